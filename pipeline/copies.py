"""Near copies among millions of embeddings: groups of rows whose cosine reaches a cut. Pure NumPy.

Rows are clustered coarsely (k-means, FAISS) and compared by matrix products inside their cluster:
each row with those whose nearest `probes` centroids include its own nearest. A pair that shares no
such cluster is missed: of 785 pairs at a cosine of 0.95 or more that brute force found for 2,000 of
1,000,000 rows of 512 numbers none was. What is found is verified in float64 as stored.

Everything is done in the order of `keys`, in blocks of fixed size: neither the order of the rows
nor of the chunks they came in matters. Rows that are equal to the bit are joined before, so that a
picture that occurs a million times costs a million comparisons; near copies of one another cost the
square of their number.

Cost of N rows of D numbers with C clusters: N C D + N^2 probes D / C multiplications, least near
C = sqrt(N probes). Memory: the rows as they are given (float16: 1 GB per million of 512), 12 bytes
per row and probe, and 100 MB.

Law: embeddings of expressions alone do not tell copies from people of one mood. Who removes faces
verifies these groups on thumbnails (:func:`pipeline.likeness.likeness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from pipeline.posix import cores

PROBES = 3
THREADS = min(cores(), 16)
DECIMALS = 6  # cosines are compared after rounding, as in similarity
_SLACK = 1e-4  # float32 products of float16 rows are trusted only beyond this
_BLOCK = 8192  # rows gathered, converted and searched at once
_TILE = 1024  # rows of one product
_ITERATIONS = 6
_TRAINED_ON = 32  # rows per centroid
_PAIRS = 1 << 14  # pairs verified at once

Rows = NDArray[np.int64]


def near_pairs(
    x: NDArray[np.floating[Any]],
    keys: NDArray[np.uint64],
    cosine: float,
    *,
    probes: int = PROBES,
    cells: int | None = None,
    seed: int = 0,
) -> Rows:
    """Pairs (P, 2) of rows at or above a cosine, lower key first, each once, sorted by their keys.

    Rows equal to the bit are paired with the first of them, which alone is compared with others.

    Args:
        x: (N, D) unit rows, float16 or float32, in memory or mapped.
        keys: (N,) unique hashes of the ids.
        cosine: the lowest at which two rows are copies, (0, 1].
        probes: clusters that each row is compared in, at least 1.
        cells: clusters, at most one per row; None for the cheapest number.
        seed: of k-means.
    """
    order = np.argsort(keys)
    first = _first_equal(x, order)
    single = np.flatnonzero(first == np.arange(len(order)))
    again = np.flatnonzero(first != np.arange(len(order)))
    found = [np.stack([first[again], again], 1)]
    if len(single) > 1:
        rows = order[single]
        count = cells or max(1, min(round((len(rows) * probes) ** 0.5), len(rows) // _TRAINED_ON))
        count = min(count, len(rows))
        near = _nearest_cells(x, rows, count, min(probes, count), seed)
        for pairs in _within_cells(x, rows, near, count, cosine):
            found.append(single[pairs])
    both = np.concatenate(found)
    once = np.unique(both[:, 0] * len(order) + both[:, 1])
    return order[np.stack(np.divmod(once, max(len(order), 1)), 1)]


def components(count: int, pairs: Rows) -> Rows:
    """Smallest member (count,) of each node's component of the graph with these edges (P, 2)."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
    label = connected_components(graph, directed=False)[1]
    return np.unique(label, return_index=True)[1][label]


