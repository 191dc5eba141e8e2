"""Accuracy on parts of the test faces: by image quality, and by what annotators saw in a face.

The labels are those that evaluate wrote beside the predictions; the test table itself is asked for
attributes alone. A difference is tested exactly, by the faces on which one model is right and the
other is not, and corrected for the number of subgroups that were looked at.

Source: :func:`pipeline.metrics.paired_chance`; Holm's correction, :func:`pipeline.metrics.holm`.
Cost: three bootstraps a subgroup, about a second for 3,000 faces in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.report.facts import Subgroup
from pipeline.run import PREDICTIONS_FILE, Artifact
from pipeline.schema import PERCEIVED
from pipeline.tables import read_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

QUALITY = ("brightness", "contrast", "sharpness", "side")
"""Columns that are cut into thirds; `side` is the shorter one, in pixels."""
THIRDS = ("lowest third", "middle third", "highest third")
LEAST = 20
"""Faces of a subgroup; of fewer nothing is said."""


def subgroups(evaluate: Artifact, test: Artifact, control: str) -> tuple[Subgroup, ...]:
    """Student and control on each subgroup of the judged test faces; empty without predictions.

    Args:
        evaluate: finished.
        test: the stage that holds the test faces.
        control: name of the control that the student is compared with.
    """
    at = evaluate.dir / PREDICTIONS_FILE
    if not at.exists() or not (test.dir / FACES_FILE).exists():
        return ()
    said = read_table(at)
    return compare(said, _attributes(test, said["id"]), control)


def compare(said: pa.Table, attributes: pa.Table, control: str) -> tuple[Subgroup, ...]:
    """As :func:`subgroups`, from tables.

    Args:
        said: label and, per model, the class it names; N rows.
        attributes: some of :data:`QUALITY` and :data:`PERCEIVED` of the same rows.
        control: column of the control.
    """
    student, other = (
        np.asarray(pc.equal(said[name], said["label"])).astype(np.float64)
        for name in ("student", control)
    )
    parts = [(trait, group, rows) for trait, group, rows in _parts(attributes)]
    chances = metrics.holm(
        [metrics.paired_chance(student[rows], other[rows]) for _, _, rows in parts]
    )
    return tuple(
        Subgroup(
            trait=trait,
            group=group,
            n=int(rows.sum()),
            control=_mean(other[rows]),
            student=_mean(student[rows]),
            change=metrics.paired_difference(student[rows], other[rows]),
            p=chance,
        )
        for (trait, group, rows), chance in zip(parts, chances, strict=True)
    )


def _attributes(test: Artifact, ids: pa.ChunkedArray) -> pa.Table:
    faces = read_table(test.dir / FACES_FILE, ["id", *QUALITY[:-1], "width", "height"])
    people = read_table(test.dir / LABELED_FILE, ["id", *PERCEIVED])
    faces = faces.take(pc.index_in(ids, faces["id"].combine_chunks()))
    people = people.take(pc.index_in(ids, people["id"].combine_chunks()))
    side = pc.min_element_wise(faces["width"], faces["height"])
    columns = {name: faces[name] for name in QUALITY[:-1]} | {"side": side}
    return pa.table(columns | {name: people[name] for name in PERCEIVED})


def _parts(attributes: pa.Table) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Trait, group and its rows (N,); groups of fewer than LEAST faces are left out."""
    for trait in (name for name in QUALITY if name in attributes.column_names):
        values = attributes[trait].to_numpy().astype(np.float64)
        edges = np.nanquantile(values, (1 / 3, 2 / 3))
        third = np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="left"))
        if len(np.unique(third[third >= 0])) < len(THIRDS):  # one value is that of most faces
            continue
        spans = (f"up to {edges[0]:.4g}", f"to {edges[1]:.4g}", f"above {edges[1]:.4g}")
        for number, (name, span) in enumerate(zip(THIRDS, spans, strict=True)):
            if (rows := third == number).sum() >= LEAST:
                yield trait, f"{name}, {span}", rows
    for trait in (name for name in PERCEIVED if name in attributes.column_names):
        column = attributes[trait]
        for group in sorted(set(column.to_pylist()) - {None}):
            rows = np.asarray(pc.fill_null(pc.equal(column, group), False))
            if rows.sum() >= LEAST:
                yield trait, group, rows


def _mean(right: NDArray[np.float64]) -> metrics.Interval:
    return metrics.bootstrap(lambda weights: weights @ right / len(right), len(right))
