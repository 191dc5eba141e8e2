"""Proves order, bounds and errors of work done side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.ordered import in_order


def _slow_first(n: int) -> int:
    time.sleep(0.02 if n % 4 == 0 else 0)
    return n * n


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_in_order__results_as_the_items_came(count: int, threads: int) -> None:
    assert list(in_order(_slow_first, range(count), threads)) == [n * n for n in range(count)]


def test_in_order__none_is_a_result() -> None:
    assert list(in_order(lambda n: None if n == 1 else n, [0, 1, 2], 2)) == [0, None, 2]


def test_in_order__draws_no_further_than_it_says() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for n in range(100):
            drawn = n + 1
            yield n

    threads = 2
    for taken, _ in enumerate(in_order(lambda n: n, items(), threads), 1):
        assert drawn <= taken + 2 * threads + 1


def test_in_order__works_side_by_side() -> None:
    """Three at a time, or the barrier breaks."""
    barrier = threading.Barrier(3, timeout=30)
    assert list(in_order(lambda n: barrier.wait() >= 0 and n, range(6), 3)) == list(range(6))


def test_in_order__errors_come_at_their_turn() -> None:
    def work(n: int) -> int:
        if n == 3:
            raise ValueError("three")
        return n

    results = in_order(work, range(9), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)

    def items() -> Iterator[int]:
        yield 7
        raise ValueError("no more")

    results = in_order(work, items(), 4)
    with pytest.raises(ValueError, match="no more"):
        list(results)
