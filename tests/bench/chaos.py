"""Processes of a real run die by SIGKILL at seeded moments; what comes out is always the same.

    python -m tests.bench.chaos [--quick]

Who dies: the driver; a worker of Ray Data (reading, embedding or scoring) while the driver lives;
the node, that is Ray's raylet; or whoever comes first to a step of the commit protocol, once per
step and seed, by a fault point that ends the process on the spot. The run is then started again
until it finishes, and its manifests are compared with those of an undisturbed run. Synthetic
faces and tiny networks: the bench is about the ledger. `--quick` is one cell of each kind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.harness import ROOT, Bench, Cell, Context, Gate, OutOfTime, Records, call, main
from tests.bench.resume import argv, digests, env, identity, plan, scored, undisturbed
from tests.helpers import flow

NAME = "chaos"
SEEDS = 10
STEPS = ("part-written", "before-commit", "after-commit", "pack-written", "before-seal")
STEP_SEEDS = 2
PATIENCE = 120.0
SETTLE = 3.0


def cells(options: argparse.Namespace) -> list[Cell]:
    """Ten seeds for each victim, two for each step."""
    kinds = dict.fromkeys(("driver", "worker", "node"), SEEDS)
    kinds |= {f"step {step}": STEP_SEEDS for step in STEPS}
    made_of = identity()
    return [
        Cell(f"{kind.replace(' ', '-')}-{seed}", kind, seed, {**made_of, "kind": kind}, NAME)
        for kind, seeds in kinds.items()
        for seed in range(1 if options.quick else seeds)
        if not options.quick or not kind.startswith("step") or kind == "step before-commit"
    ]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """One death, the runs after it, and the comparison."""
    home = context.cache / NAME
    whole = undisturbed(home, context)
    root = home / cell.name
    shutil.rmtree(root, ignore_errors=True)
    flow.copy(whole, root, without=("embed", "score"))
    slices = len(plan(root))
    target = round(slices * random.Random(cell.seed).uniform(0.1, 0.8))
    died_at, code = _disturbed(cell, root, target, context)
    runs = 1
    if code != 0:
        time.sleep(SETTLE)  # workers that outlive the driver for a moment may still commit
        call(argv(root), context, home / f"{cell.name}.log", env())
        runs = 2
    return {
        "n": slices,
        "slices": slices,
        "scored_at_death": died_at,
        "runs": runs,
        "manifest_equal": digests(root) == digests(whole),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def _disturbed(cell: Cell, root: Path, target: int, context: Context) -> tuple[int, int | None]:
    """Slices scored when somebody died, and the driver's exit code, None if it was killed."""
    fault = cell.method.removeprefix("step ") if cell.method.startswith("step") else None
    extra = {"OMNIFER_FAULT": fault} if fault else {}
    with Path(f"{root}.killed.log").open("wb") as out:
        driver = subprocess.Popen(
            argv(root), cwd=ROOT, env={**os.environ, **env(), **extra}, stdout=out, stderr=out
        )
    try:
        if fault:
            died_at = _wait(lambda: _felt(fault, root), driver, context, root)
        else:
            died_at = _wait(lambda: scored(root) >= target, driver, context, root)
            if cell.method != "driver":
                _kill(cell.method, driver.pid, random.Random(cell.seed))
                return died_at, _ended(driver, context)
        return died_at, driver.poll()
    finally:
        driver.kill()
        driver.wait()


def _wait(met: Any, driver: subprocess.Popen[bytes], context: Context, root: Path) -> int:
    """Until a condition is met or the driver is gone; slices scored by then."""
    patience = time.monotonic() + PATIENCE
    while not met() and driver.poll() is None:
        if context.left() <= 0:
            raise OutOfTime
        if time.monotonic() > patience:
            raise RuntimeError(f"nothing to kill in {PATIENCE:.0f} s: see {root}.killed.log")
        time.sleep(0.01)
    return scored(root)


def _felt(step: str, root: Path) -> bool:
    """Whether workers have died of the fault; at the steps of sealing it is the driver that dies.

    Who dies before its commit leaves the slice to a second attempt; who dies after it leaves it
    done, and the next one dies at the next slice.
    """
    if step == "after-commit":
        return sum(1 for _ in root.glob("embed/g*/commits/*/*.json")) >= 2
    return any(root.glob("embed/g*/attempts/*/*-2"))


def _ended(driver: subprocess.Popen[bytes], context: Context) -> int | None:
    """Exit code of a driver that may end by itself; None where it does not."""
    try:
        return driver.wait(min(PATIENCE, max(context.left(), 1)))
    except subprocess.TimeoutExpired:
        return None


def _kill(kind: str, driver: int, chance: random.Random) -> None:
    """Kill the raylet, or one of the workers that run a map operator, below the driver."""
    below = _descendants(driver)
    if kind == "node":
        victims = [
            pid for pid, title in below.items() if Path(title.split(" ")[0]).name == "raylet"
        ]
    else:
        victims = [
            pid for pid, title in below.items() if title.startswith("ray::") and "Map" in title
        ]
    if not victims:
        raise RuntimeError(f"no {kind} to kill among {sorted(below.values())}")
    os.kill(chance.choice(sorted(victims)), signal.SIGKILL)


def _descendants(root: int) -> dict[int, str]:
    """Process number -> command line of all processes below one."""
    parents, titles = {}, {}
    for at in Path("/proc").glob("[0-9]*"):
        try:
            stat, title = (at / "stat").read_text(), (at / "cmdline").read_bytes()
        except OSError:
            continue  # gone meanwhile
        parents[int(at.name)] = int(stat.rpartition(")")[2].split()[1])
        titles[int(at.name)] = title.replace(b"\0", b" ").decode(errors="replace")
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return {pid: titles[pid] for pid in found - {root}}


def judge_chaos(records: Records) -> list[str] | None:
    """The manifests are those of an undisturbed run, whoever died."""
    faults = [
        f"{name}: the manifest differs from an undisturbed run's"
        for name, record in records.items()
        if not record["metrics"]["manifest_equal"]
    ]
    return faults if records else None


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(Gate("same manifest whoever died", "always", judge_chaos),),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
