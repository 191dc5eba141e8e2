"""Seconds and memory of choosing 10,000 of 1,000,000 embeddings.

    python -m tests.bench.acquisition_scale [--quick] [--faces N] [--budget N] [--candidates N]

512 numbers a face in half precision, in clusters of uneven sizes, and probabilities of eight
classes; a hundredth of the faces is labeled. Each function runs in a process of its own: its
seconds, and the largest resident memory less what the process held with the columns loaded.
Functions that compare faces see a uniform sample of `candidates` unlabeled ones. A process first
asks for five faces of a small pool, so that what is imported late is not counted.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.acquisition.functions import ACQUISITIONS, READS
from pipeline.acquisition.interface import Pool
from tests.bench.harness import Bench, Cell, Context, Gate, Records, call, main, python

NAME = "acquisition_scale"
FUNCTIONS = (
    "random",
    "entropy",
    "margin",
    "least_confidence",
    "badge",
    "coreset",
    "typiclust",
    "max_herding",
)
FACES, BUDGET, CANDIDATES = 1_000_000, 10_000, 50_000
DIMS, CLASSES, CLUSTERS = 512, 8, 2_000
LABELED = 0.01
MOST_MB, MOST_SECONDS = 2_000, 600
BLOCK = 50_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--faces", type=int, default=FACES)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--candidates", type=int, default=CANDIDATES)


def cells(options: argparse.Namespace) -> list[Cell]:
    """One per function."""
    sizes = (options.faces, options.budget, options.candidates)
    if options.quick:
        sizes = (20_000, 200, 2_000)
    return [_cell(name, *sizes) for name in FUNCTIONS]


def folder(options: argparse.Namespace) -> str:
    """Where results are kept."""
    whole = (options.faces, options.budget, options.candidates) == (FACES, BUDGET, CANDIDATES)
    return NAME if whole else f"{NAME}-reduced"


def _cell(name: str, faces: int, budget: int, candidates: int) -> Cell:
    sampling = "candidates" in inspect.signature(ACQUISITIONS[name]).parameters
    identity = {
        "faces": faces,
        "budget": budget,
        "candidates": candidates if sampling else None,
        "dims": DIMS,
        "clusters": CLUSTERS,
        "labeled": LABELED,
    }
    return Cell(name, name, 0, identity, NAME)


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """One function in a process of its own; the columns are made once."""
    faces = int(cell.identity["faces"])
    at = context.cache / NAME / f"{faces}"
    make(at, faces)
    out = at / f"{cell.name}.json"
    asked = {**cell.identity, "function": cell.name, "columns": str(at), "out": str(out)}
    out.unlink(missing_ok=True)
    env = {"OMP_NUM_THREADS": str(context.threads), "OPENBLAS_NUM_THREADS": str(context.threads)}
    call(python("-m", "tests.bench.acquisition_scale", "one", json.dumps(asked)), context,
         at / f"{cell.name}.log", env)  # fmt: skip
    found = json.loads(out.read_text())
    return {
        **found,
        "faces": faces,
        "budget": cell.identity["budget"],
        "candidates": cell.identity["candidates"],
        "threads": context.threads,
        "n": faces,
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def make(at: Path, faces: int) -> None:
    """Columns of a pool, by blocks: float16 embeddings and probabilities, a labeled mask."""
    if (at / "labeled.npy").exists():
        return
    at.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(CLUSTERS, DIMS)).astype(np.float32)
    shares = 1 / np.arange(1, CLUSTERS + 1) ** 0.5
    toward = rng.normal(size=(DIMS, CLASSES)).astype(np.float32) / DIMS**0.5
    x = np.lib.format.open_memmap(at / "embeddings.npy", "w+", np.float16, (faces, DIMS))
    p = np.lib.format.open_memmap(at / "probs.npy", "w+", np.float16, (faces, CLASSES))
    for first in range(0, faces, BLOCK):
        count = min(BLOCK, faces - first)
        own = rng.choice(CLUSTERS, count, p=shares / shares.sum())
        rows = centers[own] + rng.standard_normal((count, DIMS), np.float32)
        logits = 2 * rows @ toward
        e = np.exp(logits - logits.max(1, keepdims=True))
        x[first : first + count], p[first : first + count] = rows, e / e.sum(1, keepdims=True)
    x.flush()
    p.flush()
    labeled = np.zeros(faces, bool)
    labeled[rng.choice(faces, int(LABELED * faces), replace=False)] = True
    np.save(at / "labeled.npy", labeled)


def one(asked: dict[str, Any]) -> dict[str, Any]:
    """Choose, and say what it took."""
    at, name = Path(asked["columns"]), asked["function"]
    settings = {} if asked["candidates"] is None else {"candidates": asked["candidates"]}
    ask = ACQUISITIONS[name]
    ask(_small(), 5, np.random.default_rng(0))
    columns = {column: np.load(at / f"{column}.npy") for column in READS[name]}
    pool = Pool(np.load(at / "labeled.npy"), **columns)
    held = rss()
    with Peak() as peak:
        start, used = time.perf_counter(), time.process_time()
        chosen = ask(pool, asked["budget"], np.random.default_rng(0), **settings)
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {
        "chosen": len(np.unique(chosen[~pool.labeled[chosen]])),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "extra_mb": round((peak.most - held) / 1e6, 1),
        "columns_mb": round(sum(c.nbytes for c in columns.values()) / 1e6, 1),
    }


def _small() -> Pool:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(CLASSES), 200)
    return Pool(np.arange(200) < 5, rng.normal(size=(200, DIMS)).astype(np.float16), probs)


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Largest resident memory while the block runs, looked at every 5 ms by a thread."""

    def __init__(self) -> None:
        self.most = rss()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, rss())


def judge_limits(records: Records) -> list[str] | None:
    """At most 2 GB beside the columns and ten minutes; samples of 50,000 faces or more."""
    if len(records) < len(FUNCTIONS):
        return None
    faults = []
    for cell, record in records.items():
        said = record["metrics"]
        if said["extra_mb"] > MOST_MB:
            faults.append(f"{cell}: {said['extra_mb']:,.0f} MB beside the columns")
        if said["seconds"] > MOST_SECONDS:
            faults.append(f"{cell}: {said['seconds']:,.0f} s")
        if said["candidates"] is not None and said["candidates"] < CANDIDATES:
            faults.append(f"{cell}: {said['candidates']:,} candidates")
    return faults


def judge_chosen(records: Records) -> list[str] | None:
    """As many different unlabeled faces as were asked for."""
    faults = [
        f"{cell}: {record['metrics']['chosen']} of {record['metrics']['budget']} faces"
        for cell, record in records.items()
        if record["metrics"]["chosen"] != record["metrics"]["budget"]
    ]
    return faults if records else None


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("chosen as asked", "always", judge_chosen),
        Gate("2 GB and ten minutes", "full", judge_limits),
    ),
    folder=folder,
    arguments=arguments,
)


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["one"]:
        asked = json.loads(argv[1])
        Path(asked["out"]).write_text(json.dumps(one(asked)))
        return 0
    return main(BENCH)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
