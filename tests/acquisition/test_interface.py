"""Proves what a pool refuses and how budgets and candidates are checked and drawn."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.acquisition.interface import (
    Pool,
    in_play,
    lowest,
    required,
    sampled,
    taken,
    unlabeled_rows,
)
from pipeline.errors import ConfigError

from .pools import blobs


def with_one(column: np.ndarray, value: float) -> np.ndarray:
    changed = column.copy()
    changed.flat[-1] = value
    return changed


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("embeddings", np.zeros((59, 8)), r"embeddings has shape \(59, 8\), expected \(60, any\)"),
        ("probs", np.full(60, 0.5), r"probs has shape \(60,\)"),
        ("passes", np.full((60, 4), 0.25), r"passes has shape"),
        ("labels", np.zeros(61, int), "labels has shape"),
        ("boundary", np.zeros((60, 1)), "boundary has shape"),
        ("labeled", np.zeros(60, int), "labeled is int64, expected bool"),
        ("embeddings", with_one(np.zeros((60, 8)), np.nan), "embeddings has values that are not"),
        ("embeddings", with_one(np.zeros((60, 8)), np.inf), "embeddings has values that are not"),
        ("boundary", with_one(np.full(60, np.inf), np.nan), "boundary has values that are not"),
        ("probs", np.zeros((60, 4)), "probs are no probabilities"),
        ("probs", with_one(np.full((60, 2), 0.5), -0.5), "probs are no probabilities"),
        ("probs", np.ones((60, 1)), "two classes or more"),
        ("passes", np.full((3, 60, 4), 0.5), "passes are no probabilities"),
    ],
)
def test_pool__refuses_in_one_line(column: str, value: np.ndarray, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        replace(blobs(), **{column: value})
    assert "\n" not in str(caught.value)


def test_pool__takes_half_precision_and_infinite_distances() -> None:
    pool = blobs()
    assert pool.probs is not None
    Pool(pool.labeled, probs=pool.probs.astype(np.float16), boundary=np.full(60, np.inf))


def test_required__names_the_function_and_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"^acquisition margin needs probs \(N, K\), which"):
        required(None, "margin", "probs (N, K)")
    column = np.ones(3)
    assert required(column, "margin", "probs") is column


@pytest.mark.parametrize("budget", [-1, 0, 53])
def test_unlabeled_rows__the_budget_has_bounds(budget: int) -> None:
    with pytest.raises(ConfigError, match=f"budget is {budget}, expected 1 to 52"):
        unlabeled_rows(blobs(), budget)


def test_unlabeled_rows__ascending_and_all() -> None:
    pool = blobs()
    rows = unlabeled_rows(pool, 52)
    assert rows.tolist() == [row for row in range(60) if not pool.labeled[row]]
    with pytest.raises(ConfigError, match="candidates is 9, expected the budget of 10 or more"):
        unlabeled_rows(pool, 10, candidates=9)


def test_sampled__ascending_without_repeats_and_every_row_as_likely() -> None:
    rows, rng = np.arange(10, 20), np.random.default_rng(0)
    counts = np.zeros(20)
    for _ in range(2000):
        drawn = sampled(rows, 3, rng)
        assert (np.diff(drawn) > 0).all()
        counts[drawn] += 1
    assert counts[:10].sum() == 0
    # 600 of 2000 expected, standard deviation 20
    assert np.abs(counts[10:] - 600).max() < 80
    for enough in (None, 10, 11):
        assert sampled(rows, enough, rng) is rows


def test_in_play__labeled_faces_stay() -> None:
    pool, rng = Pool(np.array([True, False, False, True, False])), np.random.default_rng(0)
    assert in_play(pool, 3, None, rng).tolist() == [0, 1, 2, 3, 4]
    rows = in_play(pool, 1, 1, rng)
    assert {0, 3} < set(rows.tolist())
    assert (len(rows), (np.diff(rows) > 0).all()) == (3, True)
    with pytest.raises(ConfigError, match="budget is 4, expected 1 to 3"):
        in_play(pool, 4, None, rng)
    assert pool.labeled.tolist() == [True, False, False, True, False]


def test_taken__copies_only_a_part() -> None:
    column = np.arange(5.0)
    assert taken(column, np.arange(5)) is column
    assert taken(column, np.array([1, 3])).tolist() == [1, 3]


def test_lowest__ties_go_to_the_lowest_row() -> None:
    scores, rows = np.array([2.0, 1.0, 1.0, 0.0, 1.0]), np.array([3, 5, 7, 8, 9])
    assert lowest(scores, rows, 3).tolist() == [8, 5, 7]
