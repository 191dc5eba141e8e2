"""Workers that are threads: their tensors add up at a barrier."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


def meeting(workers: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """The sum over workers, as each rank calls it."""
    meet, given = threading.Barrier(workers, timeout=60), [torch.empty(0)] * workers

    def of(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            given[rank] = tensor.clone()
            meet.wait()
            total = torch.stack(given).sum(0)
            meet.wait()
            return total

        return reduce

    return of


def in_threads(workers: int, run: Callable[[int, Callable[[Tensor], Tensor]], None]) -> None:
    """Call `run(rank, sum over workers)` in a thread per worker and wait for all."""
    reduce = meeting(workers)
    threads = [threading.Thread(target=run, args=(rank, reduce(rank))) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
