"""The pool as a search sees it: exact counts on a grid of scores, 4.5 MB whatever its size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.policy import OperatingPoint, rows_of
from pipeline.schema import OK

GRID = 1024  # steps of the confidence
SHARES = 32  # steps of the neighbors' share


def pool_counts(pool: Iterable[pa.Table], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Pool faces (K, 2, SHARES + 2, GRID + 1): class, prototype agrees, vote bin, confidence bin.

    Vote bin 0 is "neighbors name another class", bin 1 + s a share of at least s / SHARES.
    """
    shape = (len(names), 2, SHARES + 2, GRID + 1)
    counts = np.zeros(shape, dtype=np.int64)
    for table in pool:
        good = table.filter(pc.equal(table["status"], OK))
        rows = rows_of(good.filter(pc.is_valid(good["pseudo_label"])), names)
        vote = np.floor(np.clip(rows.agreement, 0, 1) * np.float32(SHARES)).astype(np.int64) + 1
        cell = (
            rows.predicted,
            (rows.prototype == rows.predicted).astype(np.int64),
            np.where(rows.neighbor == rows.predicted, vote, 0),
            np.floor(np.clip(rows.confidence, 0, 1) * np.float32(GRID)).astype(np.int64),
        )
        flat = np.ravel_multi_index(cell, shape)
        counts += np.bincount(flat, minlength=counts.size).reshape(shape)
    return counts


def pool_kept(point: OperatingPoint, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pool faces (K,) that a point with thresholds on the grid keeps, per class."""
    vote = 0 if point.neighbors is None else 1 + round(point.neighbors * SHARES)
    by_confidence = counts[:, int(point.prototype) :, vote:].sum((1, 2))
    floor = point.confidence if isinstance(point.confidence, float) else 0.0
    kept = np.zeros(len(counts), dtype=np.int64)
    for code, name in enumerate(point.label_names):
        cut = max(floor, (point.cuts or {}).get(name, 0.0))
        kept[code] = by_confidence[code, round(cut * GRID) :].sum()
    return kept


def on_grid(cuts: Mapping[str, float]) -> dict[str, float]:
    """Cuts rounded up to the grid, so that what is counted is what is kept."""
    return {name: float(np.ceil(cut * GRID) / GRID) for name, cut in cuts.items()}
