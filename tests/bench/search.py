"""What a search of the operating point finds: 200 points judged by heads, and its winner's curse.

    OMNIFER_DATA=... python -m tests.bench.search [--quick] [--seeds 0,1]

A cell takes ferplus10's run of its seed (built by `--until score` where it is not there), asks for
200 points through Ray Tune with the objective `head`, and as many at random. One half of the
labeled faces teaches heads and guides; the winners are judged on the other half beside the recipe's
own point, the default rules, the best single cut of the confidence, and the labels alone. No test
face and no test label is read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import conduct, drawing, flow, pool, twins
from pipeline import search as searching
from pipeline.active import pack
from pipeline.job import SCHEMA_VERSION, Job, settings
from pipeline.policy import SCORE_COLUMNS, OperatingPoint, SelectConfig, class_curves, with_cuts
from pipeline.recipe import load
from pipeline.run import CURRENT
from pipeline.search import Evidence, SearchConfig
from pipeline.spaces import HeadConfig, heads, said
from pipeline.streaming import start_ray
from tests.bench import ferplus10
from tests.bench.harness import ROOT, Bench, Cell, Context, Gate, Records, call, main, python

NAME = "search"
SEEDS = (0, 1, 2)
UNTIL_SCORE = ("labeled", "survey", "guard", "teach", "embed", "score")
MOST_SECONDS = 300.0
FOUND = "found"
COMPARED = ("labels alone", "recipe", "rules", "one cut", "random")
"""What stands beside the found point: no pool face; select as the recipe has it (all faces); the
default rules; the best of all floors of the confidence alone; as many points at random."""
FULL = SearchConfig(
    objective="head", trials=20, batch=10, concurrency=2, min_utilization=0.05, head=HeadConfig()
)
QUICK = FULL.model_copy(update={"trials": 4, "batch": 2, "head": HeadConfig(class_faces=30)})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--seeds", default=None, help="such as 0,1")


def cells(options: argparse.Namespace) -> list[Cell]:
    """One cell per seed."""
    seeds = (0,) if options.quick else SEEDS
    if options.seeds:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    return [_cell(seed, quick=options.quick) for seed in seeds]


def _cell(seed: int, *, quick: bool) -> Cell:
    sets = tuple(ferplus10.sets_of("both", seed, quick=quick))
    with ferplus10.portable():
        recipe = load(ROOT / ferplus10.RECIPE, sets)
    identity: dict[str, Any] = {name: settings(recipe, name) for name in UNTIL_SCORE}
    ferplus10.drop_later(identity)
    config = (QUICK if quick else FULL).model_copy(update={"seed": seed})
    own = config.model_dump(mode="json", exclude={"finalists"})  # came later; nobody asks for them
    identity |= {"schema": SCHEMA_VERSION, "search": own, "version": 2}
    run = ferplus10.run_of("part", seed, developing=False)
    return Cell(name=f"s{seed}", method=FOUND, seed=seed, identity=identity, run=run, sets=sets)


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Search with Optuna and at random, then judge all points on the other half."""
    import ray

    config = SearchConfig.model_validate(cell.identity["search"])
    job = opened(cell, context)
    plan, work = pool.pool_plan(job), context.cache / cell.run / "cache" / "tune"
    twins.confirm_twins(job, plan)
    try:
        start = time.perf_counter()
        start_ray(job.recipe.stream)
        spaces, _ = drawing.spaces(job, plan, config.head)
        prepared = time.perf_counter() - start

        def searched(own: SearchConfig) -> tuple[OperatingPoint, float]:
            start = time.perf_counter()
            point = searching.search(
                flow.points(job), flow.score_columns(job, SCORE_COLUMNS), own, work, (), spaces
            )
            return point, time.perf_counter() - start

        found, took = searched(config)
        drawn, took_random = searched(config.model_copy(update={"sampler": "random"}))
    finally:
        ray.shutdown()
    columns = flow.score_columns(job, SCORE_COLUMNS)
    seen, held = searching.evidence(flow.points(job), columns, config, (), spaces)
    points = {
        FOUND: found,
        "random": drawn,
        "recipe": seen.start,
        "rules": _rules(seen),
        "one cut": _one_cut(seen, config),
    }
    judged = {name: _judged(point, seen, held, config) for name, point in points.items()}
    judged["labels alone"] = _alone(seen, held)
    front = [trial for trial in found.trials if trial["pareto"]]
    return {
        "n": len(held.labels),
        "points": len(found.trials),
        "points_random": len(drawn.trials),
        "seconds_preparing": round(prepared, 1),
        "seconds_searching": round(took, 1),
        "seconds_random": round(took_random, 1),
        "pool_faces": int(seen.pool.sum()),
        "drawn_faces": len(spaces[0].pool),
        "spread": float(np.std([trial["accuracy"] for trial in found.trials])),
        "front": len(front),
        "points_judged": judged,
        "rules_found": found.model_dump(
            mode="json", include={"confidence", "prototype", "neighbors", "cuts"}
        ),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def opened(cell: Cell, context: Context) -> Job:
    """The cell's run of ferplus10, scored; a run folder that last had another pool turns back."""
    root = context.cache / cell.run
    root.mkdir(parents=True, exist_ok=True)
    sets = [*cell.sets, "tracking.uri='off'", "stream.object_store_mb=300"]
    recipe = load(ROOT / ferplus10.RECIPE, sets)
    job = conduct.start(recipe, str(root), fresh=True, show_faces=False)
    if not scored(job):
        speed = f"train.threads={context.threads}"
        argv = [part for item in (*sets, speed) for part in ("--set", item)]
        command = ("-m", "pipeline.cli", "run", ferplus10.RECIPE, "--run", str(root), "--fresh")
        threads = {"OMP_NUM_THREADS": str(context.threads)}
        call(python(*command, "--until", "score", *argv), context, Path(f"{root}.log"), threads)
    return job


def scored(job: Job) -> bool:
    """Whether the stages in use are of the recipe's pool, and score is the last one finished."""
    survey, score = (job.run.latest(name) for name in ("survey", "score"))
    if survey is None or score is None:
        return False
    plans = [(job.run.root / name / CURRENT).read_json()["plan"] for name in ("survey", "score")]
    sources = (survey.dir / "identity.json").read_json()["pool"]
    return plans[0] == plans[1] and sources == settings(job.recipe, "survey")["pool"]


def _rules(seen: Evidence) -> OperatingPoint:
    """The default rules, cut on the half that the search sees."""
    config = SelectConfig()
    assert config.target_precision is not None
    point = seen.start.model_copy(update={"prototype": config.prototype})
    curves = class_curves(seen.rows, seen.labels, point)
    return with_cuts(point, curves, config.target_precision, searching.GRID)


def _one_cut(seen: Evidence, config: SearchConfig) -> OperatingPoint:
    """The best of all floors of the confidence that the search may ask for, and no other rule."""
    points = [seen.start.model_copy(update={"confidence": k / 64}) for k in range(57)]
    return max(points, key=lambda point: searching.appraise(point, seen, config)["objective"])


def _judged(
    point: OperatingPoint, seen: Evidence, held: Evidence, config: SearchConfig
) -> dict[str, Any]:
    before, after = (searching.appraise(point, part, config) for part in (seen, held))
    assert held.study is not None
    return {
        **after,
        "accuracy_in_search": before["accuracy"],
        "correct": _correct(said(heads(point, held.study), held.study), held),
    }


def _alone(seen: Evidence, held: Evidence) -> dict[str, Any]:
    assert held.study is not None
    starts = held.study.starts
    return {
        **searching.head_worth(starts, held),
        "accuracy_in_search": searching.head_worth(starts, seen)["accuracy"],
        "correct": _correct(said(starts, held.study), held),
    }


def _correct(named: np.ndarray, held: Evidence) -> str:
    assert held.study is not None
    return pack((named == held.study.labels)[held.judges])


# -- gates ----------------------------------------------------------------------------------------


def judge_finite(records: Records) -> list[str] | None:
    """Every figure is a number between 0 and 1, and equally many points were asked."""
    faults = [
        f"{cell}: {name} {key} is {found[key]}"
        for cell, record in records.items()
        for name, found in record["metrics"]["points_judged"].items()
        for key in ("accuracy", "macro_f1", "accuracy_in_search")
        if not 0 <= found[key] <= 1
    ]
    for cell, record in records.items():
        counts = [record["metrics"][key] for key in ("points", "points_random")]
        if counts[0] != counts[1]:
            faults.append(f"{cell}: {counts[0]} points were searched, {counts[1]} at random")
    return faults if records else None


def judge_fast(records: Records) -> list[str] | None:
    """Everything from the stored scores to the estimate of the found point."""
    if not records:
        return None
    return [
        f"{cell}: {seconds(record['metrics']):.0f} s, not under {MOST_SECONDS:.0f}"
        for cell, record in records.items()
        if seconds(record["metrics"]) >= MOST_SECONDS
    ]


def seconds(metrics: Mapping[str, Any]) -> float:
    """Of one search, from the start of Ray on."""
    return float(metrics["seconds_preparing"] + metrics["seconds_searching"])


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures, equally many points", "always", judge_finite),
        Gate(f"{FULL.trials * FULL.batch} points under {MOST_SECONDS:.0f} s", "full", judge_fast),
    ),
    folder=lambda options: NAME,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(BENCH))
