"""The arithmetic of a streaming pass: what it asks of the machine, checked before it starts.

Ray waits without a word for CPUs and GPUs that will never be free, and writes to disk what does not
fit its object store. Both are sums that can be done first. Pure: no Ray in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ResourceError
from pipeline.plan import Slice

Transform = Callable[[Slice, pa.Table], pa.Table]

BUFFERED = 3
"""Blocks one task can hold in the object store: two waiting in its generator, one in hand."""


@dataclass(frozen=True)
class Operator:
    """One step of a pass: `make(*args)` builds the transform where it runs.

    `make` must be importable by name on the workers (a function or class of a module), and `args`
    picklable. With a pool (fewest, most actors) it is called once per actor, which is the place to
    load a model and to set its threads: Ray gives an actor of less than two CPUs one OpenMP
    thread. Without a pool it is called once per slice. With `calls` above one an actor runs that
    many slices at a time in threads, and the transform must allow it.
    """

    make: Callable[..., Transform]
    args: tuple[Any, ...]
    name: str
    pool: tuple[int, int] | None = None
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    calls: int = 1


class Chained:
    """Transforms one after the other in one place: nothing crosses the object store between them.

    With `calls` above one several slices are under way at a time, so that one is read and decoded
    while another is computed.
    """

    def __init__(self, *steps: Operator) -> None:
        self._transforms = [step.make(*step.args) for step in steps]

    def __call__(self, slice: Slice, table: pa.Table) -> pa.Table:
        """What the last transform returns."""
        for transform in self._transforms:
            table = transform(slice, table)
        return table


def chain(steps: Sequence[Operator], home: Operator) -> Operator:
    """All steps in the actors of one of them, `home`."""
    return home if len(steps) == 1 else replace(home, make=Chained, args=tuple(steps))


class StreamConfig(Config):
    """How a pass uses the machine or the cluster; decides nothing about the results."""

    read_cpus: float = Field(default=0.25, gt=0)  # logical CPUs of one read task
    readers: int | None = Field(
        default=None, ge=1
    )  # read tasks at a time; None: two per worker after them
    in_flight: int = Field(default=2, ge=1)  # slices sent to an actor, the running one included
    no_progress_seconds: float = Field(default=300, gt=0)  # then the pass fails instead of hanging
    object_store_mb: int | None = Field(
        default=None, ge=80
    )  # of a local Ray, None: Ray decides; cluster: what its nodes will hold in all
    cpus: int | None = Field(
        default=None, ge=1
    )  # local: Ray's logical CPUs; cluster: what it can grow to
    gpus: int | None = Field(default=None, ge=0)  # the same for GPUs
    node_cpus: int | None = Field(
        default=None, ge=1
    )  # cluster: CPUs of the largest node that it can grow by; None: not known
    node_gpus: int | None = Field(default=None, ge=0)  # the same for GPUs


@dataclass(frozen=True)
class Capacity:
    """What Ray may hand out: logical CPUs and GPUs in all and on the largest node, bytes."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float
    object_store: int


@dataclass(frozen=True)
class Layout:
    """Tasks at a time and the largest payload, in bytes, for which the pass cannot spill."""

    readers: int
    workers: tuple[int, ...]
    largest_payload: int


def lay_out(operators: Sequence[Operator], config: StreamConfig, have: Capacity) -> Layout:
    """Check the arithmetic of a pass against the capacity and fix how many tasks run at a time.

    One read task, one task of every operator and every pool at its smallest must fit at once, or
    Ray waits for ever without a word; the largest node must hold each of them. A slice is in the
    object store `BUFFERED` times per task and `in_flight` times per actor: the largest payload is
    what lets all of them fit half the store.

    Raises:
        ResourceError: the pass would hang; with what it needs and what is there.
    """
    for what, reading, total, node in (
        ("CPUs", config.read_cpus, have.cpus, have.node_cpus),
        ("GPUs", 0.0, have.gpus, have.node_gpus),
    ):
        asked = [op.num_cpus if what == "CPUs" else op.num_gpus for op in operators]
        for op, each in zip(operators, asked, strict=True):
            if each > node:
                raise ResourceError(
                    f"operator {op.name} asks for {each:g} {what} at a time, the largest node has "
                    f"{node:g}"
                )
        needs = [(op.name, _fewest(op), each) for op, each in zip(operators, asked, strict=True)]
        needed = reading + sum(count * each for _, count, each in needs)
        if needed > total:
            terms = "".join(f" + {name} {count} x {each:g}" for name, count, each in needs)
            raise ResourceError(
                f"pass would hang: read {reading:g}{terms} = {needed:g} {what} needed at once, "
                f"{total:g} there"
            )
    workers = tuple(_most(op, have) for op in operators)
    idle = have.cpus - sum(_fewest(op) * op.num_cpus for op in operators)
    wanted = config.readers or min(max(1, int(have.cpus)), 2 * max(1, sum(workers)))
    readers = max(1, min(wanted, int(idle / config.read_cpus)))
    rows = BUFFERED * readers
    for op, count in zip(operators, workers, strict=True):
        rows += count * (BUFFERED if op.pool is None else in_flight(op, config))
    return Layout(readers, workers, have.object_store // (2 * rows))


def _fewest(op: Operator) -> int:
    return 1 if op.pool is None else op.pool[0]


def _most(op: Operator, have: Capacity) -> int:
    """Workers of an operator at a time; of tasks, small as they may be, one per logical CPU."""
    most = max(1, int(have.cpus)) if op.pool is None else op.pool[1]
    for total, each in ((have.cpus, op.num_cpus), (have.gpus, op.num_gpus)):
        if each:
            most = min(most, int(total / each))
    return max(most, _fewest(op))


def in_flight(op: Operator, config: StreamConfig) -> int:
    """Twice what runs at a time, or the pool never counts as busy and never grows."""
    return max(config.in_flight, 2 * op.calls)
