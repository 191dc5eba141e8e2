"""Selection from packs at scale, and near copies among embeddings.

    python -m tests.bench.selection [--quick] [--only TEXT]

Cell `select`: a policy with cuts, duplicates, caps per person and class and soft weights decides on
10,000,000 faces in 9,766 slices, in a process of its own, the packs out of the page cache. Packing,
selecting and storing the selection are timed apart. Layout and process: tests/bench/selecting.py.

Cell `near`: near copies planted at known cosines among 1,000,000 clustered unit vectors of 512
numbers; recall against brute force. Process: tests/bench/nearing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.harness import Bench, Cell, Context, Gate, Records, call, main, python

NAME = "selection"
ROUNDS = 3
MOST_SECONDS = 10.0
MOST_MB = 2000
LEAST_RECALL = 0.98
FULL = {"select": 10_000_000, "near": 1_000_000}
QUICK = {"select": 300_000, "near": 20_000}


def cells(options: argparse.Namespace) -> list[Cell]:
    """Selection and near copies, at full or quick size."""
    rows = QUICK if options.quick else FULL
    return [
        Cell(name, name, 0, {"rows": rows[name], "rounds": ROUNDS, "version": 4}, NAME)
        for name in ("select", "near")
    ]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run the cell's processes; every figure is what they printed."""
    found = _select(cell, context) if cell.method == "select" else _near(cell, context)
    return {**found, "command": f"python -m tests.bench.{NAME} --only {cell.name}"}


def _select(cell: Cell, context: Context) -> dict[str, Any]:
    rows = int(cell.identity["rows"])
    at = context.cache / NAME / f"pool-{rows}"
    told = at / "layout.json"
    if not told.exists():
        shutil.rmtree(at, ignore_errors=True)
        made = _child("selecting", context, at, "layout", str(at), str(rows))
        told.write_text(json.dumps(made))
    rounds = [_child("selecting", context, at, "select", str(at)) for _ in range(ROUNDS)]
    shutil.rmtree(at / "select", ignore_errors=True)
    stored = _child("selecting", context, at, "write", str(at))
    checked = _child("selecting", context, at, "check", str(at))
    return {
        "n": ROUNDS,
        "rows": rows,
        "layout": json.loads(told.read_text()),
        "seconds": [r["seconds"] for r in rounds],
        "learning_seconds": [r["learning_seconds"] for r in rounds],
        "cpu_seconds": [r["cpu_seconds"] for r in rounds],
        "others_cpu_seconds": [r["others_cpu_seconds"] for r in rounds],
        "largest_mb": [r["megabytes"] for r in rounds],
        "before_mb": rounds[0]["megabytes_before"],
        "reasons": stored.pop("reasons"),
        "selected": [r["selected"] for r in rounds],
        "threads_agree": checked["one"] == checked["four"],
        "storing": stored,
        "cores": os.cpu_count(),
    }


def _near(cell: Cell, context: Context) -> dict[str, Any]:
    rows = int(cell.identity["rows"])
    at = context.cache / NAME / f"near-{rows}"
    found = _child("nearing", context, at, str(at), str(rows))
    return {**found, "n": found["queries"], "rows": rows, "cores": os.cpu_count()}


def _child(module: str, context: Context, at: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a process of ours printed last."""
    log = at.with_suffix(".log")
    call(python("-m", f"tests.bench.{module}", *arguments), context, log, {})
    return dict(json.loads(log.read_text().strip().splitlines()[-1]))


def judge_same(records: Records) -> list[str] | None:
    """Every face has one reason, in every round and with any number of threads."""
    if "select" not in records:
        return None
    found, faults = records["select"]["metrics"], []
    decided = sum(found["reasons"].values())
    for count, what in ((decided, "decided"), (found["storing"]["rows"], "stored")):
        if count != found["rows"]:
            faults.append(f"{count:,} of {found['rows']:,} faces are {what}")
    if not found["reasons"].get("selected"):
        faults.append("no face is selected")
    if set(found["selected"]) != {found["reasons"].get("selected")}:
        faults.append(f"rounds differ: {found['selected']}")
    if not found["threads_agree"]:
        faults.append("one thread and four decide differently")
    return faults


def judge_fast(records: Records) -> list[str] | None:
    """Median time and memory of every round on the full pool."""
    if "select" not in records:
        return None
    found, faults = records["select"]["metrics"], []
    seconds, largest = float(np.median(found["seconds"])), max(found["largest_mb"])
    if seconds >= MOST_SECONDS:
        faults.append(f"selection took {seconds:.1f} s, not under {MOST_SECONDS:.0f}")
    if largest >= MOST_MB:
        faults.append(f"a process took {largest:,} MB, not under {MOST_MB:,}")
    lacking = {"duplicate", "group_cap", "class_cap"} - found["reasons"].keys()
    if lacking:
        faults.append(f"no face was turned away by {', '.join(sorted(lacking))}")
    return faults


def judge_near(records: Records) -> list[str] | None:
    """Near copies are found, none that is none, for any order of chunks."""
    if "near" not in records:
        return None
    found, faults = records["near"]["metrics"], []
    if found["recall"] < LEAST_RECALL:
        faults.append(f"recall {found['recall']:.4f}, expected {LEAST_RECALL}")
    if found["wrong"]:
        faults.append(f"{found['wrong']} pairs are below the cut")
    if not found["orders_agree"]:
        faults.append("chunks in another order give other groups")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("same selection in every round and for any threads", "always", judge_same),
        Gate("near copies against brute force", "always", judge_near),
        Gate(f"under {MOST_SECONDS:.0f} s and {MOST_MB:,} MB", "full", judge_fast),
    ),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
