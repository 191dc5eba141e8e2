"""Runs a bench: a grid of cells, each finished once and kept as one small JSON.

    python -m tests.bench.NAME [--quick] [--max-minutes N] [--jobs N] [--only TEXT]

A finished cell is tests/bench/results/<folder>/<cell>.json; a second call continues with what is
missing. A cell whose settings have changed since is stale: shown so, and made again. Gates are
judged from the JSONs alone. `--quick` runs shrunken cells in a temporary folder and judges only the
gates tagged `always`. Run folders stay under tests/bench/cache, so that trainings are shared by
identity; cells of one run folder never run side by side.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RESULTS = HERE / "results"
CACHE = HERE / "cache"
QUICK_SECONDS = 180.0
GRACE = 45.0
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "faiss-gpu", "omnifer")

Record = Mapping[str, Any]
Records = Mapping[str, Record]


@dataclass(frozen=True)
class Cell:
    """One measurement: what it is called, what decides its value, which run folder it uses."""

    name: str
    method: str
    seed: int
    identity: Mapping[str, Any]  # JSON-able; another one makes a finished cell stale
    run: str  # folder below the cache; its cells run one after another
    trainings: Mapping[str, float] = field(default_factory=dict)  # image passes by training
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """A condition on finished cells: faults, or None where cells that it needs are missing."""

    name: str
    tag: Literal["always", "full"]
    judge: Callable[[Records], list[str] | None]


@dataclass
class Context:
    """What a measurement is given: how, where, until when."""

    options: argparse.Namespace
    cache: Path
    deadline: float  # time.monotonic()
    threads: int

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Bench:
    """A grid and what must hold of it."""

    name: str
    cells: Callable[[argparse.Namespace], list[Cell]]
    measure: Callable[[Cell, Context], dict[str, Any]]
    gates: Sequence[Gate]
    folder: Callable[[argparse.Namespace], str]
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    speed: Callable[[int], float] | None = None  # img/s of a short training with n threads


class OutOfTime(Exception):
    """The deadline came first; the cell continues at the next call."""


def main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Run what is missing, judge, write RESULTS.md; 0 where no judged gate failed."""
    options = _parse(bench, argv)
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            return _grid(bench, options, Path(folder) / "results", Path(folder) / "cache")
    code = _grid(bench, options, RESULTS / bench.folder(options), CACHE)
    from tests.bench import tables  # it imports the benches, which import this module

    tables.write()
    print(f"wrote {tables.FILE.relative_to(ROOT)}")
    return code


