"""Proves that likeness and the Hamming searches equal slow versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import likeness as alike
from pipeline.likeness import close_pairs, hamming_pairs, likeness, likeness_at


@pytest.mark.parametrize("mirrored", [False, True])
def test_likeness__matches_a_slow_correlation(mirrored: bool) -> None:
    rng = np.random.default_rng(3)
    own, others = rng.integers(0, 256, (2, 7, 256), dtype=np.uint8)
    kernel = np.array([0.25, 0.5, 0.25])

    def smooth(picture: np.ndarray) -> np.ndarray:
        padded = np.pad(picture.astype(float), 1, mode="edge")
        rows = np.apply_along_axis(np.convolve, 0, padded, kernel, "valid")
        return np.apply_along_axis(np.convolve, 1, rows, kernel, "valid")

    expected = []
    for a, b in zip(own.reshape(-1, 16, 16), others.reshape(-1, 16, 16), strict=True):
        first, second = smooth(a), smooth(b[:, ::-1] if mirrored else b)
        expected.append(
            max(
                np.corrcoef(
                    first[1:15, 1:15].ravel(), second[1 + y : 15 + y, 1 + x : 15 + x].ravel()
                )[0, 1]
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
            )
        )
    got = likeness(own, others, np.full(7, mirrored), (-1.0, 0.0, 1.0))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_hamming_pairs__equals_all_pairs() -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2**64, 300, dtype=np.uint64)
    queries = stored ^ (np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64))
    queries = np.tile(queries, 20)  # more than one block of queries
    distance = np.bitwise_count(queries[:, None] ^ stored[None])
    got = [np.stack(pair, 1) for pair in hamming_pairs(stored, queries, 20)]
    expected = {tuple(pair) for pair in np.argwhere(distance <= 20).tolist()}
    assert {tuple(pair) for pair in np.concatenate(got).tolist()} == expected


def test_close_pairs__misses_nothing_within_its_radius() -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2**64, 500, dtype=np.uint64)
    queries = stored.copy()
    for _ in range(alike.DUPLICATE_RADIUS):
        queries ^= np.uint64(1) << rng.integers(0, 64, 500, dtype=np.uint64)
    found = {tuple(p) for pair in close_pairs(stored, queries) for p in np.stack(pair, 1).tolist()}
    distance = np.bitwise_count(queries[:, None] ^ stored[None])
    assert found == {tuple(p) for p in np.argwhere(distance <= alike.DUPLICATE_RADIUS).tolist()}


def test_likeness_at__is_one_of_the_moves_that_likeness_tries() -> None:
    rng = np.random.default_rng(1)
    own, others = rng.integers(0, 256, (2, 6, 256), dtype=np.uint8)
    for mirrored in (np.zeros(6, bool), np.ones(6, bool)):
        each = [likeness_at(own, others, np.full(6, m), mirrored) for m in range(alike.MOVES)]
        best = likeness(own, others, mirrored, alike.PROBED)
        np.testing.assert_allclose(np.max(each, axis=0), best, atol=1e-5)


def test_probes__mirrored_half_are_hashes_of_the_mirror_image() -> None:
    thumbnails = np.random.default_rng(2).integers(0, 256, (4, 256), dtype=np.uint8)
    mirrored = np.ascontiguousarray(thumbnails.reshape(4, 16, 16)[:, :, ::-1]).reshape(4, 256)
    plain, flipped = alike.probes(thumbnails).reshape(2, 4, 3, 3)
    again = alike.probes(mirrored).reshape(2, 4, 3, 3)[0]
    apart = np.bitwise_count(flipped ^ again[:, ::-1])  # right becomes left
    assert apart.max() <= 2
    assert np.bitwise_count(plain ^ flipped).min() > 10
