"""Proves the whole flow on one tiny run: what it leaves behind, and what a second call redoes."""

import hashlib
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import flow

from pipeline import conduct, evaluation, images, pool, stages
from pipeline.schema import REASONS, TRUTH
from pipeline.synthetic import encode
from pipeline.tables import read_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

ASKED = tuple(name for name in stages.STAGES if name != "pretrain")
"""Stages that the demo asks for."""
STORED = ("labeled", "test", *(name for name in ASKED if name != "report"))
SCORED = ("teach", "embed", "score")
MODELS = ("control_a", "control_b", "student")

pytestmark = pytest.mark.usefixtures("local_ray")


def opened(root: Path, *sets: str) -> flow.LoggedJob:
    return flow.start(flow.tiny(flow.UNTRACKED, *sets), root)


def rows(job: flow.LoggedJob, stage: str) -> pa.Table:
    plan = pool.pool_plan(job)
    return pa.concat_tables(table for _, table in pool.ledger(job, stage).tables(plan))


def metrics(job: flow.LoggedJob) -> dict[str, Any]:
    return (job.run.artifact("evaluate").dir / stages.METRICS_FILE).read_json()


def test_run_all__every_stage_leaves_an_artifact(tiny_run: Path) -> None:
    job = opened(tiny_run)
    for stage, digest in flow.digests(job, STORED).items():
        assert re.fullmatch("[0-9a-f]{64}", digest), stage
        assert job.run.artifact(stage).facts["seconds"] >= 0


def test_run_all__every_slice_is_read_once_by_survey_and_once_by_embed(tiny_run: Path) -> None:
    slices = [f"{s.start}-{s.stop}" for s in pool.pool_plan(opened(tiny_run)).slices()]
    log = Path(f"{tiny_run}.reads").read_text().split()
    assert len(slices) == 10
    assert sorted(log) == sorted(2 * slices)


def test_run_all__every_face_leaves_with_a_reason(tiny_run: Path) -> None:
    job = opened(tiny_run)
    decided = rows(job, "select")
    assert decided.num_rows == 600
    assert set(decided["reason"].to_pylist()) <= set(REASONS)
    kept = pc.equal(decided["reason"], "selected")
    assert kept.equals(decided["selected"])
    rejected = decided.filter(pc.invert(decided["selected"]))
    per_class = job.run.artifact("select").facts["per_class"]
    counted = sum(n for reasons in per_class.values() for n in reasons.values())
    assert counted == 600
    assert pc.sum(kept).as_py() + rejected.num_rows == 600


def test_run_all__mined_bytes_are_the_surveyed_ones(tiny_run: Path) -> None:
    job = opened(tiny_run)
    mined, surveyed, decided = (rows(job, stage) for stage in ("mine", "survey", "select"))
    known = dict(zip(surveyed["id"].to_pylist(), surveyed["sha256"].to_pylist(), strict=True))
    selected = decided.filter(decided["selected"])
    assert mined["id"].to_pylist() == selected["id"].to_pylist()
    assert mined.num_rows > 0
    for row in mined.to_pylist():
        assert hashlib.sha256(row["image"]).digest() == known[row["id"]]


def test_run_all__student_is_tied_to_what_it_learned_from(tiny_run: Path) -> None:
    job = opened(tiny_run)
    student = job.run.artifact("student")
    identity = (student.dir / "identity.json").read_json()
    assert identity["inputs"]["mined"] == job.run.artifact("mine").digest
    assert identity["inputs"]["teacher"] == job.run.artifact("teach").digest
    assert identity["student"]["steps"] == 20
    assert identity["seed"] == 0
    facts = {name: job.run.artifact(name).facts for name in ("teach", "embed", *MODELS)}
    passes = {name: found["passes"] for name, found in facts.items()}
    assert passes["student"] - passes["teach"] - passes["embed"] == pytest.approx(20 * 48)
    assert passes["control_a"] == pytest.approx(20 * 48)
    assert passes["control_b"] == pytest.approx(passes["student"], abs=24)  # half a step of 48


def test_run_all__report_is_one_file(tiny_run: Path) -> None:
    text = (tiny_run / "report.html").read_text()
    scripts = re.findall(r"<script[^>]*>", text)  # the explorer's data, and its one script
    assert scripts == ['<script type="application/json" id="explorer-data">', "<script>"]
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']+)""", text)
    assert [link for link in outside if not link.startswith("https://github.com")] == []
    accuracy = metrics(opened(tiny_run))["models"]["student"]["accuracy"]["value"]
    assert f"{100 * accuracy:.1f}" in text


