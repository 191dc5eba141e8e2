"""Proves cuts, shrinkage, estimates and weights against closed forms and slow references."""

import math

import numpy as np
import pytest

from pipeline.thresholds import (
    NOTHING,
    cuts_at,
    estimate,
    gaussian_weight,
    precision_curves,
)


def test_precision_curves__own_curve_without_prior() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    predicted = np.zeros(5, dtype=np.int64)
    labels = np.array([0, 0, 1, 0, 1])
    curve = precision_curves(confidence, predicted, labels, 2, prior=0, min_positives=1)[0]
    assert curve.cuts.tolist() == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert curve.precision == pytest.approx([3 / 5, 3 / 4, 2 / 3, 1, 1])
    assert curve.kept.tolist() == [5, 4, 3, 2, 1]
    assert curve.at(0.75) == (0.6, 0.75, 4)


def test_precision_curves__equals_slow_reference_with_ties() -> None:
    rng = np.random.default_rng(0)
    n, classes, prior = 400, 4, 15.0
    confidence = rng.integers(1, 40, n) / 40
    predicted, labels = rng.integers(0, classes, n), rng.integers(0, classes, n)
    right = predicted == labels
    for code, curve in enumerate(precision_curves(confidence, predicted, labels, classes, prior)):
        for cut, precision, kept in zip(curve.cuts, curve.precision, curve.kept, strict=True):
            above = confidence >= cut
            own = above & (predicted == code)
            pooled = right[above].mean()
            assert kept == own.sum()
            assert precision == pytest.approx((right[own].sum() + prior * pooled) / (kept + prior))


def test_precision_curves__strength_moves_from_own_to_pooled() -> None:
    confidence = np.full(200, 0.5)
    predicted = np.repeat([0, 1], 100)
    labels = np.where(np.arange(200) < 90, 0, 1)  # class 0: 90 % right, class 1: all right
    at = [
        float(precision_curves(confidence, predicted, labels, 2, prior)[0].precision[0])
        for prior in (0.0, 100.0, 1e9)
    ]
    assert at == pytest.approx([0.9, (90 + 100 * 0.95) / 200, 0.95])


def test_cuts_at__rare_class_is_pooled() -> None:
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.zeros(300), np.ones(29)]).astype(np.int64)
    confidence = rng.random(329)
    predicted = np.where(rng.random(329) < confidence, labels, 1 - labels)
    common, rare = cuts_at(precision_curves(confidence, predicted, labels, 2), 0.8)
    assert (common.pooled, common.positives) == (False, 300)
    assert (rare.pooled, rare.positives) == (True, 29)
    above = confidence >= rare.cut
    assert rare.kept == above.sum()
    assert rare.precision == pytest.approx((predicted == labels)[above].mean())


def test_cuts_at__positives_of_the_whole_set_count() -> None:
    labels = np.zeros(20, dtype=np.int64)
    confidence = np.linspace(0.1, 1, 20)
    assert precision_curves(confidence, labels, labels, 1)[0].pooled
    whole = np.array([40])
    assert not precision_curves(confidence, labels, labels, 1, positives=whole)[0].pooled


def test_cuts_at__out_of_reach_keeps_nothing() -> None:
    labels = np.ones(50, dtype=np.int64)
    wrong = precision_curves(np.linspace(0.1, 1, 50), np.zeros(50, dtype=np.int64), labels, 2)
    assert [cut.cut for cut in cuts_at(wrong, 0.9)] == [NOTHING, NOTHING]
    assert [cut.kept for cut in cuts_at(wrong, 0.9)] == [0, 0]


def test_cuts_at__no_rows_at_all() -> None:
    none = np.empty(0, dtype=np.int64)
    curves = precision_curves(np.empty(0), none, none, 3, positives=np.array([50, 5, 0]))
    assert [cut.cut for cut in cuts_at(curves, 0.5)] == [NOTHING] * 3


def test_estimate__closed_form_and_pool_mix() -> None:
    predicted = np.array([0, 0, 0, 0, 1, 1])
    labels = np.array([0, 0, 0, 1, 1, 0])
    keep = np.array([True, True, True, True, True, False])
    plain = estimate(keep, predicted, labels, 2, prior=0)
    assert plain.purity == pytest.approx(4 / 5)
    assert plain.utilization == pytest.approx(5 / 6)
    assert plain.kept.tolist() == [4, 1]
    mixed = estimate(keep, predicted, labels, 2, prior=0, mix=np.array([100, 300]))
    assert mixed.purity == pytest.approx((100 * 3 / 4 + 300 * 1.0) / 400)
    shrunk = estimate(keep, predicted, labels, 2, prior=4, mix=np.array([0, 10]))
    assert shrunk.purity == pytest.approx((1 + 4 * 0.8) / (1 + 4))


def test_estimate__nothing_kept() -> None:
    none = estimate(np.zeros(3, dtype=bool), np.arange(3), np.arange(3), 3, mix=np.zeros(3))
    assert (none.purity, none.utilization) == (0.0, 0.0)


def test_gaussian_weight__formula_and_bounds() -> None:
    weight = gaussian_weight(np.array([0.9, 0.7, 0.5, 0.0]), mean=0.7, variance=0.04)
    assert weight[:2].tolist() == [1, 1]
    assert weight[2] == pytest.approx(math.exp(-(0.2**2) / (2 * 0.04 / 4)))
    assert (gaussian_weight(np.array([0.1]), 0.9, 0.0) > 0).all()
