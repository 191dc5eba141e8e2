"""From every model of a run back to the very faces, teacher and thresholds that made it."""

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest
from helpers import flow
from helpers.tiny import tiny_model

from pipeline import pool
from pipeline.artifacts import save_model
from pipeline.errors import ModelError
from pipeline.lineage import LEARNED, lineage, rules, said, write_faces
from pipeline.run import code_version
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training.handed import labeled_rows


@pytest.fixture(scope="module")
def job(tiny_run: Path) -> flow.LoggedJob:
    return flow.start(flow.tiny(flow.UNTRACKED), tiny_run)


def learned(tiny_run: Path, stage: str, tmp_path: Path):
    found = lineage(location(tiny_run / stage))
    count = write_faces(found, location(tmp_path / "faces.parquet"))
    table = read_table(location(tmp_path / "faces.parquet"))
    assert table.num_rows == count
    assert table.schema.names == LEARNED.names
    return found, table


def ids(table, **wanted: str) -> list[str]:
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return sorted(table["id"].to_pylist())


def trained(job: flow.LoggedJob) -> list[str]:
    """What training really opens, read another way."""
    from pipeline.flow import handed

    return sorted(labeled_rows(handed(job), ("train",))["id"].to_pylist())


def mined(job: flow.LoggedJob) -> list[str]:
    tables = pool.ledger(job, "mine").tables(pool.pool_plan(job), ["id"])
    return sorted(face for _, table in tables for face in table["id"].to_pylist())


def test_lineage__a_student_saw_the_labeled_and_the_mined_faces(job, tiny_run, tmp_path) -> None:
    found, table = learned(tiny_run, "student", tmp_path)
    assert ids(table, role="labeled", stage="student") == trained(job)
    assert ids(table, role="mined", stage="mine") == mined(job)
    assert table.num_rows == len(trained(job)) + len(mined(job))
    assert found.facts["teacher"] == job.run.artifact("teach").digest
    assert found.facts["operating point"]["digest"] == job.run.artifact("select").facts["rule"]
    assert found.facts["code"] == code_version()
    assert found.facts["weights"] == {"model": job.run.artifact("student").digest}
    assert found.facts["recipe"].startswith("demo (recipe-0001.json")
    assert found.missing == []


@pytest.mark.parametrize("stage", ["teach", "control_a", "control_b"])
def test_lineage__teacher_and_controls_saw_labeled_faces_only(
    job, tiny_run, tmp_path, stage
) -> None:
    found, table = learned(tiny_run, stage, tmp_path)
    assert ids(table) == ids(table, role="labeled", stage=stage) == trained(job)
    assert "operating point" not in found.facts
    assert found.missing == []


def test_lineage__a_tuned_teacher_saw_what_its_distilled_set_is_made_of(
    job, tiny_run, tmp_path
) -> None:
    found, table = learned(tiny_run, "tuned", tmp_path)
    assert ids(table, stage="teach") == ids(table, stage="distill") == trained(job)
    assert ids(table, role="mined") == mined(job)
    assert found.facts["distilled set"]["digest"] == job.run.artifact("distill").digest
    own, distilled = learned(tiny_run, "distill", tmp_path)
    assert own.facts["stage"] == "distill"
    assert sorted(distilled["id"].to_pylist()) == sorted(trained(job) + mined(job))


def test_lineage__bytes_and_places_are_those_that_were_surveyed(job, tiny_run, tmp_path) -> None:
    _, table = learned(tiny_run, "student", tmp_path)
    known = {}
    for _, faces in pool.ledger(job, "survey").tables(pool.pool_plan(job), ["id", "sha256"]):
        known |= dict(zip(faces["id"].to_pylist(), faces["sha256"].to_pylist(), strict=True))
    rows = table.filter(pc.equal(table["role"], "mined")).to_pylist()
    assert all(row["sha256"] == known[row["id"]] for row in rows)
    assert all(row["sha256"] is not None for row in table.to_pylist())
    names = {row["source"] for row in table.to_pylist()}
    assert names == {"synthetic", *job.sources}


def test_lineage__what_the_run_no_longer_holds_is_said(tiny_run, tmp_path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run", without=("teach",))
    found = lineage(location(root))
    assert any("no teacher of the run" in line for line in found.missing)
    assert any(line.startswith("not found: teacher") for line in said(found))
    shutil.rmtree(root / "mine")
    assert (
        "mined set: no generation of the run has that digest any more"
        in lineage(location(root)).missing
    )


def test_lineage__a_folder_that_was_carried_off_knows_nothing(tmp_path) -> None:
    save_model(tiny_model(), location(tmp_path), {})
    with pytest.raises(ModelError, match="lies in no run folder"):
        lineage(location(tmp_path))


def test_rules__a_cut_above_one_keeps_none() -> None:
    found = rules({"confidence": 0.5, "cuts": {"fear": 2.0, "anger": 0.25}})
    assert found["cuts"] == {"fear": "keeps none", "anger": 0.25}
    assert (found["confidence"], found["neighbors"]) == (0.5, None)
