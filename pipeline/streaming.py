"""Streaming passes over slices on Ray Data: one slice is one row is one block.

Why a row: Ray Data merges and splits blocks at will, so a block cannot stand for a slice, and a
slice without one good face would vanish. A row survives. The payload is an Arrow IPC stream in one
`large_binary` cell, and the pass has its own copy of Ray's DataContext with a target block size of
one byte: every row is a block, so a row is also what Ray retries and what backpressure counts.

Cost: 10 to 30 ms of Ray's time per slice, and seconds for the first; cut slices so that an operator
works on one for half a second or more. The driver keeps a byte per slice and at most 4,096
descriptors.

Ray retries a killed worker for ever, so an operator may see a slice twice: what it writes must be
committed through :class:`pipeline.ledger.Ledger`. Ray never drops a slice here.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import access
from pipeline.errors import ResourceError, RunError, UserError, told
from pipeline.placement import (
    Capacity,
    Layout,
    Operator,
    StreamConfig,
    Transform,
    in_flight,
    lay_out,
)
from pipeline.plan import Plan, Slice, number_of
from pipeline.progress import console
from pipeline.storage import Location

__all__ = [
    "Operator",
    "StreamConfig",
    "Transform",
    "check_room",
    "data_context",
    "room",
    "start_ray",
    "stream",
]

MOST_TASKS = 4096
SLICES_PER_TASK = 16
_ROW = pa.schema([pa.field("slice", pa.string()), pa.field("payload", pa.large_binary())])


class Stalled(RunError):
    """Ray reported no progress; becomes a RunError that names the slices."""


def start_ray(config: StreamConfig) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start a local Ray; once per process.

    Where Ray runs already, as in a worker of Ray Train, only its chatter is turned off.
    """
    import ray.data

    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:  # errors come out as one line; Ray's log file has the traceback
        of_ray = type(handler).__module__.startswith("ray.")  # not a handler of the caller
        if of_ray and isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        if why := access.stranger(address):
            console.print(f"warning: joining {why}", markup=False, soft_wrap=True)
        ray.init(address=address, **common)
        return
    store = None if config.object_store_mb is None else config.object_store_mb * 1_000_000
    ray.init(
        address="local",
        num_cpus=config.cpus,
        num_gpus=config.gpus,
        object_store_memory=store,
        include_dashboard=False,
        **common,
    )


def check_room(what: str, cpus: float, config: StreamConfig) -> None:
    """ResourceError where CPUs needed at once are more than there are; Ray would wait for ever."""
    there = room(config)["CPU"]
    if cpus > there:
        raise ResourceError(f"{what} would hang: {cpus:g} CPUs needed at once, {there:g} there")


def room(config: StreamConfig) -> dict[str, float]:
    """CPUs and GPUs in all: those there are, or those that a cluster we joined can grow to."""
    import ray

    there, declared = ray.cluster_resources(), _declared(config)
    return {
        "CPU": max(there.get("CPU", 0.0), declared.cpus or 0),
        "GPU": max(there.get("GPU", 0.0), declared.gpus or 0),
    }


def stream(
    pending: Plan,
    read: Callable[[Slice], pa.Table],
    operators: Sequence[Operator],
    config: StreamConfig,
) -> Iterator[tuple[Slice, pa.Table]]:
    """Send every pending slice through read and the operators, in no fixed order.

    Yields (slice, table of the last operator) on the driver; keep that table tiny. The pending
    slices are in a file that driver and workers share, so a read task that Ray repeats yields the
    same sequence.

    Raises:
        ResourceError: the pass would hang (CPUs, GPUs) or spill (payloads); with the numbers.
        RunError: an operator failed (names the slice), nothing moved for `no_progress_seconds`, or
            slices are missing at the end (names them). Errors of the user's making (a changed
            file, a misfit model) keep their class.
    """
    if not len(pending):
        return iter(())
    start_ray(config)
    layout = lay_out(operators, config, _capacity(config))
    return account(pending, _batches(pending, read, operators, config, layout))


