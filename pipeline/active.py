"""Active learning against an oracle: train, look at what is unlabeled, ask for labels, repeat.

What for: to compare acquisition functions on a set whose labels are all known. A face's label is
given to training only once a strategy has asked for it. Every round trains a network from its
start, random or pre-trained, on all labels so far; nothing of the round before remains in it. What
is drawn depends on (seed, strategy, round) alone; the first labeled set and every training's seed
on (seed, round), so that strategies of a seed begin alike and differ by what they ask for.

Research mode: the test faces are judged in every round, as the papers do it, and nothing is chosen
on them.

Cost: a training per round, a forward per face for strategies that look, then the acquisition's
own, see pipeline/acquisition.
Source: Roy and Etemad, Active Learning with Contrastive Pre-training for Facial Expression
Recognition (arXiv 2307.02744): 10 % first, 5 % a round, seven rounds.
Departs: a pre-trained start is what every round starts from; the released code resets all weights
to random ones before each training. Faces are looked at as they are, not through training views.
"""

from __future__ import annotations

import base64
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline import metrics
from pipeline.acquisition.functions import ACQUISITIONS, READS
from pipeline.acquisition.interface import Acquisition, Mask, Pool, Rows
from pipeline.config import Config, nearest
from pipeline.errors import ConfigError, IdentityError
from pipeline.training.data import seed_of
from pipeline.training.learner import LookConfig
from pipeline.training.supervised import SupervisedConfig

BASELINE = "random"
"""The strategy that all others are compared with."""

Start = Literal["scratch", "pretrained"]
Model = TypeVar("Model")


