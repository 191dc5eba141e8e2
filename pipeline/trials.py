"""One trial of active learning in a run, and many of them side by side on Ray Tune.

    rounds/g001-xxxx/<strategy>-<start>-s<seed>/round-00.json   one file per finished round
    rounds/g001-xxxx/first-<start>-s<seed>/                     the first round's model, shared

A finished round is a file that one attempt has created; whoever comes later, after kill -9 too,
reads it and goes on. The first round of a seed and start is trained once, before the trials.

Cost: seconds for Tune to start, and a process per trial that runs; the trainings are all else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import flow
from pipeline.active import (
    ActiveConfig,
    Oracle,
    Round,
    Start,
    first_rows,
    rounds,
)
from pipeline.artifacts import is_complete
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.job import Job
from pipeline.models import PRETRAINED
from pipeline.recipe import Recipe
from pipeline.schema import label_codes, label_names_of
from pipeline.sources.removals import Removals
from pipeline.storage import Location, location, to_json
from pipeline.streaming import room, start_ray
from pipeline.tables import read_table
from pipeline.training.exam import faces_of
from pipeline.training.handed import FACES_FILE, LABELED_FILE, Handed, open_labeled, usable
from pipeline.training.learner import Networks
from pipeline.training.loop import Worker, local, precision, prepare_cpu
from pipeline.training.runs import TrainConfig
from pipeline.training.supervised import SupervisedConfig
from pipeline.tuning import grid

FIRST = "first"
"""Stands for the strategy where the first round's model is kept."""


class TrialJob(Config):
    """Settings of one trial; travels as JSON."""

    handed: Handed
    test: str  # folder of the test faces
    active: ActiveConfig
    train: SupervisedConfig  # that of `active`, with the weights that `start` names
    strategy: str | None  # None: only trains the first round's model
    seed: int
    start: Start
    out: str  # folder of all rounds

    @property
    def name(self) -> str:
        """Of the trial and of its folder."""
        return trial_name(self.strategy or FIRST, self.start, self.seed)


def trial_name(strategy: str, start: str, seed: int) -> str:
    """Name of a trial and of its folder."""
    return f"{strategy}-{start}-s{seed}"


@dataclass(frozen=True)
class Opened:
    """The faces of a trial, and what trains on them."""

    oracle: Oracle
    learner: Networks


def required(recipe: Recipe) -> ActiveConfig:
    """The recipe's `active`, or ConfigError."""
    if recipe.active is None:
        raise ConfigError(f"recipe {recipe.name} has no `active`: there is nothing to compare")
    return recipe.active


def trials_of(job: Job, out: Location) -> list[TrialJob]:
    """All trials of a recipe."""
    config = required(job.recipe)
    found = []
    for start, seed, strategy in itertools.product(config.starts, config.seeds, config.strategies):
        train = config.train
        if start == "pretrained":
            net = train.model.model_copy(update={"weights": PRETRAINED})
            train = flow.started(job, train.model_copy(update={"model": net}))
        found.append(
            TrialJob(
                handed=flow.handed(job),
                test=job.run.artifact("test").dir.uri,
                active=config,
                train=train,
                strategy=strategy,
                seed=seed,
                start=start,
                out=out.uri,
            )
        )
    return found


# -- one trial ------------------------------------------------------------------------------------


def trial(
    settings: Mapping[str, Any], worker: Worker, told: Callable[[Round], None] = lambda _: None
) -> None:
    """Train the rounds of a trial that are not there yet.

    Args:
        settings: a TrialJob as JSON.
        worker: where.
        told: called with every round once it is stored.
    """
    job = TrialJob.model_validate(settings)
    opened = open_trial(job, worker)
    if job.strategy is None:
        opened.learner.train(first_rows(opened.oracle.labels, job.active, job.seed), 0)
        return
    folder = location(job.out) / job.name

    def keep(made: Round) -> Round:
        at = folder / _round_file(made.number)
        counts = made
        if not at.create(to_json(made.model_dump(mode="json"))):
            counts = Round.model_validate(at.read_json())
        told(counts)
        return counts

    rounds(
        opened.oracle,
        opened.learner,
        job.active,
        job.strategy,
        job.seed,
        done=kept(job),
        keep=keep,
    )


def open_trial(job: TrialJob, worker: Worker) -> Opened:
    """Faces packed on this node, labels, and the networks of a trial."""
    model, active = job.train.model, job.active
    data, rows = open_labeled(job.handed, model, boxes=job.train.mix == "facemix")
    names = label_names_of(rows.schema)
    test = test_rows(job.handed, location(job.test))
    oracle = Oracle(
        ids=rows["id"].to_pylist(),
        labels=data.labels,
        test=label_codes(test["label"].to_pylist(), names),
        label_names=names,
    )
    learner = Networks(
        job.train,
        data,
        faces_of(test, job.handed, model),
        names,
        worker,
        seed=job.seed,
        epochs=active.epochs,
        look=active.look,
        first=location(job.out) / trial_name(FIRST, job.start, job.seed),
    )
    return Opened(oracle, learner)


def test_rows(handed: Handed, at: Location) -> pa.Table:
    """LABELED rows of the test faces that decode and may be read."""
    removals = Removals.load(None if handed.removals is None else location(handed.removals))
    return usable(read_table(at / LABELED_FILE), read_table(at / FACES_FILE), removals)


def kept(job: TrialJob) -> list[Round]:
    """The finished rounds of a trial, from the first on."""
    folder = location(job.out) / job.name
    found: list[Round] = []
    while (data := (folder / _round_file(len(found))).find_bytes()) is not None:
        found.append(Round.model_validate_json(data))
    return found[: job.active.rounds]


def _round_file(number: int) -> str:
    return f"round-{number:02d}.json"


def finished(job: TrialJob) -> bool:
    """Whether nothing of a trial is left to train."""
    if job.strategy is None:
        return is_complete(location(job.out) / job.name)
    return len(kept(job)) == job.active.rounds


# -- many trials ----------------------------------------------------------------------------------


def tuned(trials: Sequence[TrialJob], job: Job) -> None:
    """Run trials side by side on Ray Tune, as many at a time as there is room for.

    Raises:
        ResourceError: not even one fits.
        RunError: a trial failed, again after every restart; with the first one's error.
    """
    if not trials:
        return
    start_ray(job.recipe.stream)
    place = job.recipe.train
    grid(
        _tune_trial,
        [one.model_dump(mode="json") for one in trials],
        {"place": place.model_dump(mode="json")},
        name="active",
        trainings=sum(1 if t.strategy is None else t.active.rounds - len(kept(t)) for t in trials),
        each=asked_by(place),
        there=room(job.recipe.stream),
        work=job.run.scratch / "tune",
    )


def _tune_trial(config: dict[str, Any], place: Mapping[str, Any]) -> None:
    """One Tune trial; runs in a worker."""
    from ray import tune

    def told(made: Round) -> None:
        tune.report({"labels": made.labels, "accuracy": made.accuracy, "trainings": 1})

    trial(config["item"], worker_of(TrainConfig.model_validate(place)), told)
    if config["item"]["strategy"] is None:
        tune.report({"trainings": 1})


def worker_of(place: TrainConfig) -> Worker:
    """The one worker of a trial, in this process."""
    prepare_cpu(place.threads or 1)
    device = "cuda" if place.use_gpu else "cpu"
    return local(device, precision(place.bf16, device))


def asked_by(place: TrainConfig) -> dict[str, float]:
    """CPU and GPU of a trial."""
    return {"CPU": place.threads or 1, "GPU": int(place.use_gpu)}
