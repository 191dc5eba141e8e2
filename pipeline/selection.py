"""Which pool faces are kept, under which label and weight: a pure function of scores and guard.

No image and no embedding is read. The rules of one face are asked in the order of
:data:`pipeline.schema.REASONS`; the first that fails is the reason. Rules that compare faces (one
of each duplicate group, caps per group and class) take one mergeable pass each over narrow columns,
see :mod:`pipeline.ranking`; the result depends neither on the order of the chunks nor on workers.
Cost: at most five passes; memory is K x 65,536 counters plus 20 bytes per capped group member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from pipeline import config as settings
from pipeline import ranking, thresholds
from pipeline.errors import ConfigError, LedgerError
from pipeline.policy import (
    RULES,
    SCORE_COLUMNS,
    Mask,
    OperatingPoint,
    Rows,
    class_curves,
    labeled_rows,
    mask_of,
    passes,
    rows_of,
    with_cuts,
)
from pipeline.schema import (
    EMOTIONS,
    OK,
    QUARANTINED,
    REASONS,
    SELECTION,
    label_names_of,
    require_columns,
)

GUARD_COLUMNS = ("id", "twin_of", "twin_role", "duplicate_group")
FACE_COLUMNS = ("id", "status", "group")

Tables = Callable[[], Iterator[pa.Table]]
"""Opens the chunks again from the start; each is the `join` of one slice or pack."""


class SelectConfig(settings.Config):
    """The policy, in the order its rules are asked; None is off. The guard has no switch."""

    policy: Literal["rules", "all"] = "rules"  # all: no thresholds; duplicates and caps still count
    duplicates: bool = True  # keep one of each duplicate group: the most confident
    confidence: float | dict[str, float] | None = None  # lowest confidence, for all or per class
    prototype: bool = True  # the nearest class prototype must name the same class
    neighbors: float | None = Field(default=None, ge=0, le=1)  # lowest share of the labeled vote
    target_precision: float | None = Field(default=0.9, gt=0, le=1)  # per-class cuts, out of fold
    group_cap: int | None = Field(default=None, ge=1)  # most faces of one group
    class_cap: int | None = Field(default=None, ge=0)  # most faces of one class
    class_cap_labeled: float | None = Field(default=None, ge=0)  # the same, times labeled faces
    weights: Literal["one", "confidence", "softmatch"] = "softmatch"


def operating_point(config: SelectConfig, points: pa.Table) -> OperatingPoint:
    """Resolve a policy's thresholds on the run's own labeled faces.

    Args:
        config: the policy.
        points: out-of-fold rows of labeled faces: score columns plus `label`; `label_names` in the
            schema metadata.

    Returns:
        The point, with purity and utilization estimated on the same rows (no search, so no
        winner's curse, but the cuts have seen them).

    Raises:
        ConfigError: a cut is given for a class that the data does not have.
        LabelError: a face has no label or a class outside `label_names`.
    """
    names = label_names_of(points.schema)
    rows, labels = labeled_rows(points, names)
    counts = np.bincount(labels, minlength=len(names))
    labeled = {name: int(n) for name, n in zip(names, counts, strict=True)}
    if isinstance(config.confidence, dict) and (unknown := set(config.confidence) - set(names)):
        raise ConfigError(
            f"select.confidence: {sorted(unknown)[0]!r} is not a class; known: {', '.join(names)}"
        )
    if config.policy == "all":
        return OperatingPoint(label_names=names, labeled=labeled)
    point = OperatingPoint(
        label_names=names,
        confidence=config.confidence,
        prototype=config.prototype,
        neighbors=config.neighbors,
        labeled=labeled,
    )
    if config.target_precision is not None:
        point = with_cuts(point, class_curves(rows, labels, point), config.target_precision)
    worth = thresholds.estimate(passes(rows, point), rows.predicted, labels, len(names))
    estimates = {"purity": worth.purity, "utilization_labeled": worth.utilization}
    return point.model_copy(update={"estimates": estimates})


def join(scores: pa.Table, guard: pa.Table, faces: pa.Table) -> pa.Table:
    """One chunk from the tables of one slice or pack; LedgerError where they do not line up."""
    for table, need, what in (
        (scores, SCORE_COLUMNS, "scores"),
        (guard, GUARD_COLUMNS, "guard"),
        (faces, FACE_COLUMNS, "faces"),
    ):
        require_columns(table.column_names, need, what)
        if not table["id"].equals(scores["id"]):
            raise LedgerError(
                f"select: ids of {what} ({len(table)}) and scores ({len(scores)}) differ"
            )
    good = pc.and_(pc.equal(scores["status"], OK), pc.equal(faces["status"], OK))
    chunk = scores.select(list(SCORE_COLUMNS))
    chunk = chunk.set_column(1, "status", pc.if_else(good, OK, QUARANTINED))
    for name in GUARD_COLUMNS[1:]:
        chunk = chunk.append_column(name, guard[name])
    return chunk.append_column("group", faces["group"])


def select(tables: Tables, point: OperatingPoint, config: SelectConfig) -> Iterator[pa.Table]:
    """Yield one SELECTION table per chunk, rows in the chunk's order.

    Args:
        tables: opens the chunks (:func:`join`) from the start, once per pass.
        point: thresholds; see :func:`operating_point` and :mod:`pipeline.search`.
        config: duplicates, caps and weights.
    """
    judge = Judge(point, config)
    for learn in judge.lessons():
        for table in tables():
            learn(table)
    for table in tables():
        yield judge.decide(table)


class Judge:
    """What the comparing rules know about the whole pool, learned pass by pass."""

    def __init__(self, point: OperatingPoint, config: SelectConfig) -> None:
        self.point, self.config = point, config
        self._histogram = np.zeros(ranking.LEVELS, dtype=np.int64)
        self._duplicates = ranking.Best(1) if config.duplicates else None
        self._groups = None if config.group_cap is None else ranking.Best(config.group_cap)
        self._classes = _class_caps(point, config)

    def lessons(self) -> Iterator[Callable[[pa.Table], None]]:
        """The passes that this policy needs, in order; ask for the next when one is through."""
        if self._duplicates is not None or self.config.weights == "softmatch":
            yield self._learn_usable
        if self._groups is not None:
            yield self._learn_groups
        if self._classes is not None:
            yield self._learn_classes
            if self._classes.close():
                yield self._learn_boundary

    def decide(self, table: pa.Table) -> pa.Table:
        """SELECTION rows of one chunk."""
        rows, reasons = self._reasons(table, until=None)
        kept = reasons == _SELECTED
        columns = [
            table["id"],
            pa.array(kept),
            pa.array(REASONS, pa.string()).take(pa.array(reasons)),
            table["pseudo_label"],
            pa.array(self._weights(rows), pa.float32(), mask=~kept),
        ]
        return pa.table(columns, schema=SELECTION)

    def _weights(self, rows: Rows) -> NDArray[np.float32]:
        if self.config.weights == "one":
            return np.ones(len(rows.confidence), dtype=np.float32)
        if self.config.weights == "confidence":
            return rows.confidence
        confidence = rows.confidence.astype(np.float64)
        return thresholds.gaussian_weight(confidence, *self._spread).astype(np.float32)

    @cached_property
    def _spread(self) -> tuple[float, float]:
        """Mean and variance of the usable faces' confidence, from counts: no order of addition."""
        levels = np.arange(ranking.LEVELS) / (ranking.LEVELS - 1)
        share = self._histogram / max(int(self._histogram.sum()), 1)
        mean = float(levels @ share)
        return mean, float(((levels - mean) ** 2) @ share)

    def _learn_usable(self, table: pa.Table) -> None:
        rows, reasons = self._reasons(table, until="duplicate")
        usable = reasons == _SELECTED
        confidence = rows.confidence[usable]
        np.add.at(self._histogram, ranking.level(confidence), 1)
        if self._duplicates is not None:
            self._duplicates.add(*_contest(table, rows, "duplicate_group", usable)[1:])

    def _learn_groups(self, table: pa.Table) -> None:
        rows, reasons = self._reasons(table, until="group_cap")
        if self._groups is not None:
            self._groups.add(*_contest(table, rows, "group", reasons == _SELECTED)[1:])

    def _learn_classes(self, table: pa.Table) -> None:
        rows, reasons = self._reasons(table, until="class_cap")
        here = reasons == _SELECTED
        if self._classes is not None:
            self._classes.count(rows.predicted[here], rows.confidence[here])

    def _learn_boundary(self, table: pa.Table) -> None:
        rows, reasons = self._reasons(table, until="class_cap")
        if self._classes is not None:
            here = reasons == _SELECTED
            here[here] = self._classes.boundary(rows.predicted[here], rows.confidence[here])
            ties = _hashes(table["id"], here)
            self._classes.collect(rows.predicted[here], rows.confidence[here], ties)

    def _reasons(self, table: pa.Table, until: str | None) -> tuple[Rows, NDArray[np.int64]]:
        """Reason codes of a chunk, asking only the rules that come before `until`."""
        rows = rows_of(table, self.point.label_names)
        reasons = np.full(len(table), _SELECTED)
        for reason, fails in self._questions(table, rows):
            if reason == until:
                break
            still = reasons == _SELECTED
            reasons[still & fails(still)] = REASONS.index(reason)
        return rows, reasons

    def _questions(
        self, table: pa.Table, rows: Rows
    ) -> Iterator[tuple[str, Callable[[Mask], Mask]]]:
        """Every rule in order; each is given the rows still in and says which of them fail.

        The rules that compare are always named, so that `until` finds its place.
        """
        require_columns(table.column_names, (*GUARD_COLUMNS, "status", "group"), "select")
        bad = ~mask_of(pc.equal(table["status"], OK)) | (rows.predicted < 0)
        twin = mask_of(pc.is_valid(table["twin_of"]))
        of_validation = mask_of(pc.equal(table["twin_role"], "validation"))
        yield "quarantined", lambda _: bad
        yield "twin_of_test", lambda _: twin & ~of_validation
        yield "twin_of_validation", lambda _: twin
        duplicates, groups = self._duplicates, self._groups
        yield "duplicate", lambda still: _losers(duplicates, table, rows, "duplicate_group", still)
        for reason, rule in RULES:
            yield reason, partial(_ask, rule, rows, self.point)
        yield "group_cap", lambda still: _losers(groups, table, rows, "group", still)
        yield "class_cap", lambda still: _capped(self._classes, table, rows, still)


def yield_by_class(selections: Iterable[pa.Table]) -> dict[str, dict[str, int]]:
    """Faces per pseudo-label and reason, reasons in their fixed order; "" holds the unlabeled."""
    counts: dict[str, dict[str, int]] = {}
    for table in selections:
        groups = table.group_by(["label", "reason"]).aggregate([([], "count_all")])
        for row in groups.to_pylist():
            name = row["label"] or ""
            own = counts.setdefault(name, {})
            own[row["reason"]] = own.get(row["reason"], 0) + row["count_all"]
    order = sorted(counts, key=lambda n: (EMOTIONS.index(n) if n in EMOTIONS else 99, n))
    return {name: {r: counts[name][r] for r in REASONS if r in counts[name]} for name in order}


_SELECTED = REASONS.index("selected")


def _ask(
    rule: Callable[[Rows, OperatingPoint], Mask], rows: Rows, point: OperatingPoint, _: Mask
) -> Mask:
    return rule(rows, point)


def _class_caps(point: OperatingPoint, config: SelectConfig) -> ranking.Caps | None:
    """Limit per class: the lower of the two caps, or None where there is neither."""
    if config.class_cap is None and config.class_cap_labeled is None:
        return None
    limits = np.full(len(point.label_names), np.iinfo(np.int64).max)
    if config.class_cap is not None:
        limits[:] = config.class_cap
    if config.class_cap_labeled is not None:
        labeled = [point.labeled.get(name, 0) for name in point.label_names]
        limits = np.minimum(limits, np.round(np.array(labeled) * config.class_cap_labeled))
    return ranking.Caps(limits.astype(np.int64))


def _contest(
    table: pa.Table, rows: Rows, column: str, among: Mask
) -> tuple[Mask, NDArray[np.uint64], NDArray[np.float32], NDArray[np.uint64]]:
    """Rows `among` that have a key in `column`: their mask, keys, scores and tie breakers."""
    here = among & mask_of(pc.is_valid(table[column]))
    return here, _hashes(table[column], here), rows.confidence[here], _hashes(table["id"], here)


def _losers(
    best: ranking.Best | None, table: pa.Table, rows: Rows, column: str, still: Mask
) -> Mask:
    lost = np.zeros(len(still), dtype=bool)
    if best is not None:
        here, keys, scores, ties = _contest(table, rows, column, still)
        lost[here] = ~best.keep(keys, scores, ties)
    return lost


def _capped(caps: ranking.Caps | None, table: pa.Table, rows: Rows, still: Mask) -> Mask:
    lost = np.zeros(len(still), dtype=bool)
    if caps is not None:
        here = np.flatnonzero(still)
        codes, scores = rows.predicted[here], rows.confidence[here]
        close = caps.boundary(codes, scores)
        ties = np.zeros(len(here), dtype=np.uint64)
        ties[close] = _hashes(table["id"], np.isin(np.arange(len(still)), here[close]))
        lost[here] = ~caps.keep(codes, scores, ties)
    return lost


def _hashes(column: pa.ChunkedArray, here: Mask) -> NDArray[np.uint64]:
    return ranking.stable_hash(column.filter(pa.array(here)))
