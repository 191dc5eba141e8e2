"""Why a face was kept or not: whom it resembles, and how far it was from each threshold.

Nothing is decided here; the rules that select asked are asked again about one face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import load_teacher
from pipeline.errors import SourceError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.policy import RULES, OperatingPoint, rows_of
from pipeline.pool import plan_at
from pipeline.rounds import HOME, rounds
from pipeline.run import IDENTITY, POINT_FILE, Run
from pipeline.similarity import unit
from pipeline.storage import location
from pipeline.training.runs import TEACHER

EXPLAINED = ("survey", "twins", "score", "select")
"""Stages whose row of a face is shown."""
DULL = ("thumbnail", "sha256", "pixel_sha256", "phash", "phash_flip")
"""Columns that say nothing to a person."""
MEASURED = (
    "below_confidence",
    "prototype_disagrees",
    "neighbors_disagree",
    "below_class_threshold",
)
"""Rules on a score that has a threshold."""


def explain(run_dir: str, sample_id: str) -> dict[str, Any]:
    """Everything the run knows of one pool face, in the order it was found out.

    Args:
        run_dir: the run folder.
        sample_id: the face's id, or the beginning of it that no other face shares.

    Raises:
        SourceError: the run does not know the face, or knows several that begin so.
    """
    run = Run(location(run_dir))
    survey = run.artifact("survey").dir
    plan = Plan(plan_at(survey))
    slice, row = find(Ledger(survey), plan, sample_id)
    found: dict[str, Any] = {"source": slice.source, "shard": slice.shard}
    found |= _answered(run, slice, row)
    point = (run.artifact("select").dir / POINT_FILE).read_json()
    clusters = point.get("clusters")
    for stage in (*EXPLAINED, *(() if clusters is None else ("clusters",))):
        table = Ledger(run.artifact(stage).dir).read(slice.key)
        facts = table.slice(row, 1).to_pylist()[0]
        shown = {k: v for k, v in facts.items() if k not in DULL and v is not None}
        found |= {f"{stage}.{name}": value for name, value in shown.items()}
    label = found.get("score.pseudo_label")
    found["threshold.class_cut"] = (point.get("cuts") or {}).get(label)
    found["threshold.confidence"] = point.get("confidence")
    if (cluster := found.get("clusters.cluster")) is not None:
        found["threshold.cluster_label"] = clusters[cluster]  # None: not pure enough
    found |= reasons(run, slice, row)
    decided = (run.artifact("select").dir / IDENTITY).read_json()["inputs"]["score"]
    if decided != run.artifact("score").digest:
        found["note"] = "selected before the faces were scored again; run the recipe again"
    return found


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


def find(surveyed: Ledger, plan: Plan, sample_id: str) -> tuple[Slice, int]:
    """Where a face is: the one of this id, else the only one whose id begins so."""
    begin: list[tuple[str, Slice, int]] = []
    for slice, faces in surveyed.tables(plan, ["id"]):
        row = pc.index(faces["id"], sample_id).as_py()
        if row >= 0:
            return slice, row
        alike = pc.starts_with(faces["id"], pattern=sample_id).to_numpy().nonzero()[0].tolist()
        begin += [(faces["id"][at].as_py(), slice, at) for at in alike[: 3 - len(begin)]]
    if not begin or not sample_id:
        raise SourceError(f"{surveyed.at}: no pool face {sample_id!r}")
    if len(begin) > 1:
        some = ", ".join(repr(face) for face, _, _ in begin)
        raise SourceError(f"{surveyed.at}: several pool faces begin with {sample_id!r}: {some}")
    return begin[0][1:]


def _answered(run: Run, slice: Slice, row: int) -> dict[str, Any]:
    """The label that a person gave a face, in which round, and who."""
    face = Ledger(run.artifact("survey").dir).read(slice.key, ["id"])["id"][row].as_py()
    for one in reversed(rounds(run.root / HOME)):
        answers = one.answers()
        if answers is not None and (at := pc.index(answers["id"], face).as_py()) >= 0:
            given = answers.slice(at, 1).select(["label", "by", "when"]).to_pylist()[0]
            given["label"] = given["label"] or "skipped"
            said = {key: value for key, value in given.items() if value is not None}
            return {f"annotated.{k}": v for k, v in {"round": one.name, **said}.items()}
    return {}
