"""Proves SSFER in one run: reconstruction, FaceMix, a student that labels for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import flow

from pipeline import conduct, stages
from pipeline.artifacts import load_model
from pipeline.recipe import load

ROOT = Path(__file__).parents[2]
NET = (
    "{name: vit_tiny_patch16_224, size: 32, dropout: 0, args: {img_size: 32, patch_size: 8, "
    "embed_dim: 24, depth: 1, num_heads: 2}}"
)
START = NET.replace("dropout: 0,", "dropout: 0, weights: pretrained,")
SMALL = (
    flow.UNTRACKED,
    "search=null",
    "distill=null",
    "tune=null",
    f"teach.model={START}",
    "teach.folds=2",
    f"student.model={START}",
    "student.steps=60",
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.cluster]


def shipped(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What makes the recipe SSFER, as the shipped one has it."""
    monkeypatch.setenv("OMNIFER_LABELED", "unused")
    monkeypatch.setenv("OMNIFER_POOL", "unused")
    recipe = load(ROOT / "jobs" / "recipes" / "ssfer.yaml")
    pretrain, student = recipe.pretrain, recipe.student
    assert pretrain is not None
    assert student.online is not None
    small = "steps: 4, batch: 32, probe_every: 4, decoder: {width: 16, depth: 1, heads: 2}"
    return (
        f"pretrain={{method: {pretrain.method}, model: {NET}, mask_ratio: {pretrain.mask_ratio}, "
        f"normalize_patches: {str(pretrain.normalize_patches).lower()}, {small}}}",
        f"teach.mix={recipe.teach.mix}",
        f"select={{policy: {recipe.select.policy}}}",
        f"student.online={student.online.model_dump_json()}",
        f"student.mined_weight={student.mined_weight}",
        f"student.targets={student.targets}",
        "student.warm_start=true",
    )


def test_ssfer__runs_from_reconstruction_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = flow.tiny(*SMALL, *shipped(monkeypatch))
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)
    spent = {name: job.run.artifact(name).facts["passes"] for name in ("pretrain", "teach")}
    # Mixed and unmixed faces: two passes each, and two forwards of every labeled face.
    assert spent["teach"] >= 2 * 2 * recipe.teach.steps * recipe.teach.batch
    student = job.run.artifact("student")
    assert student.facts["passes"] > sum(spent.values())
    history = (student.dir / "model" / "history.json").read_json()
    assert [row["cut_happiness"] for row in history] == pytest.approx([0.7] * len(history))
    assert load_model(student.dir / "model").config.weights.endswith("backbone")
    metrics = (job.run.artifact("evaluate").dir / stages.METRICS_FILE).read_json()
    assert "faces of the run's pool, mae" in metrics["protocol"]["pretraining_data"]
    assert "While the student learned" in (tmp_path / "run" / "report.html").read_text()
