"""The rules that compare faces: one of each duplicate group, caps per group and class.

Two passes, whatever the policy. In the first the judge learns, mergeably: a face that belongs to no
duplicate group competes at once for the places of its group and class; of a duplicate group the
best face is remembered with all that it needs to compete, and does so when the pass is over. In the
second the judge decides. Neither the order of the chunks nor the number of workers matters.

Memory: K x 65,536 counters, 31 bytes per duplicate group, 21 per face that a group cap lets through
and 13 per face that a class cap lets through; nothing is kept of every face.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import ranking, thresholds
from pipeline.policy import (
    GUARD_COLUMNS,
    RULES,
    Mask,
    OperatingPoint,
    Rows,
    SelectConfig,
    is_value,
    labels_kept,
    mask_of,
    rows_of,
)
from pipeline.ranking import Hashes, Scores
from pipeline.schema import OK, REASONS, SELECTION, require_columns

_SELECTED = REASONS.index("selected")
Reasons = NDArray[np.uint8]


@dataclass(frozen=True)
class Competitors:
    """Faces (N,) and what they compete with and for; `group` counts where `grouped`."""

    scores: Scores
    ties: Hashes
    codes: NDArray[np.uint8]
    group: Hashes
    grouped: Mask
    passing: Mask  # none of the rules that look at one face alone turns it away

    def take(self, here: Mask) -> Competitors:
        """The faces in a mask."""
        rows = np.flatnonzero(here)  # a mask would be counted through for every column
        return Competitors(*(column[rows] for column in self.columns()))

    def columns(self) -> tuple[NDArray[Any], ...]:
        """All columns, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True)
class Lesson:
    """What a chunk adds to the knowledge of the pool."""

    histogram: NDArray[np.int64]  # (LEVELS,) usable faces by confidence
    keys: Hashes  # duplicate group of each of `contested`
    contested: Competitors
    free: Competitors  # faces that belong to no duplicate group