def _first_equal(x: NDArray[np.floating[Any]], order: Rows) -> Rows:
    """For each place (N,) in `order` the first place with the same bits."""
    width = x.shape[1] * x.itemsize
    odd = np.random.default_rng(0).integers(0, 2**63, -(-width // 8), np.uint64) * 2 + 1
    hashes = np.empty(len(order), np.uint64)
    for first in range(0, len(order), _BLOCK):
        rows = np.ascontiguousarray(x[order[first : first + _BLOCK]])
        words = np.zeros((len(rows), len(odd) * 8), np.uint8)
        words[:, :width] = rows.view(np.uint8).reshape(len(rows), width)
        mixed = words.view(np.uint64) * odd
        hashes[first : first + _BLOCK] = (mixed ^ (mixed >> np.uint64(32))).sum(axis=1)
    _, lead, group = np.unique(hashes, return_index=True, return_inverse=True)
    found = lead[group]
    twice = np.flatnonzero(found != np.arange(len(order)))
    for at in range(0, len(twice), _BLOCK):
        part = twice[at : at + _BLOCK]
        same = (x[order[part]] == x[order[found[part]]]).all(axis=1)
        found[part[~same]] = part[~same]
    return found


def _nearest_cells(
    x: NDArray[np.floating[Any]], rows: Rows, cells: int, probes: int, seed: int
) -> NDArray[np.int32]:
    """Numbers (N, probes) of the centroids nearest to each row, nearest first.

    `rows` are in the order of hashes: the first of them are a random sample.
    """
    import faiss

    if cells == 1:
        return np.zeros((len(rows), 1), np.int32)
    sample = np.ascontiguousarray(x[rows[: cells * _TRAINED_ON]], np.float32)
    gpus = faiss.get_num_gpus()
    kmeans = faiss.Kmeans(
        x.shape[1],
        cells,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        gpu=gpus > 0,
        min_points_per_centroid=1,
    )
    kmeans.train(sample)
    index: Any = faiss.IndexFlatIP(x.shape[1])
    if gpus > 0:
        resources = faiss.StandardGpuResources()  # must outlive the index
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    index.add(np.ascontiguousarray(kmeans.centroids))
    near = np.empty((len(rows), probes), np.int32)
    for first in range(0, len(rows), _BLOCK):
        block = np.ascontiguousarray(x[rows[first : first + _BLOCK]], np.float32)
        near[first : first + _BLOCK] = index.search(block, probes)[1]
    return near


def _within_cells(
    x: NDArray[np.floating[Any]], rows: Rows, near: NDArray[np.int32], cells: int, cosine: float
) -> Iterator[Rows]:
    """Verified pairs (P, 2) of places in `rows`, the lower one first; some come twice."""
    cosine = round(cosine, DECIMALS)
    least = np.float32(cosine - _SLACK)
    probes = near.shape[1]
    # Members of a cell: first those whose nearest it is, then visitors, each by place.
    members = np.argsort(
        (near.astype(np.int64) * 2 + (np.arange(probes) > 0)).T, axis=None, kind="stable"
    )
    cell = near.T.reshape(-1)[members]
    bounds = np.searchsorted(cell, np.arange(cells + 1))
    homes = np.bincount(near[:, 0], minlength=cells)

    def compare(c: int) -> Rows:
        place = members[bounds[c] : bounds[c + 1]] % len(rows)
        own = int(homes[c])
        found = [np.zeros((0, 2), np.int64)]
        for right in range(0, len(place), _BLOCK):
            theirs = place[right : right + _BLOCK]
            b = np.asarray(x[rows[theirs]], np.float32).T
            for left in range(0, min(own, right + len(theirs)), _TILE):
                mine = place[left : min(left + _TILE, own)]
                a = np.asarray(x[rows[mine]], np.float32)
                i, j = np.nonzero(a @ b >= least)
                apart = left + i < right + j
                pairs = np.stack([mine[i[apart]], theirs[j[apart]]], 1)
                pairs.sort(axis=1)
                found.append(pairs[_exact(x, rows, pairs) >= cosine])
        return np.concatenate(found)

    # BLAS on many small products loses more time in waiting for its threads than they save.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(compare, range(cells))


def _exact(x: NDArray[np.floating[Any]], rows: Rows, pairs: Rows) -> NDArray[np.float64]:
    """Rounded cosine (P,) of pairs of places in `rows`, summed in float64."""
    found = np.empty(len(pairs))
    for first in range(0, len(pairs), _PAIRS):
        part = pairs[first : first + _PAIRS]
        a, b = (x[rows[part[:, side]]].astype(np.float64) for side in (0, 1))
        found[first : first + _PAIRS] = np.einsum("pd,pd->p", a, b)
    return np.round(found, DECIMALS)
