"""Best rows of a stream, per key, whatever the order of the chunks. Pure NumPy.

Rows are ranked by (score down, hash of the id up). :class:`Best` keeps the best few of very many
keys (duplicate groups, people): 20 bytes per row kept, and what the rows carry. :class:`Caps` keeps
very many of few keys (classes): a histogram of the score as uint16 with exact counts tells which
rows can still be the last of their class, 13 bytes each, and only the boundary bin is ever sorted.
Both are mergeable: rows may be added to several of them, which are then merged in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Scores = NDArray[np.float32]
Codes = NDArray[np.integer]
Mask = NDArray[np.bool_]
Carried = NDArray[Any]
Ties = Hashes | Callable[[Mask], Hashes]
"""Hashes of ids (N,), or what gives those of the rows in a mask: few are ever needed."""

LEVELS = 65_536
COMPACT_ROWS = 1_000_000
_BLOCK = 1 << 14  # rows hashed at once: their state stays in the cache


def level(scores: Scores) -> NDArray[np.int64]:
    """Bin (N,) in [0, 65,535] of scores in [0, 1]; monotone, so bins never reorder rows."""
    return (np.clip(scores, 0, 1).astype(np.float64) * (LEVELS - 1)).astype(np.int64)


def stable_hash(column: pa.Array | pa.ChunkedArray) -> Hashes:
    """64-bit hash (N,) of strings without nulls, the same on every machine.

    FNV-1a over the bytes and a final mix, one array operation per byte position and length: 0.1
    CPU-seconds per million ids of 30 characters. Collisions: one in 4e5 runs of 1e7 ids. Not for
    adversaries.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    binary = column.cast(pa.large_binary())
    _, offsets_buffer, data_buffer = binary.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[binary.offset :][: len(binary) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)
    lengths = np.diff(offsets)
    state = np.full(len(binary), 0xCBF29CE484222325, dtype=np.uint64)
    for first in range(0, len(binary), _BLOCK):
        length, start = lengths[first : first + _BLOCK], offsets[first : first + _BLOCK]
        shortest, longest = int(length.min()), int(length.max())
        if shortest == longest:  # such strings lie side by side
            letters = data[start[0] : start[0] + longest * len(length)]
            state[first : first + _BLOCK] = _fnv(letters.reshape(len(length), longest))
            continue
        for size in np.flatnonzero(np.bincount(length - shortest)) + shortest:
            rows = np.flatnonzero(length == size)
            state[first + rows] = _fnv(data[start[rows, None] + np.arange(size)])
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _fnv(letters: NDArray[np.uint8]) -> Hashes:
    """FNV-1a of every row (N, length)."""
    state = np.full(len(letters), 0xCBF29CE484222325, dtype=np.uint64)
    for place in np.ascontiguousarray(letters.T):
        state ^= place
        state *= np.uint64(0x100000001B3)
    return state


