"""The policy and its operating point: rules that look at one face alone, and their thresholds.

Every threshold is resolved on out-of-fold predictions of the run's own labeled faces, by
:func:`pipeline.selection.operating_point` or by :mod:`pipeline.search`, and stored as JSON; select
applies it to the pool. Both ask the same functions here, so an estimate and its selection cannot
drift apart. Everything is vectorized over a chunk of score rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from pipeline import config as settings
from pipeline import thresholds
from pipeline.clusters import ClusterConfig
from pipeline.cuts import AdaptiveConfig
from pipeline.errors import ConfigError, LabelError
from pipeline.schema import class_name, require_columns
from pipeline.storage import Location

SCORE_COLUMNS = (
    "id",
    "status",
    "pseudo_label",
    "confidence",
    "prototype_label",
    "neighbor_label",
    "neighbor_agreement",
)
"""What decisions read of a score table."""

LABEL_COLUMNS = ("pseudo_label", "prototype_label", "neighbor_label")
GUARD_COLUMNS = ("id", "twin_of", "twin_role", "duplicate_group")
FACE_COLUMNS = ("id", "status", "group")
CLUSTER_COLUMNS = ("id", "cluster")

THRESHOLDS = ("adaptive", "confidence", "neighbors")
"""Settings of a policy that are off unless somebody asks for them."""

Mask = NDArray[np.bool_]


class SelectConfig(settings.Config):
    """The policy, in the order its rules are asked; None is off. The guard has no switch."""

    policy: Literal["rules", "all"] = "rules"  # all: no thresholds; all else still counts
    duplicates: bool = True  # keep one of each duplicate group: the most confident
    confidence: float | dict[str, float] | None = None  # lowest confidence, for all or per class
    prototype: bool = True  # the nearest class prototype must name the same class
    neighbors: float | None = Field(default=None, ge=0, le=1)  # lowest share of the labeled vote
    target_precision: float | None = Field(default=0.9, gt=0, le=1)  # per-class cuts, out of fold
    adaptive: AdaptiveConfig | None = None  # in place of target_precision; search has its own
    clusters: ClusterConfig | None = None  # of embeddings; they may name a face otherwise
    group_cap: int | None = Field(default=None, ge=1)  # most faces of one group
    class_cap: int | None = Field(default=None, ge=0)  # most faces of one class
    class_cap_labeled: float | None = Field(default=None, ge=0)  # the same, times labeled faces
    weights: Literal["one", "confidence", "softmatch"] = "softmatch"

    @field_validator("confidence")
    @classmethod
    def _are_shares(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        by_class = value if isinstance(value, dict) else {}
        for name in by_class:
            class_name(name)
        for lowest in (value,) if isinstance(value, float) else by_class.values():
            if not 0 <= lowest <= 1:
                raise ValueError("expected confidences from 0 to 1")
        return value

    @model_validator(mode="after")
    def _what_is_asked_is_read(self) -> SelectConfig:
        precision = ("target_precision",) if self.target_precision is not None else ()
        if self.policy == "all" and (asked := settings.unread(self, (*THRESHOLDS, *precision))):
            raise ValueError(f"{asked}: policy all has no thresholds; only policy rules has")
        if self.adaptive is not None and (asked := settings.unread(self, precision)):
            raise ValueError(f"{asked}: adaptive finds the cuts in its place")
        return self


class OperatingPoint(settings.Config):
    """Decisions of the rules that look at one face alone, with what they are expected to give."""

    label_names: tuple[str, ...]
    confidence: float | dict[str, float] | None = None
    prototype: bool = False
    neighbors: float | None = None
    cuts: dict[str, float] | None = None  # per class; a cut of 2.0 keeps nothing
    clusters: tuple[str | None, ...] | None = None  # label of each; None: not pure enough
    relabel: bool = False  # a face takes the label of its cluster; else it leaves if they differ
    labeled: dict[str, int] = Field(default_factory=dict)  # per class; unit of class_cap_labeled
    table: tuple[dict[str, Any], ...] = ()  # class, cut, positives, kept, precision, pooled
    estimates: dict[str, float] = Field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ()  # of the search, if one was made

    @property
    def digest(self) -> str:
        """Of what decides: estimates and trials do not count."""
        decides = {"label_names", "confidence", "prototype", "neighbors", "cuts", "labeled"}
        if self.clusters is not None:  # points made before there were any keep their digest
            decides |= {"clusters", "relabel"}
        return settings.digest(self.model_dump(mode="json", include=decides))

    def save(self, at: Location) -> None:
        """Write the point as JSON."""
        at.write_json(self.model_dump(mode="json"))

    @classmethod
    def load(cls, at: Location) -> OperatingPoint:
        """Read what :meth:`save` wrote; ConfigError where it is something else."""
        return settings.parse(cls, at.read_json(), where=at.name)


@dataclass(frozen=True)
class Rows:
    """Columns that rules read, as codes; -1 where there is none."""

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    prototype: NDArray[np.int64]
    neighbor: NDArray[np.int64]
    agreement: NDArray[np.float32]
    cluster: NDArray[np.int64] | None = None  # None: the table has no such column


def rows_of(table: pa.Table, label_names: tuple[str, ...]) -> Rows:
    """Codes of score columns; raises LabelError for a class outside `label_names`."""
    require_columns(table.column_names, SCORE_COLUMNS[2:], "scores")
    return Rows(
        codes_of(table["pseudo_label"], label_names),
        _floats(table["confidence"]),
        codes_of(table["prototype_label"], label_names),
        codes_of(table["neighbor_label"], label_names),
        _floats(table["neighbor_agreement"]),
        _filled(table["cluster"], -1).astype(np.int64) if "cluster" in table.column_names else None,
    )


def _below_confidence(rows: Rows, point: OperatingPoint) -> Mask:
    if isinstance(point.confidence, float):
        return rows.confidence < np.float32(point.confidence)
    return rows.confidence < _per_class(point.confidence, point)[rows.predicted]


def _prototype_disagrees(rows: Rows, point: OperatingPoint) -> Mask:
    return (rows.prototype != rows.predicted) & point.prototype


def _neighbors_disagree(rows: Rows, point: OperatingPoint) -> Mask:
    if point.neighbors is None:
        return np.zeros(len(rows.predicted), dtype=bool)
    agree = (rows.neighbor == rows.predicted) & (rows.agreement >= np.float32(point.neighbors))
    return ~agree


def _below_class_threshold(rows: Rows, point: OperatingPoint) -> Mask:
    return rows.confidence < _per_class(point.cuts, point)[rows.predicted]


def cluster_labels(rows: Rows, point: OperatingPoint) -> NDArray[np.int64]:
    """Label code (N,) of the cluster that each face lies in; -1 where it is not pure enough."""
    if rows.cluster is None:
        raise ConfigError("select: the point has clusters, and the rows have none")
    codes = [-1 if n is None else point.label_names.index(n) for n in point.clusters or ()]
    return np.array([*codes, -1], np.int64)[rows.cluster]


def _impure_cluster(rows: Rows, point: OperatingPoint) -> Mask:
    if point.clusters is None:
        return np.zeros(len(rows.predicted), dtype=bool)
    return cluster_labels(rows, point) < 0


def _cluster_disagrees(rows: Rows, point: OperatingPoint) -> Mask:
    if point.clusters is None or point.relabel:
        return np.zeros(len(rows.predicted), dtype=bool)
    return cluster_labels(rows, point) != rows.predicted


RULES: tuple[tuple[str, Callable[[Rows, OperatingPoint], Mask]], ...] = (
    ("below_confidence", _below_confidence),
    ("prototype_disagrees", _prototype_disagrees),
    ("neighbors_disagree", _neighbors_disagree),
    ("below_class_threshold", _below_class_threshold),
    ("impure_cluster", _impure_cluster),
    ("cluster_disagrees", _cluster_disagrees),
)
"""Rules that look at one face alone, in the order they are asked; a mask of those who fail."""


def passes(rows: Rows, point: OperatingPoint) -> Mask:
    """Rows that fail none of :data:`RULES`."""
    failed = np.zeros(len(rows.predicted), dtype=bool)
    for _, fails in RULES:
        failed |= fails(rows, point)
    return ~failed


def labels_kept(rows: Rows, point: OperatingPoint, kept: Mask) -> NDArray[np.int64]:
    """Label code (N,): the teacher's, or the cluster's for faces in a mask that it renames.

    A renamed face passed the rules before, and competes and weighs, with the teacher's confidence
    in its own label: no narrower column has that in another one.
    """
    if point.clusters is None or not point.relabel:
        return rows.predicted
    return np.where(kept, cluster_labels(rows, point), rows.predicted)


def labeled_rows(points: pa.Table, names: tuple[str, ...]) -> tuple[Rows, NDArray[np.int64]]:
    """Rows and true codes of out-of-fold points; LabelError where a face has no label."""
    require_columns(points.column_names, ("label",), "out-of-fold rows")
    labels = codes_of(points["label"], names)
    if (labels < 0).any():
        raise LabelError(f"out-of-fold rows: {int((labels < 0).sum())} faces have no label")
    return rows_of(points, names), labels


def class_curves(
    rows: Rows, labels: NDArray[np.int64], point: OperatingPoint
) -> list[thresholds.Curve]:
    """Precision curves among the rows that pass the point's other rules."""
    keep = passes(rows, point.model_copy(update={"cuts": None}))
    classes = len(point.label_names)
    return thresholds.precision_curves(
        rows.confidence[keep].astype(np.float64),
        rows.predicted[keep],
        labels[keep],
        classes,
        positives=np.bincount(labels, minlength=classes),
    )