def _parse(bench: Bench, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.{bench.name}")
    parser.add_argument("--quick", action="store_true", help="shrunken cells, `always` gates")
    parser.add_argument("--max-minutes", type=float, default=None, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, a thread each")
    parser.add_argument("--only", metavar="TEXT", help="cells whose name contains TEXT")
    if bench.arguments is not None:
        bench.arguments(parser)
    return parser.parse_args(argv)


def _grid(bench: Bench, options: argparse.Namespace, results: Path, cache: Path) -> int:
    seconds = 60 * options.max_minutes if options.max_minutes else float("inf")
    start = time.monotonic()
    deadline = start + (min(seconds, QUICK_SECONDS) if options.quick else seconds)
    cells = [c for c in bench.cells(options) if not options.only or options.only in c.name]
    todo = []
    for cell in cells:
        state = state_of(cell, load(results, cell.name))
        print(f"{cell.name:<28} {state}")
        if state != "done":
            todo.append(cell)
    threads = 1 if options.jobs > 1 or options.quick else (os.cpu_count() or 1)
    if todo and bench.speed is not None:
        _estimate(todo, bench.speed(threads), threads, options.jobs)
    context = Context(options, cache, deadline, threads)
    failed = _run_all(bench, todo, results, context)
    records = {c.name: r for c in cells if (r := load(results, c.name)) and is_current(c, r)}
    failed |= judge(bench.gates, records, quick=options.quick)
    if options.quick:
        took = time.monotonic() - start
        late, lacking = took > QUICK_SECONDS, len(records) < len(cells)
        print(
            f"quick: {took:.0f} s, at most {QUICK_SECONDS:.0f}; {len(records)}/{len(cells)} cells"
        )
        failed |= late or lacking
    return int(failed)


def _estimate(todo: Sequence[Cell], rate: float, threads: int, jobs: int) -> None:
    trainings: dict[str, float] = {}
    for cell in todo:
        trainings |= cell.trainings
    passes = sum(trainings.values())
    hours = passes / rate / 3600 * threads
    print(
        f"{len(todo)} cells, {len(trainings)} different trainings, at most {passes:,.0f} image "
        f"passes; 20 steps ran at {rate:,.0f} img/s on {threads} threads: about {hours:.1f} "
        f"CPU-hours, {hours / threads / jobs:.1f} h of wall time",
        flush=True,
    )


def _run_all(bench: Bench, todo: Sequence[Cell], results: Path, context: Context) -> bool:
    """True if a cell failed."""
    queues: dict[str, list[Cell]] = {}
    for cell in todo:
        queues.setdefault(cell.run, []).append(cell)

    def work(queue: Sequence[Cell]) -> bool:
        failures = [_one(bench, cell, results, context) for cell in queue]
        return any(failures)

    with ThreadPoolExecutor(context.options.jobs) as pool:
        return any(list(pool.map(work, queues.values())))


def _one(bench: Bench, cell: Cell, results: Path, context: Context) -> bool:
    """Measure one cell and keep it; True if it failed."""
    if context.left() <= 0:
        print(f"{cell.name:<28} not started: no time left", flush=True)
        return False
    print(f"{cell.name:<28} starts", flush=True)
    start = time.monotonic()
    try:
        metrics = bench.measure(cell, context)
    except OutOfTime:
        print(f"{cell.name:<28} interrupted: no time left; the next call continues", flush=True)
        return False
    except (OSError, RuntimeError, KeyError, ValueError) as err:
        print(f"{cell.name:<28} FAILED: {err}", flush=True)
        return True
    seconds = time.monotonic() - start
    keep(results, cell, metrics, seconds=seconds)
    print(f"{cell.name:<28} done in {seconds:.0f} s", flush=True)
    return False


def keep(results: Path, cell: Cell, metrics: dict[str, Any], *, seconds: float) -> None:
    """Write the JSON of a finished cell; readings of the test set add up over its versions."""
    before = load(results, cell.name) or {}
    record = {
        "cell": cell.name,
        "method": cell.method,
        "seed": cell.seed,
        "digest": digest_of(cell),
        "sets": list(cell.sets),
        "n": metrics.pop("n", None),
        "readings": before.get("readings", 0) + metrics.pop("readings", 0),
        "command": metrics.pop("command", f"python -m tests.bench.{cell.run}"),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "host": host(),
        "versions": versions(),
        "metrics": metrics,
    }
    results.mkdir(parents=True, exist_ok=True)
    partial = results / f".{cell.name}.partial"
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partial.replace(results / f"{cell.name}.json")


def load(results: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished cell."""
    at = results / f"{name}.json"
    return json.loads(at.read_text()) if at.exists() else None


def digest_of(cell: Cell) -> str:
    """Digest of what decides the value of a cell."""
    from pipeline.config import digest

    return digest(cell.identity)[:16]


def is_current(cell: Cell, record: Record) -> bool:
    """Whether a record is of the cell as it is now."""
    return bool(record["digest"] == digest_of(cell))


def state_of(cell: Cell, record: Record | None) -> str:
    """done, stale (its settings changed since) or missing."""
    if record is None:
        return "missing"
    return "done" if is_current(cell, record) else "stale"


def judge(gates: Sequence[Gate], records: Records, *, quick: bool) -> bool:
    """Print every gate's verdict; True if one failed. Gates that lack cells are not judged."""
    failed = False
    for gate in gates:
        if quick and gate.tag != "always":
            continue
        verdict, faults = verdict_of(gate, records)
        print(f"gate {gate.name} ({gate.tag}): {verdict}")
        for fault in faults:
            print(f"  {fault}")
        failed |= verdict == "FAILED"
    return failed


def verdict_of(gate: Gate, records: Records) -> tuple[str, list[str]]:
    """passed, FAILED or not judged; and the faults."""
    faults = gate.judge(records)
    if faults is None:
        return "not judged, cells are missing", []
    return ("FAILED" if faults else "passed"), faults


def call(argv: Sequence[str], context: Context, log: Path, env: Mapping[str, str]) -> None:
    """Run a command of ours from the repository's root, its output in a log.

    Raises:
        OutOfTime: the deadline came; the command was interrupted and may be continued.
        RuntimeError: it failed; with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            list(argv),
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            left = context.left()
            code = process.wait(None if left == float("inf") else max(left, 0.1))
        except subprocess.TimeoutExpired as err:
            _stop(process)
            raise OutOfTime from err
        except BaseException:
            _stop(process)
            raise
    if code:
        end = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"exit code {code}; {' | '.join(end)}; whole log: {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, so that local Ray shuts down with its driver; kill what does not listen."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def host() -> str:
    """The machine in words: cores, memory, GPU; no name, no path."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}"


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]
