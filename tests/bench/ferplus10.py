"""What the recipe ferplus10 is worth: the student against controls of equal compute, on real faces.

    OMNIFER_DATA=... python -m tests.bench.ferplus10 --jobs 2
    OMNIFER_DATA=... python -m tests.bench.ferplus10 --on development --name longer \
        --set student.steps=5000

The grid reads PublicTest once per cell. Recipes are developed with `--on development`, which never
reads it: every attempt has a name and what it changes, and RESULTS.md keeps the table of them. One
run folder per seed and labeled fraction: pools and attempts share the teachers and controls whose
identity is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.active import pack
from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, SETTINGS, settings
from pipeline.recipe import Recipe, load
from pipeline.run import Run
from pipeline.spaces import HeadConfig
from pipeline.stages import METRICS_FILE, PREDICTIONS_FILE
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training.worker import precision
from tests.bench.gains import (
    HEADLINE,
    MODELS,
    judge_compute,
    judge_finite,
    judge_gain,
    judge_sharing,
)
from tests.bench.harness import ROOT, Bench, Cell, Context, Gate, call, main, python

NAME = "ferplus10"
RECIPE = "jobs/recipes/ferplus10.yaml"
DATA = "OMNIFER_DATA"
POOLS = {"both": ("rest", "faces"), "rest": ("rest",), "faces": ("faces",), "omni": ("faces",)}
"""Sources per pool; `omni` has all labels, its controls are the 100 % upper bound."""
GRID = (("both", 0), ("both", 1), ("both", 2), ("rest", 0), ("faces", 0), ("omni", 0))
BESIDE = ("active", "annotated", "clusters", "experts", "rounds", "student_share", "tuned")
"""Stages that no figure of these cells depends on."""
SCHEDULE_LATER = (("optimizer", "adamw"), ("momentum", 0.9))
"""The same of every training."""
LATER = (
    ("search", "adaptive", []),
    ("search", "batch", 1),
    ("search", "sampler", "tpe"),
    ("search", "finalists", None),
    ("search", "head", HeadConfig().model_dump(mode="json")),
    ("select", "adaptive", None),
    ("select", "clusters", None),
    ("student", "beside", "mined"),
    ("student", "online", None),
    ("student", "candidates", None),
    ("student.online", "epoch_steps", None),
    ("teach", "mix", None),
    ("teach", "mix_alpha", 1.0),
    ("teach", "partial", None),
    ("guard", "copies", None),
    *((section, *late) for section in ("pretrain", "teach", "student") for late in SCHEDULE_LATER),
)
"""Settings of sections, and of sections within them, that came after cells were measured, and the
value that changes nothing."""
POOL_FACES = {"rest": 21_700, "faces": 13_233}  # about; only for the estimate
NETWORK = "{name: compact_resnet, args: {widths: [8, 16]}, size: 32, dropout: 0}"
QUICK = (
    "labeled={kind: synthetic, count: 500, test_count: 200, fraction: 0.4}",
    "slice_faces=256",
    "stream.object_store_mb=300",
    "teach.folds=2",
    "teach.steps=20",
    "teach.batch=32",
    f"teach.model={NETWORK}",
    "student.steps=30",
    "student.labeled_batch=16",
    "student.mined_batch=32",
    f"student.model={NETWORK}",
    "evaluate.draws=200",
)
QUICK_FACES = {"kind": "synthetic", "name": "faces", "count": 300}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--on", choices=("public", "development"), default="public")
    parser.add_argument("--name", default=None, help="of an attempt on the development set")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--seeds", default="0", help="of an attempt, such as 0,1,2")
    parser.add_argument("--pools", default="both", help="of an attempt, such as both,rest")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The grid, or the cells of one attempt on the development set."""
    developing = options.on == "development"
    if options.sets and not developing:
        raise SystemExit("--set: recipes are varied with --on development only")
    if developing and not options.name:
        raise SystemExit("--on development: give the attempt a --name")
    if options.quick:
        return [_cell(pool, 0, (), developing=False, quick=True) for pool in ("both", "faces")]
    if not developing:
        return [_cell(pool, seed, (), developing=False) for pool, seed in GRID]
    pools, seeds = options.pools.split(","), [int(s) for s in options.seeds.split(",")]
    return [
        _cell(pool, seed, tuple(options.sets), developing=True, attempt=options.name)
        for pool in pools
        for seed in seeds
    ]


