"""The page is one file that loads nothing, keeps hostile text as text and holds no blurred face."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.report.facts import (
    Copies,
    Explorer,
    Face,
    Gain,
    Gallery,
    ModelRow,
    Noise,
    ReportFacts,
)
from pipeline.report.figures import Curve, learning_curves, standalone, trial_dots
from pipeline.report.page import (
    REASON_TEXT,
    audit,
    best_control,
    duration,
    plain,
    render,
    verdict,
    write_report,
)
from pipeline.schema import REASONS
from pipeline.storage import location
from report.invented import NAMES, explorer, facts, noise, picture, subgroups

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text; complains about tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def _images(page: Page) -> list[Image.Image]:
    sources = [str(attrs["src"]) for attrs in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def test_render__every_section_once_and_linked() -> None:
    page = Page(render(facts()))
    sections = [attrs["id"] for attrs in page.all("section")]
    links = [str(attrs["href"])[1:] for attrs in page.all("a")]
    assert len(sections) == len(set(sections)) == 16
    assert [link for link in links if link != "main"] == sections


def test_render__minimal_facts_leave_sections_out() -> None:
    page = Page(render(ReportFacts("r", "omnifer run r.yaml", "2026-01-01", "0.1.0")))
    assert [attrs["id"] for attrs in page.all("section")] == ["again"]


@pytest.mark.parametrize("name", [f.name for f in fields(ReportFacts) if f.name not in
                                  ("recipe", "command", "made", "version")])  # fmt: skip
def test_render__any_field_may_be_missing(name: str) -> None:
    default = getattr(ReportFacts("", "", "", ""), name)
    keep = {"confusion": {}} if name == "label_names" else {}
    Page(render(facts(**{name: default}, **keep)))


def _policy(page: Page) -> dict[str, str]:
    (content,) = (
        str(attrs["content"])
        for attrs in page.all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    pairs = (part.strip().partition(" ") for part in content.split(";"))
    return {name: value for name, _, value in pairs}


def _scripts(text: str) -> tuple[str, str]:
    """The data and the script of the explorer; nothing else is in a script element."""
    found = re.findall(r"<script([^>]*)>(.*?)</script", text, flags=re.S)
    assert [attrs for attrs, _ in found] == [' type="application/json" id="explorer-data"', ""]
    return found[0][1], found[1][1]


def test_render__loads_nothing_and_runs_one_script_by_its_hash() -> None:
    text = render(facts())
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"link", "iframe", "object", "form", "base"})
    assert all(str(a["src"]).startswith("data:image/") for a in page.all("img"))
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))
    assert not re.search(r"url\(|@import|https?://", text)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    _, script = _scripts(text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert _policy(page) == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_render__without_thresholds_there_is_no_script() -> None:
    page = Page(render(facts(explorer=None)))
    assert page.all("script") == []
    assert "script-src" not in _policy(page)


def test_explorer__without_script_the_table_stands_and_the_slider_is_hidden() -> None:
    page = Page(render(facts()))
    (explorer,) = (attrs for attrs in page.all("div") if attrs.get("id") == "explorer")
    (levels,) = (attrs for attrs in page.all("div") if attrs.get("id") == "levels")
    assert "hidden" in explorer
    assert "hidden" not in levels


def test_explorer__its_slider_has_a_label_and_speaks() -> None:
    page = Page(render(facts()))
    (slider,), (label,), (output,) = (page.all(tag) for tag in ("input", "label", "output"))
    assert slider["type"] == "range"
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "100", "62")
    assert label["for"] == output["for"] == slider["id"]
    assert output["aria-live"] == "polite"


def test_explorer__data_says_what_the_levels_say_and_holds_blurred_faces() -> None:
    data = json.loads(_scripts(render(facts()))[0])
    assert len(data["levels"]) == 101
    level = data["levels"][90]
    assert level["threshold"] == 0.9
    assert level["kept"] == int(20_000 * 0.1**0.5)
    assert level["estimated"] == pytest.approx(0.6 + 0.39 * 0.9)
    assert sum(n for n, _ in level["classes"]) == level["kept"]
    assert data["levels"][100]["estimated"] is None
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(face["image"].partition(",")[2]))).size
        for face in data["faces"]
    }
    assert sizes == {(8, 8)}


def test_render__hostile_names_stay_text() -> None:
    evil = "<script>alert(1)</script><!--\"' onload=x \u2028&amp;]]>"
    names = (evil, *NAMES[1:])
    rows = tuple(
        ModelRow(key, 0.5, (0.4, 0.6), recall=dict.fromkeys(names, 0.5))
        for key in (evil, "control_a", "student")
    )
    odd = Face(evil, 0.5, picture(1), evil)
    text = render(
        facts(
            recipe=evil,
            command=evil,
            run=evil,
            label_names=names,
            models=rows,
            protocol={evil: evil},
            galleries=(Gallery(evil, "selected", 1, (odd,)),),
            reasons={evil: 1},
            guard={evil: {evil: 1}},
            quarantine={evil: 1},
            operating_point={evil: {evil: [evil]}},
            trials=({evil: evil, "trial": evil, "purity": 0.5, "utilization": 0.5},) * 2,
            lineage={evil: evil},
            seconds={evil: 1.0},
            pool={evil: 1},
            explorer=Explorer(names, explorer(1).levels, 0.5, (odd,)),
            noise=Noise(names, 9, 0.5, noise(0).counts, (odd,)),
            copies=Copies(9, 1, 1, 1, 1, (odd,), {evil: {evil: 1}}),
            subgroups=(replace(subgroups()[0], trait=evil, group=evil),),
        )
    )
    page = Page(text)
    data, script = _scripts(text)  # two script elements, neither closed by a name
    assert not set("<>&") & set(data)
    assert json.loads(data)["faces"][0]["id"] == evil
    assert script == (Path(render.__code__.co_filename).parent / "explorer.js").read_text()
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert evil in "".join(page.text)


def test_render__blurred_page_holds_64_numbers_per_face() -> None:
    page = Page(render(facts(distilled_grid=None)))
    images = _images(page)
    assert len(images) == 16 * 3 + 6 + 4
    assert {image.size for image in images} == {(8, 8)}
    assert {image.mode for image in images} == {"L"}


def test_render__blur_is_the_mean_of_blocks() -> None:
    pixels = np.kron(np.arange(64, dtype=np.uint8).reshape(8, 8), np.ones((6, 6), np.uint8))
    pixels[0, 0] = 36  # one of 36 pixels: the block's mean becomes 1
    gallery = Gallery("fear", "selected", 1, (Face("a#1", None, pixels),))
    page = Page(render(facts(galleries=(gallery,), distilled_grid=None, noise=None, copies=None)))
    wanted = np.arange(64).reshape(8, 8)
    wanted[0, 0] = 1
    np.testing.assert_array_equal(np.asarray(_images(page)[0]), wanted)


def test_render__distilled_grid_is_blurred_like_a_face() -> None:
    page = Page(render(facts(galleries=(), noise=None, copies=None)))
    assert [image.size for image in _images(page)] == [(80, 56)]  # 10 x 7 images of 48 pixels


def test_render__shown_faces_are_asked_for_and_encoded_anew() -> None:
    gallery = Gallery("fear", "selected", 1, (Face("a#1", 0.5, picture(3, 200)),))
    values = {"galleries": (gallery,), "distilled_grid": None, "noise": None, "copies": None}
    page = Page(render(facts(show_faces=True, **values)))
    assert [image.size for image in _images(page)] == [(72, 72)]
    assert "--show-faces was given" in " ".join(page.text)


def test_render__every_picture_and_figure_has_words() -> None:
    page = Page(render(facts()))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    figures = page.all("svg")
    assert len(figures) == 10
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in figures)
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def _contrast(first: str, second: str) -> float:
    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_style__text_is_readable_in_light_and_dark(theme: int) -> None:
    css = (Path(render.__code__.co_filename).parent / "style.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, flags=re.S)[theme]
    color = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    heat = float(re.findall(r"--heat: ([\d.]+)%", block)[0])
    for name in ("ink", "muted", "accent", "warm"):
        assert _contrast(color[name], color["paper"]) > 4.5, name
    assert _contrast(color["ink"], color["warm-soft"]) > 4.5
    accent, paper = (
        np.array([int(color[n][i : i + 2], 16) for i in (1, 3, 5)]) for n in ("accent", "paper")
    )
    mixed = np.round(heat * accent + (1 - heat) * paper).astype(int)  # a cell of 100 %
    assert _contrast(color["ink"], "#" + "".join(f"{c:02x}" for c in mixed)) > 4.5


def test_render__a_full_page_is_small() -> None:
    many = tuple(
        Gallery(name, reason, 99, tuple(Face(f"x#{i}", 0.5, picture(i, 72)) for i in range(12)))
        for reason in ("selected", *list(REASON_TEXT)[1:8])
        for name in NAMES
    )
    more = {"galleries": many, "explorer": explorer(400), "noise": noise(48)}
    assert len(render(facts(**more)).encode()) < 1_000_000
    assert len(render(facts(**more, show_faces=True)).encode()) < 5_000_000


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Gain(0.02, 0.01, 0.03, "control_b"), "is 2.0 points better"),
        (Gain(0.02, 0.01, 0.03, "control_b"), "From one training seed this is a hint"),
        (Gain(0.006, 0.001, 0.01, "control_b", seeds=3), "under a point"),
        (Gain(-0.02, -0.03, -0.01, "control_a"), "is 2.0 points worse"),
        (Gain(0.02, -0.01, 0.05, "control_b"), "No difference"),
        (None, "No comparison"),
    ],
)
def test_verdict__says_no_more_than_the_interval(gain: Gain | None, words: str) -> None:
    assert words in verdict(facts(gain=gain))


def test_verdict__a_finding_carries_no_caution() -> None:
    said = verdict(facts(gain=Gain(0.02, 0.01, 0.03, "control_b", seeds=3, real=True)))
    assert said.endswith("95 % interval +1.0 to +3.0.")


def test_best_control__is_the_more_accurate_one() -> None:
    rows = (ModelRow("teacher", 0.9), ModelRow("control_a", 0.7), ModelRow("control_b", 0.6))
    found = best_control(rows)
    assert found is not None
    assert found.key == "control_a"
    assert best_control(rows[:1]) is None


def test_audit__swapped_names_are_named() -> None:
    matrix = np.diag([50, 40, 30])[[1, 0, 2]]  # truth 0 is called 1 and the other way round
    found = audit(matrix, ("anger", "disgust", "fear"))
    assert found["suspicious"]
    assert set(found["moved"]) == {("anger", "disgust"), ("disgust", "anger")}
    text = render(facts(confusion={"student": matrix}, label_names=("anger", "disgust", "fear")))
    assert "Class names may be swapped" in text


def test_reason_text__covers_what_select_writes() -> None:
    selection = REASONS[REASONS.index("quarantined") :]
    assert set(REASON_TEXT) == set(selection)


def test_learning_curves__stand_alone_with_a_dot_per_point() -> None:
    labels, accuracy = (0.0, 50.0, 200.0), (0.4, 0.5, 0.52)
    curve = Curve("accuracy", tuple(zip(labels, accuracy, strict=True)))
    root = ElementTree.fromstring(standalone(learning_curves([curve])))
    circles = [one for one in root if one.tag.endswith("circle")]
    x, y = ([float(one.attrib[name]) for one in circles] for name in ("cx", "cy"))
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(50 / 200, abs=1e-3)
    assert y[0] > y[1] > y[2]  # better is higher
    assert (y[1] - y[2]) / (y[0] - y[1]) == pytest.approx(0.02 / 0.1, abs=1e-2)
    first = Curve("accuracy", curve.points[:1])
    (alone,) = [
        one
        for one in ElementTree.fromstring(standalone(learning_curves([first])))
        if one.tag.endswith("circle")
    ]
    assert float(alone.attrib["cx"]) == x[0]


def test_trial_dots__place_trials_and_mark_the_front() -> None:
    trials = [
        {"trial": i, "utilization": u, "purity": p, "pareto": front}
        for i, (u, p, front) in enumerate(((0.2, 0.9, True), (0.3, 0.8, False), (0.4, 0.85, True)))
    ]
    root = ElementTree.fromstring(str(trial_dots(trials)))
    dots = {
        one[0].text.partition(":")[0]: one for one in root if one.tag == "circle" and one[0].text
    }
    x, y = ([float(dots[f"trial {i}"].attrib[name]) for i in range(3)] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(0.5, abs=0.01)  # less pure is lower
    assert y[1] > y[0]
    assert [dots[f"trial {i}"].attrib["class"] for i in range(3)] == [
        "dot student", "dot other", "dot student"
    ]  # fmt: skip
    assert "2 on the Pareto front" in root.attrib["aria-label"]
    without = [{k: v for k, v in trial.items() if k != "pareto"} for trial in trials]
    assert "Pareto" not in trial_dots(without)


def test_render__trials_without_purity_have_no_figure() -> None:
    text = render(facts(trials=({"trial": 0, "confidence": 0.5},) * 3))
    assert "A dot is a trial" not in text


def test_render__a_change_is_a_finding_by_its_corrected_p() -> None:
    rows = subgroups()
    text = render(facts(subgroups=rows))
    assert "for all 6 parts" in text
    section = text[text.index('id="subgroups"') : text.index('id="noise"')]
    assert section.count('<tr class="first">') == sum(row.p <= 0.05 for row in rows) == 2


def test_render__a_share_of_the_mined_faces_is_a_row() -> None:
    text = render(facts())
    section = text[text.index('id="pool"') : text.index('id="yield"')]
    rows = re.findall(r'<td class="n">([\d,]+)</td><td class="n">(\d+)&nbsp;%', section)
    assert rows == [("0", "0"), ("14,946", "100")]

    models = (*facts().models, ModelRow("student_share", 0.735, (0.72, 0.75), mean_class=0.59))
    protocol = {**facts().protocol, "mined_share": 0.1}
    text = render(facts(models=models, protocol=protocol))
    section = text[text.index('id="pool"') : text.index('id="yield"')]
    rows = re.findall(r'<td class="n">([\d,]+)</td><td class="n">(\d+)&nbsp;%', section)
    assert rows == [("0", "0"), ("1,495", "10"), ("14,946", "100")]
    (said,) = re.findall(r'aria-label="(Accuracy on[^"]+)"', section)
    assert said.endswith("0 % of mined 73.2%; 10 % of mined 73.5%; 100 % of mined 74.9%")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")],
)
def test_duration__fits_the_size(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (0.123456, "0.1235"), ({"a": 1, "b": [2.5, 3]}, "a 1, b 2.5, 3"), (7, "7")],
)
def test_plain__any_value_is_short_text(value: object, text: str) -> None:
    assert plain(value) == text


def test_write_report__writes_the_file(tmp_path: Path) -> None:
    at = location(tmp_path) / "report.html"
    write_report(at, facts())
    assert at.read_text().startswith("<!doctype html>")
