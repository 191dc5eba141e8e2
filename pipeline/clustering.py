"""Clusters of a pool: two passes over stored embeddings, one to find them and one to assign faces.

The cluster of a face is a column of its own ledger, beside the pseudo-labels counted per cluster;
what is pure enough is decided by select, from those counts. Twins of test and validation faces get
a cluster like any other face, but neither shape one nor vote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.clusters import (
    PER_CLUSTER,
    ClusterConfig,
    Clusters,
    Codes,
    Counts,
    Sample,
    count_labels,
    verdicts,
)
from pipeline.errors import LedgerError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.policy import Mask, OperatingPoint, codes_of
from pipeline.ranking import stable_hash
from pipeline.schema import CLUSTERS, OK, label_names_of
from pipeline.storage import Location

COUNTS_FILE = "counts.json"


@dataclass(frozen=True)
class Part:
    """The faces of a slice that have an embedding, among all its faces."""

    slice: Slice
    ids: pa.ChunkedArray
    good: Mask  # (N,) faces with an embedding
    rows: np.ndarray  # (n, D) float16, unit length, of those
    label: Codes  # (n,) pseudo-label
    votes: Mask  # (n,) no twin, and the teacher has an opinion


@dataclass(frozen=True)
class Inputs:
    """What clusters are made of."""

    plan: Plan
    embeddings: Ledger
    scores: Ledger
    twins: Ledger

    def names(self) -> tuple[str, ...]:
        """Classes of the pseudo-labels."""
        first = next(iter(self.plan))
        return label_names_of(self.scores.read(first.key, ["id"]).schema)

    def parts(self) -> Iterator[Part]:
        """Slice by slice; LedgerError where the stages do not line up."""
        names = self.names()
        streams = zip(
            self.embeddings.tables(self.plan, ["id", "status", "embedding"]),
            self.scores.tables(self.plan, ["id", "pseudo_label"]),
            self.twins.tables(self.plan, ["id", "twin_of"]),
            strict=True,
        )
        for (slice, embedded), (_, scored), (_, twins) in streams:
            for what, table in (("score", scored), ("twins", twins)):
                if not table["id"].equals(embedded["id"]):
                    raise LedgerError(f"slice {slice.key}: faces of {what} and embed differ")
            good = pc.equal(embedded["status"], OK).to_numpy()
            flat = embedded["embedding"].filter(pa.array(good)).combine_chunks().flatten()
            width = embedded["embedding"].type.list_size
            rows = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
            label = codes_of(scored["pseudo_label"], names)[good]
            votes = (label >= 0) & pc.is_null(twins["twin_of"]).to_numpy()[good]
            yield Part(slice, embedded["id"], good, rows, label, votes)


def cluster(inputs: Inputs, count: int, seed: int, into: Ledger) -> Counts:
    """Find clusters, commit every face's own and count pseudo-labels per cluster.

    Args:
        inputs: the pool.
        count: clusters.
        seed: of k-means.
        into: ledger of CLUSTERS rows, not sealed here.

    Returns:
        (clusters, K) voting faces; no row where no face has an embedding.
    """
    classes, sample = len(inputs.names()), Sample(PER_CLUSTER * count)
    for part in inputs.parts():
        if part.votes.any():
            ids = part.ids.filter(pa.array(part.good)).filter(pa.array(part.votes))
            sample.add(stable_hash(ids), part.rows[part.votes])
    found = Clusters(sample.rows(), count, seed) if len(sample.rows()) else None
    counts = np.zeros((found.count if found else 0, classes), np.int64)
    for part in inputs.parts():
        own = np.full(len(part.ids), -1, np.int32)
        if found is not None and len(part.rows):
            own[part.good] = near = found.of(part.rows)
            votes = part.votes
            counts += count_labels(near[votes], part.label[votes], found.count, classes)
        column = pa.array(own, pa.int32(), mask=own < 0)
        into.commit(part.slice, pa.table([part.ids, column], schema=CLUSTERS))
    return counts


def save_counts(counts: Counts, at: Location) -> None:
    """Write the counts as JSON into the folder `at`."""
    (at / COUNTS_FILE).write_json(counts.tolist())


def with_clusters(point: OperatingPoint, config: ClusterConfig, at: Location) -> OperatingPoint:
    """The point with a verdict on each cluster; `at` is where :func:`save_counts` wrote."""
    classes = len(point.label_names)
    counts = np.array((at / COUNTS_FILE).read_json(), np.int64).reshape(-1, classes)
    labels = (None if code < 0 else point.label_names[code] for code in verdicts(counts, config))
    relabel = config.outvoted == "relabel"
    return point.model_copy(update={"clusters": tuple(labels), "relabel": relabel})
