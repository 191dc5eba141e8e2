"""Proves how finalists are halved and chosen, and that their trainings go on after a kill."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow

from pipeline import pool, querying, stages
from pipeline.errors import SourceError
from pipeline.finalists import best_half, verdict
from pipeline.ledger import Ledger
from pipeline.tables import read_table
from pipeline.training.finalist import Outcome

FINAL = (
    "search={trials: 3, batch: 2, target_purity: 0.3, min_utilization: 0.1, "
    "head: {class_faces: 15}, finalists: {count: 3, steps: 4}}"
)


def outcome(right: int, held: int = 0, passes: float = 1.0) -> Outcome:
    return Outcome(right=right, judged=10, right_held=held, judged_held=20, passes=passes)


def test_best_half__the_odd_one_stays_and_of_equals_the_first() -> None:
    found = {(f, 0): outcome(right) for f, right in enumerate((3, 5, 4, 5, 1))}
    assert best_half([0, 1, 2, 3, 4], found) == [1, 2, 3]
    assert best_half([1, 3], found) == [1]
    assert best_half([4], found) == [4]


def test_verdict__only_who_stood_to_the_end_wins_and_the_labels_alone_never_do() -> None:
    found = {(0, 0): outcome(9), (1, 0): outcome(6), (2, 0): outcome(6), (3, 0): outcome(10)}
    found |= {(1, 1): outcome(5, 9), (2, 1): outcome(5, 2), (3, 1): outcome(10, 16)}
    said = verdict([1, 2], 3, found)
    assert said.best == 1
    assert said.accuracy == pytest.approx([0.9, 0.55, 0.55])
    assert said.estimates["student_accuracy_in_search"] == pytest.approx(0.55)
    assert said.estimates["student_accuracy"] == pytest.approx(9 / 40)
    assert said.estimates["student_accuracy_labels_only"] == pytest.approx(16 / 40)
    assert said.estimates["student_winners_curse"] == pytest.approx(0.55 - 9 / 40)
    assert said.estimates["passes"] == len(found)


def test_faces_of__are_the_faces_asked_for_with_their_own_bytes(
    tiny_run: Path, tmp_path: Path
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run", without=["evaluate"])
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    plan = pool.pool_plan(job)
    survey = pa.concat_tables(t for _, t in pool.ledger(job, "survey").tables(plan, ["id"]))
    mined = Ledger(job.run.artifact("mine").dir)
    bytes_of = {
        row["id"]: row["image"]
        for _, table in mined.tables(plan, ["id", "image"])
        for row in table.to_pylist()
    }
    one = survey["id"].to_pylist().index(next(iter(bytes_of)))
    place = np.unique([0, 1, 70, one, 400, len(survey) - 1])
    ids = survey["id"].take(pa.array(place)).to_pylist()
    found = querying.faces_of(job, ids[::-1])
    assert found["id"].to_pylist() == ids
    assert set(found["source"].to_pylist()) == set(job.views)
    both = [row for row in found.to_pylist() if row["id"] in bytes_of]
    assert both
    assert all(row["image"] == bytes_of[row["id"]] for row in both)
    job.sources[next(iter(job.sources))].__dict__["draw_seed"] = 99  # the pool shows other faces
    with pytest.raises(SourceError):
        querying.faces_of(job, ids)


@pytest.mark.cluster
@pytest.mark.usefixtures("local_ray")
def test_finalists__choose_the_point_and_go_on_after_a_kill(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")

    def searched() -> dict:
        job = flow.start(flow.tiny(flow.UNTRACKED, FINAL), root, fresh=True)
        stages.search(job)
        return (job.run.artifact("search").dir / stages.POINT_FILE).read_json()

    first = searched()
    trained = [trial for trial in first["trials"] if "student_accuracy" in trial]
    assert len(trained) == 3
    told, members = first["estimates"], 2
    best = [t for t in trained if t["student_accuracy"] == told["student_accuracy_in_search"]]
    assert best[0]["confidence"] == first["confidence"]
    home = max(root.glob("search/g*"))
    kept = sorted((home / stages.FINALISTS).iterdir())
    # Three points and the labels on one member, two points and the labels on the other.
    assert len(kept) == 4 + 3
    outcomes = [Outcome.model_validate_json(at.read_bytes()) for at in kept]
    assert told["passes"] == pytest.approx(sum(one.passes for one in outcomes))
    folds = read_table_of(root)
    seen = [o for at, o in zip(kept, outcomes, strict=True) if at.name.startswith("labels-")]
    assert sum(o.judged + o.judged_held for o in seen) == len(folds)
    assert len(seen) == members

    for at in (kept[0], kept[-1]):  # as if killed before them
        at.unlink()
    for done in home.glob("done*.json"):
        done.unlink()
    shutil.rmtree(root / "cache", ignore_errors=True)
    assert searched() == first


def read_table_of(root: Path) -> pa.Table:
    from pipeline.storage import location
    from pipeline.training import runs

    (at,) = root.glob(f"teach/g*/{runs.FOLDS_FILE}")
    return read_table(location(at))
