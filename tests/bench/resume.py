"""Kill -9 of the driver in the middle of scoring, run again: nothing committed is read twice.

    python -m tests.bench.resume [--quick]

Every cell is one kill at a seeded point of the pass that embeds and scores. Reads are counted by a
log that the pool's own source writes (tests/chaos/driver.py, whose reads are slow); the finished
run is compared with an undisturbed one by the digests of the embed and score manifests. Synthetic
faces, tiny networks: the bench is about the ledger, so `--quick` runs the same cells.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, settings
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.pool import plan_at
from pipeline.run import Run
from pipeline.storage import location
from tests.bench.ferplus10 import drop_later
from tests.bench.harness import (
    ROOT,
    Bench,
    Cell,
    Context,
    Gate,
    OutOfTime,
    Records,
    call,
    main,
    python,
)
from tests.helpers import flow

NAME = "resume"
KILLS = 3
DRIVER = ROOT / "tests" / "chaos" / "driver.py"
PASS = ("embed", "score")
POLL = 0.01
SETTLE = 3.0
PATIENCE = 180.0


def cells(options: argparse.Namespace) -> list[Cell]:
    """One kill per seed."""
    made_of = identity()
    return [
        Cell(f"kill{seed}", "kill -9", seed, {**made_of, "kill": seed}, NAME)
        for seed in range(KILLS)
    ]


def identity() -> dict[str, Any]:
    """What decides the manifests of the tiny job."""
    recipe = flow.tiny()
    stages = ("labeled", "survey", "guard", "teach", "embed", "score")
    chosen: dict[str, Any] = {stage: settings(recipe, stage) for stage in stages}
    drop_later(chosen)
    return {**chosen, "embedding": recipe.embed.model_dump(mode="json"), "schema": SCHEMA_VERSION}


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Kill one driver, run again, compare with the undisturbed run."""
    home = context.cache / NAME
    whole = undisturbed(home, context)
    root = home / cell.name
    shutil.rmtree(root, ignore_errors=True)
    flow.copy(whole, root, without=PASS)
    log = Path(f"{root}.reads")
    log.unlink(missing_ok=True)

    there = plan(root)
    target = round(len(there) * random.Random(cell.seed).uniform(0.2, 0.6))
    _kill_at(root, target, context)
    ledger = Ledger(generation(root, "embed"))
    held = {f"{s.start}-{s.stop}" for s in there.slices() if ledger.find(s.key) is not None}
    before = log.read_text().split()
    call(argv(root), context, home / f"{cell.name}.log", env())
    again = log.read_text().split()[len(before) :]
    return {
        "n": len(there),
        "slices": len(there),
        "killed_at": target,
        "committed_at_kill": len(held),
        "reads_before": len(before),
        "reads_after": len(again),
        "read_again": len(held & set(again)),
        "left_unread": len({f"{s.start}-{s.stop}" for s in there.slices()} - held - set(again)),
        "manifest_equal": digests(root) == digests(whole),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def undisturbed(home: Path, context: Context) -> Path:
    """A finished run of the same recipe; made once, its folder named by what it is made of."""
    whole = home / f"whole-{digest(identity())[:8]}"
    if not any(whole.glob("score/g*/done*.json")):
        call(argv(whole), context, home / f"{whole.name}.log", env())
    return whole


def _kill_at(root: Path, target: int, context: Context) -> None:
    """Start the driver and kill it once `target` slices are scored."""
    with Path(f"{root}.killed.log").open("wb") as out:
        driver = subprocess.Popen(
            argv(root), cwd=ROOT, env={**os.environ, **env()}, stdout=out, stderr=out
        )
        patience = time.monotonic() + PATIENCE
        try:
            while scored(root) < target:
                if driver.poll() is not None:
                    raise RuntimeError(f"the driver ended by itself: see {root}.killed.log")
                if context.left() <= 0:
                    raise OutOfTime
                if time.monotonic() > patience:
                    raise RuntimeError(f"{target} slices were not scored in {PATIENCE:.0f} s")
                time.sleep(POLL)
        finally:
            driver.kill()
            driver.wait()
    time.sleep(SETTLE)  # actors that outlive the driver for a moment may still commit


def scored(root: Path) -> int:
    """Slices whose score is committed."""
    return sum(1 for _ in root.glob("score/g*/commits/*/*.json"))


def argv(root: Path) -> list[str]:
    """The command of a driver."""
    return python(str(DRIVER), str(root))


def env() -> dict[str, str]:
    """Ray's workers import the logging source as the driver does."""
    return {"PYTHONPATH": str(DRIVER.parents[1]), "OMP_NUM_THREADS": "1"}


def generation(root: Path, stage: str) -> Any:
    """Folder of a stage's newest generation."""
    return location(max((root / stage).glob("g*")))


def plan(root: Path) -> Plan:
    """The pool's slices."""
    return Plan(plan_at(Run(location(root)).artifact("survey").dir))


def digests(root: Path) -> list[str]:
    """Digests of the manifests of the pass."""
    run = Run(location(root))
    return [run.artifact(stage).digest for stage in PASS]


def judge_resume(records: Records) -> list[str] | None:
    """Killed in the middle, nothing committed read again, nothing left out, same manifest."""
    if len(records) < KILLS:
        return None
    faults = []
    for name, record in records.items():
        found = record["metrics"]
        if not 0 < found["committed_at_kill"] < found["slices"]:
            faults.append(f"{name}: {found['committed_at_kill']} slices were committed at the kill")
        if found["read_again"]:
            faults.append(f"{name}: {found['read_again']} committed slices were read again")
        if found["left_unread"]:
            faults.append(f"{name}: {found['left_unread']} open slices were not read")
        if not found["manifest_equal"]:
            faults.append(f"{name}: the manifest differs from an undisturbed run's")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(Gate("committed slices are not read again", "always", judge_resume),),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