class ActiveConfig(Config):
    """Which strategies are compared, from what, for how many labels."""

    strategies: tuple[str, ...] = Field(default=tuple(ACQUISITIONS), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    starts: tuple[Start, ...] = Field(default=("scratch",), min_length=1)
    start: float = Field(default=0.10, gt=0, le=1)  # share of the labels in the first round
    step: float = Field(default=0.05, gt=0, le=1)  # share that every further round adds
    rounds: int = Field(default=7, ge=1)  # trainings, the first included
    draw: Literal["random", "stratified"] = "random"  # of the first labels
    train: SupervisedConfig = SupervisedConfig()
    epochs: float | None = Field(default=None, gt=0)  # over the labels; None: train.steps
    look: LookConfig = LookConfig()
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keyword settings of acquisition functions, by name."""

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        for name in (*self.strategies, *self.settings):
            if name not in ACQUISITIONS:
                raise ValueError(f"no strategy {name!r}{nearest(name, list(ACQUISITIONS))}")
        for name in ("strategies", "seeds", "starts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one is named twice")
        if self.start + (self.rounds - 1) * self.step > 1 + 1e-9:
            raise ValueError(
                f"{self.rounds} rounds from {self.start:g} by {self.step:g} need more labels than "
                "there are"
            )
        for name, given in self.settings.items():
            known = keywords(ACQUISITIONS[name])
            for key in given:
                if key not in known:
                    raise ValueError(f"settings.{name}: no setting {key!r}{nearest(key, known)}")
        if "bald" in self.strategies and self.train.model.dropout == 0:
            raise ValueError("bald compares dropout passes; train.model.dropout is 0")
        if self.train.model.weights is not None:
            raise ValueError("train.model.weights: `starts` says what trainings start from")
        return self

    def acquisition(self, strategy: str) -> Acquisition:
        """The function of a strategy, its settings bound."""
        return partial(ACQUISITIONS[strategy], **self.settings.get(strategy, {}))


def keywords(function: Acquisition) -> list[str]:
    """Names of an acquisition function's own settings."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


@dataclass(frozen=True)
class Oracle:
    """Faces whose labels are known, but told only on demand; and the test faces' labels."""

    ids: Sequence[str]  # (N,)
    labels: NDArray[np.int64]  # (N,) codes
    test: NDArray[np.int64]  # (T,) codes
    label_names: tuple[str, ...]  # K


class Learner(Protocol[Model]):
    """What trains and looks, see :class:`pipeline.training.learner.Networks`."""

    def train(self, rows: Rows, number: int) -> tuple[Model, float]:
        """A new model of these labeled rows in a round, and the image passes it took."""
        ...

    def look(
        self, model: Model, columns: Sequence[str], labeled: Mask, seed: int
    ) -> tuple[Mapping[str, NDArray[Any]], float]:
        """Columns of a pool of all N faces by their names there, and the passes it took."""
        ...

    def say(self, model: Model) -> NDArray[np.int64]:
        """Codes (T,) of the test faces."""
        ...


class Round(Config):
    """What one training is worth, and what it asked for next; a file per round."""

    number: int  # from 0
    labels: int  # faces that it was trained on
    class_counts: dict[str, int]  # of these faces
    accuracy: float
    macro_f1: float
    recall: dict[str, float | None]  # None: the test set lacks the class
    correct: str  # of every test face, see :func:`unpack`
    chosen: tuple[str, ...]  # ids of the faces that the next round adds; empty in the last one
    seconds: float  # of training, looking, asking and the test together
    seconds_asking: float  # of the acquisition function alone
    passes: float  # image passes of training and looking


def rounds(
    oracle: Oracle,
    learner: Learner[Any],
    config: ActiveConfig,
    strategy: str,
    seed: int,
    *,
    done: Sequence[Round] = (),
    keep: Callable[[Round], Round] = lambda made: made,
) -> list[Round]:
    """The learning curve of one strategy.

    Args:
        oracle: the faces.
        learner: trains from its start in every round.
        config: shares, rounds, settings of the strategies; its `seeds` and `starts` are not read.
        strategy: a name of ACQUISITIONS.
        seed: of the first labels and of all that is drawn.
        done: rounds that are finished already, from the first on; they are not trained again.
        keep: stores every round as it is finished, and gives back the one that counts: another
            attempt may have been first.

    Raises:
        IdentityError: the finished rounds are of other faces.
        ConfigError: fewer faces than the first round or a step needs, or deepfool's sample is
            smaller than a step.
    """
    check_sample(config, strategy, len(oracle.labels))
    found = list(done)
    labeled = np.zeros(len(oracle.labels), bool)
    labeled[first_rows(oracle.labels, config, seed)] = True
    place = {name: row for row, name in enumerate(oracle.ids)}
    for before in found:
        unknown = [name for name in before.chosen if name not in place]
        if unknown or before.labels != labeled.sum():
            raise IdentityError(
                f"round {before.number} of {strategy}: {before.labels} labels, {len(unknown)} "
                f"unknown ids asked for; expected {int(labeled.sum())} labels of these faces"
            )
        labeled[[place[name] for name in before.chosen]] = True
    for number in range(len(found), config.rounds):
        last = number + 1 == config.rounds
        made = keep(_round(oracle, learner, config, strategy, seed, number, labeled, last))
        found.append(made)
        labeled[[place[name] for name in made.chosen]] = True
    return found


def first_rows(labels: NDArray[np.int64], config: ActiveConfig, seed: int) -> Rows:
    """Rows of the first labeled faces, ascending; the same for all strategies of a seed.

    `stratified`: the share of every class, rounded, at least one face.

    Raises:
        ConfigError: the share is less than a face.
    """
    rng = np.random.default_rng(seed_of(seed, "first"))
    if config.draw == "random":
        count = share_of(config.start, len(labels), "start")
        return np.sort(rng.choice(len(labels), count, replace=False))
    parts = []
    for code in np.unique(labels):
        own = np.flatnonzero(labels == code)
        count = max(1, round(config.start * len(own)))
        parts.append(rng.choice(own, count, replace=False))
    return np.sort(np.concatenate(parts))


def share_of(share: float, faces: int, name: str) -> int:
    """Whole faces of a share, rounded down; ConfigError where there is none."""
    count = int(share * faces + 1e-9)
    if not count:
        raise ConfigError(f"active.{name}: {share:g} of {faces} faces is less than one")
    return count


def check_sample(config: ActiveConfig, strategy: str, faces: int) -> None:
    """Raise ConfigError where the rest of a budget would be faces that nobody looked at."""
    most = config.look.boundary_faces
    if most is None or "boundary" not in READS[strategy] or config.rounds == 1:
        return
    budget = share_of(config.step, faces, "step")
    if most < budget:
        raise ConfigError(
            f"active.look.boundary_faces is {most}, expected the {budget} faces that {strategy} "
            "asks for in a round, or more"
        )


def _round(
    oracle: Oracle,
    learner: Learner[Any],
    config: ActiveConfig,
    strategy: str,
    seed: int,
    number: int,
    labeled: Mask,
    last: bool,
) -> Round:
    begun = time.monotonic()
    model, passes = learner.train(np.flatnonzero(labeled), number)
    chosen, asking = np.zeros(0, np.int64), 0.0
    if not last:
        own = seed_of(seed, strategy, number)
        columns, looked = learner.look(model, READS[strategy], labeled, own)
        passes += looked
        # A label that nobody asked for must not be there to be read.
        labels = np.where(labeled, oracle.labels, -1)
        pool = Pool(labeled, labels=labels, **columns)
        budget = share_of(config.step, len(labeled), "step")
        started = time.monotonic()
        ask, rng = config.acquisition(strategy), np.random.default_rng(own)
        chosen = ask(pool, min(budget, int((~labeled).sum())), rng)
        asking = time.monotonic() - started
    said, names = learner.say(model), oracle.label_names
    confusion = metrics.confusion_matrix(said, oracle.test, len(names))
    recalls = zip(names, metrics.recalls(confusion).tolist(), strict=True)
    return Round(
        number=number,
        labels=int(labeled.sum()),
        class_counts=metrics.class_counts(oracle.labels[labeled], names),
        accuracy=float(metrics.accuracy(confusion)),
        macro_f1=float(metrics.macro_f1(confusion)),
        recall={name: None if np.isnan(value) else value for name, value in recalls},
        correct=pack(said == oracle.test),
        chosen=tuple(oracle.ids[row] for row in chosen.tolist()),
        seconds=round(time.monotonic() - begun, 3),
        seconds_asking=round(asking, 3),
        passes=passes,
    )


def pack(right: NDArray[np.bool_]) -> str:
    """Bits (T,) as text."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """Inverse of :func:`pack`."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


# -- many curves ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A strategy after a number of labels, over its seeds."""

    labels: int
    accuracy: tuple[float, ...]  # of each seed
    macro_f1: float
    rarest: float | None
    """Mean recall of the class with fewest test faces."""
    gap: metrics.Interval | None
    """Accuracy less that of random, of the same seeds, paired over test faces; None: no random."""


def points(
    curves: Mapping[str, Mapping[int, Sequence[Round]]],
    test: NDArray[np.int64],
    label_names: Sequence[str],
) -> dict[str, list[Point]]:
    """What is drawn and tabled: per strategy a point for every round that all its seeds have.

    Args:
        curves: rounds by strategy and seed, of one start.
        test: codes (T,) of the test faces.
        label_names: what the codes index; a stored round has its classes in another order.
    """
    counts = np.bincount(test)
    rarest = label_names[int(np.where(counts > 0, counts, len(test) + 1).argmin())]
    base = curves.get(BASELINE, {})
    found: dict[str, list[Point]] = {}
    for strategy, by_seed in curves.items():
        found[strategy] = []
        for number in range(min((len(curve) for curve in by_seed.values()), default=0)):
            at = [curve[number] for curve in by_seed.values()]
            recall = [one.recall[rarest] for one in at]
            known = [value for value in recall if value is not None]
            both = [seed for seed in by_seed if len(base.get(seed, ())) > number]
            gap = None
            if strategy != BASELINE and both:
                own, random = (
                    _right([side[seed][number] for seed in both], len(test))
                    for side in (by_seed, base)
                )
                gap = metrics.paired_difference(own, random)
            found[strategy].append(
                Point(
                    labels=round(float(np.mean([one.labels for one in at]))),
                    accuracy=tuple(one.accuracy for one in at),
                    macro_f1=float(np.mean([one.macro_f1 for one in at])),
                    rarest=float(np.mean(known)) if known else None,
                    gap=gap,
                )
            )
    return found


def _right(at: Sequence[Round], count: int) -> NDArray[np.float64]:
    """Share of the seeds that were right, by test face (T,)."""
    return np.mean([unpack(one.correct, count) for one in at], axis=0)