def with_cuts(
    point: OperatingPoint, curves: list[thresholds.Curve], target: float, grid: int | None = None
) -> OperatingPoint:
    """The point with per-class cuts for a target precision, rounded up to 1/grid if given."""
    names = point.label_names
    cuts: dict[str, float] = {}
    table = []
    for cut in thresholds.cuts_at(curves, target):
        name = names[cut.code]
        cuts[name] = cut.cut if grid is None else float(np.ceil(cut.cut * grid) / grid)
        table.append(
            {
                "class": name,
                "cut": cuts[name],
                "positives": cut.positives,
                "kept": cut.kept,
                "precision": cut.precision,
                "pooled": cut.pooled,
            }
        )
    return point.model_copy(update={"cuts": cuts, "table": tuple(table)})


def _per_class(values: Mapping[str, float] | None, point: OperatingPoint) -> NDArray[np.float32]:
    """Cut of each class and, last, of no class: index -1 reads it."""
    values = values or {}
    cuts = [values.get(name, 0.0) for name in point.label_names]
    return np.array([*cuts, 0.0], dtype=np.float32)


def codes_of(column: pa.ChunkedArray, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Codes (N,) of class names, -1 for null; LabelError for a name that is not in `names`."""
    found = _places(column, names)
    unknown = found == _UNKNOWN
    if unknown.any():
        name = column[int(np.flatnonzero(unknown)[0])].as_py()
        raise LabelError(f"scores: class {name!r} is not one of {', '.join(names)}")
    return found


def is_value(column: pa.ChunkedArray, value: str) -> Mask:
    """Rows (N,) of a text column that hold `value`; null does not."""
    return _places(column, (value,)) == 0


_UNKNOWN = -2


def _places(column: pa.ChunkedArray, values: tuple[str, ...]) -> NDArray[np.int64]:
    """Place (N,) of each text among `values`, -1 for null, _UNKNOWN for another text.

    A dictionary is looked up once, not row by row: 30 times as fast.
    """
    known = pa.array(values, pa.string())
    if not pa.types.is_dictionary(column.type):
        found = _filled(pc.index_in(column, value_set=known), _UNKNOWN).astype(np.int64)
        found[~mask_of(pc.is_valid(column))] = -1
        return found
    coded = column.combine_chunks()
    if isinstance(coded, pa.ChunkedArray):  # of no chunk, or too long for one
        coded = pa.concat_arrays([pa.array([], column.type), *coded.chunks])
    places = _filled(pc.index_in(coded.dictionary, value_set=known), _UNKNOWN)
    return np.append(places, -1).astype(np.int64)[_filled(coded.indices, -1)]


def _filled(codes: pa.Array | pa.ChunkedArray, null: int) -> NDArray[np.integer[Any]]:
    """Codes (N,) with a number in the place of null."""
    return (pc.fill_null(codes, null) if codes.null_count else codes).to_numpy()


def _floats(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Values (N,) with 0 for null and NaN: what was not scored passes no cut."""
    return np.nan_to_num(pc.fill_null(column, 0.0).to_numpy().astype(np.float32))


def mask_of(column: pa.ChunkedArray) -> Mask:
    """Rows (N,) of a boolean column that are true; null is not."""
    return np.asarray(pc.fill_null(column, False), dtype=bool)
