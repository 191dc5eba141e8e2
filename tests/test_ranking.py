"""Proves that the best rows per key and class are the sorted ones, in any order of chunks."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ranking
from pipeline.ranking import Best, Caps, level, stable_hash


def test_stable_hash__is_of_the_bytes_only() -> None:
    ids = ["a", "ab", "", "face/0#12", "\u00e9", "a"]
    whole = stable_hash(pa.array(ids))
    sliced = stable_hash(pa.chunked_array([["x"], ids[:3], ids[3:]]).slice(1))
    assert (whole == sliced).all()
    assert len(set(whole.tolist())) == 5
    assert whole[0] == stable_hash(pa.array(["a"], pa.large_string()))[0]
    assert len(stable_hash(pa.array([], pa.string()))) == 0


def test_stable_hash__spreads() -> None:
    hashes = stable_hash(pa.array([f"shard-0#{i}" for i in range(20_000)]))
    assert len(np.unique(hashes)) == 20_000
    share = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16) / 20_000
    assert share == pytest.approx(1 / 16, abs=0.01)


def test_level__keeps_the_order() -> None:
    scores = np.sort(np.random.default_rng(0).random(1000).astype(np.float32))
    assert (np.diff(level(scores)) >= 0).all()
    assert level(np.array([0, 1], np.float32)).tolist() == [0, 65_535]


def _top(keys: np.ndarray, scores: np.ndarray, ties: np.ndarray, size: int) -> np.ndarray:
    """Slow reference: sort each key's rows and take the first."""
    keep = np.zeros(len(keys), dtype=bool)
    for key in np.unique(keys):
        own = [i for i in range(len(keys)) if keys[i] == key]
        for i in sorted(own, key=lambda i: (-scores[i], ties[i]))[:size]:
            keep[i] = True
    return keep


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 5),
    compact=st.sampled_from([1, 7, 1000]),
)
def test_best__equals_sorting_whatever_the_chunks(seed: int, size: int, compact: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 6, 60).astype(np.uint64)
    scores = (rng.integers(0, 5, 60) / 4).astype(np.float32)  # many ties
    ties = rng.permutation(60).astype(np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COMPACT_ROWS", compact)
        best = Best(size)
        for part in rng.permutation(np.array_split(np.arange(60), 6)):
            best.add(keys[part], scores[part], ties[part])
        kept = best.keep(keys, scores, ties)
    assert (kept == _top(keys, scores, ties, size)).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_caps__equals_sorting_whatever_the_chunks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, 90)
    near = 0.5 + rng.integers(0, 9, 90) / 1e6  # several scores share a bin
    scores = np.where(rng.random(90) < 0.5, near, rng.random(90)).astype(np.float32)
    ties = rng.permutation(90).astype(np.uint64)
    limits = np.array([rng.integers(0, 40), 1000, 0])
    caps = Caps(limits)
    parts = np.array_split(rng.permutation(90), 5)
    for part in parts:
        caps.count(codes[part], scores[part])
    caps.close()
    for part in reversed(parts):
        inside = part[caps.boundary(codes[part], scores[part])]
        caps.collect(codes[inside], scores[inside], ties[inside])
    kept = caps.keep(codes, scores, ties)
    for code, limit in enumerate(limits):
        own = codes == code
        expected = _top(codes[own], scores[own], ties[own], int(limit)) if limit else False
        assert (kept[own] == expected).all()


def test_caps__without_excess_needs_no_second_pass() -> None:
    caps = Caps(np.array([3]))
    caps.count(np.zeros(3, np.int64), np.array([0.1, 0.2, 0.3], np.float32))
    assert not caps.close()
