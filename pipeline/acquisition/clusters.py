"""TypiClust and ProbCover: what to label first, when a model has seen few labels or none.

Both look at unit embeddings alone (of a self-supervised model, say), not at answers.

Cost, n faces in play (labeled and candidates), multiplications: TypiClust n K D for one assignment
(k-means is trained on 256 faces per cluster) and n_c^2 D inside each of K clusters: with even
clusters n^2 D / K. ProbCover n^2 D for its radius, as much for all degrees and as much at most
for taking away what is covered: every face is covered once, and only then do degrees change. No
lists of neighbors are kept, so a radius too large costs time, not memory. Memory: blocks of 12 MB;
TypiClust the unit rows of k-means' sample and of one cluster; ProbCover all unit rows in play, as
float32.

Source: Hacohen et al., Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets
(arXiv 2202.02794), algorithm 1; Yehuda et al., Active Learning Through a Covering Lens (arXiv
2205.11320), algorithm 1 and the purity of section 4.2.
Departs: TypiClust: the cluster with the fewest labeled and chosen faces comes first at every step,
where the released code walks through one fixed order; clusters of five faces or fewer come last
instead of never; labeled and chosen faces still count as neighbors, since density belongs to the
data. ProbCover: the radius is the exact quantile, not the best of a grid; the released code skips
the last incomplete block of rows; when all is covered the rest is random.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.acquisition.interface import (
    Floats,
    Pool,
    Rows,
    in_play,
    required,
    sampled,
    taken,
)
from pipeline.errors import ConfigError
from pipeline.similarity import unit

NEIGHBORS = 20
MOST_CLUSTERS = 500
SMALLEST = 5
PURITY = 0.95
_PER_CLUSTER = 256  # faces that k-means is trained on
_ASSIGNED = 8192
_GATHERED = 256  # faces whose neighbors' rows are gathered at once
_TILE = 1024
_SLACK = 1e-5  # squared distances of float32 unit rows are trusted only beyond this


def typiclust(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    *,
    neighbors: int = NEIGHBORS,
    most_clusters: int = MOST_CLUSTERS,
    candidates: int | None = None,
) -> Rows:
    """The most typical face of the cluster with the fewest labels, again and again.

    min(labeled + budget, most_clusters) clusters by k-means, seeded by `rng`; among clusters with
    as few labels the largest comes first, then the lowest number. Typicality: :func:`typicality`
    inside the cluster; ties: lowest row. Reads embeddings. `candidates`: see interface.py.
    """
    embeddings = required(pool.embeddings, "typiclust", "embeddings (N, D)")
    rows = in_play(pool, budget, candidates, rng)
    x, labeled = taken(embeddings, rows), pool.labeled[rows]
    count = min(int(labeled.sum()) + budget, most_clusters, len(rows))
    cluster = k_means(x, count, rng)
    members = np.argsort(cluster, kind="stable")
    bounds = np.searchsorted(cluster[members], np.arange(count + 1))
    sizes = np.diff(bounds)
    labels = np.bincount(cluster[labeled], minlength=count)
    queue = [
        (bool(sizes[c] <= SMALLEST), int(labels[c]), -int(sizes[c]), c)
        for c in range(count)
        if sizes[c] > labels[c]
    ]
    heapq.heapify(queue)
    typical: dict[int, Iterator[int]] = {}
    chosen: list[int] = []
    while len(chosen) < budget:
        small, labels_here, size, c = heapq.heappop(queue)
        if c not in typical:
            own = members[bounds[c] : bounds[c + 1]]
            order = np.argsort(-typicality(unit(x[own]), neighbors), kind="stable")
            typical[c] = iter(own[order][~labeled[own[order]]].tolist())
        face = next(typical[c], None)
        if face is not None:
            chosen.append(face)
            heapq.heappush(queue, (small, labels_here + 1, size, c))
    return rows[np.array(chosen, dtype=np.int64)]


def typicality(x: NDArray[np.float32], neighbors: int) -> NDArray[np.float64]:
    """1 / (mean distance to the nearest others + 1e-5) of each row (n, D), (n,).

    Args:
        x: rows, compared by Euclidean distance.
        neighbors: that many nearest others, or all others where there are fewer.
    """
    import faiss

    k = min(neighbors, len(x) - 1)
    if k < 1:
        return np.full(len(x), 1e5)
    x = np.ascontiguousarray(x)
    mean = np.empty(len(x))
    for first in range(0, len(x), _ASSIGNED):
        block = np.arange(first, min(first + _ASSIGNED, len(x)))
        _, found = faiss.knn(x[block], x, k + 1)
        # The face itself comes first, but for copies of it, which come in any order.
        other = np.argsort(found == block[:, None], axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(found, other, axis=1)
        for start in range(0, len(block), _GATHERED):
            part = slice(start, start + _GATHERED)
            # FAISS subtracts products of float32: copies would be 3e-4 apart instead of 0.
            apart = np.linalg.norm(x[block[part], None] - x[found[part]], axis=2)
            mean[block[part]] = apart.mean(axis=1, dtype=np.float64)
    return 1 / (mean + 1e-5)


def k_means(x: Floats, count: int, rng: np.random.Generator) -> Rows:
    """Cluster (n,) in [0, count) of each row (n, D), which is normalized here, in blocks."""
    import faiss

    sample = sampled(np.arange(len(x)), _PER_CLUSTER * count, rng)
    kmeans = faiss.Kmeans(
        x.shape[1],
        count,
        niter=25,
        seed=int(rng.integers(2**31)),
        # Random seeds leave a group in the shadow of another: one of six even in an easy test.
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        max_points_per_centroid=_PER_CLUSTER,
    )
    kmeans.train(np.ascontiguousarray(unit(taken(x, sample))))
    found = np.empty(len(x), np.int64)
    for first in range(0, len(x), _ASSIGNED):
        block = np.ascontiguousarray(unit(x[first : first + _ASSIGNED]))
        found[first : first + _ASSIGNED] = kmeans.index.search(block, 1)[1][:, 0]
    return found


def probcover(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    *,
    classes: int | None = None,
    delta: float | None = None,
    purity: float = PURITY,
    candidates: int | None = None,
) -> Rows:
    """The face whose ball covers most faces that no ball covers yet, again and again.

    Ties: lowest row. When no face is left to cover, the rest is drawn uniformly by `rng`. Reads
    embeddings, and probs for their number of classes where neither classes nor delta is given.

    Args:
        pool: as above.
        budget: faces to choose.
        rng: seeds k-means, draws candidates and the rest.
        classes: clusters whose numbers serve as pseudo-labels; None for as many as probs have.
        delta: radius of the balls, of unit embeddings, (0, 2]; None: :func:`pure_radius`.
        purity: share of balls that shall hold one pseudo-label only, (0, 1].
        candidates: see interface.py.
    """
    embeddings = required(pool.embeddings, "probcover", "embeddings (N, D)")
    if delta is not None and not 0 < delta <= 2:
        raise ConfigError(f"acquisition probcover: delta is {delta}, expected above 0, at most 2")
    if not 0 < purity <= 1:
        raise ConfigError(f"acquisition probcover: purity is {purity}, expected above 0, at most 1")
    if delta is None and classes is None:
        needs = "probs (N, K), or classes, or delta"
        classes = required(pool.probs, "probcover", needs).shape[1]
    rows = in_play(pool, budget, candidates, rng)
    x = unit(taken(embeddings, rows))
    if delta is None:
        assert classes is not None
        delta = pure_radius(x, k_means(x, min(classes, len(x)), rng), purity)
    return rows[_cover(x, pool.labeled[rows], budget, delta, rng)]


def pure_radius(x: NDArray[np.float32], cluster: Rows, purity: float) -> float:
    """Largest radius at which a share `purity` of balls (d < radius) holds one cluster only.

    The ball of a face is pure up to its distance to the nearest face of another cluster, so the
    radius is a quantile of these distances; 2, which covers everything, where there is one cluster.

    Args:
        x: unit rows (n, D).
        cluster: (n,) numbers.
        purity: (0, 1].
    """
    nearest = np.full(len(x), 4, np.float32)
    for first in range(0, len(x), _TILE):
        mine = slice(first, first + _TILE)
        for at in range(0, len(x), _TILE):
            theirs = slice(at, at + _TILE)
            apart = 2 - 2 * (x[mine] @ x[theirs].T)
            apart[cluster[mine, None] == cluster[theirs]] = 4
            np.minimum(nearest[mine], apart.min(axis=1), out=nearest[mine])
    impure = int((1 - purity) * len(x) + 1e-9)  # balls that may hold another cluster
    return float(np.sqrt(max(np.partition(nearest, impure)[impure], 0)))


def _cover(
    x: NDArray[np.float32],
    labeled: NDArray[np.bool_],
    budget: int,
    delta: float,
    rng: np.random.Generator,
) -> Rows:
    cut = np.float32(delta**2 - _SLACK)
    covered = labeled | (_degrees(x, np.flatnonzero(labeled), cut) > 0)
    degree = _degrees(x, np.flatnonzero(~covered), cut)
    closed = labeled.copy()
    degree[closed] = -1
    chosen: list[int] = []
    while len(chosen) < budget:
        face = int(degree.argmax())
        if degree[face] <= 0:
            rest = np.flatnonzero(~closed)
            chosen.extend(rng.choice(rest, budget - len(chosen), replace=False).tolist())
            break
        chosen.append(face)
        closed[face] = True
        near = 2 - 2 * (x @ x[face]) < cut
        near[face] = True
        fresh = np.flatnonzero(near & ~covered)
        covered[fresh] = True
        degree -= _degrees(x, fresh, cut)
        degree[closed] = -1
    return np.array(chosen, dtype=np.int64)


def _degrees(x: NDArray[np.float32], targets: Rows, cut: np.float32) -> Rows:
    """How many of the targets lie within the cut (squared) of each row, (n,)."""
    degree = np.zeros(len(x), np.int64)
    for at in range(0, len(targets), _TILE):
        theirs = x[targets[at : at + _TILE]].T
        for first in range(0, len(x), _TILE):
            apart = 2 - 2 * (x[first : first + _TILE] @ theirs)
            degree[first : first + _TILE] += (apart < cut).sum(axis=1)
    return degree
