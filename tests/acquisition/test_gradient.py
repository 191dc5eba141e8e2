"""Proves BADGE's draws against exact probabilities and GLISTER against autograd and plain loops."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.acquisition import gradient
from pipeline.acquisition.gradient import badge, glister
from pipeline.acquisition.interface import Pool
from pipeline.errors import ConfigError

from .pools import blobs, softmax


def gradients(pool: Pool) -> np.ndarray:
    """(N, K D): (p - onehot(argmax p)) h^T of every face, written out."""
    assert pool.probs is not None
    assert pool.embeddings is not None
    a = pool.probs - np.eye(pool.probs.shape[1])[pool.probs.argmax(axis=1)]
    return (a[:, :, None] * pool.embeddings[:, None, :]).reshape(len(a), -1)


def next_draw(g: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Probability of each row to be drawn next."""
    d = ((g[:, None] - g[None, chosen]) ** 2).sum(axis=2).min(axis=1)
    return d / d.sum()


@pytest.mark.parametrize("proposals", [2, 64])
def test_badge__draws_with_the_probabilities_of_k_means_plus_plus(
    proposals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With two proposals at once the pool is often brought up to date, with 64 hardly ever: then
    # nearly every third face is drawn from weights that are out of date.
    monkeypatch.setattr(gradient, "_DRAWS", proposals)
    pool = blobs(9, 3, seed=4)
    open_rows = np.flatnonzero(~pool.labeled)
    g, rng, runs = gradients(pool)[open_rows], np.random.default_rng(0), 1500
    found = Counter(tuple(badge(pool, 3, rng).tolist()) for _ in range(runs))
    first = int((g**2).sum(axis=1).argmax())
    expected = {}
    for second in range(6):
        for third in range(6):
            p = next_draw(g, [first])[second]
            if p > 1e-12:
                p *= next_draw(g, [first, second])[third]
            expected[tuple(open_rows[[first, second, third]].tolist())] = p
    assert sum(expected.values()) == pytest.approx(1)
    for triple, p in expected.items():
        assert abs(found[triple] - runs * p) < 4.5 * np.sqrt(runs * p * (1 - p)) + 1, triple
    assert set(found) <= {triple for triple, p in expected.items() if p > 1e-9}


def test_badge__copies_of_gradients_come_last_and_then_at_random() -> None:
    pool = blobs(10, 1)
    assert pool.embeddings is not None
    assert pool.probs is not None
    tripled = Pool(
        np.tile(pool.labeled, 3),
        embeddings=np.tile(pool.embeddings, (3, 1)),
        probs=np.tile(pool.probs, (3, 1)),
    )
    rng = np.random.default_rng(0)
    ends = set()
    for _ in range(20):
        chosen = badge(tripled, 27, rng)
        assert sorted((chosen[:9] % 10).tolist()) == np.flatnonzero(~pool.labeled).tolist()
        assert len(set(chosen.tolist())) == 27
        ends.add(int(chosen[-1]))
    assert len(ends) > 5


def plain_glister(pool: Pool, budget: int, eta: float, lam: float) -> list[int]:
    """Autograd for every gradient, a real last layer that is really moved."""
    assert pool.embeddings is not None
    assert pool.probs is not None
    assert pool.labels is not None
    h = torch.from_numpy(pool.embeddings).double()
    h = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], dim=1)
    # The last layer that gives these logits; see `linear_pool`.
    theta = LAYER.clone()
    codes = torch.from_numpy(pool.probs.argmax(axis=1))
    codes[pool.labeled] = torch.from_numpy(pool.labels[pool.labeled])

    def slope(rows: list[int] | slice, at: torch.Tensor, mean: bool) -> torch.Tensor:
        leaf = at.clone().requires_grad_()
        how = "mean" if mean else "sum"
        loss = F.cross_entropy(h[rows] @ leaf.T, codes[rows], reduction=how)
        return torch.autograd.grad(loss, leaf)[0]

    each = torch.stack([slope([row], theta, False) for row in range(len(h))])
    moved = theta - eta * each[torch.from_numpy(pool.labeled)].sum(0)
    chosen: list[int] = []
    for _ in range(budget):
        goal = slope(slice(None), moved, True)
        best, best_gain = -1, -np.inf
        for row in range(len(h)):
            if pool.labeled[row] or row in chosen:
                continue
            alike = sum(float(torch.exp(-(each[row] - each[s]).square().sum() / 2)) for s in chosen)
            gain = float((each[row] * goal).sum()) - lam * alike
            if gain > best_gain:
                best, best_gain = row, gain
        chosen.append(best)
        moved = moved - eta * each[best]
    return chosen


LAYER = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 2


def linear_pool(labeled: int) -> Pool:
    """A pool whose probabilities are those of LAYER (K, D + 1) on its embeddings."""
    pool = blobs(labeled=labeled)
    assert pool.embeddings is not None
    h = np.concatenate([pool.embeddings.astype(np.float64), np.ones((60, 1))], axis=1)
    return replace(pool, probs=softmax(h @ LAYER.numpy().T))


@pytest.mark.parametrize("labeled", [0, 8])
@pytest.mark.parametrize(("eta", "lam"), [(0.01, 10.0), (0.1, 0.0), (0.01, 0.001)])
def test_glister__is_the_plain_greedy_with_autograd(labeled: int, eta: float, lam: float) -> None:
    pool = linear_pool(labeled)
    chosen = glister(pool, 12, np.random.default_rng(0), eta=eta, lam=lam)
    assert chosen.tolist() == plain_glister(pool, 12, eta, lam)


def test_glister__the_diversity_term_matters() -> None:
    pool, rng = linear_pool(8), np.random.default_rng(0)
    assert glister(pool, 12, rng, lam=0.0).tolist() != glister(pool, 12, rng).tolist()


def test_glister__labels_are_codes_of_the_classes_and_read_where_labeled_only() -> None:
    pool, rng = linear_pool(8), np.random.default_rng(0)
    assert pool.labels is not None
    elsewhere = np.where(pool.labeled, pool.labels, -1)
    assert (glister(replace(pool, labels=elsewhere), 5, rng) == glister(pool, 5, rng)).all()
    with pytest.raises(ConfigError, match=r"labels from -1 to -1, expected codes in \[0, 4\)"):
        glister(replace(pool, labels=np.full(60, -1)), 5, rng)
    with pytest.raises(ConfigError, match="glister needs labels"):
        glister(replace(pool, labels=None), 5, rng)
    nothing = replace(linear_pool(0), labels=None)
    assert len(glister(nothing, 5, rng)) == 5