def folder(options: argparse.Namespace) -> str:
    """Where results are kept."""
    return f"{NAME}-dev" if options.on == "development" else NAME


def _cell(
    pool: str,
    seed: int,
    changes: Sequence[str],
    *,
    developing: bool,
    attempt: str = "",
    quick: bool = False,
) -> Cell:
    sets = [*sets_of(pool, seed, quick=quick), *changes]
    if developing:
        sets.append("labeled.development.role=test")
    with portable():
        recipe = load(ROOT / RECIPE, sets)
    identity = {name: settings(recipe, name) for name in SETTINGS if name not in BESIDE}
    identity |= {"schema": SCHEMA_VERSION}
    drop_later(identity)
    labels = "all" if pool == "omni" else "part"
    return Cell(
        name=f"{attempt}-{pool}-s{seed}" if attempt else f"{pool}-s{seed}",
        method=pool,
        seed=seed,
        identity=identity,
        run=run_of(labels, seed, developing=developing),
        trainings=_trainings(recipe, identity),
        sets=tuple(sets),
    )


def drop_later(identity: dict[str, Any]) -> None:
    """Take out of a cell's identity what came LATER and changes nothing, so that it stays as was.

    Args:
        identity: settings by stage, of any stages; changed in place.
    """
    if "pretrain" in identity and identity["pretrain"]["pretrain"] is None:
        del identity["pretrain"]
    for section, name, value in LATER:
        for values in identity.values():
            own = values
            for part in section.split("."):
                own = own.get(part) if isinstance(own, dict) else None
            if isinstance(own, dict) and own.get(name, ...) == value:
                del own[name]


def run_of(labels: str, seed: int, *, developing: bool) -> str:
    """Name of the run folder: one per seed and share of the labels."""
    return f"{NAME}-{'dev' if developing else 'public'}-{labels}-s{seed}"


def sets_of(pool: str, seed: int, *, quick: bool) -> list[str]:
    """What is set in the recipe for a pool and a seed."""
    base = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
    if quick:
        base["pool"] = [QUICK_FACES if s["name"] == "faces" else s for s in base["pool"]]
    sets = [f"seed={seed}", *(QUICK if quick else ())]
    if quick or pool != "both":
        sources = [source for source in base["pool"] if source["name"] in POOLS[pool]]
        sets.append(f"pool={json.dumps(sources)}")
    if pool != "both":
        sets.append("student.source_share={}")
    if pool == "omni":
        sets.append("labeled.fraction=null")
    return sets


@contextmanager
def portable() -> Iterator[None]:
    """The data's folder by its variable's name, so that identities are alike on all machines."""
    before = os.environ.get(DATA)
    os.environ[DATA] = f"${DATA}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DATA]
        else:
            os.environ[DATA] = before


