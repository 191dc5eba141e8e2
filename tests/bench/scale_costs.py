"""What the ledger, the driver and S3 take per slice, in a process of its own.

    python -m tests.bench.scale_costs disk AT SLICES | requests SLICES LISTED | dispatch AT SLICES

Each prints one JSON object. Everything is the package's own code: plans, ledgers, the pass. Only
the commits that are there before one is timed are laid down as files, without waiting for the disk,
since a hundred thousand real ones would take most of an hour. Seconds are without what threads
waited for a core (:func:`pipeline.planning.probing.clock`); waiting for the disk is in them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import sealing, streaming
from pipeline.commits import describe, folder_of
from pipeline.errors import RunError
from pipeline.ledger import Ledger
from pipeline.placement import Operator, StreamConfig
from pipeline.plan import GROUP, Plan, Slice
from pipeline.planning.probing import clock
from pipeline.storage import Location, location, to_json
from tests.bench.selecting import SLICE, Faces, largest_megabytes, slices
from tests.helpers.s3 import s3_bucket

FEW = 64
"""Rows of the tables that are committed on S3: their number changes no request."""
WARM = 64
"""Slices that stream before the driver's seconds are counted."""


class Memory:
    """Largest resident memory of a block beyond what was there before it, in bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest so far
        self._before = _resident()
        self.bytes = 0

    def stop(self) -> None:
        """Take the reading; the kernel counts in pages, the reading is in megabytes."""
        self.bytes = max(0, largest_megabytes() * 2**20 - self._before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Sheet:
    """Seconds, core-seconds and memory by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Measure a block."""
        memory = Memory()
        with clock() as took:
            yield
        memory.stop()
        self.seconds[name], self.cpu[name], self.memory[name] = took.seconds, took.cpu, memory.bytes


def disk(at: Location, count: int) -> dict[str, Any]:
    """Costs on a local disk with so many slices, all but the last group's committed before."""
    sheet = Sheet()
    whole = count - count % GROUP or count
    with sheet.of("plan"):
        plan = Plan.write(at / "plan.parquet", slices(count * SLICE))
    table = Faces(SLICE).tables(next(iter(plan)))["score"]
    ledger = Ledger(at / "score")
    last = plan.slices(max(0, whole - GROUP), whole)
    lay_down(ledger.at, itertools.islice(plan, last[0].group * GROUP), table)
    with sheet.of("commit"):
        for slice in last:
            ledger.commit(slice, table)
    fresh = Ledger(at / "score")
    with sheet.of("pending"):
        pending = sum(1 for _ in fresh.pending(plan))
    with sheet.of("committed"):
        there = sum(1 for _ in fresh.committed(plan))
    one = Plan.write(at / "one.parquet", last)
    with sheet.of("seal"):
        sealing.seal(fresh, one)
    with sheet.of("sweep"):
        sealing.sweep(fresh, one)
    with sheet.of("manifest"):
        Ledger(at / "score").manifest(one)
    with sheet.of("account"), contextlib.suppress(RunError):  # none came out, as it says
        list(streaming.account(plan, []))
    of = {"plan": count, "pending": count, "committed": there, "account": count}

    def each(spent: dict[str, float]) -> dict[str, float]:
        """Microseconds per slice."""
        return {
            name: round(1e6 * took / of.get(name, len(last)), 2) for name, took in spent.items()
        }

    return {
        "slices": count,
        "committed": there,
        "pending": pending,
        "group": len(last),
        "microseconds": each(sheet.seconds),
        "cpu_microseconds": each(sheet.cpu),
        "memory_mb": {name: round(size / 1e6, 1) for name, size in sheet.memory.items()},
    }


def lay_down(at: Location, done: Iterator[Slice], table: pa.Table) -> None:
    """Commit records of slices, as the ledger writes them."""
    record = asdict(describe(next(slices(SLICE)), table, 0, {}, 0.0))
    for slice in done:
        own = {"key": slice.key, "file": f"{slice.key}-{record['attempt']}.parquet"}
        own["fingerprint"] = slice.fingerprint
        home = at.local_path() / "commits" / folder_of(slice.group)
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{slice.key}.json").write_bytes(to_json({**record, **own}))


