"""Cluster-level pseudo-labels: a cluster has one label, and who lives in a mixed one is doubtful.

What for: one more rule of select. k-means groups the pool's embeddings, without labels; the most
frequent pseudo-label of a cluster is its label, and the share of faces that have it its purity.
Faces of clusters that are not pure enough leave; in the others, a face that the teacher calls
otherwise takes the cluster's label or leaves, too.
Cost: k-means on at most 256 faces per cluster, whatever the pool; n * count * D multiplications to
assign n faces. Memory: that sample as float16, and count x K counters; nothing is kept of a face.
Source: CluP, arXiv 2210.05246: clusters of a self-supervised network's features on the target set,
majority labels, the purest share of each class, count 250 or 1,000, share 0.1 to 0.3.
Departs: k-means runs on a sample, chosen by the hash of the id, and clusters are compared by cosine
(their unit rows with a 1 appended and made unit again are as far apart as before); the purest share
is made of whole clusters, since faces of one cluster are alike in purity, and takes the one in
which it ends; a lowest purity may be asked for instead or as well; embeddings are the teacher's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.config import Config
from pipeline.similarity import Neighbors, centers, unit

PER_CLUSTER = 256
"""Faces that k-means is trained on, per cluster."""

Counts = NDArray[np.int64]
Codes = NDArray[np.int64]


class ClusterConfig(Config):
    """Which clusters are trusted, and what becomes of a face that its cluster outvotes."""

    count: int = Field(default=250, ge=1)  # clusters; fewer where there are fewer faces
    purity: float | None = Field(default=None, ge=0, le=1)  # lowest purity of a cluster
    share: float | None = Field(default=0.3, gt=0, le=1)  # of each class, from the purest clusters
    outvoted: Literal["relabel", "leave"] = "relabel"  # relabel: it takes its cluster's label


class Sample:
    """The rows whose ids have the smallest hashes: the same ones whatever the order of parts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._hashes: list[NDArray[np.uint64]] = []
        self._rows: list[NDArray[np.float16]] = []
        self._held, self._last = 0, np.iinfo(np.uint64).max

    def add(self, hashes: NDArray[np.uint64], rows: NDArray[np.float16]) -> None:
        """Offer rows (n, D) with the hashes (n,) of their ids."""
        near = hashes <= self._last
        self._hashes.append(hashes[near])
        self._rows.append(rows[near])
        self._held += int(near.sum())
        if self._held >= 2 * self.size:
            self.rows()

    def rows(self) -> NDArray[np.float16]:
        """The sample (at most size, D), in the order of the hashes."""
        if not self._held:
            return np.zeros((0, 1), np.float16)
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")[: self.size]
        self._hashes, self._rows = [hashes[order]], [np.concatenate(self._rows)[order]]
        self._held = len(order)
        if len(order) == self.size:
            self._last = hashes[order[-1]]
        return self._rows[0]


class Clusters:
    """Centers of k-means on a sample of unit rows, and the cluster of any row."""

    def __init__(self, sample: NDArray[np.float16], count: int, seed: int) -> None:
        """See :class:`ClusterConfig`; `sample` (S, D) has at least one row."""
        x = unit(sample)
        found = unit(centers(x, min(count, len(x)), seed, spread=True))
        self.count = len(found)
        self._nearest = Neighbors(found, [f"{number:09d}" for number in range(self.count)])

    def of(self, rows: NDArray[np.float16]) -> Codes:
        """Cluster (n,) of rows (n, D), by cosine; ties go to the lower number."""
        found, _ = self._nearest.search(unit(rows), 1)
        return found[:, 0]


def count_labels(cluster: Codes, label: Codes, count: int, classes: int) -> Counts:
    """Faces (count, K) of each cluster by pseudo-label; counts of parts of a pool add up."""
    flat = np.bincount(cluster * classes + label, minlength=count * classes)
    return flat.reshape(count, classes)


def verdicts(counts: Counts, config: ClusterConfig) -> Codes:
    """Label (count,) of each cluster; -1 for one that is not pure enough or empty.

    Args:
        counts: (count, K) of the whole pool, see :func:`count_labels`.
        config: `purity` and `share`. Ties: the lower class; of clusters as pure the larger one and
            then the lower number comes first.
    """
    size, most = counts.sum(1), counts.max(1)
    purity = most / np.maximum(size, 1)
    label = np.where(size > 0, counts.argmax(1), -1)
    pure = size > 0
    if config.share is not None:
        for code in range(counts.shape[1]):
            own = np.flatnonzero(label == code)
            own = own[np.lexsort((own, -size[own], -purity[own]))]
            before = np.cumsum(size[own]) - size[own]
            pure[own[before >= config.share * size[own].sum()]] = False
    if config.purity is not None:
        pure &= purity >= config.purity
    return np.where(pure, label, -1)