def _trainings(recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, float]:
    """Image passes of what the recipe trains and embeds, by what decides its content."""
    teach, student = recipe.teach, recipe.student
    faces = sum(
        getattr(source, "count", POOL_FACES.get(name, 0))
        for name, source in recipe.sources().items()
    )
    taught = teach.folds * teach.steps * teach.batch
    embedded = faces * teach.folds * 2 / 3
    own = student.steps * (student.labeled_batch + student.mined_batch)
    base = [identity["labeled"], identity["teach"]]
    schedule = [
        identity["labeled"],
        identity["control_b"],
        student.steps,
        student.model.model_dump(mode="json"),
    ]
    return {
        f"teach {digest(base)}": taught,
        f"embed {digest([*base, identity['survey']])}": embedded,
        f"student {digest(dict(identity))}": own,
        f"control_a {digest([*schedule, own])}": own,
        f"control_b {digest([*schedule, own + taught + embedded])}": own + taught + embedded,
    }


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run the recipe in a process of its own and read what evaluate found."""
    if not context.options.quick and DATA not in os.environ:
        raise RuntimeError(f"{DATA} is not set: the folder with fer2013/ and faces/")
    root = context.cache / cell.run
    root.mkdir(parents=True, exist_ok=True)
    before = _finished(root)
    _run(cell, context, root)
    made = sorted({name.split("/")[0] for name in _finished(root) - before})
    found = _read(root)
    if context.options.quick:
        before = _finished(root)
        _run(cell, context, root)
        found["made_again"] = sorted(_finished(root) - before)
    developing = "labeled.development.role=test" in cell.sets
    return {
        **found,
        "made": made,
        "trained_in": str(precision(None, "cpu")).removeprefix("torch."),
        "readings": 0 if developing or context.options.quick else 1,
        "command": _command(cell),
    }


def _run(cell: Cell, context: Context, root: Path) -> None:
    speed = [f"train.threads={context.threads}", "tracking.uri='off'"]
    if context.options.jobs > 1:
        speed.append("stream.object_store_mb=300")
    sets = [part for item in (*cell.sets, *speed) for part in ("--set", item)]
    argv = python("-m", "pipeline.cli", "run", RECIPE, "--run", str(root), "--fresh", *sets)
    call(argv, context, root.with_suffix(".log"), {"OMP_NUM_THREADS": str(context.threads)})


def _command(cell: Cell) -> str:
    sets = [part for item in cell.sets for part in ("--set", item)]
    return shlex.join(["omnifer", "run", RECIPE, "--fresh", *sets])


def _finished(root: Path) -> set[str]:
    """The stage generations of a run that are finished."""
    return {str(at.relative_to(root)) for at in root.glob("*/g*/done*.json")}


def _read(root: Path) -> dict[str, Any]:
    """What a finished run says, small enough to keep."""
    run = Run(location(root))
    at = run.artifact("evaluate").dir
    found, said = (at / METRICS_FILE).read_json(), read_table(at / PREDICTIONS_FILE)
    truth = np.array(said["label"].to_pylist())
    student = json.loads(max(root.glob("recipe-*.json")).read_text())["student"]
    models = {
        name: {
            **{key: found["models"][name][key]["value"] for key in HEADLINE},
            "passes": found["models"][name]["passes"],
            "recall": {c["class"]: c["recall"] for c in found["models"][name]["per_class"]},
            "correct": pack(np.array(said[name].to_pylist()) == truth),
        }
        for name in MODELS
    }
    pool = found["pool"]
    return {
        "n": len(truth),
        "faces": digest(said.select(["id", "label"]).to_pydict())[:16],
        "models": models,
        "gain": found["gain"],
        "pool": {key: pool[key] for key in ("purity", "utilization", "pool", "selected", "known")},
        "temperature": run.artifact("teach").facts["temperature"],
        "teacher": run.artifact("teach").dir.name,
        "student_steps": student["steps"],
        "student_batch": student["labeled_batch"] + student["mined_batch"],
        "seconds_per_stage": {
            name: run.artifact(name).facts["seconds"]
            for name in ("survey", "teach", "embed", "student", "control_a", "control_b")
        },
    }


def speed(threads: int) -> float:
    """img/s of 20 training steps of the recipe's student network on invented faces."""

    from pipeline.training.data import LabeledFaces
    from pipeline.training.faces import ArrayFaces
    from pipeline.training.student import control
    from pipeline.training.supervised import train_supervised
    from pipeline.training.worker import local, prepare_cpu

    with portable():
        recipe = load(ROOT / RECIPE)
        config = control(recipe.student, own=recipe.control)
    prepare_cpu(threads)
    rng, size = np.random.default_rng(0), config.model.size
    pixels = rng.integers(0, 256, (512, config.model.channels, size, size), np.uint8)
    data = LabeledFaces(ArrayFaces(pixels), np.arange(512) % 8)
    names = [f"c{i}" for i in range(8)]
    seconds = 0.0
    for steps in (3, 20):  # the first run pays for compilation
        start = time.perf_counter()
        short = config.model_copy(update={"steps": steps})
        train_supervised(short, data, names, local("cpu", precision(None, "cpu")), seed=0)
        seconds = time.perf_counter() - start
    return 20 * config.batch / seconds


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures", "always", judge_finite),
        Gate("compute as defined", "always", judge_compute),
        Gate("trainings shared by identity", "always", judge_sharing),
        Gate("gain over the better control", "full", judge_gain),
    ),
    folder=folder,
    arguments=arguments,
    speed=speed,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
