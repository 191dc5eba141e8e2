"""Feature comparison: class prototypes and labeled neighbors.

Two views of "whom does this face resemble": the nearest class prototype, and a vote of the k
nearest labeled faces. Cost of N queries: one (N, P) product for prototypes; one flat FAISS search
(N x bank) for neighbors. Queries come a slice at a time: FAISS is several times slower on small
batches.

Source: Liu et al., Omni-supervised Facial Expression Recognition via Distilled Data
(arXiv 2005.08551): faces are selected by feature-wise similarity to a primitive model's classes.
Vote: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination
(arXiv 1805.01978), section 3.4, weight exp(cosine / tau).
Departs: we could not read the first paper's definition of a prototype; ours is the mean of the
samples that the model classifies correctly, or k-means sub-prototypes of them (an expression has
several looks). The vote is reported as a share in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DECIMALS = 6  # similarities are compared after rounding; FAISS ties must not decide anything
_SLACK = 2e-6  # FAISS sums in float32: its order is trusted only beyond this
_CHUNK = 256  # queries refined at once; bounds the gathered candidates to tens of MB


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of `x` (N, D) divided by their length, float32; a zero row stays zero."""
    x = np.asarray(x, dtype=np.float32)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def prototypes(
    embeddings: np.ndarray,
    labels: np.ndarray,
    correct: np.ndarray,
    classes: int,
    per_class: int = 1,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit prototypes of each class, in class order.

    Args:
        embeddings: (N, D); normalized here.
        labels: (N,) integer codes in [0, classes).
        correct: (N,) bool, the model's own (out-of-fold) answer was right.
        classes: number of classes.
        per_class: 1 for the mean; above, seeded k-means sub-prototypes, at most one per sample.
        seed: of k-means.

    Returns:
        vectors (P, D) float32 of unit length and their labels (P,) int64. A class without a correct
        sample uses all its samples; a class without samples has no prototype.
    """
    z = unit(embeddings)
    vectors: list[np.ndarray] = []
    owners: list[int] = []
    for code in range(classes):
        mine = labels == code
        chosen = z[mine & correct] if (mine & correct).any() else z[mine]
        if not len(chosen):
            continue
        found = unit(centers(chosen, min(per_class, len(chosen)), seed))
        vectors.append(found)
        owners.extend([code] * len(found))
    if not vectors:
        return np.zeros((0, z.shape[1]), np.float32), np.zeros(0, np.int64)
    return np.concatenate(vectors), np.array(owners, dtype=np.int64)


def centers(x: np.ndarray, k: int, seed: int, *, spread: bool = False) -> np.ndarray:
    """Centers (k, D) of seeded spherical k-means on unit rows (N, D), k at most N.

    `spread` starts from rows that lie apart (k-means++), three times, and keeps the best: random
    ones may share a group and leave another to none.
    """
    if k == 1:
        return x.mean(axis=0, keepdims=True)
    if k == len(x):
        return x
    import faiss

    # Spherical: centers are compared by cosine. FAISS warns below 39 points per center; rare
    # classes have fewer and are still better off than with one mean.
    start = (
        {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "nredo": 3} if spread else {}
    )
    kmeans = faiss.Kmeans(
        x.shape[1],
        k,
        niter=25,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        **start,
    )
    kmeans.train(np.ascontiguousarray(x))
    return np.asarray(kmeans.centroids)


def nearest_prototypes(
    x: np.ndarray, vectors: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class of the nearest prototype; a class is as near as its nearest sub-prototype.

    Args:
        x: (N, D) unit embeddings.
        vectors: (P, D) unit prototypes, P >= 1.
        labels: (P,) their class codes.

    Returns:
        label (N,) int64, similarity (N,) cosine in [-1, 1], and margin (N,) in [0, 2]: similarity
        minus that of the best other class. With one class the other one counts as cosine -1.
    """
    owners = np.unique(labels)
    cosine = np.clip(x @ vectors.T, -1, 1)
    by_class = np.stack([cosine[:, labels == code].max(axis=1) for code in owners], axis=1)
    best = by_class.argmax(axis=1)
    rows = np.arange(len(x))
    similarity = by_class[rows, best]
    by_class[rows, best] = -1
    return owners[best], similarity, similarity - by_class.max(axis=1)


class Neighbors:
    """Exact nearest neighbors by cosine in a bank of labeled faces.

    Ordered by (similarity rounded to 1e-6, descending; id, ascending), so neither FAISS ties nor
    the order of the bank nor the batch decide. Uses the GPU that FAISS sees, if any.
    """

    def __init__(self, bank: np.ndarray, ids: Sequence[str]) -> None:
        """Index `bank` (N, D) of unit rows, N >= 1, named by `ids` (N, unique)."""
        import faiss

        order = np.argsort(np.asarray(ids, dtype=object), kind="stable")
        self._row = order.astype(np.int64)  # position among sorted ids -> row of the caller's bank
        self._bank = np.ascontiguousarray(np.asarray(bank, np.float32)[order])
        self._index: Any = faiss.IndexFlatIP(self._bank.shape[1])
        if faiss.get_num_gpus() > 0:
            self._gpu = faiss.StandardGpuResources()  # must outlive the index
            self._index = faiss.index_cpu_to_gpu(self._gpu, 0, self._index)
        self._index.add(self._bank)

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of the bank for each query.

        Args:
            x: (N, D) unit queries; a slice at once.
            k: at least 1; more than the bank holds is cut to its size.

        Returns:
            rows (N, k) int64 into the bank as given, similarity (N, k) float32 in [-1, 1].
        """
        x = np.ascontiguousarray(x, dtype=np.float32)
        size = len(self._bank)
        k = min(k, size)
        wide = min(k + 8, size)
        if not len(x):
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        rough, found = self._index.search(x, wide)
        lines = [
            self._refine(x[i : i + _CHUNK], found[i : i + _CHUNK], k)
            for i in range(0, len(x), _CHUNK)
        ]
        rows = np.concatenate([line[0] for line in lines])
        similarity = np.concatenate([line[1] for line in lines])
        if wide < size:
            # A crowd of near-equal faces may reach past the candidates; only then scan the bank.
            for i in np.flatnonzero(rough[:, -1] > similarity[:, -1] - _SLACK):
                rows[i : i + 1], similarity[i : i + 1] = self._refine(
                    x[i : i + 1], np.arange(size)[None], k
                )
        return self._row[rows], similarity.astype(np.float32)

    def _refine(self, x: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the candidate `rows` (N, C) by (rounded cosine descending, row ascending).

        Summed in float64: BLAS sums float32 in an order that depends on the batch, and its errors
        are large enough to cross a rounding step.
        """
        exact = np.einsum("nd,ncd->nc", x.astype(np.float64), self._bank[rows].astype(np.float64))
        cosine = np.clip(np.round(exact, DECIMALS), -1, 1)
        order = np.lexsort((rows, -cosine), axis=-1)[:, :k]
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosine, order, axis=1)


def vote(
    labels: np.ndarray, similarity: np.ndarray, classes: int, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    """Vote of the nearest faces, each with weight exp(similarity / tau).

    Args:
        labels: (N, k) class codes of the neighbors.
        similarity: (N, k) cosines.
        classes: number of classes.
        tau: temperature above 0; small values listen to the nearest only.

    Returns:
        label (N,) int64 (the lower code on a tie) and its share of the vote (N,) in [0, 1].
    """
    weight = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / tau)
    votes = np.zeros((len(labels), classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weight)
    best = votes.argmax(axis=1)
    return best, votes[np.arange(len(votes)), best] / votes.sum(axis=1)
