"""Proves what distillation leaves in a run: sets with their origin, experts, tuned models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import flow as tiny
from PIL import Image

from pipeline import flow
from pipeline.artifacts import load_model, load_teacher, read_meta
from pipeline.errors import ConfigError, SourceError
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training import distillation, exam, runs
from pipeline.training.distilled import load_distilled
from pipeline.training.distilling import DistillConfig
from pipeline.training.worker import local

WORKER = local(dtype=torch.float32)
EXPERTS = {"count": 2, "epochs": 2, "epoch_steps": 1, "batch": 8, "ahead": 1, "latest": [0, 1]}


@pytest.fixture
def job(tiny_run: Path, tmp_path: Path) -> tiny.LoggedJob:
    recipe = tiny.tiny(tiny.UNTRACKED, "distill.steps=4", "distill.preview_every=2")
    return tiny.start(recipe, tiny.copy(tiny_run, tmp_path / "run"))


def settings(job: tiny.LoggedJob, out: Path, **changed: Any) -> distillation.DistillJob:
    assert job.recipe.distill is not None
    values = {**job.recipe.distill.model_dump(mode="json"), **changed}
    return distillation.DistillJob(
        handed=flow.handed(job, mined=True),
        distill=DistillConfig.model_validate(values),
        teacher=job.run.artifact("teach").dir.uri,
        experts=None,
        out=str(out),
        checkpoints=str(out / "checkpoints"),
        seed=0,
    )


def test_distill__writes_images_with_where_they_come_from(
    job: tiny.LoggedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "distill"
    facts = distillation.distill(settings(job, out).model_dump(mode="json"), WORKER)
    faces = flow.points(job).num_rows + job.run.artifact("mine").facts["rows"]
    names = flow.label_names(job)
    made = load_distilled(location(out))
    assert facts["ipc"] == 1
    assert facts["size"] == 32
    assert facts["faces"] == faces
    assert facts["passes"] == pytest.approx(facts["expected_passes"])
    assert made.images.shape == (len(names), 1, 32, 32)
    assert np.allclose(made.soft.sum(1), 1, atol=1e-5)
    (row,) = (location(out) / runs.HISTORY_FILE).read_json()
    assert row["step"] == 4
    assert row["loss"] == facts["last_loss"]
    said = capsys.readouterr().out
    expected = f"distill: expected {facts['expected_passes']:,.0f} image passes, "
    assert said.index(expected) < said.index("distill: 4/4 steps")  # before the first step
    known = read_table(location(out) / "provenance.parquet").to_pylist()
    assert [row["label"] for row in known] == list(names)
    mined = read_table(job.run.artifact("labeled").dir / "labeled.parquet", ["id"])["id"]
    for row in known:
        assert (row["origin_source"] == "labeled") == (row["origin"] in mined.to_pylist())
        assert 0.5 < row["similarity"] <= 1 + 1e-5
    assert f"- faces: {faces}" in (out / "STATEMENT.md").read_text()
    previews = sorted(path.name for path in (out / "previews").iterdir())
    assert previews == ["step-000002.png", "step-000004.png"]
    assert Image.open(out / "previews" / previews[0]).size == (36, 2 + 34 * len(names))


@pytest.mark.parametrize("method", ["random", "herding", "k_center", "crops"])
def test_distill__chosen_sets_are_real_faces(
    job: tiny.LoggedJob, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "distill"
    facts = distillation.distill(settings(job, out, method=method).model_dump(), WORKER)
    assert facts["passes"] == 0
    known = read_table(location(out) / "provenance.parquet").to_pylist()
    if method != "crops":
        assert all(row["similarity"] > 0.999 for row in known)
    assert not (out / "previews").exists()


def test_distill__what_would_not_fit_is_refused_before_a_step(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    out = tmp_path / "distill"
    given = settings(job, out, method="unrolled", memory_mb=1)
    with pytest.raises(ConfigError, match="step of unrolled needs about"):
        distillation.distill(given.model_dump(), WORKER)
    assert not out.exists()


def test_expert__is_trained_once_and_then_followed(job: tiny.LoggedJob, tmp_path: Path) -> None:
    out, at = tmp_path / "distill", tmp_path / "experts"
    changed = {
        "method": "trajectory",
        "experts": EXPERTS,
        "inner": {"steps": 2},
        "learn_labels": True,
    }
    given = settings(job, out, **changed).model_copy(update={"experts": str(at)})
    with pytest.raises(SourceError, match="expected 2 experts, 2 are missing"):
        distillation.distill(given.model_dump(), WORKER)
    one = distillation.ExpertJob(
        handed=given.handed, distill=given.distill, number=0, out=str(at), seed=0
    )
    both = [one, one.model_copy(update={"number": 1})]
    digests = [distillation.expert(e.model_dump(), WORKER)["sha256"] for e in both]
    assert digests[0] != digests[1]
    written = (at / "expert-000.safetensors").stat().st_mtime_ns
    again = distillation.expert(one.model_dump(), WORKER)
    assert again["sha256"] == digests[0]
    kept = EXPERTS["epochs"] * EXPERTS["epoch_steps"] * EXPERTS["batch"]
    assert again["passes"] == kept
    assert (at / "expert-000.safetensors").stat().st_mtime_ns == written
    facts = distillation.distill(given.model_dump(), WORKER)
    assert facts["passes"] == pytest.approx(facts["expected_passes"])
    made = load_distilled(location(out))
    assert made.rate is not None


def test_tune__trains_every_member_on_and_keeps_running_statistics(
    job: tiny.LoggedJob, tmp_path: Path
) -> None:
    out, tuned = tmp_path / "distill", tmp_path / "tuned"
    distillation.distill(settings(job, out, method="random").model_dump(), WORKER)
    teacher = job.run.artifact("teach").dir
    given = distillation.TuneJob(
        tune=distillation.TuneConfig(steps=3, batch=16),
        distilled=str(out),
        teacher=teacher.uri,
        out=str(tuned),
        checkpoints=str(tmp_path / "checkpoints"),
        seed=0,
    ).model_dump()
    facts = distillation.tune(given, WORKER)
    before = load_teacher(teacher / runs.TEACHER).members
    assert facts["passes"] == 3 * 16 * len(before)
    for number, member in enumerate(before):
        after = load_model(location(tuned) / str(number))
        old, new = member.state_dict(), after.state_dict()
        running = [name for name in old if "running" in name]
        assert all(torch.equal(old[name], new[name]) for name in running)
        assert not torch.equal(old["net.fc.weight"], new["net.fc.weight"])
        assert read_meta(location(tuned) / str(number))["temperature"] > 0
    assert distillation.tune(given, WORKER)["sha256"] == facts["sha256"]

    rows = flow.labeled_rows(flow.handed(job), ("train",))
    found = exam.probabilities(location(tuned), rows, flow.handed(job), WORKER)
    assert found.shape == (rows.num_rows, len(flow.label_names(job)))
    assert np.allclose(found.sum(1), 1, atol=1e-5)
