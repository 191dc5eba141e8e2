"""What two pictures have in common: thumbnails that correlate, hashes few bits apart.

Pure functions on arrays; both sides may be mirrored or moved by up to 2 pixels of a 48-pixel face.
Cost per core: 17,000 pairs of thumbnails or 3e8 pairs of hashes per second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.images import THUMBNAIL, hash_bits

MOVE = 2 / 48 * THUMBNAIL  # pixels of a thumbnail that 2 pixels of a 48-pixel face are
PROBED = (-MOVE, 0.0, MOVE)
NEAR = (-MOVE, -MOVE / 2, 0.0, MOVE / 2, MOVE)
FAR = (-2 * MOVE, -MOVE, 0.0, MOVE, 2 * MOVE)
MOVES = len(PROBED) ** 2
DUPLICATE_RADIUS = 7  # bits; what four 16-bit hash tables with one flipped bit find for certain
QUERIES = 4096  # hashes searched at once
BLOCK = 1 << 16  # pairs handed on at once: alike pools give millions for a block of queries
PAIRS = 256  # thumbnails compared at once: 25 moves of 256 pairs are 5 MB


def probes(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes (18 R,) uint64 of thumbnails (R, 256): MOVES for each, then the same mirrored."""
    moved = _moved(_centered(thumbnails), PROBED, border=0)
    squares = moved.transpose(0, 1, 3, 4, 2).reshape(-1, THUMBNAIL, THUMBNAIL)
    return np.concatenate([hash_bits(squares), hash_bits(squares[:, :, ::-1])])


def likeness(
    faces: np.ndarray, others: np.ndarray, mirrored: np.ndarray, moves: Sequence[float] = NEAR
) -> np.ndarray:
    """Best correlation (P,) in [-1, 1] of thumbnails with others, moved and mirrored.

    Args:
        faces: (P, 256) uint8.
        others: (P, 256) uint8.
        mirrored: (P,) bool; where true the other is mirrored first.
        moves: pixels of a thumbnail, tried in both directions.
    """
    border = int(np.ceil(max(moves)))
    best = np.empty(len(faces), np.float32)
    for first in range(0, len(faces), PAIRS):
        part = slice(first, first + PAIRS)
        squares = _centered(others[part])
        squares = np.where(mirrored[part, None, None], squares[:, :, ::-1], squares)
        moved = _moved(squares, moves, border)
        own = _moved(_centered(faces[part]), (0.0,), border)[:, 0, :, 0, :]
        own -= own.mean(axis=(1, 2), keepdims=True)
        own /= np.maximum(np.linalg.norm(own, axis=(1, 2), keepdims=True), 1e-3)
        products = np.einsum("pxayb,pab->pxy", moved, own)
        sums = moved.sum(axis=(2, 4))
        power = np.einsum("pxayb,pxayb->pxy", moved, moved) - sums**2 / own[0].size
        best[part] = (products / np.sqrt(np.maximum(power, 1e-3))).max(axis=(1, 2))
    return best


def hamming_pairs(
    stored: np.ndarray, queries: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(query, stored) positions of hashes (uint64) at most `radius` bits apart, by a full scan."""
    import faiss

    index = faiss.IndexBinaryFlat(64)
    index.add(_bytes(stored))
    yield from _ranges(index, queries, radius)


def close_pairs(stored: np.ndarray, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(query, stored) positions at most DUPLICATE_RADIUS bits apart, by multi-index hashing.

    Time grows with the pairs that share 15 of 16 neighboring bits instead of with all pairs.
    """
    import faiss

    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.nflip = 1
    index.add(_bytes(stored))
    yield from _ranges(index, queries, DUPLICATE_RADIUS)


def likeness_at(
    faces: np.ndarray, others: np.ndarray, move: np.ndarray, mirrored: np.ndarray
) -> np.ndarray:
    """Correlation (P,) at one move each; a tenth of the work of :func:`likeness`.

    Args:
        faces: (P, 256) uint8.
        others: (P, 256) uint8.
        move: (P,) int, number of the move as in :func:`probes`.
        mirrored: (P,) bool; where true the other is mirrored after the move.
    """
    weights = _move_weights(PROBED, 1).reshape(len(PROBED), -1, THUMBNAIL)
    rest = weights[len(PROBED) // 2]
    best = np.empty(len(faces), np.float32)
    for first in range(0, len(faces), QUERIES):
        part = slice(first, first + QUERIES)
        right, down = weights[move[part] // len(PROBED)], weights[move[part] % len(PROBED)]
        moved = down @ _centered(others[part]) @ right.transpose(0, 2, 1)
        own = rest @ _centered(faces[part]) @ rest.T
        own = np.where(mirrored[part, None, None], own[:, :, ::-1], own)
        moved -= moved.mean(axis=(1, 2), keepdims=True)
        own -= own.mean(axis=(1, 2), keepdims=True)
        power = np.einsum("pab,pab->p", moved, moved) * np.einsum("pab,pab->p", own, own)
        best[part] = np.einsum("pab,pab->p", moved, own) / np.sqrt(np.maximum(power, 1e-3))
    return best


def _centered(thumbnails: np.ndarray) -> np.ndarray:
    """(P, 16, 16) float32 of mean 0: small sums of squares keep their digits."""
    values = thumbnails.astype(np.float32)
    return (values - values.mean(axis=1, keepdims=True)).reshape(-1, THUMBNAIL, THUMBNAIL)


def _moved(squares: np.ndarray, moves: Sequence[float], border: int) -> np.ndarray:
    """Squares (P, 16, 16) smoothed and read at every move right and down, less the border.

    Returns:
        float32 (P, moves, inner, moves, inner), columns before rows: two large products.
    """
    weights = _move_weights(tuple(moves), border).T
    steps, inner = len(moves), THUMBNAIL - 2 * border
    right = (squares.reshape(-1, THUMBNAIL) @ weights).reshape(len(squares), THUMBNAIL, -1)
    both = right.transpose(0, 2, 1).reshape(-1, THUMBNAIL) @ weights
    return both.reshape(len(squares), steps, inner, steps, inner)


@functools.lru_cache(maxsize=8)
def _move_weights(moves: tuple[float, ...], border: int) -> np.ndarray:
    """Cubic interpolation (Catmull-Rom) after smoothing by 1 2 1, float32 (moves * inner, 16).

    Without the smoothing a copy moved by a third of a thumbnail's pixel correlates less than some
    strangers do.
    """
    pixel = np.arange(THUMBNAIL)
    inner = np.arange(border, THUMBNAIL - border)
    at = np.clip(inner[None] + np.array(moves)[:, None], 0, THUMBNAIL - 1)
    d = np.abs(at.reshape(-1, 1) - pixel)
    cubic = np.where(d <= 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2)
    cubic = np.where(d < 2, cubic, 0)
    smooth = sum(
        share * (pixel == np.clip(pixel + step, 0, THUMBNAIL - 1)[:, None])
        for step, share in ((-1, 0.25), (0, 0.5), (1, 0.25))
    )
    return (cubic / cubic.sum(axis=1, keepdims=True) @ smooth).astype(np.float32)


def _bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes, np.uint64).view(np.uint8).reshape(-1, 8)


def _ranges(
    index: object, queries: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(queries), QUERIES):
        part = _bytes(queries[first : first + QUERIES])
        limits, _, found = index.range_search(part, radius + 1)  # type: ignore[attr-defined]
        query = first + np.repeat(np.arange(len(part)), np.diff(limits.astype(np.int64)))
        for at in range(0, len(found), BLOCK):
            yield query[at : at + BLOCK], found[at : at + BLOCK].astype(np.int64)
