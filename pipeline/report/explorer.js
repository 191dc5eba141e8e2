"use strict";
// The threshold explorer. Reads the page's own numbers, writes text and pictures, loads nothing.
(() => {
  const box = document.getElementById("explorer");
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const slider = box.querySelector("input");
  const said = box.querySelector("output");
  const rows = [...box.querySelectorAll("tbody tr")];
  const line = document.getElementById("cut-line");
  const shown = 8;

  const count = (n) => n.toLocaleString("en-US");
  const percent = (v) => (v === null ? "\u2013" : (100 * v).toFixed(1) + "\u00a0%");

  function face(sample) {
    const item = document.createElement("li");
    const image = document.createElement("img");
    // Cut, not rounded: a face below the threshold must not read as if it reached it.
    const sure = Math.floor(sample.confidence * 100 + 1e-6) / 100;
    const words = `${sample.label} ${sure.toFixed(2)}`;
    image.src = sample.image;
    image.alt = `${data.face}, ${words}`;
    image.title = sample.id;
    const caption = document.createElement("span");
    caption.className = "caption";
    caption.textContent = words;
    item.append(image, caption);
    return item;
  }

  function show() {
    const level = data.levels[slider.valueAsNumber];
    const { threshold, kept, share, purity, known, estimated, labeled } = level;
    const parts = [
      `At ${threshold.toFixed(2)}: ${count(kept)} faces kept, ${percent(share)} of the pool`,
    ];
    if (estimated !== null) {
      parts.push(`estimated purity ${percent(estimated)} (${count(labeled)} labeled faces)`);
    }
    if (known) parts.push(`known purity ${percent(purity)} (${count(known)} faces)`);
    said.textContent = parts.join("; ") + ".";
    slider.setAttribute("aria-valuetext", `confidence at least ${threshold.toFixed(2)}`);
    rows.forEach((row, i) => {
      const [n, right] = level.classes[i];
      row.cells[1].textContent = count(n);
      row.cells[2].textContent = percent(right);
      row.cells[3].firstElementChild.style.width = `${kept ? (100 * n) / kept : 0}%`;
    });
    if (line) {
      const { left, right } = line.dataset;
      const x = Number(left) + threshold * (Number(right) - Number(left));
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    let first = data.faces.findIndex((sample) => sample.confidence >= threshold);
    if (first < 0) first = data.faces.length;
    const groups = {
      "just-kept": data.faces.slice(first, first + shown),
      "just-not": data.faces.slice(Math.max(0, first - shown), first).reverse(),
    };
    for (const [id, samples] of Object.entries(groups)) {
      const list = document.getElementById(id);
      list.replaceChildren(...samples.map(face));
      list.previousElementSibling.hidden = !samples.length;
    }
  }

  slider.addEventListener("input", show);
  box.hidden = false;
  document.getElementById("levels").hidden = true;
  show();
})();
