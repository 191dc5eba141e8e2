"""Proves that a head is the one of scikit-learn, from any start, and weights count as faces."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from pipeline.heads import SCALE, fit_head, named

CLASSES = 3


def faces(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    x = rng.normal(size=(n, 6)) + 2.5 * np.eye(CLASSES, 6)[labels]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def test_fit_head__is_the_head_of_scikit_learn() -> None:
    x, labels = faces(400, 0)
    l2 = 1e-3
    ours = fit_head(x, labels, np.ones(400), CLASSES, l2)
    slow = LogisticRegression(C=1 / (400 * l2), tol=1e-8, max_iter=5000)
    slow.fit(x.astype(np.float64) * SCALE, labels)
    centered = ours - ours.mean(0)  # a softmax does not feel what all classes share
    np.testing.assert_allclose(centered[:, :-1], slow.coef_, atol=0.01)
    new, truth = faces(2000, 1)
    assert (named(ours, new) == slow.predict(new * SCALE)).mean() > 0.995
    assert (named(ours, new) == truth).mean() > 0.75


def test_fit_head__a_start_changes_nothing_but_the_time() -> None:
    x, labels = faces(400, 0)
    cold = fit_head(x, labels, np.ones(400), CLASSES, 1e-3)
    start = fit_head(x[:200], labels[:200], np.ones(200), CLASSES, 1e-3)
    warm = fit_head(x, labels, np.ones(400), CLASSES, 1e-3, start)
    assert (warm == fit_head(x, labels, np.ones(400), CLASSES, 1e-3, start)).all()
    new, _ = faces(2000, 1)
    assert (named(cold, new) == named(warm, new)).mean() > 0.995


def test_fit_head__a_weight_of_two_is_a_face_twice() -> None:
    x, labels = faces(60, 0)
    twice = np.where(np.arange(60) < 20, 2.0, 1.0)
    rows = np.repeat(np.arange(60), twice.astype(int))
    weighted = fit_head(x, labels, twice, CLASSES, 1e-2)
    repeated = fit_head(x[rows], labels[rows], np.ones(80), CLASSES, 1e-2)
    np.testing.assert_allclose(weighted, repeated, atol=0.02)


def test_fit_head__a_class_without_a_face_is_never_named() -> None:
    x, labels = faces(200, 0)
    two = labels < 2
    head = fit_head(x[two], labels[two], np.ones(two.sum()), CLASSES, 1e-3)
    assert set(named(head, x)) == {0, 1}
