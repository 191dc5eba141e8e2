"""Guard in a run: twins of test and validation faces, by pixels, hashes and proposed embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import guard as guarding
from pipeline.artifacts import load_teacher
from pipeline.flow import handed
from pipeline.job import Job
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.pool import ledger, seal
from pipeline.progress import meter
from pipeline.run import Stage
from pipeline.schema import OK, matrix
from pipeline.similarity import Neighbors, unit
from pipeline.storage import Location
from pipeline.tables import read_table, write_table
from pipeline.training import exam, runs
from pipeline.training.handed import FACES_FILE, LABELED_FILE

Row = TypeVar("Row", bound=tuple[Any, ...])

LATER = ("guard.copies",)
"""Settings of guard that only the stage `twins` reads."""


def guard_labeled(job: Job, into: Location) -> None:
    """Mark labeled faces that are twins of a test face."""
    known = guarding.reference({"test": _test_faces(job)})
    faces = read_table(job.run.artifact("labeled").dir / FACES_FILE)
    write_table(into / LABELED_FILE, guarding.find_twins(known, faces, job.recipe.guard))


def guard_pool(job: Job, stage: Stage, plan: Plan) -> None:
    """Mark pool faces that are twins of test or validation faces, and their duplicates."""
    config, known = job.recipe.guard, reference(job)
    surveyed, into = ledger(job, "survey"), Ledger(stage.dir)
    duplicates = guarding.Duplicates(config, job.run.scratch)
    for _, faces in surveyed.tables(plan):
        duplicates.add(faces)
    groups = duplicates.groups()
    with meter("guard", plan.faces) as shown:
        for slice, faces in _open(into, plan, surveyed.tables(plan)):
            found = guarding.find_twins(known, faces, config)
            into.commit(slice, guarding.with_duplicates(found, groups))
            shown.advance(faces.num_rows)


def confirm_twins(job: Job, plan: Plan) -> None:
    """Add twins and duplicates that the teacher's embeddings propose and thumbnails confirm.

    They are the stage `twins`.
    """
    inputs = {name: job.run.artifact(name).digest for name in ("guard", "survey", "embed")}
    stage = job.open("twins", inputs, plan=plan.digest)
    if stage.done is None:
        _confirm(job, stage, plan)
        seal(stage, plan)


def _confirm(job: Job, stage: Stage, plan: Plan) -> None:
    config, known = job.recipe.guard, reference(job)
    wanted = {face: row for row, face in enumerate(known.ids)}
    rows, embedding = _reference_embeddings(job, wanted)
    index = Neighbors(embedding, [known.ids[row] for row in rows])
    into = Ledger(stage.dir)
    groups = None if config.copies is None else _duplicates(job, plan)
    for slice, first, faces, x in _open(into, plan, _side_by_side(job, plan)):
        good = np.flatnonzero(x.any(1))
        near = np.full((faces.num_rows, config.neighbors), -1, np.int64)
        if len(good):
            found, _ = index.search(x[good], config.neighbors)
            near[good, : found.shape[1]] = rows[found]
        second = guarding.find_twins_by_embedding(known, faces, near, config)
        merged = guarding.merge(first, second)
        into.commit(slice, merged if groups is None else guarding.with_duplicates(merged, groups))


def _open(into: Ledger, plan: Plan, rows: Iterator[Row]) -> Iterator[Row]:
    """Of what there is for each slice, in plan order, that of slices without a commit."""
    pending = into.pending(plan)
    wanted = next(pending, None)
    for row in rows:
        if wanted is None:
            return
        if row[0] == wanted:
            yield row
            wanted = next(pending, None)


def _duplicates(job: Job, plan: Plan) -> dict[str, str]:
    """Duplicate groups of the pool, by hashes as in guard and by embeddings."""
    found = guarding.Duplicates(job.recipe.guard, job.run.scratch)
    for _, _, faces, x in _side_by_side(job, plan):
        found.add(faces, x)
    return found.groups()


def _side_by_side(job: Job, plan: Plan) -> Iterator[tuple[Slice, pa.Table, pa.Table, np.ndarray]]:
    """Each slice's guard and survey rows and unit embeddings (N, D), zero where there is none."""
    streams = zip(
        ledger(job, "guard").tables(plan),
        ledger(job, "survey").tables(plan),
        ledger(job, "embed").tables(plan, ["status", "embedding"]),
        strict=True,
    )
    for (slice, first), (_, faces), (_, embedded) in streams:
        good, column = pc.equal(embedded["status"], OK), embedded["embedding"]
        x = np.zeros((faces.num_rows, column.type.list_size), np.float32)
        x[good.to_numpy()] = unit(matrix(column.filter(good), x.shape[1]))
        yield slice, first, faces, x


def _test_faces(job: Job) -> pa.Table:
    return read_table(job.run.artifact("test").dir / FACES_FILE)


def reference(job: Job) -> guarding.Reference:
    """Test faces and validation faces."""
    at = job.run.artifact("labeled").dir
    roles, faces = read_table(at / LABELED_FILE, ["role"]), read_table(at / FACES_FILE)
    validation = faces.filter(pc.equal(roles["role"], "validation"))
    return guarding.reference({"test": _test_faces(job), "validation": validation})


def _reference_embeddings(job: Job, wanted: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reference that decode, and their embeddings (R, D)."""
    tables = [read_table(job.run.artifact(name).dir / LABELED_FILE) for name in ("test", "labeled")]
    faces = pa.concat_tables([t.select(["id", "image", "box", "landmarks"]) for t in tables])
    faces = faces.filter(pc.is_in(faces["id"], pa.array(list(wanted))))
    teacher = load_teacher(job.run.artifact("teach").dir / runs.TEACHER)
    embedding = exam.embeddings(teacher, faces, handed(job))
    return np.array([wanted[face] for face in faces["id"].to_pylist()], np.int64), embedding
