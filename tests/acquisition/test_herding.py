"""Proves the lazy greedy of both herdings against brute force, and why it may be lazy."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.acquisition import herding
from pipeline.acquisition.herding import max_herding, uncertainty_herding
from pipeline.acquisition.interface import Pool
from pipeline.errors import ConfigError
from pipeline.similarity import unit

from .pools import blobs


def dense_kernel(pool: Pool, sigma: float) -> np.ndarray:
    assert pool.embeddings is not None
    x = unit(pool.embeddings).astype(np.float64)
    return np.exp(-((x[:, None] - x[None]) ** 2).sum(axis=2) / sigma**2)


def all_gains(kernel: np.ndarray, weight: np.ndarray, centers: list[int]) -> np.ndarray:
    """Gain (N,) of every face, term by term from the definition."""
    covered = kernel[:, centers].max(axis=1) if centers else np.zeros(len(kernel))
    return (weight[:, None] * np.maximum(kernel - covered[:, None], 0)).mean(axis=0)


def brute_force(pool: Pool, budget: int, sigma: float, weight: np.ndarray) -> list[int]:
    kernel = dense_kernel(pool, sigma)
    labeled = np.flatnonzero(pool.labeled).tolist()
    chosen: list[int] = []
    while len(chosen) < budget:
        gain = all_gains(kernel, weight, labeled + chosen)
        gain[labeled + chosen] = -1
        # Two faces that resemble each other and nobody else gain exactly the same.
        equal = gain >= gain.max() - max(1e-5 * gain.max(), 1e-6 * max(1, 2 / sigma**2) / len(gain))
        chosen.append(int(np.flatnonzero(equal)[0]))
    return chosen


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("labeled", [0, 8])
@pytest.mark.parametrize("share", [1, 64, 1e9])  # listed at once, later, never
def test_max_herding__is_the_brute_force_greedy(
    sigma: float, labeled: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herding, "_SHARE", share)
    monkeypatch.setattr(herding, "_REFRESHED", 5)
    monkeypatch.setattr(herding, "_TILE", 23)
    pool = blobs(labeled=labeled)
    chosen = max_herding(pool, 30, np.random.default_rng(0), sigma=sigma)
    assert chosen.tolist() == brute_force(pool, 30, sigma, np.ones(60))


@pytest.mark.parametrize("share", [1, 64, 1e9])
def test_uncertainty_herding__is_the_brute_force_greedy(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herding, "_SHARE", share)
    pool = blobs()
    assert pool.probs is not None
    ordered = np.sort(pool.probs, axis=1)
    weight = 1 - (ordered[:, -1] - ordered[:, -2])
    chosen = uncertainty_herding(pool, 30, np.random.default_rng(0))
    assert chosen.tolist() == brute_force(pool, 30, 1.0, weight)
    assert chosen.tolist() != max_herding(pool, 30, np.random.default_rng(0)).tolist()


def test_max_herding__goes_over_to_the_list_on_a_larger_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[int] = []
    listed = herding._Herd._choose_listed

    def noted(herd: herding._Herd, budget: int) -> None:
        begun.append(len(herd.chosen))
        listed(herd, budget)

    monkeypatch.setattr(herding._Herd, "_choose_listed", noted)
    pool = blobs(500, 5)
    chosen = max_herding(pool, 90, np.random.default_rng(0))
    assert len(begun) == 1
    assert 0 < begun[0] < 80
    assert chosen.tolist() == brute_force(pool, 90, 1.0, np.ones(500))


def test_gain__of_no_face_ever_rises() -> None:
    # What makes stale gains upper bounds: with more centers every gain is as large or smaller.
    pool = blobs()
    kernel, rng = dense_kernel(pool, 1.0), np.random.default_rng(0)
    weight = rng.random(60)
    for _ in range(50):
        more = rng.permutation(60)[:20].tolist()
        fewer = more[: rng.integers(1, 20)]
        after, before = all_gains(kernel, weight, more), all_gains(kernel, weight, fewer)
        assert (after <= before + 1e-12).all()
        assert (after < before).any()


def test_max_herding__computes_few_gains_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(herding, "_SHARE", 1e9)
    monkeypatch.setattr(herding, "_REFRESHED", 8)
    refresh = herding._Herd._refresh
    computed: list[int] = []

    def counted(herd: herding._Herd, rows: np.ndarray) -> None:
        computed.append(len(rows))
        refresh(herd, rows)

    monkeypatch.setattr(herding._Herd, "_refresh", counted)
    max_herding(blobs(500, 0), 60, np.random.default_rng(0))
    assert computed[0] == 500
    # the plain greedy computes about 500 again for each of the 59 that follow
    assert sum(computed[1:]) < 500 * 59 / 4


def test_max_herding__copies_come_after_everything_else() -> None:
    pool = blobs(20, 2)
    assert pool.embeddings is not None
    tripled = Pool(np.tile(pool.labeled, 3), embeddings=np.tile(pool.embeddings, (3, 1)))
    chosen = max_herding(tripled, 20, np.random.default_rng(0), sigma=0.5)[:18] % 20
    assert sorted(chosen.tolist()) == np.flatnonzero(~pool.labeled).tolist()


def test_max_herding__a_row_of_zeros_is_orthogonal_to_all() -> None:
    pool = blobs()
    assert pool.embeddings is not None
    x = np.concatenate([pool.embeddings, np.zeros((60, 1), np.float32)], axis=1)
    zero = int(np.flatnonzero(~pool.labeled)[3])
    x[zero] = 0
    found = max_herding(replace(pool, embeddings=x), 52, np.random.default_rng(0), sigma=0.3)
    x[zero, -1] = 1
    own = max_herding(replace(pool, embeddings=x), 52, np.random.default_rng(0), sigma=0.3)
    # A face that does not even resemble itself is worth less than one that does.
    assert found.tolist().index(zero) > own.tolist().index(zero)
    others = [row for row in own.tolist() if row != zero]
    assert [row for row in found.tolist() if row != zero] == others


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_max_herding__sigma_is_above_zero(sigma: float) -> None:
    with pytest.raises(ConfigError, match=f"sigma is {sigma}, expected above 0"):
        max_herding(blobs(), 3, np.random.default_rng(0), sigma=sigma)
