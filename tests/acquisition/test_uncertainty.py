"""Proves every score against a plain loop or by hand, and which faces it prefers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.acquisition import uncertainty
from pipeline.acquisition.interface import Acquisition, Pool

from .pools import blobs


def plain_entropy(row: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in row.tolist() if p > 0)


def plain_margin(row: np.ndarray) -> float:
    best, second = sorted(row.tolist(), reverse=True)[:2]
    return best - second


SCORES = [  # (function, score of a row of probs; the lowest are taken)
    (uncertainty.entropy, lambda row: -plain_entropy(row)),
    (uncertainty.margin, plain_margin),
    (uncertainty.least_confidence, max),
]


@pytest.mark.parametrize(("function", "score"), SCORES)
def test_ranking__is_the_plain_loops(function: Acquisition, score) -> None:
    pool = blobs()
    assert pool.probs is not None
    keyed = sorted((score(pool.probs[row]), row) for row in range(60) if not pool.labeled[row])
    assert function(pool, 20, np.random.default_rng(0)).tolist() == [row for _, row in keyed[:20]]


@pytest.mark.parametrize(("function", "score"), SCORES)
def test_ranking__ties_go_to_the_lowest_row(function: Acquisition, score) -> None:
    probs = np.tile([0.7, 0.2, 0.1], (9, 1))
    probs[[6, 2]] = [0.4, 0.35, 0.25]
    labeled = np.zeros(9, bool)
    labeled[0] = True
    chosen = function(Pool(labeled, probs=probs), 4, np.random.default_rng(0))
    assert chosen.tolist() == [2, 6, 1, 3]


def test_entropies__zero_probabilities_count_nothing() -> None:
    probs = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    assert uncertainty.entropies(probs).tolist() == pytest.approx([0, math.log(2), math.log(3)])


def test_mutual_information__sure_and_split_beats_unsure_and_agreed() -> None:
    passes = np.array([[[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]])
    found = uncertainty.mutual_information(passes)
    assert found.tolist() == pytest.approx([math.log(2), 0, 0])


def test_bald__is_the_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "_BLOCK", 7)
    pool = blobs()
    assert pool.passes is not None
    keyed = []
    for row in np.flatnonzero(~pool.labeled).tolist():
        own = pool.passes[:, row]
        each = sum(plain_entropy(p) for p in own) / len(own)
        keyed.append((each - plain_entropy(own.mean(axis=0)), row))
    chosen = uncertainty.bald(pool, 20, np.random.default_rng(0))
    assert chosen.tolist() == [row for _, row in sorted(keyed)[:20]]


def test_random__every_unlabeled_face_as_often_and_in_any_place() -> None:
    pool, rng = replace(blobs(), labeled=np.arange(60) >= 6), np.random.default_rng(0)
    places = np.zeros((6, 3))
    for _ in range(3000):
        places[uncertainty.random(pool, 3, rng), np.arange(3)] += 1
    # 500 expected each, standard deviation 20
    assert np.abs(places - 500).max() < 85
