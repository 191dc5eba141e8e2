"""What a few images per class are worth: every distiller and baseline, hard and soft labels.

    OMNIFER_DATA=... python -m tests.bench.distill --jobs 2
    OMNIFER_DATA=... python -m tests.bench.distill --on development --name wider --set steps=400

A cell distills the mined and labeled faces of ferplus10's run of its seed (built by `--until mine`
where it is not there), or the labeled ones alone in the reference table, and trains networks from
the images alone: the ConvNet that was distilled for, and a ResNet. `tune` cells fine-tune the
teacher. CPU size: width 32 in place of 128, a hundred steps or two; `--protocol literature` is the
full size, for a GPU.
Settings are chosen with `--on development`, which judges on the 3,000 Training faces that the run
has left out, and needs no teacher of its own; PublicTest is read once per cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import yaml

from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, settings
from pipeline.models import ModelConfig
from pipeline.recipe import Recipe, load
from pipeline.training.data import LabeledFaces
from pipeline.training.distill_cost import Cost, cost_of
from pipeline.training.distilling import DistillConfig
from pipeline.training.loop import local, precision, prepare_cpu
from pipeline.training.supervised import SupervisedConfig, train_supervised
from tests.bench import ferplus10, markdown
from tests.bench.distill_cells import TUNED_ON, config_of, measure
from tests.bench.distill_protocols import CPU, PROTOCOLS
from tests.bench.harness import ROOT, Bench, Cell, Gate, Record, main

NAME = "distill"
SEEDS = (0, 1, 2)
OWN = ("convnet hard", "convnet soft")
"""The network that sets are distilled for, with either labels."""
CHOSEN = ("random", "herding", "k_center", "crops")
LEARNED = ("distribution", "gradient", "unrolled", "window", "trajectory")
FOLLOWING = ("trajectory",)
"""Methods that follow experts, which are trained before."""
QUICK = ("random", "crops", "distribution", "window", "trajectory")
LABELED_FACES = 2_400  # about; only for the estimate
UNTIL_MINE = ("labeled", "survey", "guard", "teach", "embed", "score", "select")
"""Stages whose settings decide what is distilled."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--on", choices=("public", "development"), default="public")
    parser.add_argument("--name", default=None, help="of an attempt on the development set")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--protocol", choices=("cpu", "literature"), default="cpu")
    parser.add_argument("--seeds", default=None, help="such as 0,1")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The grid: both tables and the tuned teachers."""
    developing = options.on == "development"
    if options.sets and not developing:
        raise SystemExit("--set: settings are varied with --on development only")
    if developing and not options.name:
        raise SystemExit("--on development: give the attempt a --name")
    protocol = "tiny" if options.quick else options.protocol
    seeds = (0,) if options.quick else SEEDS
    if options.seeds:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    found = []
    for seed in seeds:
        for ipc in (1,) if options.quick else (1, 10):
            for method in QUICK if options.quick else (*CHOSEN, *LEARNED):
                found.append(_cell(options, protocol, "mined", method, ipc, seed))
                if seed == 0 and not options.quick:  # the reference table has one seed
                    found.append(_cell(options, protocol, "labeled", method, ipc, seed))
        if not options.quick:
            found += [_cell(options, protocol, "mined", m, 50, seed) for m in ("random", TUNED_ON)]
        found.append(_cell(options, protocol, "mined", "tune", 10, seed))
    return found


def folder(options: argparse.Namespace) -> str:
    """Where results are kept."""
    suffix = "-dev" if options.on == "development" else ""
    return f"{NAME}{suffix}" if options.protocol == "cpu" else f"{NAME}-{options.protocol}{suffix}"


def recipe_of(seed: int, *, quick: bool) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe whose mined set is distilled, and what is set in it."""
    sets = ferplus10.sets_of("both", seed, quick=quick)
    with ferplus10.portable():
        return load(ROOT / ferplus10.RECIPE, sets), tuple(sets)


def _cell(
    options: argparse.Namespace, protocol: str, source: str, method: str, ipc: int, seed: int
) -> Cell:
    recipe, sets = recipe_of(seed, quick=options.quick)
    chosen = dict(PROTOCOLS[protocol])
    if options.sets:
        chosen[method] = _changed(chosen.get(method, {}), options.sets)
    identity: dict[str, Any] = {name: settings(recipe, name) for name in UNTIL_MINE}
    ferplus10.drop_later(identity)
    identity |= {
        "schema": SCHEMA_VERSION,
        "on": options.on,
        "source": source,
        "method": method,
        "ipc": ipc,
        "width": chosen["width"],
        "resnet": chosen["resnet"],
        "evaluate": chosen["evaluate"],
        "settings": chosen.get(method, {}),
        "distill": chosen.get(TUNED_ON if method == "tune" else method, {}),
    }
    name = f"{source}-{method}-ipc{ipc}-s{seed}"
    return Cell(
        name=f"{options.name}-{name}" if options.name else name,
        method=method,
        seed=seed,
        identity=identity,
        run=ferplus10.run_of("part", seed, developing=False),
        trainings=_passes(identity),
        sets=sets,
    )


