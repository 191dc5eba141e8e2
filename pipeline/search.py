"""Find the operating point: Ray Tune and Optuna over cached scores, no image and no network.

A point is the rules (floor of the confidence, prototype agreement, share of the neighbors' vote)
with per-class cuts. What it is worth is, by `objective`:

    balanced, utilization   the utilization of the pool, and how evenly over the classes, at an
                            estimated purity; a point scans 20 target precisions; milliseconds
    head                    accuracy of the logistic head that labeled and selected faces teach,
                            on labeled faces that its space has not seen (spaces.py); a second

Of a head the accuracy counts, not macro-F1: of the half of a small labeled set, a rare class has a
dozen faces, one of which moves macro-F1 by a percent, and the best of many points would be the
luckiest. Macro-F1 stands beside it.

The pool enters as exact counts on a grid (class x prototype x vote x confidence, 4.5 MB whatever
its size), put once into the object store; thresholds are multiples of the grid, so a predicted
utilization is what select will keep before guard, duplicates and caps.

One half of the labeled faces teaches and guides. The winner is estimated again on the half that no
trial saw; the difference is the winner's curse and is reported. Trials that no other one surpasses
in purity, utilization and evenness at once are marked `pareto`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline import thresholds
from pipeline.config import Config
from pipeline.cuts import AdaptiveConfig, Seen, adaptive_cuts
from pipeline.errors import RunError
from pipeline.metrics import accuracy, class_counts, confusion_matrix, effective_classes, macro_f1
from pipeline.policy import (
    Mask,
    OperatingPoint,
    Rows,
    class_curves,
    labeled_rows,
    passes,
    with_cuts,
)
from pipeline.schema import label_names_of
from pipeline.spaces import FinalistsConfig, HeadConfig, Space, Study, heads, said, study
from pipeline.storage import Location
from pipeline.tally import GRID, on_grid, pool_counts, pool_kept
from pipeline.training.teacher import stratified_folds
from pipeline.tuning import Plan, Trial, tuned

logger = logging.getLogger(__name__)

PRECISIONS = tuple(float(p) for p in np.linspace(0.50, 0.975, 20))
VOTES = (None, 0.25, 0.5, 0.625, 0.75)
BALANCE = 0.25  # weight of the classes' evenness beside the utilization
PENALTY = 10.0  # per unit of purity or utilization that is missing
FRONT = ("purity", "utilization", "effective_classes")
CURSED = ("purity", "accuracy", "macro_f1", "objective")
"""Estimates that stand beside what the search thought; of the pool, both know the same."""


class SearchConfig(Config):
    """How an operating point is searched."""

    trials: int = Field(default=16, ge=1)
    batch: int = Field(default=1, ge=1)  # points of a trial
    target_purity: float = Field(default=0.85, gt=0, le=1)  # head: purity is not asked for
    min_utilization: float = Field(default=0.05, ge=0, le=1)
    objective: Literal["balanced", "utilization", "head"] = "balanced"
    """balanced: utilization, and the classes evenly; head: accuracy of a logistic head."""
    head: HeadConfig = HeadConfig()
    finalists: FinalistsConfig | None = None  # None: the best objective is the best point
    adaptive: tuple[AdaptiveConfig, ...] = ()  # rules whose cuts are looked at as well
    sampler: Literal["tpe", "random"] = "tpe"  # random: what the search is compared with
    concurrency: int = Field(default=1, ge=1)  # trials at once, 1 CPU each; asked in fixed rounds
    seed: int = 0

    @property
    def plan(self) -> Plan:
        """What is asked, and in which rounds."""
        return Plan(self.trials, self.batch, self.concurrency, self.seed, self.sampler)

    @property
    def space(self) -> dict[str, Any]:
        """Optuna distributions of what a point is asked by."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        space: dict[str, Any] = {
            "confidence": FloatDistribution(0.0, 0.875, step=1 / 64),
            "prototype": CategoricalDistribution([False, True]),
            "neighbors": CategoricalDistribution(VOTES),
        }
        if self.objective == "head":  # its points do not scan the ways to cut
            ways = ("none", "precision", *(each.rule for each in self.adaptive))
            space["cut_by"] = CategoricalDistribution(ways)
            space["target_precision"] = FloatDistribution(0.5, 0.975, step=1 / 40)
        return space


