"""Proves that folds are stratified and group-disjoint and that no face is judged by who saw it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, labeled

from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.losses import fit_temperature
from pipeline.training import teacher
from pipeline.training.data import LabeledFaces
from pipeline.training.loop import Objective, Step, local
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
