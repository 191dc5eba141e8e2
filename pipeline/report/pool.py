"""One pass over the decided pool: counts for the tables and a fair sample of faces to look at.

Reads narrow columns of selection, scores, guard and survey side by side, one slice at a time. The
sample holds, per reason and class and per step of the confidence, the faces whose ids have the
smallest hashes: the same ones whatever the order of slices.
Cost: about 400 bytes of reading per pool face, most of it thumbnail and neighbors; memory does not
grow with the pool. The hidden truth may be opened here, as evaluate may.
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

STEPS = 100
"""Of the confidence, in counts of the pool and for the threshold explorer."""

THRESHOLDS = np.arange(STEPS + 1) / STEPS

THUMBNAIL = 16

COLUMNS = {
    "select": ("id", "reason", "label"),
    "score": (
        "id",
        "status",
        "pseudo_label",
        "confidence",
        "neighbor_ids",
        "neighbor_similarity",
    ),
    "guard": ("id", "twin_of", "twin_kind", "twin_role", "duplicate_group"),
    "survey": ("id", "status", "reason", "thumbnail"),
}


SAMPLED = ("id", "confidence", "thumbnail", "pseudo_label", "neighbor", "neighbor_similarity")


@dataclass(frozen=True)
class Sample:
    """A face that was drawn for a gallery."""

    id: str
    confidence: float | None
    thumbnail: bytes | None
    pseudo_label: str | None
    neighbor: str | None  # id of the nearest labeled face
    neighbor_similarity: float | None  # its cosine
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
    cells: dict[str, np.ndarray] = field(default_factory=dict)
    """By pseudo-label: scored faces, those with a truth, those that are right, (3, STEPS + 1)."""
    twins: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, role)
    duplicates: int = 0
    quarantine: Counter[str] = field(default_factory=Counter)


class Sampler:
    """Keeps the `size` faces with the smallest hashes of every (reason, label)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heaps: dict[tuple[str, str], list[tuple[int, Sample]]] = {}

    def add(self, slice: str, rows: pa.Table) -> None:
        """Offer the faces of one slice; columns reason, label and those of a :class:`Sample`."""
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
                row = {name: rows[name][i].as_py() for name in SAMPLED}
                push = heapq.heappush if len(heap) < self.size else heapq.heapreplace
                push(heap, (rank, Sample(**row, slice=slice)))

    def drawn(self) -> dict[tuple[str, str], list[Sample]]:
        """The sample by (reason, label), surest first."""
        return {
            key: sorted((s for _, s in heap), key=lambda s: (-(s.confidence or 0.0), s.id))
            for key, heap in self._heaps.items()
        }


@dataclass(frozen=True)
class Walked:
    """What the pass found."""

    tally: Tally
    drawn: dict[tuple[str, str], list[Sample]]  # by reason and label, surest first
    ladder: list[Sample]  # scored faces evenly over the steps of the confidence, least sure first


def walk(
    ledgers: dict[str, Ledger], plan: Plan, truth: pa.Table, size: int, per_step: int = 0
) -> Walked:
    """Count the pool and draw faces to look at.

    Args:
        ledgers: of select, score, guard and survey.
        plan: of the pool.
        truth: TRUTH; faces without a label there are unknown.
        size: faces per gallery.
        per_step: faces per step of the confidence.

    Raises:
        LedgerError: tables of a slice do not line up.
    """
    truth = truth.filter(pc.is_valid(truth["label"])).combine_chunks()
    tally, sampler, ladder = Tally(), Sampler(size), Sampler(per_step)
    for key, rows in _rows(ledgers, plan):
        scored = rows.filter(rows["scored"])
        step = steps_of(scored["confidence"])
        _count(tally, rows, scored, step, truth)
        sampler.add(key, rows)
        names = {
            "reason": pa.repeat("scored", len(step)),
            "label": pa.array(step).cast(pa.string()),
        }
        ladder.add(key, pa.table({**{n: scored[n] for n in SAMPLED}, **names}))
    every = [sample for samples in ladder.drawn().values() for sample in samples]
    return Walked(tally, sampler.drawn(), sorted(every, key=lambda s: (s.confidence or 0.0, s.id)))


def pixels_of(thumbnail: bytes) -> np.ndarray:
    """A stored thumbnail as uint8 (16, 16)."""
    return np.frombuffer(thumbnail, np.uint8).reshape(THUMBNAIL, THUMBNAIL)


def steps_of(confidence: pa.ChunkedArray) -> np.ndarray:
    """Highest step (N,) that each confidence reaches; float32 is compared with float32."""
    values = confidence.to_numpy().astype(np.float32)
    return np.searchsorted(THRESHOLDS.astype(np.float32), values, side="right") - 1


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
                    "neighbor": pc.list_element(scores["neighbor_ids"], 0),
                    "neighbor_similarity": scores["neighbor_similarity"],
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


def _count(
    tally: Tally, rows: pa.Table, scored: pa.Table, step: np.ndarray, truth: pa.Table
) -> None:
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

    place = pc.index_in(scored["id"], value_set=truth["id"])
    known = np.asarray(pc.is_valid(place))
    answer = truth["label"].take(place)
    right = np.asarray(pc.equal(scored["pseudo_label"], answer).fill_null(False))
    labels = np.array(scored["pseudo_label"].to_pylist(), dtype=object)
    for label in sorted(set(labels.tolist())):
        own = labels == label
        cells = tally.cells.setdefault(label, np.zeros((3, STEPS + 1), np.int64))
        for row, which in enumerate((own, own & known, own & right)):
            cells[row] += np.bincount(step[which], minlength=STEPS + 1)
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
