"""Which pool faces are kept, under which label and weight: a pure function of scores and guard.

No image and no embedding is read. The rules of one face are asked in the order of
:data:`pipeline.schema.REASONS`; the first that fails is the reason. Rules that compare faces are in
:mod:`pipeline.judge`. Cost: two passes over narrow columns of packs, a row group at a time, on as
many threads as there are cores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline import cuts, thresholds
from pipeline.errors import ConfigError, LedgerError
from pipeline.judge import Judge
from pipeline.ledger import Ledger
from pipeline.metrics import class_counts
from pipeline.ordered import in_order
from pipeline.plan import Plan
from pipeline.policy import (
    CLUSTER_COLUMNS,
    FACE_COLUMNS,
    GUARD_COLUMNS,
    LABEL_COLUMNS,
    SCORE_COLUMNS,
    OperatingPoint,
    SelectConfig,
    class_curves,
    is_value,
    labeled_rows,
    passes,
    with_cuts,
)
from pipeline.posix import cores
from pipeline.schema import (
    EMOTIONS,
    OK,
    QUARANTINED,
    REASONS,
    SELECTION,
    label_names_of,
    require_columns,
)

__all__ = [
    "Judge",
    "Pool",
    "SelectConfig",
    "cut",
    "join",
    "operating_point",
    "select",
    "yield_by_class",
]

THREADS = min(cores(), 8)

Tables = Callable[[], Iterator[pa.Table]]
"""Opens the chunks again from the start; each is the `join` of one slice or pack."""


def operating_point(
    config: SelectConfig, points: pa.Table, pool: Iterable[pa.Table] = ()
) -> OperatingPoint:
    """Resolve a policy's thresholds on the run's own labeled faces.

    Args:
        config: the policy.
        points: out-of-fold rows of labeled faces: score columns plus `label`; `label_names` in the
            schema metadata.
        pool: chunks of the pool's score table with the columns of :mod:`pipeline.cuts`; read only
            where the policy has an adaptive rule.

    Returns:
        The point, with purity and utilization estimated on the same rows (no search, so no
        winner's curse, but the cuts have seen them).

    Raises:
        ConfigError: a cut is given for a class that the data does not have.
        LabelError: a face has no label or a class outside `label_names`.
    """
    names = label_names_of(points.schema)
    rows, labels = labeled_rows(points, names)
    labeled = class_counts(labels, names)
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
    if config.adaptive is not None:
        seen = cuts.look(pool, len(names), config.adaptive.tau)
        found = cuts.adaptive_cuts(config.adaptive, seen, points, names)
        point = point.model_copy(update={"cuts": found})
    elif config.target_precision is not None:
        point = with_cuts(point, class_curves(rows, labels, point), config.target_precision)
    worth = thresholds.estimate(passes(rows, point), rows.predicted, labels, len(names))
    estimates = {"purity": worth.purity, "utilization_labeled": worth.utilization}
    return point.model_copy(update={"estimates": estimates})


class Pool:
    """Opens the pool in plan order, a row group of a pack at a time; see :func:`join`.

    The ids of the three stages are compared once: what is sealed or committed never changes.
    """

    def __init__(
        self,
        plan: Plan,
        scores: Ledger,
        guard: Ledger,
        faces: Ledger,
        clusters: Ledger | None = None,
    ) -> None:
        self._plan = plan
        self._scores, self._guard, self._faces, self._clusters = scores, guard, faces, clusters
        self._compared = False

    def __call__(self) -> Iterator[pa.Table]:
        """The chunks from the start; LedgerError where the stages do not line up."""
        from_row = 1 if self._compared else 0  # the id comes first
        text = ("status", *LABEL_COLUMNS)
        streams = [
            self._scores.blocks(self._plan, SCORE_COLUMNS, coded=text),
            self._guard.blocks(self._plan, GUARD_COLUMNS[from_row:], coded=("twin_role",)),
            self._faces.blocks(self._plan, FACE_COLUMNS[from_row:], coded=("status",)),
        ]
        if self._clusters is not None:
            streams.append(self._clusters.blocks(self._plan, CLUSTER_COLUMNS[from_row:]))
        for tables in _aligned(streams):
            if not self._compared:
                _compare_ids(*tables)
            yield _joined(*tables)
        self._compared = True


def _aligned(streams: Sequence[Iterator[pa.Table]]) -> Iterator[list[pa.Table]]:
    """The same rows of every stream at a time; their blocks may end at different rows."""
    none = pa.table({})
    held = [none] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            while not len(held[i]) and (table := next(stream, None)) is not None:
                held[i] = table
        rows = [len(table) for table in held]
        if not any(rows):
            return
        if not all(rows):
            raise LedgerError("select: scores, guard and faces do not have equally many rows")
        yield [table.slice(0, min(rows)) for table in held]
        held = [table.slice(min(rows)) for table in held]


def join(
    scores: pa.Table, guard: pa.Table, faces: pa.Table, clusters: pa.Table | None = None
) -> pa.Table:
    """One chunk from tables of the same faces; LedgerError where they do not line up."""
    _compare_ids(scores, guard, faces, clusters)
    return _joined(scores, guard, faces, clusters)


def _compare_ids(
    scores: pa.Table, guard: pa.Table, faces: pa.Table, clusters: pa.Table | None = None
) -> None:
    for table, need, what in (
        (scores, SCORE_COLUMNS, "scores"),
        (guard, GUARD_COLUMNS, "guard"),
        (faces, FACE_COLUMNS, "faces"),
        (clusters, CLUSTER_COLUMNS, "clusters"),
    ):
        if table is None:
            continue
        require_columns(table.column_names, need, what)
        if not table["id"].equals(scores["id"]):
            raise LedgerError(
                f"select: ids of {what} ({len(table)}) and scores ({len(scores)}) differ"
            )


def _joined(
    scores: pa.Table, guard: pa.Table, faces: pa.Table, clusters: pa.Table | None = None
) -> pa.Table:
    bad = ~(is_value(scores["status"], OK) & is_value(faces["status"], OK))
    status = pa.DictionaryArray.from_arrays(pa.array(bad.astype(np.int8)), [OK, QUARANTINED])
    chunk = scores.select(list(SCORE_COLUMNS)).set_column(1, "status", status)
    for name in GUARD_COLUMNS[1:]:
        chunk = chunk.append_column(name, guard[name])
    if clusters is not None:
        chunk = chunk.append_column("cluster", clusters["cluster"])
    return chunk.append_column("group", faces["group"])


def select(
    tables: Tables,
    point: OperatingPoint,
    config: SelectConfig,
    threads: int = THREADS,
    labeled: Collection[str] = (),
) -> Iterator[pa.Table]:
    """Yield one SELECTION table per chunk, rows in the chunk's order.

    Args:
        tables: opens the chunks (:func:`join`) from the start, once per pass.
        point: thresholds; see :func:`operating_point` and :mod:`pipeline.search`.
        config: duplicates, caps and weights.
        threads: chunks worked on at a time; NumPy and Arrow let go of the interpreter.
        labeled: ids of faces that a person labeled; they train already.
    """
    judge = Judge(point, config, labeled)
    if judge.must_learn:
        for lesson in in_order(judge.study, tables(), threads):
            judge.absorb(lesson)
    judge.close()
    yield from in_order(judge.decide, tables(), threads)


def cut(tables: Iterable[pa.Table], rows: Iterable[int]) -> Iterator[pa.Table]:
    """The same rows in tables of the given numbers of rows; LedgerError where the sums differ."""
    rest = iter(tables)
    held = SELECTION.empty_table()
    for count in rows:
        pieces = []
        while count > len(held):
            pieces.append(held)
            count -= len(held)
            if (table := next(rest, None)) is None:
                raise LedgerError(f"select: {count} rows are missing at the end")
            held = table
        yield pa.concat_tables([*pieces, held.slice(0, count)])
        held = held.slice(count)
    if len(held) or any(len(table) for table in rest):
        raise LedgerError("select: more rows are decided on than slices hold")


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