@dataclass(frozen=True)
class Evidence:
    """What a point is judged on."""

    rows: Rows  # out of fold, of the labeled faces that judge
    labels: NDArray[np.int64]  # (n,) their true codes
    pool: NDArray[np.int64]  # (K, 2, SHARES + 2, GRID + 1) faces
    start: OperatingPoint  # names and labeled counts, no thresholds
    adaptive: Mapping[str, dict[str, float]] = field(default_factory=dict)  # cuts by rule
    study: Study | None = None  # what heads are taught with
    judges: Mask | None = None  # (N,) which of all labeled faces judge; None: all


@dataclass(frozen=True)
class Verdict:
    """What whole trainings say of finalists."""

    best: int  # place among them
    accuracy: Sequence[float]  # of each, on faces that the search may see
    estimates: Mapping[str, float]


def search(
    points: pa.Table,
    pool: Iterable[pa.Table],
    config: SearchConfig,
    work: Path,
    seen_pool: Sequence[Seen] = (),
    spaces: Sequence[Space] = (),
    kept: Location | None = None,
    told: Callable[[int, Trial], None] = lambda number, points: None,
    final: Callable[[Sequence[OperatingPoint], Mask], Verdict] | None = None,
) -> OperatingPoint:
    """Search the policy on the run's own labeled faces and the pool's scores.

    Args:
        points: out-of-fold rows of labeled faces: score columns plus `label`; `label_names` in the
            schema metadata.
        pool: chunks of score columns; rows whose status is not ok are left out.
        config: trials, targets, seed.
        work: local folder for Tune's own files.
        seen_pool: the pool as each of `config.adaptive` sees it.
        spaces: for the objective `head`, labeled faces in the order of `points`.
        kept: folder of finished trials, from which a search that was stopped continues.
        told: called with the number and points of each trial that finishes.
        final: judges `config.finalists`, best first; is told which labeled faces (N,) are seen.

    Returns:
        The best point, its estimates and all trials. The same seed, batch, concurrency and data
        give the same trials.

    Raises:
        RunError: Ray is not started, a trial failed, or nothing can be searched.
    """
    seen, held = evidence(points, pool, config, seen_pool, spaces)
    found = tuned(worth, (seen, config), config.space, config.plan, work, kept, told)
    front = pareto(found)
    trials = [
        {"trial": place // config.batch, **one, "pareto": bool(on)}
        for place, (one, on) in enumerate(zip(found, front, strict=True))
    ]
    best = max(trials, key=lambda trial: trial["objective"])
    judged: Mapping[str, float] = {}
    if final is not None and config.finalists is not None and seen.judges is not None:
        entered = _finalists(trials, seen, config.finalists.count)
        said = final([point_of(trial, seen) for trial in entered], seen.judges)
        for trial, value in zip(entered, said.accuracy, strict=True):
            trial["student_accuracy"] = value
        best, judged = entered[said.best], said.estimates
    if short := unmet(best, config):
        logger.warning("search: the point taken of %d misses %s", len(trials), short)
    point = point_of(best, seen)
    again = appraise(point, held, config)
    estimates = {
        **again,
        **{f"{name}_in_search": best[name] for name in again if name in CURSED},
        "winners_curse": best["objective"] - again["objective"],
        "winners_curse_purity": best["purity"] - again["purity"],
        "labeled_searched": float(len(seen.labels)),
        "labeled_held_out": float(len(held.labels)),
        **judged,
    }
    if held.study is not None:
        estimates["accuracy_labels_only"] = head_worth(held.study.starts, held)["accuracy"]
    return point.model_copy(update={"estimates": estimates, "trials": tuple(trials)})


def unmet(best: Mapping[str, Any], config: SearchConfig) -> str:
    """What the best point misses of what was asked for, in words; empty where it has all."""
    asked = {"utilization": config.min_utilization}
    if config.objective != "head":
        asked["purity"] = config.target_purity
    short = [(name, value) for name, value in asked.items() if best[name] < value]
    return " and ".join(f"{name} {value:g} ({best[name]:.3f})" for name, value in short)


def evidence(
    points: pa.Table,
    pool: Iterable[pa.Table],
    config: SearchConfig,
    seen_pool: Sequence[Seen] = (),
    spaces: Sequence[Space] = (),
) -> tuple[Evidence, Evidence]:
    """What trials are judged on, and what the winner is judged on; see :func:`search`.

    Heads of both are taught by the half that trials see.
    """
    names = label_names_of(points.schema)
    rows, labels = labeled_rows(points, names)
    known = points.column_names
    groups = points["group"].to_pylist() if "group" in known else None
    seen = halves(
        labels, config.seed, groups, points["fold"].to_numpy() if "fold" in known else None
    )
    labeled = class_counts(labels, names)
    start = OperatingPoint(label_names=names, labeled=labeled)
    grid = pool_counts(pool, names)
    if not grid.sum() or not len(labels):
        raise RunError(
            f"search: {len(labels)} labeled rows and {int(grid.sum())} scored pool faces; "
            "expected at least one of each"
        )
    adaptive: dict[str, dict[str, float]] = {
        each.rule: on_grid(adaptive_cuts(each, pool_seen, points.filter(pa.array(seen)), names))
        for each, pool_seen in zip(config.adaptive, seen_pool, strict=True)
    }
    taught = None
    if config.objective == "head":
        taught = study(spaces, labels, seen, len(names), config.head)
    searched = Evidence(_take(rows, seen), labels[seen], grid, start, adaptive, taught, seen)
    held = replace(searched, rows=_take(rows, ~seen), labels=labels[~seen], judges=~seen)
    return searched, held


def worth(rules: dict[str, Any], shared: tuple[Evidence, SearchConfig]) -> dict[str, Any]:
    """What the rules of one point are worth, with the rules; runs in a worker."""
    seen, config = shared
    if config.objective != "head":
        return best_precision(rules, seen, config)
    by = rules["cut_by"]
    found = {name: rules[name] for name in ("confidence", "prototype", "neighbors")}
    found["target_precision"] = rules["target_precision"] if by == "precision" else None
    if seen.adaptive:
        found["adaptive"] = by if by in seen.adaptive else None
    return {**found, **appraise(point_of(found, seen), seen, config)}


def _finalists(
    trials: Sequence[dict[str, Any]], seen: Evidence, count: int
) -> list[dict[str, Any]]:
    """The trials of the best points that decide differently."""
    found: dict[str, dict[str, Any]] = {}
    for trial in sorted(trials, key=lambda trial: -trial["objective"]):
        found.setdefault(point_of(trial, seen).digest, trial)
        if len(found) == count:
            break
    return list(found.values())


def pareto(trials: Sequence[Mapping[str, Any]]) -> Mask:
    """Trials (n,) that none surpasses: at least as good in all of :data:`FRONT`, in one better."""
    values = np.array([[trial[name] for name in FRONT] for trial in trials], dtype=np.float64)
    at_least = (values[:, None] <= values[None]).all(2)
    better = (values[:, None] < values[None]).any(2)
    surpassed: Mask = np.any(at_least & better, axis=1)
    return ~surpassed


def halves(
    labels: NDArray[np.int64],
    seed: int,
    groups: Sequence[str | None] | None = None,
    fold: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.bool_]:
    """Which rows (N,) the search may see: half of every class, the odd one included.

    Faces of a group stay together, as in the teacher's folds: a person who is searched on must not
    judge the winner. Each fold (N,) is then halved by itself, as nearly as its groups allow: halves
    that followed the folds would leave a member nothing to be taught with.
    """
    seen = np.zeros(len(labels), dtype=bool)
    if groups is not None and any(group is not None for group in groups):
        names = np.array([group or f"\0{row}" for row, group in enumerate(groups)], dtype=object)
        for number in np.unique(fold) if fold is not None else (None,):
            own = np.flatnonzero(fold == number) if number is not None else np.arange(len(labels))
            if len(set(names[own])) < 2:  # seen
                seen[own] = True
                continue
            seen[own] = stratified_folds(labels[own], names[own].tolist(), 2, seed) == 0
        return seen
    rng = np.random.default_rng(seed)
    for code in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == code))
        seen[own[: (len(own) + 1) // 2]] = True
    return seen


def appraise(point: OperatingPoint, evidence: Evidence, config: SearchConfig) -> dict[str, float]:
    """Purity, utilization, evenness and objective of a point; of a head accuracy and macro-F1, too.

    Purity is estimated on labeled out-of-fold faces per predicted class and weighted as the pool's
    kept faces are; it assumes that a class is as pure in the pool as among the labeled.
    """
    classes = len(point.label_names)
    kept = pool_kept(point, evidence.pool)
    keep = passes(evidence.rows, point)
    worth = thresholds.estimate(keep, evidence.rows.predicted, evidence.labels, classes, mix=kept)
    utilization = float(kept.sum() / evidence.pool.sum())
    even = effective_classes(kept)
    found = {"purity": worth.purity, "utilization": utilization, "effective_classes": even}
    missing = max(0.0, config.min_utilization - utilization)
    if config.objective == "head":
        assert evidence.study is not None
        found |= head_worth(heads(point, evidence.study), evidence)
        return {**found, "objective": found["accuracy"] - PENALTY * missing}
    value = utilization
    if config.objective == "balanced":
        value += BALANCE * even / classes
    value -= PENALTY * max(0.0, config.target_purity - worth.purity)
    return {**found, "objective": value - PENALTY * missing}


def head_worth(found: Sequence[NDArray[np.float64]], evidence: Evidence) -> dict[str, float]:
    """Accuracy and macro-F1 of heads on the labeled faces that judge."""
    made = evidence.study
    assert made is not None
    named = said(found, made)
    here = named >= 0
    if evidence.judges is not None:
        here &= evidence.judges
    classes = len(evidence.start.label_names)
    confusion = confusion_matrix(named[here], made.labels[here], classes)
    return {"accuracy": float(accuracy(confusion)), "macro_f1": float(macro_f1(confusion))}


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


def point_of(trial: Mapping[str, Any], evidence: Evidence) -> OperatingPoint:
    """The operating point of a trial."""
    (point,) = _points(dict(trial), [trial], evidence)
    return point


def _points(
    rules: dict[str, Any], ways: Sequence[Mapping[str, Any]], evidence: Evidence
) -> Iterator[OperatingPoint]:
    """The point of a trial's rules with each of several ways to cut its classes."""
    point = evidence.start.model_copy(update=_thresholds(rules))
    curves = None
    for way in ways:
        if (name := way.get("adaptive")) is not None:
            yield point.model_copy(update={"cuts": evidence.adaptive[name]})
        elif way["target_precision"] is None:
            yield point
        else:
            curves = curves or class_curves(evidence.rows, evidence.labels, point)
            yield with_cuts(point, curves, way["target_precision"], GRID)


def _take(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    predicted, prototype, neighbor = rows.predicted, rows.prototype, rows.neighbor
    return Rows(
        predicted[which],
        rows.confidence[which],
        prototype[which],
        neighbor[which],
        rows.agreement[which],
    )
