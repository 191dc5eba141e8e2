"""Every odd image file there is goes through survey and embedding: a face, or a row with a reason.

    OMNIFER_DATA=... python -m tests.bench.odd_files [--quick]

One cell: the demo's recipe, shrunk, with the folder of odd files as its pool. Decoding happens in
Ray workers as in any run; the largest resident memory of their processes is sampled. What is no
picture by its name (containers, lists) is not in a folder pool and is counted apart.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.pool import plan_at
from pipeline.run import Run
from pipeline.storage import location
from tests.bench.harness import Bench, Cell, Context, Gate, Records, call, main, python
from tests.helpers import flow

NAME = "odd_files"
DATA = "OMNIFER_DATA"
MOST_MB = 1500
"""Of one process: torch, Ray and Arrow take about 700; a bomb would take gigabytes."""
SETS = (*flow.TINY, "pool=[{kind: folder, name: odd, path: $OMNIFER_DATA/odd}]", "error_budget=1")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The one cell."""
    return [Cell("folder", "folder", 0, {"sets": list(SETS)}, NAME)]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run to the end of embedding and count what became of each file."""
    if DATA not in os.environ:
        raise RuntimeError(f"{DATA} is not set: the folder with odd/")
    root = context.cache / NAME / "run"
    sets = [part for item in (*SETS, "tracking.uri='off'") for part in ("--set", item)]
    argv = python("-m", "pipeline.cli", "run", str(flow.DEMO), "--run", str(root), "--fresh", *sets)
    largest = Largest()
    with largest:
        call([*argv, "--until", "embed"], context, root.with_suffix(".log"), {})
    outcomes = {stage: _outcomes(root, stage) for stage in ("survey", "embed")}
    listed = _listed(Path(os.environ[DATA]) / "odd")
    pictures = {name for name in listed if name.lower().endswith(tuple(IMAGE_SUFFIXES))}
    return {
        "n": len(listed),
        "files": len(listed),
        "pictures": len(pictures),
        "missing": sorted(pictures - outcomes["survey"].keys())[:20],
        "reasons": dict(Counter(outcomes["survey"].values()).most_common()),
        "disagree": sorted(
            name
            for name, reason in outcomes["survey"].items()
            if reason not in ("blank", outcomes["embed"].get(name))
        )[:20],
        "largest_mb": round(largest.megabytes),
        "command": f"python -m tests.bench.{NAME}",
    }


def _outcomes(root: Path, stage: str) -> dict[str, str]:
    """File -> "ok" or the reason, in a streaming stage."""
    run = Run(location(root))
    plan = Plan(plan_at(run.artifact("survey").dir))
    tables = Ledger(run.artifact(stage).dir).tables(plan, ["id", "reason"])
    rows = [row for _, table in tables for row in table.to_pylist()]
    found = {row["id"].removeprefix("odd/"): row["reason"] or "ok" for row in rows}
    if len(found) != len(rows):
        raise RuntimeError(f"{stage}: {len(rows)} rows of {len(found)} files")
    return found


def _listed(odd: Path) -> list[str]:
    lines = [x for x in (odd / "MANIFEST.tsv").read_text().splitlines() if not x.startswith("#")]
    return [row["file"] for row in csv.DictReader(lines, delimiter="\t")]


class Largest:
    """The largest resident memory of any one process below this one, while the block runs."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Largest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            said = subprocess.run(
                ["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True
            ).stdout
            rows = [tuple(map(int, line.split())) for line in said.splitlines()[1:]]
            ours, grown = {os.getpid()}, True
            while grown:
                more = {pid for pid, parent, _ in rows if parent in ours} - ours
                ours |= more
                grown = bool(more)
            sizes = [rss / 1024 for pid, _, rss in rows if pid in ours and pid != os.getpid()]
            self.megabytes = max([self.megabytes, *sizes])


def judge_odd(records: Records) -> list[str] | None:
    """Every picture is a row, survey and embedding agree, no process outgrew its bound."""
    faults = []
    for name, record in records.items():
        found = record["metrics"]
        faults += [f"{name}: {file} is not a row" for file in found["missing"]]
        faults += [f"{name}: survey and embed differ on {file}" for file in found["disagree"]]
        if found["largest_mb"] > MOST_MB:
            faults.append(f"{name}: a process held {found['largest_mb']:,} MB, limit {MOST_MB:,}")
    return faults if records else None


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(Gate("every file is a face or a reason", "always", judge_odd),),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
