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


def test_stable_hash__is_fnv_with_a_final_mix() -> None:
    rng = np.random.default_rng(0)
    lengths = [*([12] * 50), *rng.integers(0, 40, 150)]
    ids = ["".join(map(chr, rng.integers(32, 900, n))) for n in lengths]
    mask = 2**64 - 1

    def slow(text: str) -> int:
        state = 0xCBF29CE484222325
        for byte in text.encode():
            state = (state ^ byte) * 0x100000001B3 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        return state ^ state >> 31

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK", 64)
        assert stable_hash(pa.array(ids)).tolist() == [slow(text) for text in ids]


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


@given(
    seed=st.integers(0, 2**32 - 1),
    workers=st.integers(1, 3),
    compact=st.sampled_from([1, 20, 1000]),
)
def test_caps__equals_sorting_whatever_the_chunks(seed: int, workers: int, compact: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, 90)
    near = 0.5 + rng.integers(0, 9, 90) / 1e6  # several scores share a bin
    scores = np.where(rng.random(90) < 0.5, near, rng.random(90)).astype(np.float32)
    ties = rng.permutation(90).astype(np.uint64)
    limits = np.array([rng.integers(0, 40), rng.choice([1000, Caps.UNLIMITED]), 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COMPACT_ROWS", compact)
        some = [Caps(limits) for _ in range(workers)]
        for i, part in enumerate(np.array_split(rng.permutation(90), 5)):
            some[i % workers].add(codes[part], scores[part], ties[part])
        caps = some.pop()
        for other in some:
            caps.merge(other)
        caps.close()
    kept = caps.keep(codes, scores, ties)
    assert (kept == caps.keep(codes, scores, lambda tied: ties[tied])).all()
    for code, limit in enumerate(limits):
        own = codes == code
        expected = _top(codes[own], scores[own], ties[own], int(limit)) if limit else False
        assert (kept[own] == expected).all()


def test_caps__holds_no_more_than_can_be_the_last_of_a_class() -> None:
    rng = np.random.default_rng(0)
    caps = Caps(np.array([100, Caps.UNLIMITED]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COMPACT_ROWS", 500)
        for _ in range(100):
            codes = rng.integers(0, 2, 1000)
            scores = rng.random(1000).astype(np.float32)
            caps.add(codes, scores, rng.integers(0, 2**60, 1000).astype(np.uint64))
            assert sum(len(part[0]) for part in caps._parts) < 1500
    caps.close()
    assert len(caps._parts[0][0]) < 110


def test_caps__without_excess_keeps_all() -> None:
    caps = Caps(np.array([3]))
    scores = np.array([0.1, 0.2, 0.3], np.float32)
    caps.add(np.zeros(3, np.int64), scores, np.arange(3, dtype=np.uint64))
    caps.close()
    assert caps.keep(np.zeros(3, np.int64), scores, np.zeros(3, np.uint64)).all()


def test_best__merged_and_carried() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 5, 200).astype(np.uint64)
    scores = (rng.integers(0, 9, 200) / 8).astype(np.float32)
    ties = rng.permutation(200).astype(np.uint64)
    some = [Best(3), Best(3), Best(3)]
    for i, part in enumerate(np.array_split(rng.permutation(200), 7)):
        some[i % 2].add(keys[part], scores[part], ties[part], part)
    whole = some.pop()
    for other in some:
        whole.merge(other)
    kept = _top(keys, scores, ties, 3)
    found_keys, found_scores, found_ties, rows = whole.rows()
    assert sorted(rows) == np.flatnonzero(kept).tolist()
    assert (found_keys == keys[rows]).all()
    assert (found_scores == scores[rows]).all()
    assert (found_ties == ties[rows]).all()
    assert (whole.keep(keys, scores, lambda tied: ties[tied]) == kept).all()


def test_best__without_rows() -> None:
    best = Best(2)
    none = np.zeros(0, np.uint64)
    best.add(none, np.zeros(0, np.float32), none)
    assert [len(column) for column in best.rows()] == [0, 0, 0]
    assert len(best.keep(none, np.zeros(0, np.float32), none)) == 0
