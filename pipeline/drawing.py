"""Pool faces for heads and finalists: a few of every pseudo-label, drawn among all usable ones.

Usable is what select would keep without thresholds and caps: twins of test and validation faces,
duplicates and faces that a person labeled are out before any head is taught. Cost: one pass over
narrow columns and one read of the embeddings; memory: a few thousand faces.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from pipeline import annotated, flow, pool, selection
from pipeline.artifacts import load_teacher
from pipeline.errors import RunError
from pipeline.job import Job
from pipeline.plan import Plan
from pipeline.policy import OperatingPoint, SelectConfig, codes_of, mask_of
from pipeline.schema import matrix
from pipeline.spaces import Drawn, HeadConfig, Space, spaces_of
from pipeline.tables import read_table
from pipeline.training import runs
from pipeline.tuning import Trial


def spaces(job: Job, plan: Plan, config: HeadConfig) -> tuple[list[Space], list[str]]:
    """Each member's space with the faces drawn, and their ids (P); score and twins are finished."""
    at = job.run.artifact("teach").dir
    teacher = load_teacher(at / runs.TEACHER)
    place, stands_for = drawn_rows(job, plan, config.class_faces)
    embedded = (t for _, t in pool.ledger(job, "embed").tables(plan, ["id", "embedding", "logits"]))
    rows = _rows_at(embedded, place)
    members, classes = len(teacher.members), len(teacher.label_names)
    drawn = Drawn(
        np.array(rows["id"].to_pylist(), dtype=object),
        matrix(rows["embedding"], teacher.width),
        matrix(rows["logits"], members * classes).reshape(-1, members, classes),
        stands_for,
    )
    found = spaces_of(
        teacher,
        read_table(at / runs.FOLDS_FILE),
        drawn,
        job.recipe.score,
        sub_prototypes=job.recipe.teach.sub_prototypes,
        seed=job.recipe.seed,
    )
    return found, drawn.ids.tolist()


def track(job: Job, number: int, points: Trial) -> None:
    """A tracked child run of a trial, one batch of metrics; the step is the number of the point.

    Names of rules and what a point does not ask for are parameters, called after the step.
    """
    first = number * len(points)
    names = {
        f"{first + place} {k}": v
        for place, found in enumerate(points)
        for k, v in found.items()
        if not isinstance(v, int | float)
    }
    with job.tracker.stage(f"search {number}", {"points": len(points), **names}) as child:
        for place, found in enumerate(points):
            numbers = {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
            child.metrics(numbers, step=first + place)


def drawn_rows(job: Job, plan: Plan, class_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (P,) in the pool, ascending, and how many faces each stands for (P,).

    Raises:
        RunError: no face is usable.
    """
    names = flow.label_names(job)
    stages = (pool.ledger(job, name) for name in ("score", "twins", "survey"))
    usable = selection.select(
        selection.Pool(plan, *stages),
        OperatingPoint(label_names=names),
        SelectConfig(policy="all", duplicates=job.recipe.select.duplicates, weights="one"),
        labeled=annotated.labeled_ids(job),
    )
    codes = (
        np.where(mask_of(rows["selected"]), codes_of(rows["label"], names), -1) for rows in usable
    )
    found = draw(codes, class_faces, job.recipe.seed)
    if not len(found[0]):
        raise RunError("search: no pool face is left for the heads; expected at least one")
    return found


def draw(pool: Iterable[np.ndarray], class_faces: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same number of faces of each class, each face with a random number of its own.

    Where the chunks end changes nothing.

    Args:
        pool: class codes (n,) of chunks of faces, -1 for what is not to be drawn.
        class_faces: most faces of one class.
        seed: of the draw.

    Returns:
        Places (P,) of the faces, ascending, and how many faces of the class each stands for (P,).
    """
    rng = np.random.default_rng(seed)
    kept = {"place": np.zeros(0, np.int64), "code": np.zeros(0, np.int64), "lot": np.zeros(0)}
    counts = np.zeros(0, np.int64)
    first = 0
    for codes in pool:
        lots, here = rng.random(len(codes)), np.flatnonzero(codes >= 0)
        own = np.bincount(codes[here], minlength=len(counts))
        own[: len(counts)] += counts
        counts = own
        more = {"place": here + first, "code": codes[here], "lot": lots[here]}
        kept = {name: np.concatenate([kept[name], more[name]]) for name in kept}
        order = np.lexsort((kept["lot"], kept["code"]))
        code = kept["code"][order]
        rank = np.arange(len(order)) - np.searchsorted(code, code)
        stay = np.sort(order[rank < class_faces])
        kept = {name: values[stay] for name, values in kept.items()}
        first += len(codes)
    size = np.bincount(kept["code"], minlength=len(counts))
    return kept["place"], (counts / np.maximum(size, 1))[kept["code"]]


def _rows_at(tables: Iterable[pa.Table], place: np.ndarray) -> pa.Table:
    """Rows at ascending places of tables that stand one behind the other."""
    parts, first = [], 0
    for table in tables:
        low, high = np.searchsorted(place, [first, first + len(table)])
        if high > low:
            parts.append(table.take(pa.array(place[low:high] - first)))
        first += len(table)
    return pa.concat_tables(parts)
