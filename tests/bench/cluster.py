"""What a cluster is promised, on real Ray nodes of this machine.

    python -m tests.bench.cluster [--quick] [--only TEXT]

A cell per promise: a job submitted with a token to a head whose runs lie on S3 and are tracked by
MLflow on PostgreSQL; nodes that die while faces are scored; nodes that come for a pass and go; a
head that dies and another one that goes on; a node that dies under Ray Train. The scenes are those
of tests/cluster/scenes.py; `--quick` plays the shortest one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.harness import Bench, Cell, Context, Gate, Records, main
from tests.bench.resume import identity
from tests.cluster import scenes
from tests.helpers import servers

NAME = "cluster"
MOST_SECONDS = 12 * 60.0
"""That all scenes may take together."""
CLOSE = 1e-6
"""Largest difference of a weight; float32, the same number of workers."""
COMPARED: dict[str, Callable[..., dict[str, Any]]] = {
    "node-loss": scenes.node_loss,
    "autoscaling": scenes.autoscaling,
    "head-restart": scenes.head_restart,
}
"""Scenes whose manifest is compared with that of one node."""
ALONE: dict[str, Callable[..., dict[str, Any]]] = {
    "submission": scenes.submission,
    "train-node-loss": scenes.train_node_loss,
}
QUICK = ("train-node-loss",)


def cells(options: argparse.Namespace) -> list[Cell]:
    """One per promise."""
    made_of = {**identity(), "sets": list(scenes.SETS), "version": 1}
    names = QUICK if options.quick else (*ALONE, *COMPARED)
    return [Cell(name, name, 0, {**made_of, "scene": name}, NAME) for name in names]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Play a scene; seconds are of the scene alone, with the start of its nodes."""
    if cell.name == "submission" and (why := servers.missing()) is not None:
        raise RuntimeError(why)
    given = []
    if cell.name in COMPARED:
        home = context.cache / NAME
        home.mkdir(parents=True, exist_ok=True)
        given.append(scenes.single_node(home))
    work = Path(tempfile.mkdtemp(prefix="ray-"))  # short, for sockets
    began = time.monotonic()
    try:
        found = {**COMPARED, **ALONE}[cell.name](work, *given)
    except scenes.Waited as err:
        raise RuntimeError(str(err)) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "n": 1,
        **found,
        "scene_seconds": round(time.monotonic() - began, 1),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def judge(records: Records) -> list[str] | None:
    """Every promise that was put to the test was kept."""
    faults = []
    for name, record in records.items():
        found = record["metrics"]
        if name != "head-restart" and found["exit_code"] != 0:
            faults.append(f"{name}: exit code {found['exit_code']}: {found['said']}")
        if not found.get("manifest_equal", True):
            faults.append(f"{name}: the manifest differs from that of one node")
        if found.get("committed_again"):
            faults.append(f"{name}: {found['committed_again']} slices were committed again")
        if name == "autoscaling":
            counts = [found[f"nodes_{when}"] for when in ("before", "most", "after")]
            if counts != [0, scenes.NODES, 0]:
                faults.append(f"{name}: {counts} nodes, expected [0, {scenes.NODES}, 0]")
        if name == "train-node-loss":
            apart = found["largest_difference"]
            if apart is None or apart > CLOSE:
                faults.append(f"{name}: weights differ by {apart}, at most {CLOSE}")
        if name == "submission" and found["without_token"] != 401:
            faults.append(f"{name}: {found['without_token']} without a token, expected 401")
    seconds = sum(record["metrics"]["scene_seconds"] for record in records.values())
    if len(records) == len(COMPARED) + len(ALONE) and seconds > MOST_SECONDS:
        faults.append(f"all scenes took {seconds:.0f} s, at most {MOST_SECONDS:.0f}")
    return faults if records else None


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(Gate("what a cluster is promised", "always", judge),),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
