"""One cell of the active-learning bench: the rounds of a trial, in a process of its own.

    python -m tests.bench.active_cells RUN_FOLDER STRATEGY START SEED THREADS [--set A.B=V ...]

The process trains; the cell reads the rounds that it has stored.
"""

from __future__ import annotations

import argparse
import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import conduct, flow
from pipeline.config import digest
from pipeline.job import Job
from pipeline.recipe import load
from pipeline.storage import location
from pipeline.training.data import LabeledFaces
from pipeline.training.faces import ArrayFaces
from pipeline.training.handed import labeled_rows
from pipeline.training.loop import local, precision, prepare_cpu
from pipeline.training.runs import TrainConfig
from pipeline.training.supervised import SupervisedConfig, train_supervised
from pipeline.trials import TrialJob, kept, test_rows, trial, trials_of, worker_of
from tests.bench.harness import ROOT, Cell, Context, call, python

RECIPE = "jobs/recipes/activefer.yaml"
FACES = "active-faces"
"""Run folder of the stages before any trial, named by what is set in the recipe."""


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Train what is missing of a trial's rounds, and read them."""
    root = _prepared(cell, context)
    start = cell.identity["start"]
    one, job = _trial(root, cell.method, start, cell.seed, cell.sets)
    before = len(kept(one))
    argv = [str(root), cell.method, start, str(cell.seed), str(context.threads)]
    sets = [part for item in cell.sets for part in ("--set", item)]
    log = context.cache / f"{cell.run}.log"
    env = {"OMP_NUM_THREADS": str(context.threads)}
    call(python("-m", "tests.bench.active_cells", *argv, *sets), context, log, env)
    found = kept(one)
    return {
        "start": start,
        "rounds": [made.model_dump(mode="json", exclude={"chosen"}) for made in found],
        "chosen": digest([made.chosen for made in found])[:16],
        "first": found[0].labels,
        "budget": len(found[0].chosen),
        "faces": len(labeled_rows(flow.handed(job), ("train",))),
        "seconds_training": round(sum(made.seconds for made in found), 1),
        "seconds_asking": round(sum(made.seconds_asking for made in found), 1),
        "continued": before,
        "trained_in": str(precision(job.recipe.train.bf16, "cpu")).removeprefix("torch."),
        "n": len(test_rows(one.handed, location(one.test))),
        "readings": 0 if context.options.quick else len(found) - before,
        "command": f"python -m tests.bench.active --only {cell.name}",
    }


def _prepared(cell: Cell, context: Context) -> Path:
    """The shared run folder, finished up to guard, or to the backbone where a cell starts there."""
    until = "pretrain" if cell.identity["start"] == "pretrained" else "guard"
    root = context.cache / f"{FACES}-{digest(list(cell.sets))[:8]}"
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root.with_suffix(".lock")):
        if not list(root.glob(f"{until}/g*/done*.json")):
            sets = [*cell.sets, f"train.threads={context.threads}", "tracking.uri='off'"]
            argv = [part for item in sets for part in ("--set", item)]
            command = ("-m", "pipeline.cli", "run", RECIPE, "--run", str(root), "--fresh")
            env = {"OMP_NUM_THREADS": str(context.threads)}
            log = root.with_suffix(".log")
            call(python(*command, "--until", until, *argv), context, log, env)
    return root


@contextmanager
def _alone(at: Path) -> Iterator[None]:
    """One process at a time."""
    with at.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _trial(
    root: Path, strategy: str, start: str, seed: int, sets: Sequence[str]
) -> tuple[TrialJob, Job]:
    """The trial of a cell; its rounds lie in a folder named by what decides them."""
    recipe = load(ROOT / RECIPE, [*sets, "tracking.uri='off'"])
    job = conduct.start(recipe, str(root), fresh=True, show_faces=False)
    assert recipe.active is not None
    lists = {"strategies": (strategy,), "seeds": (seed,), "starts": (start,)}
    own = recipe.active.model_copy(update=lists)
    same = own.model_dump(mode="json", exclude={"strategies", "seeds", "starts"})
    inputs = [same, flow.training_digest(job), job.run.artifact("test").digest]
    if start == "pretrained":
        inputs.append(job.run.artifact("pretrain").digest)
    out = job.run.root / f"bench-rounds/{digest(inputs)[:12]}"
    job = Job(recipe.model_copy(update={"active": own}), job.run, job.tracker)
    (one,) = trials_of(job, out)
    return one, job


def rate(config: SupervisedConfig, threads: int, place: TrainConfig) -> float:
    """img/s of 20 training steps on invented faces."""
    prepare_cpu(threads)
    rng, size = np.random.default_rng(0), config.model.size
    pixels = rng.integers(0, 256, (512, config.model.channels, size, size), np.uint8)
    data = LabeledFaces(ArrayFaces(pixels), np.arange(512) % 7)
    names, seconds = [f"c{i}" for i in range(7)], 0.0
    dtype = precision(place.bf16, "cpu")
    for steps in (3, 20):  # the first run pays for compilation
        begun = time.perf_counter()
        short = config.model_copy(update={"steps": steps})
        train_supervised(short, data, names, local("cpu", dtype), seed=0)
        seconds = time.perf_counter() - begun
    return 20 * config.batch / seconds


def main() -> None:
    """Train a trial's missing rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("start")
    parser.add_argument("seed", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    given = parser.parse_args()
    one, job = _trial(given.root, given.strategy, given.start, given.seed, given.sets)
    worker = worker_of(job.recipe.train.model_copy(update={"threads": given.threads}))
    trial(one.model_dump(mode="json"), worker)


if __name__ == "__main__":
    main()
