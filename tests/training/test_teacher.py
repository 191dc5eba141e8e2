"""Proves that folds are stratified and group-disjoint and that no face is judged by who saw it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, labeled

from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.losses import fit_temperature
from pipeline.models import ModelConfig
from pipeline.recipe import load
from pipeline.training import teacher
from pipeline.training.data import LabeledFaces
from pipeline.training.loop import Objective, Step, Worker, local
from pipeline.training.partial import PartialConfig
from pipeline.training.supervised import predict_logits
from pipeline.training.teacher import TeachConfig, cross_fit, stratified_folds

WORKER = local(dtype=torch.float32)
CONFIG = TeachConfig(model=CONVNET, folds=3, steps=30, batch=16, lr=1e-2, augment="plain")


def test_stratified_folds__every_class_spread_evenly() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(range(4), [870, 298, 52, 11]))
    fold = stratified_folds(labels, None, 5, seed=1)
    table = np.stack([np.bincount(labels[fold == k], minlength=4) for k in range(5)])
    assert (table.max(0) - table.min(0)).max() <= 1
    assert np.ptp(table.sum(1)) <= 4
    assert not np.array_equal(fold, stratified_folds(labels, None, 5, seed=2))


def test_stratified_folds__groups_stay_together() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 120, 600)]
    labels = rng.integers(0, 4, 600)
    fold = stratified_folds(labels, groups, 4, seed=0)
    assert all(len(set(fold[np.asarray(groups) == g])) == 1 for g in set(groups))
    table = np.stack([np.bincount(labels[fold == k], minlength=4) for k in range(4)])
    assert (table.max(0) / table.min(0)).max() < 1.35


def test_stratified_folds__more_folds_than_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="folds: 3, expected at most 2"):
        stratified_folds(np.array([0, 1, 0]), ["a", "a", "b"], 3, seed=0)


def test_teach_config__one_fold_leaves_nothing_out() -> None:
    with pytest.raises(ConfigError, match="folds"):
        parse(TeachConfig, {"folds": 1})


def test_cross_fit__no_member_has_seen_the_faces_it_judges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[set[int]] = []
    original = teacher.train_supervised

    def spy(*args, rows, **kwargs):
        learned.append(set(rows.tolist()))
        return original(*args, rows=rows, **kwargs)

    monkeypatch.setattr(teacher, "train_supervised", spy)
    data = labeled(60)
    data = LabeledFaces(data.faces, data.labels, groups=[str(i // 2) for i in range(60)])
    fit = cross_fit(CONFIG, data, NAMES, lambda _: WORKER, seed=0)
    for number, (member, seen) in enumerate(zip(fit.members, learned, strict=True)):
        rows = np.flatnonzero(fit.fold == number)
        assert not seen & set(rows.tolist())
        assert len(seen) + len(rows) == 60
        expected = predict_logits(member, data.faces, WORKER, rows=rows)
        assert fit.logits[rows] == pytest.approx(expected)
    assert fit.passes == pytest.approx(3 * 30 * 16 + 2 * 60 / 3)
    assert fit.temperature == pytest.approx(fit_temperature(fit.logits, data.labels))
    assert fit.metrics["accuracy"] == pytest.approx((fit.logits.argmax(1) == data.labels).mean())
    assert fit.metrics["nll_calibrated"] <= fit.metrics["nll"]
    assert fit.metrics["accuracy"] > 0.6
    first, second = (m.net.fc.weight for m in fit.members[:2])
    assert not torch.equal(first, second)


def test_cross_fit__finished_folds_are_not_trained_again(tmp_path: Path) -> None:
    data = labeled(24)
    config = CONFIG.model_copy(update={"steps": 4, "folds": 2})
    steps: list[int] = []

    def count(objective: Objective, at: Step) -> None:
        steps.append(at.number)

    def run():
        return cross_fit(
            config,
            data,
            NAMES,
            lambda k: local("cpu", torch.float32, tmp_path / str(k)),
            seed=0,
            hooks=[count],
        )

    first, again = run(), run()
    assert len(steps) == 2 * 4
    assert np.array_equal(first.logits, again.logits)
    assert first.passes == again.passes


# -- candidate sets -------------------------------------------------------------------------------

WEAK = Path(__file__).parents[2] / "jobs" / "recipes" / "weak.yaml"


def test_cross_fit__derived_candidates_are_what_plain_teachers_said_out_of_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets: list[LabeledFaces] = []
    original = teacher.train_partial

    def spy(config, partial, data, *args, **kwargs):
        sets.append(data)
        return original(config, partial, data, *args, **kwargs)

    monkeypatch.setattr(teacher, "train_partial", spy)
    numbers: list[int] = []

    def worker(number: int) -> Worker:
        numbers.append(number)
        return WORKER

    config = CONFIG.model_copy(update={"steps": 12})
    partial = PartialConfig(candidates="derived", ratio=0.3)
    data = labeled(48)
    plain = cross_fit(config, data, NAMES, lambda fold: WORKER, seed=0)
    given = config.model_copy(update={"partial": partial})
    fit = cross_fit(given, data, NAMES, worker, seed=0)
    assert numbers == [3, 4, 5, 0, 1, 2]
    scaled = plain.logits.astype(np.float64) / plain.temperature
    probs = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    near = probs >= 0.3 * probs.max(1, keepdims=True)
    near[np.arange(48), data.labels] = True
    want = np.where(near, probs, 0)
    assert len(sets) == 3
    assert sets[0].soft is not None
    np.testing.assert_allclose(sets[0].soft, want / want.sum(1, keepdims=True), rtol=1e-4)
    assert fit.candidates == f"derived, {near.sum(1).mean():.2f} per face"
    assert fit.passes == pytest.approx(2 * plain.passes)
    assert given.trainings == 6


def test_cross_fit__candidates_from_votes_are_told_and_cost_nothing() -> None:
    data = labeled(48)
    soft = np.eye(4)[data.labels] * 0.75 + 0.25 * np.eye(4)[(data.labels + 1) % 4]
    config = CONFIG.model_copy(update={"steps": 6, "partial": PartialConfig()})
    fit = cross_fit(config, replace(data, soft=soft), NAMES, lambda fold: WORKER, seed=0)
    assert fit.candidates == "votes, 2.00 per face"
    assert fit.passes == pytest.approx(3 * 6 * 16 + 2 * 48 / 3)
    assert config.trainings == 3


def test_teach_config__candidates_of_mixed_faces_are_refused() -> None:
    with pytest.raises(ConfigError, match="mixed by mixup cannot move"):
        parse(TeachConfig, {"partial": {}, "mix": "mixup"})


def test_weak_recipe__trains_a_few_steps_of_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMNIFER_LABELED", "OMNIFER_POOL"):
        monkeypatch.setenv(name, "unused")
    recipe = load(WEAK)
    assert recipe.teach.partial is not None
    assert (recipe.teach.partial.method, recipe.labeled.rule) == ("decoder", "voted")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    net = {"name": "vit_tiny_patch16_224", "size": 16, "dropout": 0.0, "args": sizes}
    small = {"steps": 4, "folds": 2, "batch": 8, "model": ModelConfig.model_validate(net)}
    data = labeled(32)
    voted = replace(data, soft=np.eye(4)[data.labels])
    fit = cross_fit(
        recipe.teach.model_copy(update=small), voted, NAMES, lambda fold: WORKER, seed=0
    )
    assert fit.history[0][-1]["decoder_loss"] > 0
    assert fit.candidates == "votes, 1.00 per face"
