"""One pass over the decided pool: counts for the tables and a fair sample of faces to look at.

Reads narrow columns of selection, scores, guard and survey side by side, one slice at a time. The
sample holds, per reason and class, the faces whose ids have the smallest hashes: the same ones
whatever the order of slices. Cost: about 300 bytes of reading per pool face (the thumbnail is most
of it); memory does not grow with the pool. The hidden truth may be opened here, as evaluate may.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import LedgerError
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.ranking import stable_hash
from pipeline.schema import OK, QUARANTINED

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

COLUMNS = {
    "select": ("id", "reason", "label"),
    "score": ("id", "status", "pseudo_label", "confidence"),
    "guard": ("id", "twin_of", "twin_kind", "twin_role", "duplicate_group"),
    "survey": ("id", "status", "reason", "thumbnail"),
}


@dataclass(frozen=True)
class Sample:
    """A face that was drawn for a gallery."""

    id: str
    confidence: float | None
    thumbnail: bytes | None
    slice: str


@dataclass
class Tally:
    """Mergeable counts of the pass."""

    faces: int = 0
    usable: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    by_class: Counter[tuple[str, str]] = field(default_factory=Counter)  # (label, reason)
    known: Counter[str] = field(default_factory=Counter)  # kept faces with a truth, by label
    right: Counter[str] = field(default_factory=Counter)
    levels: dict[float, np.ndarray] = field(  # faces at or above it, with a truth, right
        default_factory=lambda: {level: np.zeros(3, np.int64) for level in LEVELS}
    )
    twins: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, role)
    duplicates: int = 0
    quarantine: Counter[str] = field(default_factory=Counter)


class Sampler:
    """Keeps the `size` faces with the smallest hashes of every (reason, label)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heaps: dict[tuple[str, str], list[tuple[int, Sample]]] = {}

    def add(self, slice: str, rows: pa.Table) -> None:
        """Offer the faces of one slice; columns id, reason, label, confidence, thumbnail."""
        if not self.size or not rows.num_rows:
            return
        hashes = stable_hash(rows["id"])
        reasons = np.array(rows["reason"].to_pylist())
        labels = np.array(rows["label"].to_pylist())
        for key in sorted(set(zip(reasons.tolist(), labels.tolist(), strict=True))):
            heap = self._heaps.setdefault(key, [])
            here = np.flatnonzero((reasons == key[0]) & (labels == key[1]))
            for i in here[np.argsort(hashes[here])][: self.size].tolist():
                rank = -int(hashes[i])  # heapq keeps the smallest on top: the worst hash
                if len(heap) == self.size and rank <= heap[0][0]:
                    break
                row = {name: rows[name][i].as_py() for name in ("id", "confidence", "thumbnail")}
                push = heapq.heappush if len(heap) < self.size else heapq.heapreplace
                push(heap, (rank, Sample(**row, slice=slice)))

    def drawn(self) -> dict[tuple[str, str], list[Sample]]:
        """The sample by (reason, label), surest first."""
        return {
            key: sorted((s for _, s in heap), key=lambda s: (-(s.confidence or 0.0), s.id))
            for key, heap in self._heaps.items()
        }


def walk(
    ledgers: dict[str, Ledger], plan: Plan, truth: pa.Table, size: int
) -> tuple[Tally, dict[tuple[str, str], list[Sample]]]:
    """Count the pool and draw faces for the galleries.

    Args:
        ledgers: of select, score, guard and survey.
        plan: of the pool.
        truth: TRUTH; faces without a label there are unknown.
        size: faces per gallery.

    Raises:
        LedgerError: tables of a slice do not line up.
    """
    truth = truth.filter(pc.is_valid(truth["label"])).combine_chunks()
    tally, sampler = Tally(), Sampler(size)
    for key, rows in _rows(ledgers, plan):
        _count(tally, rows, truth)
        sampler.add(key, rows)
    return tally, sampler.drawn()


def _rows(ledgers: dict[str, Ledger], plan: Plan) -> Iterator[tuple[str, pa.Table]]:
    """Per slice one table; `label` is select's, `pseudo_label` the teacher's."""
    streams = [ledgers[stage].tables(plan, columns) for stage, columns in COLUMNS.items()]
    for parts in zip(*streams, strict=True):
        slice = parts[0][0]
        selection, scores, guard, faces = (table for _, table in parts)
        for stage, table in zip(COLUMNS, (selection, scores, guard, faces), strict=True):
            if not table["id"].equals(selection["id"]):
                raise LedgerError(f"slice {slice.key}: faces of {stage} and select differ")
        yield (
            slice.key,
            pa.table(
                {
                    "id": selection["id"],
                    "reason": selection["reason"],
                    "label": selection["label"].fill_null(""),
                    "pseudo_label": scores["pseudo_label"],
                    "confidence": scores["confidence"],
                    "scored": pc.equal(scores["status"], OK),
                    "twin_of": guard["twin_of"],
                    "twin_kind": guard["twin_kind"],
                    "twin_role": guard["twin_role"],
                    "duplicate_group": guard["duplicate_group"],
                    "status": faces["status"],
                    "fault": faces["reason"],
                    "thumbnail": faces["thumbnail"],
                }
            ),
        )


def _count(tally: Tally, rows: pa.Table, truth: pa.Table) -> None:
    tally.faces += rows.num_rows
    tally.usable += pc.sum(pc.equal(rows["status"], OK)).as_py() or 0
    tally.reasons += _pairs(rows, "reason")
    tally.by_class += _pairs(rows, "label", "reason")
    twins = rows.filter(pc.is_valid(rows["twin_of"]))
    tally.twins += _pairs(twins, "twin_kind", "twin_role")
    grouped = rows.filter(pc.is_valid(rows["duplicate_group"]))
    tally.duplicates += pc.sum(pc.not_equal(grouped["id"], grouped["duplicate_group"])).as_py() or 0
    bad = rows.filter(pc.equal(rows["status"], QUARANTINED))
    tally.quarantine += _pairs(bad, "fault")

    scored = rows.filter(rows["scored"])
    place = pc.index_in(scored["id"], value_set=truth["id"])
    known = np.asarray(pc.is_valid(place))
    answer = truth["label"].take(place)
    right = np.asarray(pc.equal(scored["pseudo_label"], answer).fill_null(False))
    confidence = np.asarray(scored["confidence"])
    for level, counts in tally.levels.items():
        above = confidence >= np.float32(level)
        counts += (above.sum(), (above & known).sum(), (above & right).sum())
    kept = np.asarray(pc.equal(scored["reason"], "selected"))
    tally.known += _pairs(scored.filter(pa.array(kept & known)), "label")
    right = np.asarray(pc.equal(scored["label"], answer).fill_null(False))  # as select named it
    tally.right += _pairs(scored.filter(pa.array(kept & right)), "label")


def _pairs(rows: pa.Table, *columns: str) -> Counter:  # type: ignore[type-arg]
    """How often each value, or each tuple of values, occurs."""
    groups = rows.group_by(list(columns)).aggregate([([], "count_all")]).to_pylist()
    return Counter(
        {
            row[columns[0]] if len(columns) == 1 else tuple(row[c] for c in columns): row[
                "count_all"
            ]
            for row in groups
        }
    )
