"""Proves that guard compares a run's labeled faces and pool with its test and validation faces."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from helpers import flow

from pipeline import pool, twins
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.storage import location
from pipeline.tables import read_table, write_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

PLANTED = (3, 64, 599)


@pytest.fixture
def planted(tiny_run: Path, tmp_path: Path) -> flow.LoggedJob:
    """A run whose test set has three faces of the pool and the first labeled face."""
    drop = (
        "guard",
        "twins",
        "embed",
        "score",
        "search",
        "select",
        "mine",
        "student",
        "control_a",
        "control_b",
        "evaluate",
    )
    job = flow.start(flow.tiny(flow.UNTRACKED), flow.copy(tiny_run, tmp_path / "run", drop))
    plan, surveyed = pool.pool_plan(job), pool.ledger(job, "survey")
    faces = pa.concat_tables(table for _, table in surveyed.tables(plan))
    labeled = read_table(job.run.artifact("labeled").dir / FACES_FILE)
    more = pa.concat_tables([faces.take(list(PLANTED)), labeled.slice(0, 1)])
    more = more.set_column(0, more.schema.field("id"), pa.array([f"test/{i}" for i in range(4)]))
    at = job.run.artifact("test").dir / FACES_FILE
    write_table(at, pa.concat_tables([read_table(at), more]))
    return job


def test_guard_labeled__same_pixels_are_a_twin(planted: flow.LoggedJob) -> None:
    into = planted.run.root / "there"
    twins.guard_labeled(planted, into)
    found = read_table(into / LABELED_FILE)
    labeled = read_table(planted.run.artifact("labeled").dir / FACES_FILE)
    assert found["id"].equals(labeled["id"])
    first = found.slice(0, 1).to_pylist()[0]
    assert (first["twin_of"], first["twin_kind"], first["twin_role"]) == (
        "test/3",
        "pixels",
        "test",
    )


def test_open__committed_slices_are_not_made_again(tmp_path: Path) -> None:
    slices = [Slice(f"s{i:07d}", i // 1024, "web", "m", i, i + 1, "f", 1) for i in (0, 1, 2, 1024)]
    plan, into = Plan.write(location(tmp_path) / "p.parquet", slices), Ledger(location(tmp_path))
    for slice in (slices[0], slices[2]):
        into.commit(slice, pa.table({"a": [1]}))
    rows = ((slice, "faces") for slice in slices)
    made = []
    for slice, _ in twins._open(into, plan, rows):
        into.commit(slice, pa.table({"a": [1]}))
        made.append(slice.key)
    assert made == ["s0000001", "s0001024"]
    assert list(twins._open(into, plan, iter([(slices[0], "faces")]))) == []


def test_guard_pool__planted_faces_are_found_where_they_lie(planted: flow.LoggedJob) -> None:
    plan = pool.pool_plan(planted)
    stage = planted.open("guard", {}, plan=plan.digest)
    twins.guard_pool(planted, stage, plan)
    found = pa.concat_tables(table for _, table in Ledger(stage.dir).tables(plan))
    exact = found.filter(pc.equal(found["twin_kind"], "pixels"))
    ids = found["id"].to_pylist()
    assert exact["id"].to_pylist() == [ids[row] for row in PLANTED]
    assert exact["twin_of"].to_pylist() == ["test/0", "test/1", "test/2"]
    assert set(exact["twin_role"].to_pylist()) == {"test"}


def test_confirm_twins__keeps_what_guard_found(tiny_run: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    plan = pool.pool_plan(job)
    first, second = (
        pa.concat_tables(table for _, table in pool.ledger(job, stage).tables(plan))
        for stage in ("guard", "twins")
    )
    assert second["id"].equals(first["id"])
    assert second["duplicate_group"].equals(first["duplicate_group"])
    known = pc.is_valid(first["twin_of"])
    assert pc.all(pc.is_valid(second["twin_of"].filter(known))).as_py() in (True, None)


def test_confirm_twins__duplicates_by_embedding_need_thumbnails_that_agree(
    tiny_run: Path, tmp_path: Path
) -> None:
    drop = ("twins", "select", "mine", "student", "control_a", "control_b", "evaluate")
    root = flow.copy(tiny_run, tmp_path / "run", drop)
    job = flow.start(flow.tiny(flow.UNTRACKED, "guard.copies=0.5"), root)
    plan = pool.pool_plan(job)
    twins.confirm_twins(job, plan)
    first, second = (
        pa.concat_tables(table for _, table in pool.ledger(job, stage).tables(plan))
        for stage in ("guard", "twins")
    )
    before, after = (t["duplicate_group"].to_pylist() for t in (first, second))
    assert [b for b, a in zip(before, after, strict=True) if b is not None and a is None] == []
    # Nearly all drawn faces lie within a cosine of 0.5; thumbnails tell them apart.
    assert sum(a is not None for a in after) < len(after) / 10