class Judge:
    """What the comparing rules know about the whole pool.

    Chunks are studied anywhere and absorbed, judges that saw different chunks are merged, in any
    order; once closed, the judge decides.
    """

    def __init__(
        self, point: OperatingPoint, config: SelectConfig, labeled: Collection[str] = ()
    ) -> None:
        """For a policy; faces whose ids are `labeled` have a label of a person and are not kept."""
        self.point, self.config = point, config
        self._labeled = pa.array(sorted(labeled), pa.string())
        self._histogram = np.zeros(ranking.LEVELS, dtype=np.int64)
        self._duplicates = ranking.Best(1) if config.duplicates else None
        self._groups = None if config.group_cap is None else ranking.Best(config.group_cap)
        self._classes = _class_caps(point, config)

    @property
    def must_learn(self) -> bool:
        """Whether a rule or a weight of this policy compares faces."""
        compares = (self._duplicates, self._groups, self._classes)
        return any(rule is not None for rule in compares) or self.config.weights == "softmatch"

    def study(self, table: pa.Table) -> Lesson:
        """What a chunk teaches; changes nothing, so threads may study side by side."""
        rows = rows_of(table, self.point.label_names)
        reasons = self._guarded(table, rows)
        usable = reasons == _SELECTED
        self._ask_rules(rows, reasons)
        passing = reasons == _SELECTED
        bins = ranking.level(rows.confidence[usable])

        none = np.zeros(len(table), dtype=bool)
        contested = none if self._duplicates is None else usable & _known(table["duplicate_group"])
        capped = self._groups is not None or self._classes is not None
        competing = contested | passing if capped else contested
        grouped = none if self._groups is None else competing & _known(table["group"])
        faces = Competitors(
            scores=rows.confidence,
            ties=_hashes(table["id"], competing),
            codes=labels_kept(rows, self.point, passing).astype(np.uint8),
            group=_hashes(table["group"], grouped),
            grouped=grouped,
            passing=passing,
        )
        return Lesson(
            histogram=np.bincount(bins, minlength=ranking.LEVELS),
            keys=_hashes(table["duplicate_group"], contested)[contested],
            contested=faces.take(contested),
            free=faces.take(competing & ~contested),
        )

    def absorb(self, lesson: Lesson) -> None:
        """Add what a chunk teaches."""
        self._histogram += lesson.histogram
        if self._duplicates is not None:
            self._duplicates.add(lesson.keys, *lesson.contested.columns())
        self._enter(lesson.free)

    def merge(self, other: Judge) -> None:
        """Add what another judge of the same policy absorbed; neither may be closed."""
        self._histogram += other._histogram
        for own, theirs in ((self._duplicates, other._duplicates), (self._groups, other._groups)):
            if own is not None and theirs is not None:
                own.merge(theirs)
        if self._classes is not None and other._classes is not None:
            self._classes.merge(other._classes)

    def close(self) -> None:
        """All chunks are absorbed: let the best under each rule compete under the next."""
        if self._duplicates is not None:
            _, *columns = self._duplicates.rows()
            if len(columns[0]):
                best = Competitors(*columns)
                self._enter(best.take(best.passing))
            self._duplicates.close()
        if self._groups is not None:
            keys, scores, ties, *codes = self._groups.rows()
            if self._classes is not None and len(keys):
                self._classes.add(codes[0], scores, ties)
            self._groups.close()
        if self._classes is not None:
            self._classes.close()

    def decide(self, table: pa.Table) -> pa.Table:
        """SELECTION rows of one chunk."""
        rows = rows_of(table, self.point.label_names)
        reasons = self._guarded(table, rows)
        self._ask_best("duplicate", self._duplicates, "duplicate_group", table, rows, reasons)
        self._ask_rules(rows, reasons)
        codes = labels_kept(rows, self.point, reasons == _SELECTED)
        self._ask_best("group_cap", self._groups, "group", table, rows, reasons)
        if self._classes is not None:
            here = np.flatnonzero(reasons == _SELECTED)
            own, scores = codes[here], rows.confidence[here]
            stay = self._classes.keep(own, scores, partial(_hashes_at, table["id"], here))
            reasons[here[~stay]] = REASONS.index("class_cap")
        kept = reasons == _SELECTED
        names = pa.array((*self.point.label_names, None), pa.string())  # the last for code -1
        columns = [
            table["id"],
            pa.array(kept),
            pa.array(REASONS, pa.string()).take(pa.array(reasons)),
            names.take(pa.array(codes % len(names))),
            pa.array(self._weights(rows.confidence, kept), pa.float32(), mask=~kept),
        ]
        return pa.table(columns, schema=SELECTION)

    def _guarded(self, table: pa.Table, rows: Rows) -> Reasons:
        """Reason codes (N,) by status, twins and labels: what no policy switches off."""
        require_columns(table.column_names, (*GUARD_COLUMNS, "status", "group"), "select")
        twin = _known(table["twin_of"])
        of_validation = twin & is_value(table["twin_role"], "validation")
        reasons = np.full(len(table), _SELECTED, dtype=np.uint8)
        if len(self._labeled):
            named = pc.is_in(table["id"], value_set=self._labeled)
            reasons[mask_of(named)] = REASONS.index("labeled")
        reasons[twin] = REASONS.index("twin_of_test")
        reasons[of_validation] = REASONS.index("twin_of_validation")
        bad = ~is_value(table["status"], OK) | (rows.predicted < 0)
        reasons[bad] = REASONS.index("quarantined")
        return reasons

    def _ask_rules(self, rows: Rows, reasons: Reasons) -> None:
        """The first of the rules on one face alone that turns a face away is its reason."""
        for reason, fails in RULES:
            reasons[(reasons == _SELECTED) & fails(rows, self.point)] = REASONS.index(reason)

    def _ask_best(
        self,
        reason: str,
        best: ranking.Best | None,
        column: str,
        table: pa.Table,
        rows: Rows,
        reasons: Reasons,
    ) -> None:
        if best is not None:
            among = (reasons == _SELECTED) & _known(table[column])
            here = np.flatnonzero(among)
            keys = _hashes(table[column], among)[here]
            stay = best.keep(keys, rows.confidence[here], partial(_hashes_at, table["id"], here))
            reasons[here[~stay]] = REASONS.index(reason)

    def _enter(self, faces: Competitors) -> None:
        """Let faces that passed all earlier rules compete for their group's and class's places."""
        if self._groups is not None:
            own = faces.take(faces.grouped)
            self._groups.add(own.group, own.scores, own.ties, own.codes)
            faces = faces.take(~faces.grouped)
        if self._classes is not None:
            self._classes.add(faces.codes, faces.scores, faces.ties)

    def _weights(self, confidence: Scores, kept: Mask) -> Scores:
        weights = np.ones(len(confidence), dtype=np.float32)
        if self.config.weights == "confidence":
            weights = confidence
        elif self.config.weights == "softmatch":
            own = confidence[kept].astype(np.float64)
            weights[kept] = thresholds.gaussian_weight(own, *self._spread)
        return weights

    @cached_property
    def _spread(self) -> tuple[float, float]:
        """Mean and variance of the usable faces' confidence, from counts: no order of addition."""
        levels = np.arange(ranking.LEVELS) / (ranking.LEVELS - 1)
        share = self._histogram / max(int(self._histogram.sum()), 1)
        mean = float(levels @ share)
        return mean, float(((levels - mean) ** 2) @ share)


def _class_caps(point: OperatingPoint, config: SelectConfig) -> ranking.Caps | None:
    """Limit per class: the lower of the two caps, or None where there is neither."""
    if config.class_cap is None and config.class_cap_labeled is None:
        return None
    limits = np.full(len(point.label_names), ranking.Caps.UNLIMITED)
    if config.class_cap is not None:
        limits[:] = config.class_cap
    if config.class_cap_labeled is not None:
        labeled = [point.labeled.get(name, 0) for name in point.label_names]
        limits = np.minimum(limits, np.round(np.array(labeled) * config.class_cap_labeled))
    return ranking.Caps(limits.astype(np.int64))


def _known(column: pa.ChunkedArray) -> Mask:
    return mask_of(pc.is_valid(column))


def _hashes(column: pa.ChunkedArray, here: Mask) -> Hashes:
    """Hash (N,) of the rows in a mask; 0 elsewhere."""
    hashes = np.zeros(len(here), dtype=np.uint64)
    if here.any():
        hashes[here] = ranking.stable_hash(column.filter(pa.array(here)))
    return hashes


def _hashes_at(column: pa.ChunkedArray, rows: NDArray[np.int64], tied: Mask) -> Hashes:
    return ranking.stable_hash(column.take(pa.array(rows[tied])))
