"""Proves what training functions leave behind, and that a finished model is not trained again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import flow as tiny

from pipeline import flow
from pipeline.artifacts import load_any, load_teacher
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training import runs
from pipeline.training.distill import Distilled
from pipeline.training.distilled import save_distilled
from pipeline.training.student import StudentConfig, control
from pipeline.training.worker import local

WORKER = local(dtype=torch.float32)
NAMES = ("neutral", "happiness")


@pytest.fixture
def job(tiny_run: Path, tmp_path: Path) -> tiny.LoggedJob:
    changed = ("student.steps=3", "teach.steps=4")
    recipe = tiny.tiny(tiny.UNTRACKED, *changed)
    return tiny.start(recipe, tiny.copy(tiny_run, tmp_path / "run"))


def settings(job: tiny.LoggedJob, model: str, passes: float | None, out: Path) -> dict:  # type: ignore[type-arg]
    return runs.StudentJob(
        handed=flow.handed(job, mined=True),
        student=job.recipe.student,
        model=model,
        control=None if model == "student" else control(job.recipe.student, passes),
        teacher=job.run.artifact("teach").dir.uri,
        out=str(out),
        checkpoints=str(out / "checkpoints"),
        seed=0,
    ).model_dump(mode="json")


@pytest.mark.parametrize(
    ("model", "passes", "expected"),
    [("student", None, 3 * 48), ("control_a", None, 3 * 48), ("control_b", 240.0, 5 * 48)],
)
def test_study__image_passes_are_steps_times_batch(
    job: tiny.LoggedJob, tmp_path: Path, model: str, passes: float | None, expected: int
) -> None:
    out = tmp_path / model
    facts = runs.study(settings(job, model, passes, out), WORKER)
    assert facts["passes"] == expected
    assert load_any(location(out)).members[0].label_names == flow.label_names(job)

    written = (out / "model.safetensors").stat().st_mtime_ns
    again = runs.study(settings(job, model, passes, out), WORKER)
    assert again["passes"] == expected
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_teach__folds_and_bank_are_the_training_faces(job: tiny.LoggedJob, tmp_path: Path) -> None:
    out = tmp_path / "teach"
    given = runs.TeachJob(
        handed=flow.handed(job), teach=job.recipe.teach, out=str(out),
        checkpoints=str(out / "checkpoints"), seed=0,
    )  # fmt: skip
    facts = runs.teach(given.model_dump(mode="json"), WORKER)
    teacher = load_teacher(location(out) / runs.TEACHER)
    folds = read_table(location(out) / runs.FOLDS_FILE)
    count = len(teacher.bank_ids)
    assert folds["id"].to_pylist() == list(teacher.bank_ids)
    assert sorted(set(folds["fold"].to_pylist())) == [0, 1]
    assert facts["sha256"] == teacher.sha256
    # two teachers of 4 steps of 32, and a face and its mirror image judged by one of them
    assert facts["passes"] == pytest.approx(2 * 4 * 32 + count * 2 / 3)


def test_study__a_student_learns_from_the_distilled_set_where_asked(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    given = settings(job, "student", None, tmp_path / "plain")
    from_set = {**given, "distilled": job.run.artifact("distill").dir.uri}
    from_set |= {"out": str(tmp_path / "set"), "checkpoints": str(tmp_path / "set-checkpoints")}
    facts = [runs.study(one, WORKER) for one in (given, from_set)]
    assert facts[0]["passes"] == facts[1]["passes"]
    assert facts[0]["sha256"] != facts[1]["sha256"]


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_beside__hard_targets_of_a_distilled_set_are_its_own_classes(
    tmp_path: Path, targets: str
) -> None:
    soft = np.array([[0.4, 0.6], [0.3, 0.7]], np.float32)  # both look like the second class
    images, codes = np.zeros((2, 1, 8, 8), np.uint8), np.arange(2)
    save_distilled(location(tmp_path), Distilled(images, codes, soft, NAMES, codes, [], 0.0))
    student = StudentConfig.model_validate({"beside": "distilled", "targets": targets})
    given = runs.StudentJob.model_construct(distilled=str(tmp_path), student=student)
    expected = np.eye(2) if targets == "hard" else soft
    assert np.array_equal(runs._beside(given).soft, expected)