def requests(count: int, listed: int) -> dict[str, Any]:
    """Requests per slice of a pass that embeds and scores, against an S3 server.

    Args:
        count: slices of one group that are taken through embed's and score's ledgers and sealed.
        listed: slices whose records lie there when they are listed.
    """
    seen: Counter[str] = Counter()

    def watch(method: str, path: str) -> None:
        seen["LIST" if method == "GET" and path.strip("/") == "faces" else method] += 1

    found: dict[str, dict[str, float]] = {}

    @contextmanager
    def of(name: str, over: int) -> Iterator[None]:
        seen.clear()
        yield
        found[name] = {kind: round(n / over, 4) for kind, n in sorted(seen.items())}

    with s3_bucket(watch) as root:
        plan = Plan.write(root / "plan.parquet", slices(count * SLICE))
        table = Faces(SLICE).tables(next(iter(plan)))["score"].slice(0, FEW)
        embed, embedded = Ledger(root / "embed"), Ledger(root / "embed")
        score = Ledger(root / "score")
        with of("slice", count):
            for slice in plan:  # request by request what embedding.py and scoring.py ask for
                embed.find(slice.key)
                embed.attempt(slice)
                embed.commit(slice, table)
                embed.read(slice.key)
                embedded.find(slice.key)
                score.commit(slice, table)
        with of("seal", count):
            sealing.seal(Ledger(root / "score"), plan)
        with of("sweep", count):
            sealing.sweep(score, plan)
        with of("manifest", count):
            Ledger(root / "score").manifest(plan)
        many = Plan.write(root / "many.parquet", slices(listed * SLICE))
        _fill(root / "listed", many)
        with of("pending", listed):
            pending = sum(1 for _ in Ledger(root / "listed").pending(many))
    return {"slices": count, "listed": listed, "pending": pending, "requests": found}


def _fill(at: Location, plan: Plan) -> None:
    """Names of commit records, put into the server's memory; listing reads no record."""
    from moto.s3.models import s3_backends

    store = s3_backends["123456789012"]["aws"]
    bucket, _, prefix = at.uri.removeprefix("s3://").partition("/")
    for slice in plan:
        key = f"{prefix}/commits/{folder_of(slice.group)}/{slice.key}.json"
        store.put_object(bucket, key, b"{}")


def dispatch(at: Location, count: int) -> dict[str, Any]:
    """CPU-seconds of the driver per slice while nothing but Ray is at work."""
    config = StreamConfig(object_store_mb=150, cpus=2)
    plan = Plan.write(at / "plan.parquet", slices((WARM + count) * SLICE))
    operator = Operator(idle, (), "embed", pool=(1, 1), num_cpus=0.5)
    rows = streaming.stream(plan, empty, [operator], config)
    for _ in itertools.islice(rows, WARM):
        pass
    began, started = time.process_time(), time.perf_counter()
    out = sum(1 for _ in rows)
    spent = time.process_time() - began
    return {
        "slices": out,
        "driver_ms": round(1000 * spent / out, 2),
        "wall_ms": round(1000 * (time.perf_counter() - started) / out, 2),
    }


def empty(slice: Slice) -> pa.Table:
    """A read that costs nothing."""
    return pa.table({"n": [slice.start]})


def idle() -> Callable[[Slice, pa.Table], pa.Table]:
    """An operator that does nothing."""
    return _same


def _same(slice: Slice, table: pa.Table) -> pa.Table:
    return table


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "disk": lambda at, count: disk(location(at), int(count)),
    "requests": lambda count, listed: requests(int(count), int(listed)),
    "dispatch": lambda at, count: dispatch(location(at), int(count)),
}

if __name__ == "__main__":
    from tests.bench import scale_costs as own  # Ray's workers import what they run by this name

    what, *given = sys.argv[1:]
    print(json.dumps(own.STEPS[what](*given)))
