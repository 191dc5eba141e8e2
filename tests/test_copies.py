"""Proves that near copies are those of brute force, for any order of rows."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import copies
from pipeline.copies import components, near_pairs
from pipeline.similarity import unit

CUT = 0.95


def planted(rng: np.random.Generator, rows: int, width: int = 32) -> np.ndarray:
    """Rows around a few centers, a third of them copies at cosines on both sides of the cut."""
    centers = rng.normal(size=(5, width))
    x = unit(centers[rng.integers(0, 5, rows)] + 1.2 * rng.normal(size=(rows, width)))
    for i in rng.choice(rows, rows // 3, replace=False):
        of = x[rng.integers(rows)].astype(np.float64)
        cosine = rng.choice([1.0, 0.999, 0.97, 0.955, 0.945, 0.9])
        away = rng.normal(size=width)
        away -= away @ of * of / (of @ of)
        away /= np.linalg.norm(away)
        x[i] = cosine * of + np.sqrt(1 - cosine**2) * away
    return unit(x).astype(np.float16)


def brute_force(x: np.ndarray) -> set[frozenset[int]]:
    cosine = np.round(x.astype(np.float64) @ x.astype(np.float64).T, copies.DECIMALS)
    return {frozenset(pair) for pair in np.argwhere(np.triu(cosine >= CUT, 1)).tolist()}


def groups_of(pairs: set[frozenset[int]], keys: np.ndarray) -> list[int]:
    """First member by key of each row's component, by spreading until nothing changes."""
    first = list(range(len(keys)))
    changed = True
    while changed:
        changed = False
        for a, b in map(sorted, pairs):
            best = min(first[a], first[b], key=lambda i: keys[i])
            changed |= first[a] != best or first[b] != best
            first[a] = first[b] = best
    return first


def near_copies(x: np.ndarray, keys: np.ndarray, **asked: int | None) -> np.ndarray:
    """First member by key of each row's group of copies."""
    order, place = np.argsort(keys), np.argsort(np.argsort(keys))
    return order[components(len(x), place[near_pairs(x, keys, CUT, **asked)])][place]


@settings(max_examples=25, deadline=None)
@example(seed=65536, cells=4)  # three rows that are not equal
@given(seed=st.integers(0, 2**32 - 1), cells=st.sampled_from([1, 4, None]))
def test_near_pairs__equals_brute_force_where_every_cell_is_looked_at(
    seed: int, cells: int | None
) -> None:
    rng = np.random.default_rng(seed)
    x = planted(rng, int(rng.integers(1, 150)))
    keys = rng.permutation(10**6)[: len(x)].astype(np.uint64)
    expected = brute_force(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_BLOCK", 37)
        patch.setattr(copies, "_TILE", 16)
        patch.setattr(copies, "_PAIRS", 5)
        patch.setattr(copies, "_TRAINED_ON", 8)
        found = near_pairs(x, keys, CUT, probes=99, cells=cells)
        groups = near_copies(x, keys, probes=99, cells=cells)
    assert len({tuple(pair) for pair in found.tolist()}) == len(found)
    assert (keys[found[:, 0]] < keys[found[:, 1]]).all()
    equal = {frozenset(p) for p in expected if (x[min(p)] == x[max(p)]).all()}
    told = {frozenset(pair) for pair in found.tolist()}
    assert told <= expected
    assert groups.tolist() == groups_of(expected, keys)
    if not equal:
        assert told == expected


def test_near_pairs__order_of_rows_does_not_count() -> None:
    rng = np.random.default_rng(2)
    x = planted(rng, 3000)
    keys = rng.integers(0, 2**63, len(x)).astype(np.uint64)
    groups = near_copies(x, keys)
    shuffled = rng.permutation(len(x))
    again = near_copies(x[shuffled], keys[shuffled])
    assert (keys[shuffled][again] == keys[groups][shuffled]).all()
    pairs = near_pairs(x, keys, CUT, probes=8, cells=24)
    found = {frozenset(pair) for pair in pairs.tolist()}
    expected = brute_force(x)
    _, first = np.unique(x[np.argsort(keys)].view(np.uint16), axis=0, return_index=True)
    first = set(np.argsort(keys)[first].tolist())  # of rows equal to the bit
    distinct = {pair for pair in expected if pair <= first}
    assert len(distinct) > 300
    assert len(found & distinct) >= 0.98 * len(distinct)
    assert found <= expected


def test_near_pairs__a_million_times_the_same_picture_stays_linear() -> None:
    row = unit(np.random.default_rng(0).normal(size=(1, 64))).astype(np.float16)
    x = np.repeat(row, 50_000, axis=0)
    keys = np.random.default_rng(1).permutation(len(x)).astype(np.uint64)
    assert (near_copies(x, keys) == np.argmin(keys)).all()
    assert len(near_pairs(x, keys, CUT)) == len(x) - 1


def test_first_equal__equal_hashes_of_other_rows_stay_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = unit(np.random.default_rng(0).normal(size=(40, 8))).astype(np.float16)
    x[30] = x[3]
    order = np.arange(40)
    found = copies._first_equal(x, order)
    assert np.flatnonzero(found != order).tolist() == [30]
    assert found[30] == 3
    unique = np.unique
    collide = lambda hashes, **more: unique(np.zeros_like(hashes), **more)  # noqa: E731
    monkeypatch.setattr(np, "unique", collide)
    assert (copies._first_equal(x, order) == order).all()


def test_components__smallest_member() -> None:
    pairs = np.array([[3, 1], [4, 5], [5, 3]])
    assert components(7, pairs).tolist() == [0, 1, 2, 1, 1, 1, 6]
    assert components(2, np.zeros((0, 2), np.int64)).tolist() == [0, 1]