def account(
    pending: Plan, rows: Iterable[tuple[Slice, pa.Table]]
) -> Iterator[tuple[Slice, pa.Table]]:
    """Pass rows on; RunError if a slice comes out twice, or naming those that did not come out."""
    left = bytearray()  # a byte per number: a set of a million keys would take a hundred times that
    for slice in pending:
        number = number_of(slice.key)
        left.extend(bytes(number + 1 - len(left)))
        left[number] = 1
    try:
        for slice, table in rows:
            number = number_of(slice.key)
            if number >= len(left) or not left[number]:
                raise RunError(f"slice {slice.key} came out twice or was never asked for")
            left[number] = 0
            yield slice, table
    except Stalled as error:
        raise RunError(f"{error}; {_missing(pending, left)}") from error
    if any(left):
        raise RunError(_missing(pending, left))


def _missing(pending: Plan, left: bytearray) -> str:
    keys = (slice.key for slice in pending if left[number_of(slice.key)])
    shown = list(itertools.islice(keys, 9))
    names = ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
    return f"{sum(left)} of {len(pending)} slices did not come out: {names}"


def read_range(at: Location, first: int, last: int, read: Any, largest: int) -> Iterator[pa.Table]:
    """Body of one read task: rows of the pending slices first <= i < last, one at a time.

    `read` is the reading function or Ray's reference to it (a removal list can be large, and there
    are thousands of tasks).
    """
    import ray

    function = ray.get(read) if isinstance(read, ray.ObjectRef) else read
    for slice in Plan(at).slices(first, last):
        with _naming(slice, "read"):
            row = _pack(slice, function(slice), largest)
        yield row


class Actor:
    """A transform where Ray Data runs it: one row in, one row out.

    The transform is made on the first slice, not in the constructor: Ray turns what a constructor
    raises into text, and the class of the error would be lost.
    """

    def __init__(self, operator: Operator, largest: int) -> None:
        self._operator = operator
        self._largest = largest
        self._making = threading.Lock()
        self._transform: Transform | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Transform the one row of `batch`."""
        slice, table = _unpack(batch)
        with _naming(slice, self._operator.name):
            with self._making:
                if self._transform is None:
                    self._transform = self._operator.make(*self._operator.args)
            return _pack(slice, self._transform(slice, table), self._largest)


def apply(batch: pa.Table, operator: Operator, largest: int) -> pa.Table:
    """The same in a stateless task."""
    return Actor(operator, largest)(batch)


def _batches(
    pending: Plan,
    read: Callable[[Slice], pa.Table],
    operators: Sequence[Operator],
    config: StreamConfig,
    layout: Layout,
) -> Iterator[tuple[Slice, pa.Table]]:
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    ranges = _ranges(len(pending), layout.readers)
    with ray.data.DataContext.current(data_context(config)):
        dataset = ray.data.read_datasource(
            _datasource(pending.at, ranges, ray.put(read), layout.largest_payload),
            num_cpus=config.read_cpus,
            compute=ray.data.TaskPoolStrategy(size=min(layout.readers, len(ranges))),
            override_num_blocks=len(ranges),
        )
        for op, workers in zip(operators, layout.workers, strict=True):
            dataset = _attach(dataset, op, min(workers, len(pending)), config, layout)
    try:
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield _unpack(batch)
    except ray.exceptions.RayTaskError as error:
        raise told(error.cause, "pass failed") from error
    except ExecutionTimeoutError as error:
        raise stalled(config, "pass") from error
    except ray.exceptions.RayError as error:
        raise RunError(f"pass failed: {_line(error)}") from error


def stalled(config: StreamConfig, what: str) -> Stalled:
    """What is said where Ray Data gave up waiting."""
    return Stalled(
        f"{what}: nothing moved for {config.no_progress_seconds:g} s (stream.no_progress_seconds): "
        "no node with free CPUs or GPUs came, or a slice hangs or keeps killing its worker"
    )


def _attach(dataset: Any, op: Operator, workers: int, config: StreamConfig, layout: Layout) -> Any:
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    arguments = (op, layout.largest_payload)
    shape = {"batch_size": 1, "batch_format": "pyarrow"}
    asked = {"num_cpus": op.num_cpus, "num_gpus": op.num_gpus}
    if op.pool is None:
        tasks = TaskPoolStrategy(size=workers)
        return dataset.map_batches(apply, fn_args=arguments, compute=tasks, **shape, **asked)
    actors = ActorPoolStrategy(
        min_size=op.pool[0],
        max_size=max(op.pool[0], workers),
        max_tasks_in_flight_per_actor=in_flight(op, config),
        max_concurrent_calls_per_actor=op.calls,
        enable_true_multi_threading=op.calls > 1,
    )
    return dataset.map_batches(
        Actor, fn_constructor_args=arguments, compute=actors, **shape, **asked
    )


def _datasource(at: Location, ranges: list[tuple[int, int]], read: Any, largest: int) -> Any:
    """Ray's lazy descriptors; the class stays in here so that importing this module is cheap."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Slices(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            return [
                ReadTask(
                    partial(read_range, at, first, last, read, largest),
                    BlockMetadata(last - first, None, None, None),
                )
                for first, last in ranges
            ]

    return Slices()


