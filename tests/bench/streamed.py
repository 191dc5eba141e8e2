"""Whether a backbone learns as much from a streamed pool as from one packed on the node.

    OMNIFER_DATA=... python -m tests.bench.streamed [--quick]

SimCLR on the 13,233 faces of ferplus10's face pool, a small ConvNet, the same steps each time:
packed and drawn from the whole pool in one process; streamed through Ray Data in one process; and
streamed by two workers of Ray Train. Judged by the nearest neighbors among a tenth of FERPlus'
training faces (leave one out). No validation or test face is looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.run import Run
from pipeline.storage import location
from tests.bench import ferplus10
from tests.bench.harness import Bench, Cell, Context, Gate, Records, call, main, python

NAME = "streamed"
WAYS: Mapping[str, tuple[str, int]] = {
    "packed": ("packed", 0),
    "streamed": ("streamed", 0),
    "streamed, two workers": ("streamed", 2),
}
SEEDS = (0, 1, 2)
NET = "{name: convnet, args: {width: 16}, size: 48, dropout: 0.0}"
CPUS = 4
"""Logical ones: two workers hold two, and what reads beside them needs some."""


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every way with every seed."""
    steps, seeds = (4, (0,)) if options.quick else (300, SEEDS)
    return [
        Cell(
            f"{way.replace(', ', '-').replace(' ', '-')}-s{seed}",
            way,
            seed,
            {"read": read, "workers": workers, "steps": steps, "batch": 128, "net": NET},
            NAME,
        )
        for seed in seeds
        for way, (read, workers) in WAYS.items()
    ]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Pre-train in the run folder of the seed, whose survey and guard are made once."""
    what = cell.identity
    # Workers are no part of a stage's identity: theirs would be taken for what one process made.
    root = context.cache / NAME / f"s{cell.seed}-{what['workers']}"
    root.mkdir(parents=True, exist_ok=True)
    every = max(1, what["steps"] // 3)
    sets = [
        *ferplus10.sets_of("faces", cell.seed, quick=context.options.quick),
        f"pretrain={{model: {NET}, steps: {what['steps']}, batch: {what['batch']}, "
        f"read: {what['read']}, probe_every: {every}}}",
        f"train.stage_workers={{pretrain: {what['workers']}}}",
        "train.threads=1" if what["workers"] else f"train.threads={context.threads}",
        "tracking.uri='off'",
        f"stream.cpus={CPUS}",
        "stream.object_store_mb=800",
    ]
    argv = [part for item in sets for part in ("--set", item)]
    command = ["-m", "pipeline.cli", "run", ferplus10.RECIPE, "--run", str(root)]
    log = root.with_suffix(".log")
    call(python(*command, "--until", "pretrain", "--fresh", *argv), context, log, {})
    made = Run(location(root)).artifact("pretrain")
    probes = (made.dir / "probes.json").read_json()
    return {
        "n": made.facts["faces"],
        "knn": made.facts["last_knn"],
        "probes": probes,
        "loss": made.facts["last_loss"],
        "training_seconds": round(made.facts["seconds"], 1),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def accuracies(records: Records, way: str) -> list[float]:
    """Nearest-neighbor accuracy of each seed, a share."""
    return [r["metrics"]["knn"] for r in records.values() if r["method"] == way]


def losses(records: Records, way: str) -> list[float]:
    """Mean contrastive loss of each seed's last steps, nats."""
    return [r["metrics"]["loss"] for r in records.values() if r["method"] == way]


def judge_whole(records: Records) -> list[str] | None:
    """Every way saw every face, and its loss is a number."""
    faults = []
    for name, record in records.items():
        if not np.isfinite(record["metrics"]["loss"]):
            faults.append(f"{name}: loss {record['metrics']['loss']}")
    if len({record["n"] for record in records.values()}) > 1:
        faults.append("the pools differ in size")
    return faults if records else None


def judge_equal(records: Records) -> list[str] | None:
    """A streamed pool's means are not behind the packed one's by more than the seeds spread."""
    faults = []
    for name, of, sign in (("accuracy", accuracies, 1), ("loss", losses, -1)):
        found = {way: of(records, way) for way in WAYS}
        if any(len(values) < len(SEEDS) for values in found.values()):
            return None
        for way, values in found.items():
            gap = sign * float(np.mean(found["packed"]) - np.mean(values))
            spread = float(max(np.ptp(values), np.ptp(found["packed"])))
            if gap > spread:
                faults.append(f"{way}: {name} is {gap:.4f} behind, seeds spread by {spread:.4f}")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("the same faces, finite losses", "always", judge_whole),
        Gate("as good as packed", "full", judge_equal),
    ),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
