"""One process of a training run: its place among all, its device, its checkpoints.

What for: objectives and the loop add up numbers over workers without knowing who started them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.losses import Gather
from pipeline.schema import AllReduce
from pipeline.training.checkpoint import Folder


@dataclass(frozen=True)
class Worker:
    """One process of a run: its place among all, its device, where it may leave checkpoints."""

    device: torch.device
    dtype: torch.dtype
    """bfloat16 for autocast, float32 for none."""
    rank: int = 0
    world: int = 1
    checkpoint: Folder | None = None
    """Folder that every worker can read; None: nothing is kept and nothing resumed."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    sum_over_workers: AllReduce | None = None
    """Sum of a tensor over all workers; needed where there are several."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forwards run in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all workers; may reuse its memory."""
        if self.sum_over_workers is None:
            return tensor
        summed: Tensor = self.sum_over_workers(tensor)
        return summed

    @property
    def gather(self) -> Gather:
        """Joins the rows of all workers."""
        return Gather(self.all_reduce, self.rank, self.world)

    def barrier(self) -> None:
        """Wait for all workers."""
        self.all_reduce(torch.zeros(1, device=self.device))


def local(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    checkpoint: Folder | None = None,
    checkpoint_every: int = 500,
) -> Worker:
    """The only worker of a run in this process."""
    where = torch.device(device)
    return Worker(where, dtype, checkpoint=checkpoint, checkpoint_every=checkpoint_every)


def distributed(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    checkpoint: Folder | None = None,
    checkpoint_every: int = 500,
) -> Worker:
    """This process's worker of a torch.distributed group that has been initialized."""

    def reduce(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    return Worker(
        torch.device(device),
        dtype,
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        checkpoint,
        checkpoint_every,
        reduce,
    )


def precision(bf16: bool | None, device: str) -> torch.dtype:
    """bfloat16 for autocast, or float32.

    Args:
        bf16: as the recipe says. None: where it is faster: on GPUs, and on CPUs that multiply
            bfloat16 themselves. compact_resnet, batch 192: 1,040 to 1,109 img/s against 739 in
            float32 on two cores with AVX512-BF16; 343 against 449 on one core of a CPU without.
        device: cpu or cuda.
    """
    if bf16 is None:
        ask = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch we run on
        able = ask() if ask is not None else {"amx_bf16": True}
        bf16 = device != "cpu" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.bfloat16 if bf16 else torch.float32


def prepare_cpu(threads: int | None) -> None:
    """Settings of this process that training on a CPU wants.

    Denormal numbers are flushed to zero: the moments of weights that have come to rest are full of
    them and each costs a hundred cycles. On cores shared with others, one thread can be several
    times as fast as two, which wait for each other.

    Args:
        threads: of torch; None leaves torch's choice, all cores.
    """
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
