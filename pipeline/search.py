"""Find the operating point: Ray Tune and Optuna over cached scores, no image and no model.

A trial proposes the rules (floor of the confidence, prototype agreement, share of the neighbors'
vote) and scans 20 target precisions for the per-class cuts. What it is worth is the utilization of
the pool, and how evenly over the classes, at an estimated purity. The pool enters as exact counts
on a grid (class x prototype x vote x confidence, 4.5 MB whatever its size), put once into the
object store; thresholds are multiples of the grid, so a predicted utilization is what select will
keep before guard, duplicates and caps. Cost: milliseconds per trial, seconds for Tune to start.

The winner is estimated again on the half of the labeled faces that no trial saw; the difference is
the winner's curse and is reported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from pipeline import thresholds
from pipeline.config import Config
from pipeline.cuts import AdaptiveConfig, Seen, adaptive_cuts
from pipeline.errors import RunError
from pipeline.metrics import effective_classes
from pipeline.policy import (
    OperatingPoint,
    Rows,
    class_curves,
    labeled_rows,
    passes,
    rows_of,
    with_cuts,
)
from pipeline.schema import OK, label_names_of

GRID = 1024  # steps of the confidence
SHARES = 32  # steps of the neighbors' share
PRECISIONS = tuple(float(p) for p in np.linspace(0.50, 0.975, 20))
VOTES = (None, 0.25, 0.5, 0.625, 0.75)
BALANCE = 0.25  # weight of the classes' evenness beside the utilization
PENALTY = 10.0  # per unit of purity or utilization that is missing


class SearchConfig(Config):
    """How an operating point is searched."""

    trials: int = Field(default=16, ge=1)  # each scans 20 target precisions
    target_purity: float = Field(default=0.85, gt=0, le=1)
    min_utilization: float = Field(default=0.05, ge=0, le=1)
    objective: Literal["balanced", "utilization"] = "balanced"  # balanced: classes evenly, too
    adaptive: tuple[AdaptiveConfig, ...] = ()  # rules whose cuts every trial looks at as well
    concurrency: int = Field(default=1, ge=1)  # trials at once, 1 CPU each; asked in fixed batches
    seed: int = 0


@dataclass(frozen=True)
class Evidence:
    """What a trial is judged on."""

    rows: Rows
    labels: NDArray[np.int64]  # (N,) true codes of the labeled rows
    pool: NDArray[np.int64]  # (K, 2, SHARES + 2, GRID + 1) faces
    start: OperatingPoint  # names and labeled counts, no thresholds
    adaptive: Mapping[str, dict[str, float]] = field(default_factory=dict)  # cuts by rule


def search(
    points: pa.Table,
    pool: Iterable[pa.Table],
    config: SearchConfig,
    work: Path,
    seen_pool: Sequence[Seen] = (),
) -> OperatingPoint:
    """Search the policy on the run's own labeled faces and the pool's scores.

    Args:
        points: out-of-fold rows of labeled faces: score columns plus `label`; `label_names` in the
            schema metadata.
        pool: chunks of score columns; rows whose status is not ok are left out.
        config: trials, targets, seed.
        work: local folder for Tune's own files.
        seen_pool: the pool as each of `config.adaptive` sees it.

    Returns:
        The best point, its estimates and all trials. The same seed, concurrency and data give the
        same trials.

    Raises:
        RunError: Ray is not started, a trial failed, or nothing can be searched.
    """
    names = label_names_of(points.schema)
    rows, labels = labeled_rows(points, names)
    seen = halves(labels, config.seed)
    counts = np.bincount(labels, minlength=len(names))
    labeled = {name: int(n) for name, n in zip(names, counts, strict=True)}
    start = OperatingPoint(label_names=names, labeled=labeled)
    grid = pool_counts(pool, names)
    if not grid.sum() or not len(labels):
        raise RunError(
            f"search: {len(labels)} labeled rows and {int(grid.sum())} scored pool faces; "
            "expected at least one of each"
        )
    adaptive: dict[str, dict[str, float]] = {
        each.rule: _on_grid(adaptive_cuts(each, pool_seen, points.filter(pa.array(seen)), names))
        for each, pool_seen in zip(config.adaptive, seen_pool, strict=True)
    }
    evidence = Evidence(_take(rows, seen), labels[seen], grid, start, adaptive)
    trials = _tune(evidence, config, work)
    best = max(trials, key=lambda trial: trial["objective"])
    (point,) = _points(best, [best], evidence)

    held = Evidence(_take(rows, ~seen), labels[~seen], grid, start)
    again = appraise(point, held, config)
    estimates = {
        "purity": again["purity"],
        "utilization": again["utilization"],
        "effective_classes": again["effective_classes"],
        "objective": again["objective"],
        "purity_in_search": best["purity"],
        "objective_in_search": best["objective"],
        "winners_curse": best["objective"] - again["objective"],
        "winners_curse_purity": best["purity"] - again["purity"],
        "labeled_searched": float(seen.sum()),
        "labeled_held_out": float((~seen).sum()),
    }
    return point.model_copy(update={"estimates": estimates, "trials": tuple(trials)})


def halves(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which rows (N,) the search may see: half of every class, the odd one included."""
    rng = np.random.default_rng(seed)
    seen = np.zeros(len(labels), dtype=bool)
    for code in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == code))
        seen[own[: (len(own) + 1) // 2]] = True
    return seen


def pool_counts(pool: Iterable[pa.Table], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Pool faces (K, 2, SHARES + 2, GRID + 1): class, prototype agrees, vote bin, confidence bin.

    Vote bin 0 is "neighbors name another class", bin 1 + s a share of at least s / SHARES.
    """
    shape = (len(names), 2, SHARES + 2, GRID + 1)
    counts = np.zeros(shape, dtype=np.int64)
    for table in pool:
        good = table.filter(pc.equal(table["status"], OK))
        rows = rows_of(good.filter(pc.is_valid(good["pseudo_label"])), names)
        vote = np.floor(np.clip(rows.agreement, 0, 1) * np.float32(SHARES)).astype(np.int64) + 1
        cell = (
            rows.predicted,
            (rows.prototype == rows.predicted).astype(np.int64),
            np.where(rows.neighbor == rows.predicted, vote, 0),
            np.floor(np.clip(rows.confidence, 0, 1) * np.float32(GRID)).astype(np.int64),
        )
        flat = np.ravel_multi_index(cell, shape)
        counts += np.bincount(flat, minlength=counts.size).reshape(shape)
    return counts


def pool_kept(point: OperatingPoint, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pool faces (K,) that a point with thresholds on the grid keeps, per class."""
    vote = 0 if point.neighbors is None else 1 + round(point.neighbors * SHARES)
    by_confidence = counts[:, int(point.prototype) :, vote:].sum((1, 2))
    floor = point.confidence if isinstance(point.confidence, float) else 0.0
    kept = np.zeros(len(counts), dtype=np.int64)
    for code, name in enumerate(point.label_names):
        cut = max(floor, (point.cuts or {}).get(name, 0.0))
        kept[code] = by_confidence[code, round(cut * GRID) :].sum()
    return kept


def appraise(point: OperatingPoint, evidence: Evidence, config: SearchConfig) -> dict[str, float]:
    """Purity, utilization, evenness and objective of a point.

    Purity is estimated on labeled out-of-fold faces per predicted class and weighted as the pool's
    kept faces are; it assumes that a class is as pure in the pool as among the labeled.
    """
    classes = len(point.label_names)
    kept = pool_kept(point, evidence.pool)
    keep = passes(evidence.rows, point)
    worth = thresholds.estimate(keep, evidence.rows.predicted, evidence.labels, classes, mix=kept)
    utilization = float(kept.sum() / evidence.pool.sum())
    even = effective_classes(kept)
    value = utilization
    if config.objective == "balanced":
        value += BALANCE * even / classes
    value -= PENALTY * max(0.0, config.target_purity - worth.purity)
    value -= PENALTY * max(0.0, config.min_utilization - utilization)
    return {
        "purity": worth.purity,
        "utilization": utilization,
        "effective_classes": even,
        "objective": value,
    }


def best_precision(
    rules: dict[str, Any], evidence: Evidence, config: SearchConfig
) -> dict[str, Any]:
    """The rules of one trial with the best way to cut classes, and what that is worth."""
    ways: list[dict[str, Any]] = [{"target_precision": precision} for precision in PRECISIONS]
    if evidence.adaptive:
        ways = [{**way, "adaptive": None} for way in ways]
        ways += [{"target_precision": None, "adaptive": name} for name in evidence.adaptive]
    found: dict[str, Any] = {}
    for way, point in zip(ways, _points(rules, ways, evidence), strict=True):
        worth = appraise(point, evidence, config)
        if not found or worth["objective"] > found["objective"]:
            found = {**rules, **way, **worth}
    return found


def _thresholds(rules: dict[str, Any]) -> dict[str, Any]:
    return {
        "confidence": float(rules["confidence"]),
        "prototype": bool(rules["prototype"]),
        "neighbors": rules["neighbors"],
    }


def _points(
    rules: dict[str, Any], ways: Sequence[Mapping[str, Any]], evidence: Evidence
) -> Iterator[OperatingPoint]:
    """The point of a trial's rules with each of several ways to cut its classes."""
    point = evidence.start.model_copy(update=_thresholds(rules))
    curves = class_curves(evidence.rows, evidence.labels, point)
    for way in ways:
        if (name := way.get("adaptive")) is not None:
            yield point.model_copy(update={"cuts": evidence.adaptive[name]})
        else:
            yield with_cuts(point, curves, way["target_precision"], GRID)


def _on_grid(cuts: Mapping[str, float]) -> dict[str, float]:
    return {name: float(np.ceil(cut * GRID) / GRID) for name, cut in cuts.items()}


def _take(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    predicted, prototype, neighbor = rows.predicted, rows.prototype, rows.neighbor
    return Rows(
        predicted[which],
        rows.confidence[which],
        prototype[which],
        neighbor[which],
        rows.agreement[which],
    )


def _trial(rules: dict[str, Any], evidence: Evidence, config: SearchConfig) -> None:
    """One Tune trial; runs in a worker."""
    from ray import tune

    tune.report(best_precision(rules, evidence, config))


def _tune(evidence: Evidence, config: SearchConfig, work: Path) -> list[dict[str, Any]]:
    """All trials in the order they were asked."""
    import ray
    from ray import tune

    if not ray.is_initialized():
        raise RunError("search: Ray is not started; expected pipeline.streaming.start_ray first")
    space = {
        "confidence": tune.quniform(0.0, 0.875, 1 / 64),
        "prototype": tune.choice([False, True]),
        "neighbors": tune.choice(list(VOTES)),
    }
    with quiet_tune():
        trainable = tune.with_parameters(_trial, evidence=evidence, config=config)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="max",
                num_samples=config.trials,
                search_alg=_in_batches(config),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="search", storage_path=str(work.resolve()), verbose=0),
        )
        results = tuner.fit()
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise RunError(
            f"search: {len(failed)} of {config.trials} trials failed; first: {failed[0]}"
        )
    way = ("target_precision", *(("adaptive",) if evidence.adaptive else ()))
    columns = (*space, *way, "purity", "utilization", "effective_classes", "objective")
    return [
        {"trial": number, **{name: _plain(result.metrics[name]) for name in columns}}
        for number, result in enumerate(results)
    ]


def _in_batches(config: SearchConfig) -> Any:
    """Optuna, asked and told in fixed batches: suggestions depend on no trial's speed.

    Ray's ConcurrencyLimiter(batch=True) closes a batch early when a trial ends before the next is
    asked, which trials of milliseconds do.
    """
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    class Batches(Searcher):
        def __init__(self, inner: Any, size: int, total: int) -> None:
            super().__init__(metric="objective", mode="max")
            self.inner, self.size, self.total = inner, size, total
            self.asked = 0
            self.ready: list[tuple[str, dict[str, Any]]] = []
            self.open: dict[str, str] = {}
            self.done: dict[str, tuple[Any, bool]] = {}

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return bool(self.inner.set_search_properties(metric, mode, config, **spec))

        def suggest(self, trial_id: str) -> Any:
            if not self.ready:
                if self.open:
                    return None
                first, last = self.asked, min(self.asked + self.size, self.total)
                self.ready = [
                    (f"{n:06d}", self.inner.suggest(f"{n:06d}")) for n in range(first, last)
                ]
                self.asked = last
                if not self.ready:
                    return Searcher.FINISHED
            number, suggestion = self.ready.pop(0)
            self.open[trial_id] = number
            return suggestion

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            self.done[self.open.pop(trial_id)] = (result, error)
            if not self.open and not self.ready:
                for number, (value, bad) in sorted(self.done.items()):
                    self.inner.on_trial_complete(number, result=value, error=bad)
                self.done = {}

        def save(self, checkpoint_path: str) -> None:
            self.inner.save(checkpoint_path)

        def restore(self, checkpoint_path: str) -> None:
            self.inner.restore(checkpoint_path)

    return Batches(OptunaSearch(seed=config.seed), config.concurrency, config.trials)


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Without Tune's own loggers and experiment snapshots: the trials are ours to keep.

    And without the credentials that Tune copies into the environment of every trial: Ray writes
    that environment into its logs, and no trial needs them.
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


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
