"""Why a face was kept or not: whom it resembles, and how far it was from each threshold.

Nothing is decided here; the rules that select asked are asked again about one face.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from pipeline.artifacts import load_teacher
from pipeline.ledger import Ledger
from pipeline.plan import Slice
from pipeline.policy import RULES, OperatingPoint, rows_of
from pipeline.run import Run
from pipeline.similarity import unit
from pipeline.stages import POINT_FILE
from pipeline.training.runs import TEACHER

MEASURED = (
    "below_confidence",
    "prototype_disagrees",
    "neighbors_disagree",
    "below_class_threshold",
)
"""Rules on a score that has a threshold."""


def reasons(run: Run, slice: Slice, row: int) -> dict[str, str]:
    """What the nearest labeled faces are and how each rule judged a pool face, as lines by name.

    Args:
        run: with a finished select.
        slice: that the face is in.
        row: the face, among the slice's.

    Returns:
        `neighbor.1` and on: id, label and cosine; `rule.<name>`: passed or failed, by how much.
        Empty for a face that was not scored.
    """
    scores = Ledger(run.artifact("score").dir).read(slice.key).slice(row, 1)
    known = scores.to_pylist()[0]
    if known["pseudo_label"] is None:
        return {}
    point = OperatingPoint.load(run.artifact("select").dir / POINT_FILE)
    embedded = Ledger(run.artifact("embed").dir).read(slice.key, ["embedding"])
    vector = np.asarray(embedded["embedding"][row].as_py(), np.float32)
    return {**_neighbors(run, known["neighbor_ids"], vector), **judged(scores, point)}


def _neighbors(run: Run, ids: list[str | None], vector: np.ndarray) -> dict[str, str]:
    """Labeled faces that voted, the nearest first, with their labels and cosines."""
    teacher = load_teacher(run.artifact("teach").dir / TEACHER)
    place = {face: i for i, face in enumerate(teacher.bank_ids)}
    bank, own = teacher.bank.numpy(), unit(vector)
    said = {}
    for number, face in enumerate(ids, 1):
        at = place.get(face) if face is not None else None
        if at is None:  # fewer labeled faces than neighbors asked for, or forgotten since
            continue
        label = teacher.label_names[int(teacher.bank_labels[at])]
        said[f"neighbor.{number}"] = f"{face}  {label}  cosine {float(bank[at] @ own):.4f}"
    return said


def judged(scores: pa.Table, point: OperatingPoint) -> dict[str, str]:
    """How the rules that look at one face alone judge the single row of a score table."""
    rows, face = rows_of(scores, point.label_names), scores.to_pylist()[0]
    label, sure = face["pseudo_label"], face["confidence"]
    least: Mapping[str, float | None] = {
        "below_confidence": _for(point.confidence, label),
        "neighbors_disagree": point.neighbors,
        "below_class_threshold": _for(point.cuts, label),
    }
    said = {}
    for name, fails in RULES:
        if name not in MEASURED:
            continue
        verdict = "failed" if fails(rows, point)[0] else "passed"
        if name == "prototype_disagrees":
            where = f"nearest prototype {face['prototype_label']}, label {label}"
            near = f"ahead of the second class by {face['prototype_margin']:.4f}"
            said[f"rule.{name}"] = f"{verdict}: {where}, {near}" if point.prototype else "not asked"
            continue
        cut = least[name]
        if cut is None:
            said[f"rule.{name}"] = "not asked"
            continue
        value, what = (sure, f"confidence as {label}")
        if name == "neighbors_disagree":
            value, what = face["neighbor_agreement"], f"vote for {face['neighbor_label']}"
        numbers = f"{what} {value:.4f}, threshold {cut:.4f}, margin {value - cut:+.4f}"
        said[f"rule.{name}"] = f"{verdict}: {numbers}"
    return said


def _for(value: float | Mapping[str, float] | None, label: str) -> float | None:
    """A threshold for a class."""
    return value.get(label) if isinstance(value, Mapping) else value