class Best:
    """The best `size` rows of every key; rows may carry more columns, which are kept with them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[tuple[Carried, ...]] = []
        self._waiting = 0
        self._held = 0
        self._last: tuple[Hashes, Scores, Hashes] | None = None

    def add(self, keys: Hashes, scores: Scores, ties: Hashes, *carried: Carried) -> None:
        """Rows (N,) of one chunk: hash of the key, score, hash of the id, and what they carry."""
        self._last = None
        self._parts.append((keys, scores, ties, *carried))
        self._waiting += len(keys)
        if self._waiting >= max(COMPACT_ROWS, self._held):
            self._compact()

    def merge(self, other: Best) -> None:
        """Add the rows of another one of the same size."""
        for part in other._parts:
            self.add(*part)

    def rows(self) -> tuple[Carried, ...]:
        """Keys, scores, ties and what the rows carry of the best rows, in the order of the keys."""
        self._compact()
        nothing = (np.zeros(0, np.uint64), np.zeros(0, np.float32), np.zeros(0, np.uint64))
        return self._parts[0] if self._parts else nothing

    def close(self) -> None:
        """All rows are in: find the last row that each key keeps; then threads may ask."""
        keys, scores, ties = self.rows()[:3]
        ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)[: len(keys)])
        self._last = keys[ends], scores[ends], ties[ends]

    def keep(self, keys: Hashes, scores: Scores, ties: Ties) -> Mask:
        """Which rows (N,) are among the best of their key; every key must have been added."""
        if self._last is None:
            self.close()
        assert self._last is not None
        last_keys, last_scores, last_ties = self._last
        if not len(keys):
            return np.zeros(0, dtype=bool)
        order = np.argsort(keys)  # neighbors in the order are neighbors in the cache
        place = np.empty_like(order)
        place[order] = np.searchsorted(last_keys, keys[order])
        return _beats(scores, last_scores[place], ties, last_ties[place])

    def _compact(self) -> None:
        """Drop all but the best of each key."""
        if self._waiting:
            columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
            order = _best(columns[0], columns[1], columns[2], self.size)
            self._parts = [tuple(column[order] for column in columns)]
        self._held = len(self._parts[0][0]) if self._parts else 0
        self._waiting = 0


def _best(keys: Hashes, scores: Scores, ties: Hashes, size: int) -> NDArray[np.int64]:
    """Rows of the best `size` of every key, in the order of the keys.

    Keys are hashes: by their first bits they fall into shares that are sorted in the cache.
    """
    share = (keys >> np.uint64(58)).astype(np.uint8)
    order = np.argsort(share, kind="stable")  # by counting
    bounds = np.append(0, np.cumsum(np.bincount(share, minlength=64)))
    found = []
    for first, last in itertools.pairwise(bounds.tolist()):
        rows = order[first:last]
        ranked, group = _ranked(keys[rows], scores[rows], ties[rows])
        starts = np.flatnonzero(np.append(True, group[1:] != group[:-1])[: len(group)])
        place = np.arange(len(group)) - starts[group]
        found.append(rows[ranked[place < size]])
    return np.concatenate(found)


def _ranked(
    keys: Hashes, scores: Scores, ties: Hashes
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order (N,) by key, score down, tie up; and the number (N,) of each ordered row's key.

    Two sorts of single 64-bit numbers, five times as fast as one by three columns; only rows of
    equal key and score are sorted by their tie.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    group = np.cumsum(np.append(False, ordered[1:] != ordered[:-1])[: len(order)])
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    both = (group.astype(np.uint64) << np.uint64(32)) | (~rising[order]).astype(np.uint64)
    second = np.argsort(both)
    order, both = order[second], both[second]
    same = both[1:] == both[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        rows = order[tied]
        order[tied] = rows[np.lexsort((ties[rows], both[tied]))]
    return order, group


def _beats(scores: Scores, last_scores: Scores, ties: Ties, last_ties: Hashes) -> Mask:
    """Rows (N,) ranked no lower than the last one that stays."""
    stay = scores > last_scores
    tied = scores == last_scores
    if tied.any():
        own = ties(tied) if callable(ties) else ties[tied]
        stay[tied] = own <= last_ties[tied]
    return stay


class Caps:
    """The best `limits[c]` rows of every class c; UNLIMITED where a class has no cap."""

    UNLIMITED = np.iinfo(np.int64).max

    def __init__(self, limits: NDArray[np.int64]) -> None:
        self.limits = limits
        self._capped = limits < self.UNLIMITED
        self._histogram = np.zeros((len(limits), LEVELS), dtype=np.int64)
        # Bin in which a class ends by the counts so far: they only grow, so it only rises.
        self._floor = np.where(self._capped, -1, LEVELS)
        self._parts: list[tuple[Carried, ...]] = []
        self._waiting = self._held = 0
        self._last_scores = np.full(len(limits), -np.inf, np.float32)
        self._last_ties = np.zeros(len(limits), np.uint64)

    def add(self, codes: Codes, scores: Scores, ties: Hashes) -> None:
        """Rows (N,) that compete: class code, score, hash of the id."""
        bins = level(scores)
        flat = codes.astype(np.int64) * LEVELS + bins
        self._histogram += np.bincount(flat, minlength=self._histogram.size).reshape(-1, LEVELS)
        near = bins >= self._floor[codes]
        self._hold(codes[near].astype(np.uint8), scores[near], ties[near])

    def merge(self, other: Caps) -> None:
        """Add the rows of another one of the same limits."""
        self._histogram += other._histogram
        for part in other._parts:
            self._hold(*part)

    def close(self) -> None:
        """All rows are in: find the last row that each class keeps; then threads may ask."""
        self._compact()
        codes, scores, ties = self._parts[0]
        for code in np.flatnonzero(self._capped & (self._floor >= 0)).tolist():
            floor = self._floor[code]
            left = self.limits[code] - self._histogram[code, floor + 1 :].sum()
            own, bins = codes == code, level(scores)
            near = np.flatnonzero(own & ((bins == floor) if left else (bins > floor)))
            order = near[np.lexsort((ties[near], -scores[near]))][: left or None]
            self._last_scores[code] = scores[order[-1]] if len(order) else np.inf
            self._last_ties[code] = ties[order[-1]] if len(order) else 0

    def keep(self, codes: Codes, scores: Scores, ties: Ties) -> Mask:
        """Which rows (N,) stay."""
        return _beats(scores, self._last_scores[codes], ties, self._last_ties[codes])

    def _hold(self, *columns: Carried) -> None:
        self._parts.append(columns)
        self._waiting += len(columns[0])
        if self._waiting >= max(COMPACT_ROWS, self._held):
            self._compact()

    def _compact(self) -> None:
        """Forget rows below the bin in which their class ends by the counts so far."""
        at_or_above = self._histogram[:, ::-1].cumsum(1)[:, ::-1]
        ends = (at_or_above > self.limits[:, None]).sum(axis=1) - 1
        self._floor = np.where(self._capped, ends, LEVELS)
        none = (np.zeros(0, np.uint8), np.zeros(0, np.float32), np.zeros(0, np.uint64))
        columns = [np.concatenate(column) for column in zip(none, *self._parts, strict=True)]
        near = level(columns[1]) >= self._floor[columns[0]]
        self._parts = [tuple(column[near] for column in columns)]
        self._held, self._waiting = int(near.sum()), 0