def _ranges(count: int, readers: int) -> list[tuple[int, int]]:
    """Cut 0..count into at most 4,096 ranges: small ones, and enough to keep the readers busy."""
    wanted = max(math.ceil(count / SLICES_PER_TASK), 4 * readers)
    step = math.ceil(count / min(count, wanted, MOST_TASKS))
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def data_context(config: StreamConfig) -> Any:
    """A DataContext for one pass: a row is a block, errors stay what they are, nothing prints."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = config.no_progress_seconds
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    return context


def _capacity(config: StreamConfig) -> Capacity:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    declared = _declared(config)
    cpus, gpus = ([node.get(name, 0.0) for node in nodes] for name in ("CPU", "GPU"))
    return Capacity(
        cpus=declared.cpus if declared.cpus is not None else sum(cpus),
        gpus=declared.gpus if declared.gpus is not None else sum(gpus),
        node_cpus=_largest(cpus, declared.cpus, declared.node_cpus),
        node_gpus=_largest(gpus, declared.gpus, declared.node_gpus),
        object_store=max(
            int(sum(node.get("object_store_memory", 0.0) for node in nodes)),
            (declared.object_store_mb or 0) * 1_000_000,
        ),
    )


def _largest(live: Sequence[float], total: int | None, node: int | None) -> float:
    """Of the nodes that are there and that will come; where only their sum is known, the sum."""
    coming = total if node is None else node
    return max([*live, 0.0]) if coming is None else max([*live, float(coming)])


def _declared(config: StreamConfig) -> StreamConfig:
    """What a recipe says of the cluster that RAY_ADDRESS names; of a local Ray nothing."""
    return config if os.environ.get("RAY_ADDRESS") else StreamConfig()


def _pack(slice: Slice, table: pa.Table, largest: int) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload = sink.getvalue()
    if payload.size > largest:
        raise ResourceError(
            f"{payload.size:,} bytes of payload would spill, at most {largest:,} fit half the "
            f"object store; cut smaller slices or set object_store_mb"
        )
    offsets = pa.array([0, payload.size], pa.int64()).buffers()[1]
    cell = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, payload])  # no copy
    return pa.table([[json.dumps(asdict(slice))], cell], schema=_ROW)


def _unpack(row: pa.Table) -> tuple[Slice, pa.Table]:
    slice = Slice(**json.loads(row["slice"][0].as_py()))
    with pa.ipc.open_stream(row["payload"][0].as_buffer()) as reader:
        return slice, reader.read_all()


@contextmanager
def _naming(slice: Slice, step: str) -> Iterator[None]:
    """Put the slice and the step in front of whatever is raised, and keep it an error."""
    try:
        yield
    except Exception as error:
        where = f"slice {slice.key} of {slice.source}, {step}: "
        if isinstance(error, UserError | RunError):
            raise type(error)(where + _line(error)) from error
        raise RunError(f"{where}{type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
