"""Active learning in a run: which strategies are compared, and what their trials came to.

    active/g001-yyyy/curve.json, curves.svg   points per start and strategy, rounds per trial

Lists of strategies, seeds and starts may grow without --fresh: trials that are trained already are
found again. Cost: the trials', see trials.py; a second per thousand test faces and trial for the
intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from pipeline import flow
from pipeline.active import BASELINE, ActiveConfig, Round, check_sample, points
from pipeline.config import digest
from pipeline.job import Job
from pipeline.metrics import class_counts
from pipeline.pool import done
from pipeline.progress import console
from pipeline.report.figures import Curve, learning_curves, standalone
from pipeline.run import Artifact
from pipeline.schema import label_codes
from pipeline.storage import Location
from pipeline.training.handed import labeled_rows
from pipeline.trials import (
    TrialJob,
    finished,
    kept,
    required,
    test_rows,
    trial_name,
    trials_of,
    tuned,
)

CURVE_FILE = "curve.json"
PICTURE = "curves.svg"
LISTS = ("active.strategies", "active.seeds", "active.starts")
"""Settings that no single trial depends on."""

Runner = Callable[[Sequence[TrialJob], Job], None]
"""Runs trials to their ends, in any order."""


def active(job: Job, run: Runner | None = None) -> Artifact:
    """Compare acquisition functions on the labeled set, judged on the test set in every round.

    Args:
        job: with `active` in its recipe; its stages up to guard, and pretrain where a start is
            pre-trained, are finished.
        run: runs the trials; None: :func:`tuned`.

    Raises:
        ConfigError: the recipe has no `active`, or a strategy's sample is smaller than a step.
        RunError: a trial failed.
    """
    config = required(job.recipe)
    inputs: dict[str, Any] = {
        "labeled": flow.training_digest(job),
        "test": job.run.artifact("test").digest,
    }
    if "pretrained" in config.starts:
        inputs["pretrain"] = job.run.artifact("pretrain").digest
    faces = len(labeled_rows(flow.handed(job), ("train",)))
    for strategy in config.strategies:
        check_sample(config, strategy, faces)
    stage = job.open("active", inputs, retarget=LISTS)
    if stage.done is None:
        made = job.open("rounds", inputs, hide=LISTS)
        trials = trials_of(job, made.dir)
        first = {(t.start, t.seed): t.model_copy(update={"strategy": None}) for t in trials}
        run = run or tuned
        run([trial for trial in first.values() if not finished(trial)], job)
        run([trial for trial in trials if not finished(trial)], job)
        curves = {trial.name: kept(trial) for trial in trials}
        told = told_of(job, config, curves)
        (stage.dir / CURVE_FILE).write_json(told)
        (stage.dir / PICTURE).write_bytes(picture(told).encode())
        _track(job, trials, curves)
        passes = sum(one.passes for curve in curves.values() for one in curve)
        chosen = [[one.chosen for one in curve] for curve in curves.values()]
        stage.finish(digest(chosen), trials=len(trials), passes=passes)
    made_of = done(stage)
    show((made_of.dir / CURVE_FILE).read_json(), made_of.dir)
    return made_of


def told_of(
    job: Job, config: ActiveConfig, curves: Mapping[str, Sequence[Round]]
) -> dict[str, Any]:
    """Everything of the comparison, JSON-able: protocol, points per start, rounds per trial.

    Args:
        job: whose test faces were judged.
        config: lists of strategies, seeds and starts.
        curves: finished rounds by name of the trial.
    """
    rows = test_rows(flow.handed(job), job.run.artifact("test").dir)
    names = flow.label_names(job)
    test = label_codes(rows["label"].to_pylist(), names)
    each: dict[str, Any] = {}
    for start in config.starts:
        own = {
            strategy: {seed: curves[trial_name(strategy, start, seed)] for seed in config.seeds}
            for strategy in config.strategies
        }
        each[start] = {
            strategy: [asdict(point) for point in found]
            for strategy, found in points(own, test, names).items()
        }
    return {
        "protocol": {
            "mode": "research: all labels are known, the test faces are judged in every round and "
            "nothing is chosen on them",
            "n": len(test),
            "classes": class_counts(test, names),
            "seeds": list(config.seeds),
            "metric": "accuracy, last weights; difference to random: paired percentile bootstrap "
            "over test faces of the seed-averaged correctness, 95 %",
            "settings": config.model_dump(mode="json"),
        },
        "label_names": list(names),
        "points": each,
        "trials": {
            name: [one.model_dump(mode="json", exclude={"chosen"}) for one in curve]
            for name, curve in curves.items()
        },
    }


def picture(told: Mapping[str, Any]) -> str:
    """Learning curves, one line per strategy and start, as an SVG file."""
    lines = [
        Curve(
            name=strategy if len(told["points"]) == 1 else f"{strategy}, {start}",
            points=tuple((p["labels"], float(np.mean(p["accuracy"]))) for p in found),
        )
        for start, strategies in told["points"].items()
        for strategy, found in strategies.items()
    ]
    return standalone(learning_curves(lines))


def show(told: Mapping[str, Any], at: Location) -> None:
    """Print strategy x rounds, mean and spread over seeds; then the last round, also by class."""
    counts = {name: n for name, n in told["protocol"]["classes"].items() if n}
    rarest = min(told["label_names"], key=lambda name: counts.get(name, float("inf")))
    for start, strategies in told["points"].items():
        table = Table(title=f"accuracy on the test faces, {start}", title_justify="left")
        table.add_column("strategy", no_wrap=True)
        for point in next(iter(strategies.values())):
            table.add_column(f"{point['labels']:,}", justify="right", no_wrap=True)
        for name in (f"last minus {BASELINE}", "macro-F1", f"recall {rarest}"):
            table.add_column(name, justify="right", no_wrap=True)
        for strategy in told["protocol"]["settings"]["strategies"]:  # JSON has them by the alphabet
            found = strategies[strategy]
            last = found[-1] if found else {"macro_f1": None, "rarest": None}
            shares = [_share(last[key]) for key in ("macro_f1", "rarest")]
            means = [_spread(point["accuracy"]) for point in found]
            table.add_row(strategy, *means, _gap(found), *shares)
        console.print(table)
    for name in (CURVE_FILE, PICTURE):
        console.print(f"{name}: {at / name}", markup=False, soft_wrap=True)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ±{100 * np.std(values, ddof=1):.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _gap(found: Sequence[Mapping[str, Any]]) -> str:
    gap = found[-1]["gap"] if found else None
    if gap is None:
        return "-"
    value, low, high = (100 * gap[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _track(job: Job, trials: Sequence[TrialJob], curves: Mapping[str, Sequence[Round]]) -> None:
    """A child run per trial; the step of a metric is the number of labels."""
    for one in trials:
        chosen = {"strategy": one.strategy, "start": one.start, "seed": one.seed}
        with job.tracker.stage(one.name, chosen) as child:
            for made in curves[one.name]:
                recalls = {f"recall_{k}": v for k, v in made.recall.items() if v is not None}
                numbers = {"accuracy": made.accuracy, "macro_f1": made.macro_f1, **recalls}
                numbers |= {"passes": made.passes, "seconds": made.seconds}
                child.metrics(numbers, step=made.labels)
