"""Proves herding and k-center against brute force, and what happens with few faces."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.distillers.coresets import choose, herding, k_center
from pipeline.errors import LabelError

RNG = np.random.default_rng(0)


def points(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_herding__is_the_greedy_choice(seed: int) -> None:
    x = points(12, seed)
    chosen: list[int] = []
    for _ in range(5):
        left = [i for i in range(12) if i not in chosen]
        gaps = [np.linalg.norm(x[[*chosen, i]].mean(0) - x.mean(0)) for i in left]
        chosen.append(left[int(np.argmin(gaps))])
    assert herding(x, 5, RNG).tolist() == chosen


@pytest.mark.parametrize("seed", range(3))
def test_k_center__is_farthest_first(seed: int) -> None:
    x = points(12, seed)
    chosen = [int(np.linalg.norm(x - x.mean(0), axis=1).argmin())]
    for _ in range(4):
        gaps = [min(np.linalg.norm(x[i] - x[j]) for j in chosen) for i in range(12)]
        chosen.append(int(np.argmax(gaps)))
    assert k_center(x, 5, RNG).tolist() == chosen


def test_k_center__copies_come_once_each() -> None:
    x = np.ones((4, 5), np.float32)
    assert sorted(k_center(x, 4, RNG).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["random", "herding", "k_center"])
def test_choose__class_after_class_and_again_where_there_are_few(method: str) -> None:
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 2])
    rows = choose(method, labels, points(8, 1), 3, 3, np.random.default_rng(1))
    assert labels[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(rows[:3])) == 3
    assert set(rows[6:]) == {7}


def test_choose__a_class_without_faces_is_an_error() -> None:
    with pytest.raises(LabelError, match="class 1 has no face"):
        choose("random", np.array([0, 0]), None, 2, 1, np.random.default_rng(0))
