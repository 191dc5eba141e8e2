"""Proves the lazy k-centers against the plain greedy, whatever the size of its front."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.acquisition import diversity
from pipeline.acquisition.diversity import coreset
from pipeline.acquisition.interface import Pool

from .pools import blobs


def plain(x: np.ndarray, labeled: np.ndarray, budget: int, first: int | None) -> list[int]:
    dense = np.linalg.norm(x[:, None].astype(np.float64) - x[None], axis=2)
    centers = np.flatnonzero(labeled).tolist()
    chosen = [] if first is None else [first]
    while len(chosen) < budget:
        apart = dense[:, centers + chosen].min(axis=1)
        apart[centers + chosen] = -1
        chosen.append(int(apart.argmax()))
    return chosen


@pytest.mark.parametrize("front", [1, 7, 4096])
@pytest.mark.parametrize("labeled", [0, 1, 8])
def test_coreset__is_the_plain_greedy(
    front: int, labeled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "_FRONT", front)
    monkeypatch.setattr(diversity, "_FIRST", 3)
    pool = blobs(labeled=labeled)
    assert pool.embeddings is not None
    chosen = coreset(pool, 30, np.random.default_rng(5)).tolist()
    first = None if labeled else int(np.random.default_rng(5).integers(60))
    assert chosen == plain(pool.embeddings, pool.labeled, 30, first)


@pytest.mark.parametrize("front", [2, 4096])
def test_coreset__ties_go_to_the_lowest_row(front: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_FRONT", front)
    # The origin is labeled; four corners are equally far, then their copies equally near.
    corners = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    pool = Pool(np.arange(15) == 0, embeddings=np.tile(corners, (3, 1)))
    chosen = coreset(pool, 14, np.random.default_rng(0)).tolist()
    assert chosen == [1, 2, 3, 4, *range(5, 15)]


def test_coreset__a_tie_with_a_lower_row_outside_the_front_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diversity, "_FRONT", 3)
    # Squared distances to the origin: 25, 25, 100, 65. The front is rows 1, 3, 4; once row 3 is
    # chosen row 4 is left with 25 as well, and row 2, outside, comes before it.
    x = np.array([[0, 0], [0, 5], [-5, 0], [10, 0], [7, 4]], np.float32)
    chosen = coreset(Pool(np.arange(5) == 0, embeddings=x), 4, np.random.default_rng(0))
    assert chosen.tolist() == [3, 1, 2, 4]


def test_coreset__copies_come_after_everything_else() -> None:
    pool = blobs(20, 2)
    assert pool.embeddings is not None
    tripled = Pool(np.tile(pool.labeled, 3), embeddings=np.tile(pool.embeddings, (3, 1)))
    chosen = coreset(tripled, 30, np.random.default_rng(0)) % 20
    assert sorted(chosen[:18].tolist()) == np.flatnonzero(~pool.labeled).tolist()


def test_coreset__candidates_choose_among_a_sample_and_see_all_labels() -> None:
    pool = blobs()
    assert pool.embeddings is not None
    rng = np.random.default_rng(3)
    sample = rng.choice(np.flatnonzero(~pool.labeled), 20, replace=False)
    part = np.sort(np.concatenate([sample, np.flatnonzero(pool.labeled)]))
    expected = part[plain(pool.embeddings[part], pool.labeled[part], 10, None)]
    chosen = coreset(pool, 10, np.random.default_rng(3), candidates=20)
    assert chosen.tolist() == expected.tolist()


def test_coreset__half_precision_is_read_as_it_is() -> None:
    pool = blobs()
    assert pool.embeddings is not None
    half = replace(pool, embeddings=pool.embeddings.astype(np.float16))
    assert half.embeddings is not None
    chosen = coreset(half, 20, np.random.default_rng(0)).tolist()
    assert chosen == plain(half.embeddings.astype(np.float64), half.labeled, 20, None)
