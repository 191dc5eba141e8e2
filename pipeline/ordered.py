"""Work on many items side by side, results in the order of the items, few of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yield `work(item)` for each item, in the order of the items.

    A thread of its own draws the items one ahead; at most 2 * threads + 1 of them, worked on or
    done, wait to be yielded. What an item or its work raises is raised when it is its turn.

    Args:
        work: called in `threads` threads, None is a result like any other.
        items: drawn as results are taken; none of them None.
        threads: at least 1.
    """
    rest = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as pool:
        coming = reader.submit(next, rest, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, rest, None)
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
