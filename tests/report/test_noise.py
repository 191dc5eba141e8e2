"""Label noise is counted as by hand; tests of what is read are in test_collect.py."""

from __future__ import annotations

import numpy as np

from pipeline.report.noise import confident


def _plainly(probs: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """Confident learning, face by face."""
    classes = probs.shape[1]
    beliefs: list[list[float]] = [[] for _ in range(classes)]
    for row, label in zip(probs, labels, strict=True):
        beliefs[label].append(row[label])
    cuts = [np.mean(b) if b else 2.0 for b in beliefs]
    suggested, counts = [], [[0] * classes for _ in range(classes)]
    for row, label in zip(probs, labels, strict=True):
        able = [(p, -j) for j, p in enumerate(row) if p >= cuts[j]]
        best = -max(able)[1] if able else -1
        suggested.append(best)
        if able:
            counts[label][best] += 1
    return suggested, counts


def test_confident__equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.5] * 5, 300)
    labels = rng.integers(0, 4, 300)  # nobody carries the last label
    suggested, counts = confident(probs, labels)
    wanted, table = _plainly(probs, labels)
    assert suggested.tolist() == wanted
    assert counts.tolist() == table
    assert 0 < (suggested == -1).sum() < 300
    assert not (suggested == 4).any()


def test_confident__finds_swapped_labels() -> None:
    """Of 200 faces 20 carry the other label; the model knows better."""
    truth = np.repeat([0, 1], 100)
    labels = truth.copy()
    labels[:10], labels[100:110] = 1, 0
    sure = 0.9 + 0.001 * np.arange(200) % 0.05
    probs = np.where(truth[:, None] == [0, 1], sure[:, None], 1 - sure[:, None])
    suggested, counts = confident(probs, labels)
    wrong = np.flatnonzero((suggested >= 0) & (suggested != labels))
    assert wrong.tolist() == [*range(10), *range(100, 110)]
    assert counts.tolist() == [[90, 10], [10, 90]]
