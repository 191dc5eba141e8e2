"""inspect: what is at a path, told before a recipe is written for it.

Recognizes labeled sets and pools by the names and columns they are distributed with, counts them
(against the official counts where those are known), looks at a sample of faces, audits the order of
the labels against a model, and draws captioned samples. Nothing is guessed from numbers: a folder
of classes named 0 to 6 is not recognized, since every data set counts its emotions differently.

Cost: a labeled set is read whole, as a run would; of a pool the plan and one slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from pipeline import images, metrics
from pipeline.artifacts import Teacher
from pipeline.errors import RecordError, SourceError
from pipeline.images import Crop
from pipeline.labeled.reader import LabeledData
from pipeline.labeled.records import Records, unlike_official
from pipeline.labeled.splits import parted_groups
from pipeline.recognizing import Found, recognize
from pipeline.schema import EMOTIONS, OTHER
from pipeline.sources.reader import PoolSource, plan_slices, read_slice
from pipeline.sources.rows import labeled_rows_as_read
from pipeline.storage import Location
from pipeline.survey import describe

FACES = 64  # of a sample
SIDE, CAPTION, COLUMNS = 96, 28, 8  # of the contact sheet: pixels, pixels, faces
KNOWS = 2.0
"""Times chance that a model has to agree with labels, so that it can judge their names."""


@dataclass
class Inspection:
    """What there is to say of a path.

    Attributes:
        found: how it was recognized.
        faces: how many; None where only reading all would tell.
        slices: how many a pass would have, of 1,024 faces; None for labeled sets.
        classes: faces per role and emotion ("-" for none), of labeled sets.
        rules: as readers print them.
        dropped: faces that the reader leaves out, by why.
        parted: groups that its own splits part, in lines.
        unlike: where the counts differ from the published ones; None where none are known.
        states: faces of the sample by "ok" or reason.
        sizes: width, height and count of the commonest picture sizes of the sample.
        groups: different groups in the sample.
        order: the audit, where a model was given.
        sheet: captioned samples, uint8 (H, W, 3).
    """

    found: Found
    faces: int | None = None
    slices: int | None = None
    classes: dict[str, Counter[str]] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    parted: list[str] = field(default_factory=list)
    unlike: list[str] | None = None
    states: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    groups: int = 0
    order: metrics.LabelOrder | None = None
    sheet: np.ndarray | None = None


def inspect(path: str, work: Location, model: Teacher | None = None) -> Inspection:
    """Look at a path.

    Args:
        path: file or folder, local or on S3.
        work: folder for the index that some pools need.
        model: judges the order of the labels of a labeled set.

    Raises:
        SourceError: as :func:`recognize`, or what its reader says.
    """
    found = recognize(path)
    return (_labeled if found.role == "labeled" else _pool)(found, work, model)


def said(seen: Inspection) -> list[str]:
    """The inspection in plain lines, and what to write into a recipe."""
    found = seen.found
    config = ", ".join(f"{key}: {value}" for key, value in found.config.items())
    lead = f"labeled: {{{config}}}" if found.role == "labeled" else f"pool: [{{{config}}}]"
    faces = "faces counted when they are read" if seen.faces is None else f"{seen.faces:,} faces"
    slices = "" if seen.slices is None else f" in {seen.slices:,} slices"
    lines = [f"{found.config['kind']} ({found.why}): {faces}{slices}", f"recipe: {lead}"]
    for role, counts in seen.classes.items():
        names = [name for name in (*EMOTIONS, OTHER, "-") if counts[name]]
        each = ", ".join(f"{'no label' if n == '-' else n} {counts[n]:,}" for n in names)
        lines.append(f"{role}: {counts.total():,} ({each})")
    lines += [f"rule {rule}: {counts}" for rule, counts in seen.rules.items()]
    lines += [f"left out: {n:,} ({why})" for why, n in seen.dropped.items() if n]
    lines += [f"warning: {line}" for line in seen.parted]
    if seen.unlike is not None:
        lines += seen.unlike or ["counts are the published ones"]
    states = ", ".join(f"{state} {n:,}" for state, n in seen.states.most_common())
    sizes = ", ".join(f"{width}x{height} ({n})" for width, height, n in seen.sizes)
    lines.append(f"sample of {seen.states.total():,}: {states}; {sizes}; {seen.groups} groups")
    if seen.order is not None:
        before, after = seen.order.accuracy, seen.order.accuracy_permuted
        verdict = "SUSPICIOUS, look at the names" if seen.order.suspicious else "as named"
        there = {name for counts in seen.classes.values() for name in counts if name != "-"}
        if after * len(there) < KNOWS:
            verdict = "cannot be told, the model knows too little of these faces"
        lines.append(
            f"label order: {verdict}; the model agrees with {before:.1%}, "
            f"with {after:.1%} under the best exchange of names"
        )
    return lines


def _labeled(found: Found, work: Location, model: Teacher | None) -> Inspection:
    source: Any = TypeAdapter(LabeledData).validate_python(found.config)
    if "label_policy" in type(source).model_fields:  # a run must say it; here all is counted
        source = source.model_copy(update={"label_policy": "keep"})
    records: Records = source.records(found.config["kind"])
    table = records.table
    classes: dict[str, Counter[str]] = {}
    roles, labels = table["role"].to_pylist(), table["label"].to_pylist()
    if OTHER in labels:
        found = replace(found, config={**found.config, "label_policy": "keep"})
    for role, label in zip(roles, labels, strict=True):
        classes.setdefault(role or "no split", Counter())[label or "-"] += 1
    chosen = _spread(labels, FACES)
    sample = labeled_rows_as_read(table.take(pa.array(chosen)))
    crop = Crop(box=True) if sample["box"].null_count < sample.num_rows else Crop()
    seen = Inspection(
        found,
        faces=table.num_rows,
        classes=classes,
        rules=records.rules,
        dropped=records.dropped,
        parted=parted_groups(table["group"].to_pylist(), roles),
        unlike=unlike_official(records) if records.official else None,
    )
    captions = [labels[row] or "no label" for row in chosen]
    _sample(seen, sample, crop, captions)
    if model is not None:
        seen.order = audit(records, model, crop)
    if records.photos:
        seen.found = replace(found, config={**found.config, "crop": "{box: true}"})
    return seen


def _pool(found: Found, work: Location, model: Teacher | None) -> Inspection:
    source: Any = TypeAdapter(PoolSource).validate_python(found.config)
    sources = {"pool": source}
    first, count, faces = None, 0, 0
    known = True
    for slice in plan_slices(sources, 1024, work):
        first = first or slice
        count, faces = count + 1, faces + (slice.faces or 0)
        known = known and slice.faces is not None
    assert first is not None, "a source without a face raises"
    sample = read_slice(first, sources).slice(0, FACES)
    seen = Inspection(found, faces=faces if known else None, slices=count)
    _sample(
        seen, sample, source.crop, [str(i).rpartition("/")[2] for i in sample["id"].to_pylist()]
    )
    return seen


def _sample(seen: Inspection, sample: pa.Table, crop: Crop, captions: Sequence[str]) -> None:
    faces = describe(sample, crop, "rgb", threads=2)
    seen.states = Counter(reason or "ok" for reason in faces["reason"].to_pylist())
    pairs = zip(faces["width"].to_pylist(), faces["height"].to_pylist(), strict=True)
    sizes = Counter(pair for pair in pairs if pair[0] is not None)
    seen.sizes = [(width, height, n) for (width, height), n in sizes.most_common(3)]
    seen.groups = pc.count_distinct(sample["group"]).as_py()
    said = [
        f"{caption}\n{reason}" if reason else caption
        for caption, reason in zip(captions, faces["reason"].to_pylist(), strict=True)
    ]
    seen.sheet = contact_sheet(sample, crop, said)


def audit(records: Records, model: Teacher, crop: Crop, most: int = 2000) -> metrics.LabelOrder:
    """Whether a model agrees with the labels better if their names are exchanged.

    Raises:
        SourceError: no labeled face of the model's classes decodes.
    """
    names = model.label_names
    labels = [label if label in names else None for label in records.table["label"].to_pylist()]
    chosen = [row for row in _spread(labels, most) if labels[row] is not None]
    rows = records.table.take(pa.array(chosen, pa.int64()))
    net = model.members[0].config
    pixels, codes = [], []
    for row in rows.to_pylist():
        try:
            where = {name: row[name] for name in ("box", "landmarks")}
            one = images.face(row["image"], crop=crop, color=net.color, size=net.size, **where)
        except RecordError:
            continue
        pixels.append(one)
        codes.append(names.index(row["label"]))
    if not pixels:
        raise SourceError(f"label-order audit: no labeled face of {', '.join(names)} decodes")
    said = []
    with torch.no_grad():
        for first in range(0, len(pixels), 256):
            batch = torch.from_numpy(np.stack(pixels[first : first + 256]))
            said.append(model.probs(model.represent(batch)[1]).argmax(1).numpy())
    predicted = np.concatenate(said)
    return metrics.label_order(metrics.confusion_matrix(predicted, np.array(codes), len(names)))


def contact_sheet(sample: pa.Table, crop: Crop, captions: Sequence[str]) -> np.ndarray:
    """Faces of a READ table with a caption under each, uint8 (H, W, 3); bad ones stay dark."""
    count = max(sample.num_rows, 1)
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    known = (sample[name] for name in ("image", "box", "landmarks"))
    for i, (data, box, landmarks) in enumerate(zip(*known, strict=True)):
        left, top = i % COLUMNS * SIDE, i // COLUMNS * (SIDE + CAPTION)
        try:
            encoded = data.as_py() or b""
            where = {"box": box.as_py(), "landmarks": landmarks.as_py()}
            face = images.face(encoded, crop=crop, color="rgb", size=SIDE - 4, **where)
            picture = Image.fromarray(np.ascontiguousarray(face.transpose(1, 2, 0)))
        except RecordError:
            picture = Image.new("RGB", (SIDE - 4, SIDE - 4), "dimgray")
        sheet.paste(picture, (left + 2, top + 2))
        lines = [line[-15:] for line in captions[i].split("\n")]
        pen.multiline_text((left + 3, top + SIDE), "\n".join(lines), fill="black", spacing=1)
    return np.asarray(sheet)


def save_sheet(sheet: np.ndarray, out: Path) -> None:
    """Write a contact sheet as PNG."""
    Image.fromarray(sheet).save(out, "PNG")


def _spread(labels: Sequence[str | None], most: int) -> list[int]:
    """Up to `most` rows, classes in turn, each class's rows evenly over the set."""
    order = {name: i for i, name in enumerate((*EMOTIONS, OTHER))}
    by_class: dict[str | None, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    names = sorted(by_class, key=lambda name: order.get(name or "", len(order)))
    each = max(1, most // max(len(names), 1))
    chosen: list[int] = []
    for name in names:
        rows = by_class[name]
        picked = np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)
        chosen += [rows[i] for i in picked]
    return chosen[:most]
