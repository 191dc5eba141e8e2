"""Proves that the grid counts exactly what the rules keep."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.policy import OperatingPoint, passes, rows_of
from pipeline.tally import GRID, on_grid, pool_counts, pool_kept
from tests.test_search import NAMES, score_rows


@pytest.mark.parametrize("prototype", [False, True])
@pytest.mark.parametrize("neighbors", [None, 0.25, 0.625])
def test_pool_kept__is_exactly_what_the_rules_keep(prototype: bool, neighbors: float) -> None:
    pool = score_rows(4000, 1)
    point = OperatingPoint(
        label_names=NAMES,
        confidence=0.3125,
        prototype=prototype,
        neighbors=neighbors,
        cuts={"neutral": 411 / GRID, "happiness": 0.5, "sadness": 2.0, "surprise": 0.0},
    )
    counts = pool_counts([pool.slice(0, 1000), pool.slice(1000)], NAMES)
    good = pool.filter(pa.array([s == "ok" for s in pool["status"].to_pylist()]))
    rows = rows_of(good, NAMES)
    expected = np.bincount(rows.predicted[passes(rows, point)], minlength=4)
    assert counts.sum() == len(good)
    assert pool_kept(point, counts).tolist() == expected.tolist()
    assert expected.sum() > 0


def test_on_grid__cuts_are_rounded_up() -> None:
    assert on_grid({"a": 0.5, "b": 0.5001, "c": 2.0}) == {"a": 0.5, "b": 513 / GRID, "c": 2.0}
