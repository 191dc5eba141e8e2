"""Drawn pools: any slice yields the same faces, and none of the labeled set's people."""

import pytest

from pipeline.labeled.synthetic import SyntheticSet
from pipeline.sources.synthetic import SyntheticPool


def test_read__positions_are_the_same_faces():
    pool = SyntheticPool(count=30, size=16)
    extents = list(pool.slices(10))
    assert [(e.start, e.stop) for e in extents] == [(0, 10), (10, 20), (20, 30)]
    whole = pool.read(extents[1])
    assert pool.read(extents[1], [17, 12]).equals(whole.take([2, 7]))


@pytest.mark.parametrize("draw_seed", [1, 2])
def test_read__shares_nobody_with_the_labeled_set(draw_seed):
    pool = SyntheticPool(count=200, size=16, draw_seed=draw_seed)
    table = pool.read(next(pool.slices(200)))
    labeled = SyntheticSet(count=200, test_count=0, size=16).records("x").table
    for column in ("group", "image"):
        assert not set(table[column].to_pylist()) & set(labeled[column].to_pylist())
