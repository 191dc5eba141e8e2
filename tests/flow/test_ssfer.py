"""Proves SSFER in one run: reconstruction, FaceMix, a student that labels for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import flow

from pipeline import conduct, stages
from pipeline.artifacts import load_model
from pipeline.recipe import load
from pipeline.report.collect import collect

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
    # The rest of the labels, as rgb as the pool, is all that the student labels.
    rest, pool = recipe.pool
    assert (rest.kind, rest.color, pool.color) == ("rest", "rgb", "rgb")
    assert student.source_share == {"pool": 0}
    small = "steps: 4, batch: 32, probe_every: 4, decoder: {width: 16, depth: 1, heads: 2}"
    return (
        "labeled.fraction=0.5",
        "pool=[{kind: rest, name: rest}, {kind: synthetic, name: pool, count: 600}]",
        f"student.source_share={student.source_share}",
        f"pretrain={{method: {pretrain.method}, model: {NET}, mask_ratio: {pretrain.mask_ratio}, "
        f"normalize_patches: {str(pretrain.normalize_patches).lower()}, {small}}}",
        f"teach.mix={recipe.teach.mix}",
        f"select={{policy: {recipe.select.policy}}}",
        f"student.online={student.online.model_dump_json()}",
        f"student.mined_weight={student.mined_weight}",
        f"student.ramp={student.ramp}",
        f"student.ema={student.ema}",
        f"student.targets={student.targets}",
        "student.warm_start=true",
    )


def test_ssfer__runs_from_reconstruction_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = flow.tiny(*SMALL, *shipped(monkeypatch))
    config = recipe.student
    assert config.online is not None
    assert (config.online.thresholds.rule, config.online.thresholds.tau) == ("fixed", 0.7)
    assert (config.online.labeler, config.online.weak) == ("ema", "weak")
    assert (config.ema, config.mined_augment, config.targets) == (0.999, "strong", "hard")
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)
    spent = {name: job.run.artifact(name).facts["passes"] for name in ("pretrain", "teach")}
    # Mixed and unmixed faces: two passes each, and two forwards of every labeled face.
    assert spent["teach"] >= 2 * 2 * recipe.teach.steps * recipe.teach.batch
    student = job.run.artifact("student")
    assert student.facts["passes"] > sum(spent.values())
    history = (student.dir / "model" / "history.json").read_json()
    cuts = [value for row in history for name, value in row.items() if name.startswith("cut_")]
    assert cuts == pytest.approx([0.7] * 8 * len(history))
    for row in history:  # lambda_u is 5 from the first step on
        expected = row["labeled_loss"] + 5 * row["mined_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    # The average of the weights labels: weak views are passed forward, and the strong ones taught.
    spent["embed"] = job.run.artifact("embed").facts["passes"]
    each = config.labeled_batch + config.mined_batch * (1 + 1 / 3)
    own = student.facts["passes"] - sum(spent.values())
    assert own == pytest.approx(config.steps * each)
    assert load_model(student.dir / "model").config.weights.endswith("backbone")
    judged, course = job.run.artifact("evaluate").dir, collect(job.run, "ssfer", "c", False).course
    assert course is not None
    assert 480 < course.known < 512  # so many faces are watched; some of the rest have no label
    at = judged / "history.json"
    purity = {row["step"]: row["purity"] for row in (at.read_json() if at.exists() else ())}
    assert [purity.get(step) for step in course.steps] == list(course.purity)
    metrics = (judged / stages.METRICS_FILE).read_json()
    assert "faces of the run's pool, mae" in metrics["protocol"]["pretraining_data"]
    assert "While the student learned" in (tmp_path / "run" / "report.html").read_text()
