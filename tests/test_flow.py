"""Proves how artifacts of a run are found, joined and counted between stages."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from helpers import flow as tiny

from pipeline import flow, lineage, pool, stages, synthetic
from pipeline.errors import ModelError
from pipeline.models import ModelConfig
from pipeline.policy import SCORE_COLUMNS
from pipeline.schema import EMOTIONS
from pipeline.tables import read_table
from pipeline.training.handed import LABELED_FILE


@pytest.fixture
def job(tiny_run: Path) -> tiny.LoggedJob:
    return tiny.start(tiny.tiny(tiny.UNTRACKED), tiny_run)


def test_read_labels__test_faces_are_apart(job: tiny.LoggedJob) -> None:
    roles = {
        stage: set(read_table(job.run.artifact(stage).dir / LABELED_FILE)["role"].to_pylist())
        for stage in ("labeled", "test")
    }
    assert roles == {"labeled": {"train", "rest"}, "test": {"test"}}  # rest: no majority
    assert flow.label_names(job) == EMOTIONS


def test_read_labels__a_face_replaced_deep_in_a_folder_is_read_again(tmp_path: Path) -> None:
    faces = synthetic.draw(0, np.arange(5), 16)
    files = [tmp_path / "set" / split for split in ("train/sad/a.png", "test/sad/b.png")]
    for file, face in zip(files, faces, strict=False):
        file.parent.mkdir(parents=True)
        file.write_bytes(synthetic.encode(face))
    labeled = f"labeled={{kind: folder, path: {tmp_path / 'set'}}}"
    job = tiny.start(tiny.tiny(tiny.UNTRACKED, labeled), tmp_path / "run")
    flow.read_labels(job)
    before = job.run.artifact("labeled")
    flow.read_labels(job)
    assert job.run.artifact("labeled") == before
    files[0].write_bytes(synthetic.encode(faces[4]) + b"more")
    flow.read_labels(job)
    assert job.run.artifact("labeled").digest != before.digest


def test_forward_passes__third_of_a_pass_per_view_and_teacher(job: tiny.LoggedJob) -> None:
    plan = pool.pool_plan(job)
    spent = flow.forward_passes(job, plan, pool.ledger(job, "embed"))
    assert spent == pytest.approx(600 * 2 * 2 / 3)  # two teachers, face and mirrored face


def test_share__a_student_of_its_own_for_the_same_passes(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    before = {name: job.run.artifact(name) for name in ("student", "control_a", "control_b")}
    recipe = tiny.tiny(tiny.UNTRACKED, "mined_share=0.25")
    other = tiny.start(recipe, tiny.copy(Path(job.run.root.uri), tmp_path / "run"))
    stages.student(other)
    assert {name: other.run.artifact(name).digest for name in before} == {
        name: artifact.digest for name, artifact in before.items()
    }
    made = other.run.artifact(flow.SHARE)
    assert made.facts["passes"] == before["student"].facts["passes"]
    assert made.digest != before["student"].digest
    assert lineage.lineage(made.dir).facts["share of the mined faces"] == 0.25
    stages.evaluate(other)
    metrics = (other.run.artifact("evaluate").dir / stages.METRICS_FILE).read_json()
    assert metrics["models"][flow.SHARE]["passes"] == made.facts["passes"]
    assert metrics["protocol"]["mined_share"] == 0.25
    assert metrics["gain"]["over"] in ("control_a", "control_b")
    text = (stages.report(other), (other.run.root / "report.html").read_text())[1]
    kept = other.run.artifact("mine").facts["rows"]
    assert f'<td class="n">{round(kept / 4):,}</td><td class="n">25&nbsp;%</td>' in text


def test_training_digest__twins_and_removed_faces_change_it(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    before = flow.training_digest(job)
    table = read_table(job.run.artifact("labeled").dir / LABELED_FILE)
    listed = tmp_path / "removed.txt"
    listed.write_text("nobody")
    root = Path(job.run.root.uri)
    other = tiny.start(
        tiny.tiny(tiny.UNTRACKED, f"removals={listed}"), tiny.copy(root, tmp_path / "r")
    )
    assert flow.training_digest(other) == before
    listed.write_text(table["id"][0].as_py())
    assert flow.training_digest(other) != before


def test_training_digest__another_crop_or_color_changes_it(job: tiny.LoggedJob) -> None:
    settings = ((), ("labeled.crop={fraction: 0.9}",), ("labeled.color=rgb",))
    jobs = [replace(job, recipe=tiny.tiny(tiny.UNTRACKED, *sets)) for sets in settings]
    digests = [flow.training_digest(other) for other in jobs]
    assert digests[0] == flow.training_digest(job)
    assert len(set(digests)) == 3


def test_points__one_row_per_training_face(job: tiny.LoggedJob) -> None:
    points = flow.points(job)
    labeled = read_table(job.run.artifact("labeled").dir / LABELED_FILE)
    labeled = labeled.filter(pc.equal(labeled["role"], "train"))
    assert points["id"].to_pylist() == labeled["id"].to_pylist()
    assert points["label"].to_pylist() == labeled["label"].to_pylist()
    right = pc.mean(pc.equal(points["label"], points["pseudo_label"]).cast("int8")).as_py()
    facts = job.run.artifact("teach").facts
    assert right == pytest.approx(facts["out_of_fold_accuracy"], abs=0.01)


def test_pool_rows__faces_of_all_stages_side_by_side(job: tiny.LoggedJob) -> None:
    rows = pa.concat_tables(flow.pool_rows(job)())
    scores = pa.concat_tables(flow.score_columns(job, SCORE_COLUMNS))
    assert len(rows) == 600
    for name in ("id", "confidence"):
        assert rows[name].equals(scores[name])
    assert rows["pseudo_label"].to_pylist() == scores["pseudo_label"].to_pylist()


def test_backbone_input__weights_of_the_same_name_with_another_content(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    model = ModelConfig(weights=str(file), pretraining_data="none")
    found = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        found.append(flow.backbone_input(job, model)["weights"])
    assert found == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
    assert flow.backbone_input(job, ModelConfig()) == {}
    file.unlink()
    with pytest.raises(ModelError, match="expected a weights file or folder; not there"):
        flow.backbone_input(job, model)
