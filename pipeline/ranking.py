"""Best rows of a stream, per key, whatever the order of the chunks. Pure NumPy.

Rows are ranked by (score down, hash of the id up). :class:`Best` keeps the best few of very many
keys (duplicate groups, people): 24 bytes per row kept. :class:`Caps` keeps very many of few keys
(classes): a histogram of the score as uint16 with exact counts tells the boundary bin of each
class, a second pass resolves that bin alone.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Scores = NDArray[np.float32]
Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]

LEVELS = 65_536
COMPACT_ROWS = 1_000_000


def level(scores: Scores) -> Codes:
    """Bin (N,) in [0, 65,535] of scores in [0, 1]; monotone, so bins never reorder rows."""
    return (np.clip(scores, 0, 1).astype(np.float64) * (LEVELS - 1)).astype(np.int64)


def stable_hash(column: pa.Array | pa.ChunkedArray) -> Hashes:
    """64-bit hash (N,) of strings without nulls, the same on every machine.

    FNV-1a over the bytes and a final mix, one array operation per byte position. Collisions: one in
    4e5 runs of 1e7 ids. Not for adversaries.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    binary = column.cast(pa.large_binary())
    _, offsets_buffer, data_buffer = binary.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[binary.offset :][: len(binary) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)
    start, length = offsets[:-1], np.diff(offsets)
    state = np.full(len(binary), 0xCBF29CE484222325, dtype=np.uint64)
    for place in range(int(length.max(initial=0))):
        here = np.flatnonzero(length > place)
        byte = data[start[here] + place].astype(np.uint64)
        state[here] = (state[here] ^ byte) * np.uint64(0x100000001B3)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Best:
    """The best `size` rows of every key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys: list[Hashes] = []
        self._scores: list[Scores] = []
        self._ties: list[Hashes] = []
        self._waiting = 0
        self._last: tuple[Hashes, Scores, Hashes] | None = None

    def add(self, keys: Hashes, scores: Scores, ties: Hashes) -> None:
        """Rows (N,) of one chunk: hash of the key, score, hash of the id."""
        self._keys.append(keys)
        self._scores.append(scores)
        self._ties.append(ties)
        self._last = None
        self._waiting += len(keys)
        if self._waiting >= COMPACT_ROWS:
            self._compact()

    def keep(self, keys: Hashes, scores: Scores, ties: Hashes) -> Mask:
        """Which rows (N,) are among the best of their key; every key must have been added."""
        if self._last is None:
            self._last = self._compact()
        last_keys, last_scores, last_ties = self._last
        if not len(keys):
            return np.zeros(0, dtype=bool)
        place = np.searchsorted(last_keys, keys)
        above = scores > last_scores[place]
        return above | ((scores == last_scores[place]) & (ties <= last_ties[place]))

    def _compact(self) -> tuple[Hashes, Scores, Hashes]:
        """Drop all but the best of each key; return the last kept row of each key."""
        keys = np.concatenate([*self._keys, np.empty(0, np.uint64)])
        scores = np.concatenate([*self._scores, np.empty(0, np.float32)])
        ties = np.concatenate([*self._ties, np.empty(0, np.uint64)])
        order = np.lexsort((ties, -scores, keys))
        keys, scores, ties = keys[order], scores[order], ties[order]
        first = np.searchsorted(keys, keys)
        top = np.arange(len(keys)) - first < self.size
        keys, scores, ties = keys[top], scores[top], ties[top]
        self._keys, self._scores, self._ties = [keys], [scores], [ties]
        self._waiting = 0
        ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)[: len(keys)])
        return keys[ends], scores[ends], ties[ends]


class Caps:
    """The best `limits[c]` rows of every class c."""

    def __init__(self, limits: Codes) -> None:
        self.limits = limits
        self._histogram = np.zeros((len(limits), LEVELS), dtype=np.int64)
        self._bin = np.zeros(len(limits), dtype=np.int64)
        self._boundary: dict[int, Best] = {}

    def count(self, codes: Codes, scores: Scores) -> None:
        """First pass: rows (N,) that compete."""
        np.add.at(self._histogram, (codes, level(scores)), 1)

    def close(self) -> bool:
        """Find each class's boundary bin; True if rows inside a bin must still be ranked."""
        at_or_above = self._histogram[:, ::-1].cumsum(1)[:, ::-1]
        for code, limit in enumerate(self.limits):
            if limit >= at_or_above[code, 0]:
                self._bin[code] = -1
                continue
            reached = np.flatnonzero(at_or_above[code] > limit)
            boundary = int(reached[-1])
            self._bin[code] = boundary
            left = int(limit - (at_or_above[code, boundary] - self._histogram[code, boundary]))
            self._boundary[code] = Best(left)
        return bool(self._boundary)

    def boundary(self, codes: Codes, scores: Scores) -> Mask:
        """Rows (N,) in their class's boundary bin."""
        return level(scores) == self._bin[codes]

    def collect(self, codes: Codes, scores: Scores, ties: Hashes) -> None:
        """Second pass: the rows of the boundary bins, with the hash of their ids."""
        for code, best in self._boundary.items():
            own = codes == code
            best.add(np.zeros(int(own.sum()), np.uint64), scores[own], ties[own])

    def keep(self, codes: Codes, scores: Scores, ties: Hashes) -> Mask:
        """Which rows (N,) stay; `ties` counts for rows in a boundary bin only."""
        stay = level(scores) > self._bin[codes]
        inside = self.boundary(codes, scores)
        for code, best in self._boundary.items():
            own = inside & (codes == code)
            if best.size:
                zeros = np.zeros(int(own.sum()), np.uint64)
                stay[own] = best.keep(zeros, scores[own], ties[own])
        return stay
