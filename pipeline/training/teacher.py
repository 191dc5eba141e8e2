"""Cross-fit teachers: every labeled face is judged by a model that has not seen it.

What for: cuts, temperature and class shares are chosen from out-of-fold predictions, never from
faces a model has memorized, and the fold models together are the ensemble that scores the pool.
Teachers may learn from candidate sets (training/partial.py) in place of labels.
Cost: folds x steps x batch image passes, and two forwards per labeled face; twice as much where
candidates are derived.
Source: cross-fitting arXiv 1608.00060, section 3; temperature arXiv 1706.04599, section 4.2.
Departs: a face's derived candidates come from a model that has not seen the face, but has seen
those of the fold that its next teacher is judged on; their labels reach that teacher so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field, model_validator

from pipeline import metrics
from pipeline.ambiguity import near_top, within
from pipeline.errors import ConfigError
from pipeline.losses import fit_temperature, nll
from pipeline.models import FaceModel
from pipeline.training.data import LabeledFaces, seed_of
from pipeline.training.loop import FORWARD, Hook, Worker
from pipeline.training.partial import PartialConfig, train_partial
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised


class TeachConfig(SupervisedConfig):
    """How teachers are trained."""

    folds: int = Field(default=5, ge=2)
    """Teachers; each is trained without one fold. One teacher would leave nothing out of fold."""
    sub_prototypes: int = Field(default=1, ge=1)
    """Prototypes per class: 1 is the mean of the correct faces, more are k-means centers."""
    partial: PartialConfig | None = None
    """Learn from candidate sets; None: from labels."""

    @model_validator(mode="after")
    def _no_mixed_candidates(self) -> TeachConfig:
        if self.partial is not None and self.mix is not None:
            raise ValueError(f"partial: targets of faces mixed by {self.mix} cannot move")
        return self

    @property
    def derives(self) -> bool:
        """Whether candidates are derived, so that teachers are trained twice."""
        return self.partial is not None and self.partial.candidates == "derived"

    @property
    def trainings(self) -> int:
        """Networks that are trained one after another."""
        return self.folds * (2 if self.derives else 1)


@dataclass(frozen=True)
class FoldFit:
    """One teacher and what it says of the faces it has not seen."""

    model: FaceModel
    rows: np.ndarray
    """Positions of the held-out faces (n,)."""
    logits: np.ndarray
    """Theirs (n, K), averaged with the mirrored face's."""
    passes: float
    history: list[dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class TeacherFit:
    """The ensemble and its out-of-fold predictions."""

    members: list[FaceModel]
    """With averaged weights, in evaluation mode, one per fold."""
    fold: np.ndarray
    """The fold (N,) each labeled face was held out in; member `fold[i]` has not seen face i."""
    logits: np.ndarray
    """Out-of-fold logits (N, K) float32."""
    temperature: float
    """Of a member; least NLL of the out-of-fold logits."""
    passes: float
    history: list[list[dict[str, float]]]
    """One per fold."""
    metrics: dict[str, float]
    """Out-of-fold, of single members: accuracy, mean_class_accuracy, macro_f1, nll, nll_calibrated,
    ece_calibrated, and the accuracy of each fold."""
    seconds: float
    candidates: str | None = None
    """Where candidates came from and how many a face has; None: there are none."""


def cross_fit(
    config: TeachConfig,
    data: LabeledFaces,
    label_names: Sequence[str],
    worker_for_fold: Callable[[int], Worker],
    *,
    seed: int,
    hooks: Sequence[Hook] = (),
) -> TeacherFit:
    """Train one teacher per fold, one after another, and judge every face out of fold.

    Args:
        config: network, schedule and number of folds.
        data: the labeled faces; their groups stay together.
        label_names: what their codes index.
        worker_for_fold: each fold's worker; give each its own checkpoint folder and finished folds
            are not trained again. Numbers from `folds` on are those that candidates derive from.
        seed: of folds, weights and everything drawn.
        hooks: called after every step of every fold.
    """
    fold = stratified_folds(data.labels, data.groups, config.folds, seed)

    def fit_all(config: TeachConfig, data: LabeledFaces, first: int) -> TeacherFit:
        fits = [
            fit_fold(
                config,
                data,
                label_names,
                fold,
                k,
                worker_for_fold(first + k),
                seed=seed,
                hooks=hooks,
            )
            for k in range(config.folds)
        ]
        return combine(fits, fold, data, label_names)

    if config.partial is None:
        return fit_all(config, data, 0)
    before: TeacherFit | None = None
    if config.derives:
        before = fit_all(config.model_copy(update={"partial": None}), data, config.folds)
        data = replace(data, soft=derived(before, data.labels, config.partial.ratio))
    fit = fit_all(config, data, 0)
    assert data.soft is not None
    sizes = float((data.soft > 0).sum(1).mean())
    said = f"{config.partial.candidates}, {sizes:.2f} per face"
    if before is None:
        return replace(fit, candidates=said)
    return replace(
        fit,
        candidates=said,
        passes=before.passes + fit.passes,
        seconds=before.seconds + fit.seconds,
        history=[*before.history, *fit.history],
    )


def derived(fit: TeacherFit, labels: np.ndarray, ratio: float) -> np.ndarray:
    """Calibrated out-of-fold probabilities (N, K) within the label and the classes near the top."""
    probs = torch.softmax(torch.from_numpy(fit.logits).double() / fit.temperature, 1).numpy()
    return within(probs, near_top(probs, labels, ratio))


def fit_fold(
    config: TeachConfig,
    data: LabeledFaces,
    label_names: Sequence[str],
    fold: np.ndarray,
    number: int,
    worker: Worker,
    *,
    seed: int,
    hooks: Sequence[Hook] = (),
) -> FoldFit:
    """Train the teacher of one fold; `fold` (N,) comes from :func:`stratified_folds`."""
    rows, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
    own_seed = seed_of(seed, "fold", number)
    if config.partial is None:
        trained = train_supervised(
            config, data, label_names, worker, seed=own_seed, rows=rest, hooks=hooks
        )
    else:
        trained = train_partial(
            config, config.partial, data, label_names, worker, seed=own_seed, rows=rest, hooks=hooks
        )
    logits = predict_logits(trained.model, data.faces, worker, rows=rows)
    passes = trained.fitted.passes + 2 * len(rows) * FORWARD
    fitted = trained.fitted
    return FoldFit(trained.model, rows, logits, passes, fitted.history, fitted.seconds)


def combine(
    fits: Sequence[FoldFit], fold: np.ndarray, data: LabeledFaces, label_names: Sequence[str]
) -> TeacherFit:
    """Put the folds together and calibrate."""
    logits = np.zeros((len(data), len(label_names)), np.float32)
    for one in fits:
        logits[one.rows] = one.logits
    temperature = fit_temperature(logits, data.labels)
    return TeacherFit(
        members=[one.model for one in fits],
        fold=fold,
        logits=logits,
        temperature=temperature,
        passes=sum(one.passes for one in fits),
        history=[one.history for one in fits],
        metrics=_judge(logits, data.labels, fold, temperature),
        seconds=sum(one.seconds for one in fits),
    )


def stratified_folds(
    labels: np.ndarray,
    groups: Sequence[str] | None,
    folds: int,
    seed: int,
    setting: str = "teach.folds",
) -> np.ndarray:
    """The fold (N,) of each face: classes spread evenly, every group within one fold.

    Groups go, largest first and in random order within a size, to the fold that has the least of
    their classes so far.

    Raises:
        ConfigError: fewer groups than folds; it names the setting that asked for them.
    """
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    _, group = np.unique(names, return_inverse=True)
    count = int(group.max(initial=-1)) + 1
    if count < folds:
        raise ConfigError(f"{setting}: {folds}, expected at most {count}, the number of groups")
    totals = np.bincount(labels)
    members = np.zeros((count, len(totals)), np.int64)
    np.add.at(members, (group, labels), 1)
    order = np.random.default_rng(seed_of(seed, "folds")).permutation(count)
    order = order[np.argsort(-members[order].sum(1), kind="stable")]
    # A class counts by its share, so that a rare class is spread as carefully as a common one; the
    # small second term keeps the folds of one size where the classes do not decide.
    share = 1 / np.maximum(totals, 1)
    filled = np.zeros((folds, len(totals)))
    chosen = np.empty(count, np.int64)
    for one in order:
        cost = filled @ (members[one] * share**2) + 1e-6 * filled.sum(1) / len(labels)
        chosen[one] = int(cost.argmin())
        filled[chosen[one]] += members[one]
    return chosen[group]


def _judge(
    logits: np.ndarray, labels: np.ndarray, fold: np.ndarray, temperature: float
) -> dict[str, float]:
    predicted = logits.argmax(1)
    confusion = metrics.confusion_matrix(predicted, labels, logits.shape[1])
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    judged = {
        "accuracy": float(metrics.accuracy(confusion)),
        "mean_class_accuracy": float(metrics.mean_class_accuracy(confusion)),
        "macro_f1": float(metrics.macro_f1(confusion)),
        "nll": nll(logits, labels),
        "nll_calibrated": nll(logits, labels, temperature),
        "ece_calibrated": metrics.calibration_error(probs, labels),
    }
    for number in np.unique(fold):
        here = fold == number
        judged[f"accuracy_fold_{number}"] = float((predicted[here] == labels[here]).mean())
    return judged
