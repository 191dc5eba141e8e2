"""Optuna on Ray Tune, in fixed rounds: the same seed gives the same points, also after a kill.

A trial evaluates a batch of points in a reused actor. Optuna is asked for a whole round of trials
and told when all of it is back, in the order asked, so that no trial's speed decides what is asked
next. What a trial found is kept as a file; a search that starts again asks Optuna the same, answers
from the files what they hold, and evaluates the rest.

Cost: seconds for Tune to start and about 50 ms per trial beside its work.
Departs from Ray's OptunaSearch and ConcurrencyLimiter(batch=True): that closes a batch early when a
trial ends before the next one is asked, which trials of milliseconds do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import ResourceError, RunError
from pipeline.progress import meter
from pipeline.storage import Location

RESTARTS = 2
"""Times that a trial is tried again, be it that it failed or that its process died."""

OTHER_STREAM = 1_000_003

Point = dict[str, Any]
Trial = list[Point]


@dataclass(frozen=True)
class Plan:
    """What is asked, and in which rounds."""

    trials: int
    batch: int  # points of a trial
    concurrency: int  # trials of a round, 1 CPU each
    seed: int
    sampler: Literal["tpe", "random"] = "tpe"


def tuned(
    evaluate: Callable[[Point, Any], Point],
    shared: Any,
    space: Mapping[str, Any],
    plan: Plan,
    work: Path,
    kept: Location | None = None,
    told: Callable[[int, Trial], None] = lambda number, points: None,
) -> Trial:
    """Evaluate points and return what was found of each, in the order they were asked.

    Args:
        evaluate: what a point is worth, as a dict with `objective`, which is maximized; JSON-able;
            a function that workers can import.
        shared: second argument of `evaluate`; put into the object store once.
        space: Optuna distributions by name.
        plan: how many, how and in which rounds.
        work: local folder for Tune's own files.
        kept: folder of finished trials; None keeps none.
        told: called here with the number and points of every trial that was not kept before.

    Raises:
        RunError: Ray is not started, or a trial failed; the finished ones are kept.
    """
    import ray
    from ray import tune

    if not ray.is_initialized():
        raise RunError("search: Ray is not started; expected pipeline.streaming.start_ray first")
    with quiet_tune(), meter("search", plan.trials * plan.batch, "points") as shown:
        rounds = _rounds(space, plan, kept, told, shown.advance)
        if rounds.open():
            trainable = tune.with_parameters(_trial, evaluate=evaluate, shared=shared)
            tuner = tune.Tuner(
                tune.with_resources(trainable, {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="max",
                    num_samples=plan.trials,
                    search_alg=rounds,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(work.resolve()),
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),
                    verbose=0,
                ),
            )
            failed = [result.error for result in tuner.fit() if result.error is not None]
            if failed:
                line = str(failed[0]).strip().splitlines()[-1]
                raise RunError(
                    f"search: {len(failed)} of {plan.trials} trials failed; first: {line}; "
                    "those that are finished are kept"
                )
    return [point for number in range(plan.trials) for point in rounds.found[number]]


def grid(
    trainable: Callable[..., None],
    items: Sequence[Any],
    shared: Mapping[str, Any],
    *,
    name: str,
    trainings: int,
    each: Mapping[str, float],
    there: Mapping[str, float],
    work: Path,
) -> None:
    """Run one Tune trial per item, as many at a time as there is room for.

    Args:
        trainable: called in a worker with `{"item": item}` and `shared`; reports `trainings`, how
            many it has finished since the report before.
        items: JSON-able.
        shared: further arguments; put into the object store once.
        name: for the meter and for messages.
        trainings: of all trials, for the meter.
        each: CPU and GPU of a trial.
        there: CPU and GPU that there are, see :func:`pipeline.streaming.room`.
        work: local folder for Tune's own files.

    Raises:
        ResourceError: not even one fits.
        RunError: a trial failed, again after every restart; with the first one's error.
    """
    if not items:
        return
    from ray import tune

    if any(each[what] > there[what] for what in each):
        raise ResourceError(
            f"{name}: a trial takes {each['CPU']:g} CPUs and {each['GPU']:g} GPUs; there are "
            f"{there['CPU']:g} and {there['GPU']:g}"
        )
    with quiet_tune(), meter(name, trainings, "trainings") as shown:

        class Counting(tune.Callback):
            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
            ) -> None:
                shown.advance(int(result.get("trainings", 0)))

        asked = {what.lower(): count for what, count in each.items()}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, **shared), asked),
            param_space={"item": tune.grid_search(list(items))},
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(work.resolve()),
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[Counting()],
                verbose=0,
            ),
        )
        failed = [result.error for result in tuner.fit() if result.error is not None]
    if failed:
        line = str(failed[0]).strip().splitlines()[-1]
        raise RunError(f"{name}: {len(failed)} of {len(items)} trials failed; first: {line}")


def _trial(config: dict[str, Any], evaluate: Callable[[Point, Any], Point], shared: Any) -> None:
    """One Tune trial; runs in a worker."""
    from ray import tune

    found = [evaluate(point, shared) for point in config["points"]]
    best = max(one["objective"] for one in found)
    tune.report({"found": [_plain(one) for one in found], "objective": best})


def _rounds(
    space: Mapping[str, Any],
    plan: Plan,
    kept: Location | None,
    told: Callable[[int, Trial], None],
    advance: Callable[[int], None],
) -> Any:
    """Tune's searcher; Tune is imported late, so the class is made here."""
    import optuna
    from ray.tune.search import Searcher

    chosen: Any = optuna.samplers.TPESampler(seed=plan.seed)
    if plan.sampler == "random":  # of a stream of its own: the first points of tpe are random, too
        chosen = optuna.samplers.RandomSampler(seed=plan.seed + OTHER_STREAM)

    class Rounds(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="objective", mode="max")
            self.study = optuna.create_study(direction="maximize", sampler=chosen)
            self.found: dict[int, Trial] = {}
            self.asked: dict[int, list[Any]] = {}  # of this round: Optuna's trials by number
            self.ready: list[int] = []  # of this round: not begun
            self.running: dict[str, int] = {}
            self.failed = False

        def open(self) -> bool:
            """Ask for rounds until one has a trial that is not kept; False where none is left."""
            while not self.ready and not self.running and not self.failed:
                first = len(self.found)
                if first == plan.trials:
                    return False
                for number in range(first, min(first + plan.concurrency, plan.trials)):
                    self.asked[number] = [self.study.ask(dict(space)) for _ in range(plan.batch)]
                for number in self.asked:
                    if (old := self._stored(number)) is not None:
                        self.found[number] = old
                        advance(plan.batch)
                    else:
                        self.ready.append(number)
                self._tell()
            return not self.failed

        def suggest(self, trial_id: str) -> Any:
            if not self.open():
                return Searcher.FINISHED
            if not self.ready:
                return None
            number = self.running[trial_id] = self.ready.pop(0)
            return {"points": self._points(number)}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            number = self.running.pop(trial_id)
            if error or result is None or "found" not in result:
                self.failed = True
                return
            found = [dict(one) for one in result["found"]]
            self.found[number] = found
            if kept is not None:
                _file(kept, number).write_json({"points": self._points(number), "found": found})
            told(number, found)
            advance(plan.batch)
            self._tell()

        def _tell(self) -> None:
            if any(number not in self.found for number in self.asked):
                return
            for number, trials in sorted(self.asked.items()):
                for trial, one in zip(trials, self.found[number], strict=True):
                    self.study.tell(trial, one["objective"])
            self.asked = {}

        def _points(self, number: int) -> list[Point]:
            return [dict(trial.params) for trial in self.asked[number]]

        def _stored(self, number: int) -> Trial | None:
            """What a trial found before; None where it was asked something else then."""
            if kept is None or not (at := _file(kept, number)).exists():
                return None
            old = at.read_json()
            return old["found"] if old["points"] == self._points(number) else None

        def save(self, checkpoint_path: str) -> None:
            """Nothing that Tune keeps is read: the files of the trials hold all that is known."""
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to read; see :meth:`save`."""

    return Rounds()


def _file(kept: Location, number: int) -> Location:
    return kept / f"{number:06d}.json"


def _plain(values: Mapping[str, Any]) -> Point:
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Without Tune's own loggers and experiment snapshots: the trials are ours to keep.

    Without the credentials that Tune copies into the environment of every trial: Ray writes that
    environment into its logs, and no trial needs them. And without Tune's answer to Ctrl-C, which
    is to return as if all were done: it interrupts us as it does elsewhere.
    """
    import optuna
    from ray.tune.execution import class_cache

    copied = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {n for n in copied if not n.startswith("AWS_")}

    switches = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in switches}
    tune_logger = logging.getLogger("ray.tune")
    levels = tune_logger.level, optuna.logging.get_verbosity()
    os.environ.update(switches)
    tune_logger.setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = copied
        tune_logger.setLevel(levels[0])
        optuna.logging.set_verbosity(levels[1])
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