def _changed(values: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    found = json.loads(json.dumps(values))
    for item in sets:
        path, _, text = item.partition("=")
        *parents, last = path.split(".")
        at = found
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = yaml.safe_load(text)
    return dict(found)


def _cost(config: DistillConfig, source: str) -> Cost:
    mined = sum(ferplus10.POOL_FACES.values()) if source == "mined" else 0
    return _cost_of(config.model_dump_json(), LABELED_FACES + mined)


@cache
def _cost_of(config: str, faces: int) -> Cost:
    """Traced once for all seeds."""
    names = [str(code) for code in range(8)]
    return cost_of(DistillConfig.model_validate_json(config), names, faces)


def _passes(identity: Mapping[str, Any]) -> dict[str, float]:
    evaluate = identity["evaluate"]
    each = evaluate["steps"] * evaluate["batch"]
    found = {f"evaluate {digest(dict(identity))}": 3.0 * each}
    if identity["method"] in LEARNED:
        cost = _cost(config_of(identity), identity["source"])
        found[f"distill {digest(dict(identity))}"] = cost.passes
        if cost.expert_passes:
            keys = [identity[name] for name in ("labeled", "source", "distill", "width")]
            found[f"experts {digest(keys)}"] = cost.expert_passes
    return found


# -- gates ----------------------------------------------------------------------------------------


def judge_finite(records: Mapping[str, Any]) -> list[str] | None:
    """Every figure is a number between 0 and 1."""
    faults = [
        f"{cell}: {model} {key} is {said[key]}"
        for cell, record in records.items()
        for model, said in record["metrics"]["models"].items()
        for key in ("accuracy", "macro_f1")
        if not 0 <= said[key] <= 1
    ]
    return faults if records else None


def judge_best(records: Mapping[str, Any]) -> list[str] | None:
    """The best learned method at ten images beats random with hard labels beyond the spread."""
    random = over_seeds(records, "random", 10, "convnet hard")
    learned = {
        (method, labels): values
        for method in LEARNED
        for labels in OWN
        if len(values := over_seeds(records, method, 10, labels)) == len(SEEDS)
    }
    if len(random) < len(SEEDS) or len(learned) < 2 * len(LEARNED):
        return None
    (method, labels), values = max(learned.items(), key=lambda item: float(np.mean(item[1])))
    if min(values) > max(random):
        return []
    return [
        f"{method} ({labels}) {100 * np.mean(values):.1f}, smallest {100 * min(values):.1f}; "
        f"random with hard labels {100 * np.mean(random):.1f}, largest {100 * max(random):.1f}"
    ]


def judge_cheap(records: Mapping[str, Any]) -> list[str] | None:
    """Tuning on the set takes under 5 % of the student's image passes."""
    found = [r for r in records.values() if r["method"] == "tune"]
    if not found:
        return None
    recipe, _ = recipe_of(0, quick=False)
    own = recipe.student.steps * (recipe.student.labeled_batch + recipe.student.mined_batch)
    return [
        f"{r['cell']}: {r['metrics']['models']['distilled']['passes'] / own:.1%} of the passes"
        for r in found
        if r["metrics"]["models"]["distilled"]["passes"] > 0.05 * own
    ]


def judge_quick(records: Mapping[str, Any]) -> list[str] | None:
    """Tuning on the set takes under 5 % of the seconds of training on labeled + mined."""
    faults, judged = [], set()
    for record in (r for r in records.values() if r["method"] == "tune"):
        student = students().get(record["seed"])
        if student is None or student["host"] != record["host"]:
            continue
        judged.add(record["seed"])
        took = record["metrics"]["models"]["distilled"]["seconds"]
        whole = student["metrics"]["seconds_per_stage"]["student"]
        if took > 0.05 * whole:
            faults.append(f"{record['cell']}: {took:,.0f} s, {took / whole:.1%} of {whole:,.0f} s")
    return faults if faults or judged >= set(SEEDS) else None


@cache
def students() -> Mapping[int, Record]:
    """By seed, what ferplus10 found of the student that learns from labeled and mined faces."""
    _, found = markdown.current(ferplus10.BENCH)
    return {record["seed"]: record for record in found.values() if record["method"] == "both"}


def over_seeds(
    records: Mapping[str, Any], method: str, ipc: int, model: str, source: str = "mined"
) -> list[float]:
    """Accuracy of the seeds that are there."""
    names = [f"{source}-{method}-ipc{ipc}-s{seed}" for seed in SEEDS]
    return [
        records[name]["metrics"]["models"][model]["accuracy"] for name in names if name in records
    ]


def speed(threads: int) -> float:
    """img/s of the evaluation's training on invented faces."""
    prepare_cpu(threads)
    from pipeline.training.faces import ArrayFaces

    rng = np.random.default_rng(0)
    faces = ArrayFaces(rng.integers(0, 256, (256, 1, 48, 48), np.uint8))
    net = ModelConfig(name="convnet", args={"width": CPU["width"]}, dropout=0)
    data, names = LabeledFaces(faces, np.arange(256) % 8), [f"c{i}" for i in range(8)]
    worker = local("cpu", precision(None, "cpu"))
    seconds = 0.0
    for steps in (2, 20):
        start = time.perf_counter()
        config = SupervisedConfig(model=net, steps=steps, batch=64, ema=None)
        train_supervised(config, data, names, worker, seed=0)
        seconds = time.perf_counter() - start
    return 20 * 64 / seconds


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures", "always", judge_finite),
        Gate("the best learned set beats random faces with hard labels", "full", judge_best),
        Gate("tuning takes under 5 % of the student's compute", "full", judge_cheap),
        Gate("tuning takes under 5 % of the seconds of labeled + mined", "full", judge_quick),
    ),
    folder=folder,
    arguments=arguments,
    speed=speed,
)

if __name__ == "__main__":
    sys.exit(main(BENCH))