def test_show_results__table_has_every_model_and_what_was_mined(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conduct.show_results(opened(tiny_run))
    said = " ".join("".join(capsys.readouterr()).split())
    for word in ("teacher", "control A", "control B", "student", "gain", "purity", "utilization"):
        assert word in said, word
    for stage in ASKED:
        assert stage == "report" or re.search(rf"\b{stage} \d+", said), stage


def test_run_all__one_tracked_child_per_stage(tiny_run: Path) -> None:
    with sqlite3.connect(tiny_run / "mlflow.db") as db:
        parents = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId'"
        children = {name for (name,) in db.execute(
            f"SELECT name FROM runs WHERE run_uuid IN ({parents})"
        )}  # fmt: skip
        everyone = db.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
        unfinished = db.execute("SELECT COUNT(*) FROM runs WHERE status != 'FINISHED'").fetchone()
        steps = db.execute(
            "SELECT MAX(step) FROM metrics JOIN runs USING (run_uuid) "
            "WHERE name = 'student' AND key = 'mined_loss'"
        ).fetchone()
        points = tuple(step for (step,) in db.execute(
            "SELECT step FROM metrics JOIN runs USING (run_uuid) "
            "WHERE name LIKE 'search %' AND key = 'objective' ORDER BY step"
        ))  # fmt: skip
    assert steps == (20,)  # the history of the training, step by step
    trials = {f"search {number}" for number in range(4)}
    assert children == set(stages.STAGES) | trials
    assert everyone == len(children) + 1
    assert points == tuple(range(8))  # each trial has its two
    assert unfinished == (0,)


def test_run_all__a_second_call_does_nothing(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    before = flow.finished(root)
    job = opened(root)
    conduct.run_all(job, None)
    assert flow.finished(root) == before
    assert flow.reads(job) == []
    assert (root / "report.html").exists()


@pytest.mark.parametrize(
    ("read_in", "run_in", "streams"), [("task", "actor", 1), ("actor", "actor", 2)]
)
def test_embed__where_reading_and_scoring_run_changes_no_byte(
    tiny_run: Path, tmp_path: Path, read_in: str, run_in: str, streams: int
) -> None:
    places = [f"embed.read_in={read_in}", f"score.run_in={run_in}", f"embed.streams={streams}"]
    before = opened(tiny_run)
    config = before.recipe
    assert (config.embed.read_in, config.score.run_in) == ("actor", "embed")
    root = flow.copy(tiny_run, tmp_path / "run", without=("embed", "score"))
    job = opened(root, *places)
    conduct.run_all(job, "score")
    assert flow.digests(job, SCORED) == flow.digests(before, SCORED)
    assert len(flow.reads(job)) == 10


def test_run_all__another_test_set_scores_nothing_again(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    before, digests = flow.finished(root), flow.digests(opened(root), SCORED)
    other = "labeled.test={kind: synthetic, name: other, count: 60, test_count: 0, draw_seed: 7}"
    job = opened(root, other)
    conduct.run_all(job, None)
    assert flow.reads(job) == []
    assert flow.digests(job, SCORED) == digests
    new = {at.split("/")[0] for at in set(flow.finished(root)) - set(before)}
    assert {"test", "guard", "evaluate"} <= new
    assert not new & {"labeled", "survey", *SCORED}
    assert metrics(job)["protocol"]["n"] == job.run.artifact("test").facts["rows"]

    # Faces of the training set as the test: a teacher that had learned them would tell what it
    # remembers, and the student would be taught by it. So they leave, and the teachers start over.
    same = "labeled.test={kind: synthetic, name: same, count: 40, test_count: 0, draw_seed: 0}"
    job = opened(root, same)
    conduct.run_all(job, "teach")
    twins = read_table(job.run.artifact("guard").dir / LABELED_FILE)
    tested = read_table(job.run.artifact("test").dir / FACES_FILE)["pixel_sha256"].to_pylist()
    labeled = read_table(job.run.artifact("labeled").dir / FACES_FILE)["pixel_sha256"].to_pylist()
    is_twin = [twin is not None for twin in twins["twin_of"].to_pylist()]
    assert sum(is_twin) >= 30  # those of the 40 that got a label
    assert all(twin for twin, sha in zip(is_twin, labeled, strict=True) if sha in set(tested))
    assert job.run.artifact("teach").digest != digests["teach"]
    folds = read_table(job.run.artifact("teach").dir / "folds.parquet")
    assert not set(folds["id"].to_pylist()) & {
        face for face, twin in zip(twins["id"].to_pylist(), is_twin, strict=True) if twin
    }


def test_run_all__hidden_truth_is_read_by_evaluate_only(tiny_run: Path, tmp_path: Path) -> None:
    judged = [name for name in ASKED if name not in ("survey", "evaluate", "report")]
    root = flow.copy(tiny_run, tmp_path / "run", without=[*judged, *MODELS, "twins", "evaluate"])
    job = opened(root)
    at = job.run.artifact("survey").dir / pool.TRUTH_FILE
    truth = read_table(at)
    drawn = np.random.default_rng(0).permutation(truth.num_rows)
    shuffled = pa.table([truth["id"], truth["label"].take(pa.array(drawn))], schema=TRUTH)
    pq.write_table(shuffled, at.local_path())
    conduct.run_all(job, "evaluate")

    assert flow.digests(job, judged) == flow.digests(opened(tiny_run), judged)
    printed = metrics(job)["pool"]["purity"]
    kept = rows(job, "select").filter(pc.field("selected"))["label"].to_pylist()
    labels = truth["label"].to_pylist()
    chance = sum(kept.count(c) / len(kept) * labels.count(c) / len(labels) for c in set(labels))
    # Shuffled labels hit like draws without replacement: four standard deviations of that.
    assert printed == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / len(kept)))


def test_run_all__removed_faces_leave_and_the_rest_stays(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    job = opened(root)
    surveyed, before = rows(job, "survey"), flow.digests(job, SCORED)
    keys = [slice.key for slice in pool.pool_plan(job).slices()]
    by_id, by_bytes = 5, 70  # faces of the first and the second slice
    removed = {surveyed["id"][row].as_py() for row in (by_id, by_bytes)}
    listed = tmp_path / "removed.txt"
    listed.write_text(
        f"{surveyed['id'][by_id].as_py()}\n{surveyed['sha256'][by_bytes].as_py().hex()}\n"
    )
    removals = f"removals={listed}"

    job = opened(root, removals)
    conduct.run_all(job, "select")
    assert sorted(flow.reads(job)) == ["0-60", "0-60", "60-120", "60-120"]  # survey and embed
    after = [slice.key for slice in pool.pool_plan(job).slices()]
    assert [old == new for old, new in zip(keys, after, strict=True)] == [False] * 2 + [True] * 8
    for stage in ("survey", "guard", "embed", "score", "twins", "select"):
        table = rows(job, stage)
        assert table.num_rows == 598, stage
        assert not removed & set(table["id"].to_pylist()), stage
    assert flow.digests(job, ["teach"])["teach"] == before["teach"]

    again = opened(root, removals)
    conduct.run_all(again, "select")
    assert len(flow.reads(again)) == 4

    labeled = read_table(again.run.artifact("labeled").dir / LABELED_FILE)
    training = labeled.filter(pc.equal(labeled["role"], "train"))
    group = training["group"][0].as_py()
    listed.write_text(f"{listed.read_text()}{group}\n")
    job = opened(root, removals)
    conduct.run_all(job, "teach")
    assert len(flow.reads(job)) == 4  # nobody of the pool is in this group
    assert flow.digests(job, ["teach"])["teach"] != before["teach"]
    folds = read_table(job.run.artifact("teach").dir / "folds.parquet")
    gone = training.filter(pc.equal(training["group"], group))["id"].to_pylist()
    assert gone
    assert not set(gone) & set(folds["id"].to_pylist())


def test_run_all__planted_copies_of_test_faces_are_rejected(tiny_run: Path, tmp_path: Path) -> None:
    later = ("survey", "guard", "embed", "score", "search", "select", "mine", "twins", "distill")
    root = flow.copy(tiny_run, tmp_path / "run", without=[*later, *MODELS, "evaluate"])
    test = read_table(opened(tiny_run).run.artifact("test").dir / LABELED_FILE).slice(0, 40)
    copies = [
        encode(flow.altered(images.decode(image), i))
        for i, image in enumerate(test["image"].to_pylist())
    ]
    shard = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"image": pa.array(copies, pa.binary())}), shard)
    source = f"pool=[{{kind: parquet, name: web, path: {shard}}}]"

    job = opened(root, source, "search=null", "select.policy=all")
    conduct.run_all(job, "select")
    reasons = rows(job, "select")["reason"].to_pylist()
    assert reasons.count("twin_of_test") >= 0.95 * len(copies)


def test_purity__of_the_run_by_hand(tiny_run: Path) -> None:
    job = opened(tiny_run)
    truth = read_table(job.run.artifact("survey").dir / pool.TRUTH_FILE)
    labels = dict(zip(truth["id"].to_pylist(), truth["label"].to_pylist(), strict=True))
    decided = rows(job, "select")
    kept = [row for row in decided.to_pylist() if row["selected"]]
    right = sum(labels[row["id"]] == row["label"] for row in kept)
    found = metrics(opened(tiny_run))["pool"]
    assert found == evaluation.purity([decided], truth)
    assert found["purity"] == pytest.approx(right / len(kept))
    assert found["utilization"] == pytest.approx(len(kept) / 600)
