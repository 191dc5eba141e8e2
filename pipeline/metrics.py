"""What every number of an evaluation is, and how far it can be trusted. Pure NumPy.

Points: accuracy, mean-class accuracy, macro-F1, expected calibration error; against the votes of
several raters divergences, Brier score, top-2 accuracy, and accuracy where the raters agreed and
where they did not. Intervals: percentile bootstrap over faces, the same draws for every model, so
that differences are paired. All metrics are linear in the faces' weights up to a last small step,
so a bootstrap is one matrix product per chunk of draws: 2,000 draws of 3,200 faces take well under
a second per model.

Source: ECE, arXiv 1706.04599 eq. 3; Brier score, Brier 1950, his own sum over classes; percentile
bootstrap, Efron and Tibshirani 1993 chapter 13.
Departs: macro-F1 and mean-class accuracy average over the classes that have faces; a class that is
only predicted lowers the others and adds no zero of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr
from scipy.stats import binomtest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
DRAWS = 2000
AGREED = 0.8  # share of the most voted class from which raters agreed
LEAST = 1e-7  # a smaller probability counts as this one: a divergence must not be infinite
CHUNK_CELLS = 4_000_000  # draws x faces held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile interval."""

    value: float
    low: float
    high: float


def confusion_matrix(predicted: Ints, labels: Ints, classes: int) -> Ints:
    """Counts (K, K) of true class (row) and predicted class (column); codes in [0, K)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_counts(labels: Ints, label_names: Sequence[str]) -> dict[str, int]:
    """Faces per class name of codes (N,)."""
    counts = np.bincount(labels, minlength=len(label_names)).tolist()
    return dict(zip(label_names, counts, strict=True))


def accuracy(confusion: NDArray[np.generic]) -> Floats:
    """Share of right answers, [0, 1], of counts (..., K, K)."""
    counts = np.asarray(confusion, dtype=np.float64)
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1))


def recalls(confusion: NDArray[np.generic]) -> Floats:
    """Per-class recall (..., K) of counts (..., K, K); NaN for a class without faces."""
    counts = np.asarray(confusion, dtype=np.float64)
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1))


def precisions(confusion: NDArray[np.generic]) -> Floats:
    """Per-class precision (..., K) of counts (..., K, K); NaN for a class never predicted."""
    counts = np.asarray(confusion, dtype=np.float64)
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-2))


def f1s(confusion: NDArray[np.generic]) -> Floats:
    """Per-class F1 (..., K) of counts (..., K, K); NaN for a class without faces."""
    counts = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    value = _ratio(2 * right, counts.sum(-1) + counts.sum(-2))
    return np.where(counts.sum(-1) > 0, value, np.nan)


def mean_class_accuracy(
    confusion: NDArray[np.generic], subset: Sequence[int] | None = None
) -> Floats:
    """Mean recall over the classes that have faces, [0, 1]; `subset` restricts to some classes."""
    return _mean_present(recalls(confusion), subset)


def macro_f1(confusion: NDArray[np.generic], subset: Sequence[int] | None = None) -> Floats:
    """Mean F1 over the classes that have faces, [0, 1]; `subset` restricts to some classes.

    Faces of classes outside the subset stay in the counts: predicting them into it is an error.
    """
    return _mean_present(f1s(confusion), subset)


def calibration_error(probs: Floats, labels: Ints) -> float:
    """Expected calibration error, [0, 1], of probabilities (N, K) over equal-width bins."""
    return float(np.abs(_gaps(probs, labels).sum(0)).sum() / len(labels))


def reliability(probs: Floats, labels: Ints) -> list[dict[str, float]]:
    """Reliability curve: per bin that has faces its edges, n, mean confidence and accuracy."""
    confidence, right, place = _binned(probs, labels)
    curve = []
    for b in range(BINS):
        inside = place == b
        if n := int(inside.sum()):
            curve.append(
                {
                    "low": b / BINS,
                    "high": (b + 1) / BINS,
                    "n": n,
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    return curve


def effective_classes(counts: NDArray[np.generic]) -> float:
    """Exponential of the entropy of class counts (K,), in [1, K]; 0 where nothing is counted."""
    mass = np.asarray(counts, dtype=np.float64)
    if mass.sum() <= 0:
        return 0.0
    share = mass[mass > 0] / mass.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def headline(
    probs: Floats, labels: Ints, subset: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Headline metrics of one model over one or more training seeds, each with its interval.

    Args:
        probs: (S, N, K) probabilities of S training seeds on the same N faces; a metric is the mean
            over the seeds, of the full set for the value and of each draw for the interval.
        labels: (N,) codes.
        subset: classes of the `_large` metrics.
        draws: bootstrap draws.
        seed: of the draws; the same seed draws the same faces for every model.

    Returns:
        accuracy, mean_class_accuracy, macro_f1, mean_class_accuracy_large, macro_f1_large, ece.
    """
    classes = probs.shape[2]
    cells = [np.eye(classes**2)[labels * classes + p.argmax(1)] for p in probs]
    gaps = [_gaps(p, labels) for p in probs]
    values: dict[str, list[Floats]] = {}
    for weights in (np.ones((1, len(labels))), *_draws(len(labels), draws, seed)):
        counts = np.stack([weights @ c for c in cells]).reshape(len(probs), -1, classes, classes)
        ece = np.stack([np.abs(weights @ g).sum(1) for g in gaps]) / len(labels)
        parts = {
            "accuracy": accuracy(counts),
            "mean_class_accuracy": mean_class_accuracy(counts),
            "macro_f1": macro_f1(counts),
            "mean_class_accuracy_large": mean_class_accuracy(counts, subset),
            "macro_f1_large": macro_f1(counts, subset),
            "ece": ece,
        }
        for name, part in parts.items():
            values.setdefault(name, []).append(part.mean(0))
    return {name: _interval(np.concatenate(parts)) for name, parts in values.items()}


def paired_difference(
    first: NDArray[np.generic],
    second: NDArray[np.generic],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Accuracy of `first` minus accuracy of `second` on the same faces, paired bootstrap.

    Args:
        first: correctness (N,) in {0, 1}, or its mean over training seeds in [0, 1].
        second: the same of the other model, same faces in the same order.
        draws: bootstrap draws.
        seed: of the draws.
    """
    gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap(lambda weights: weights @ gap / len(gap), len(gap), draws, seed)


def paired_chance(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """P-value of the difference between two models on the same faces, exact and two-sided, (0, 1].

    By the faces on which one is right and the other is not or, over seeds, more often right.

    Args:
        first: as of :func:`paired_difference`.
        second: the same of the other model.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions,
        1947, as an exact binomial test.
    """
    won, lost = int(np.greater(first, second).sum()), int(np.less(first, second).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def bootstrap(
    statistic: Callable[[Floats], Floats], faces: int, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of a statistic that maps face weights (D, N) to values (D,)."""
    parts = [statistic(np.ones((1, faces)))]
    parts += [statistic(weights) for weights in _draws(faces, draws, seed)]
    return _interval(np.concatenate(parts))


def holm(p: Sequence[float]) -> list[float]:
    """P-values of a family of tests, adjusted so that the chance of any false one stays below.

    Args:
        p: p-values, [0, 1].

    Returns:
        Adjusted values in the same order, [0, 1]; one of at most 0.05 may be called a finding.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979; the values as in
        Wright 1992, equation 2.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()


# -- against votes --------------------------------------------------------------------------------


def kl_to_votes(probs: Floats, votes: Floats) -> Floats:
    """KL(votes || probs) of each face (N,), nats, at least 0; both (N, K), rows sum to 1."""
    return rel_entr(votes, np.maximum(probs, LEAST)).sum(1)


def js_to_votes(probs: Floats, votes: Floats) -> Floats:
    """Jensen-Shannon divergence of each face (N,), nats, in [0, log 2]; arguments as above."""
    middle = (probs + votes) / 2
    return (rel_entr(probs, middle) + rel_entr(votes, middle)).sum(1) / 2


def brier_to_votes(probs: Floats, votes: Floats) -> Floats:
    """Squared distance of each face (N,) from its votes, in [0, 2]; arguments as above."""
    return np.square(probs - votes).sum(1)


def vote_scores(
    probs: Floats, labels: Ints, votes: Floats
) -> dict[str, tuple[Floats, NDArray[np.bool_]]]:
    """What a model scores on each face that raters voted on, and which faces count.

    Args:
        probs: (N, K), rows sum to 1.
        labels: (N,) codes.
        votes: shares (N, K) of the raters' votes, rows sum to 1.

    Returns:
        kl, js, brier, top2 (the label is one of the two most probable classes), accuracy_agreed and
        accuracy_disputed (the most voted class has AGREED of the votes, or less): values (N,) and
        the faces whose mean it is (N,).
    """
    everyone = np.ones(len(labels), dtype=bool)
    right = (probs.argmax(1) == labels).astype(np.float64)
    ranked = np.argsort(-probs, axis=1, kind="stable")[:, :2]
    # Shares are float32: four of five votes must not fall short of 0.8.
    agreed = votes.max(1) >= AGREED - 1e-6
    return {
        "kl": (kl_to_votes(probs, votes), everyone),
        "js": (js_to_votes(probs, votes), everyone),
        "brier": (brier_to_votes(probs, votes), everyone),
        "top2": ((ranked == labels[:, None]).any(1).astype(np.float64), everyone),
        "accuracy_agreed": (right, agreed),
        "accuracy_disputed": (right, ~agreed),
    }


def against_votes(
    probs: Floats, labels: Ints, votes: Floats, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Means of :func:`vote_scores` over one or more training seeds, each with its interval.

    Args:
        probs: (S, N, K) probabilities of S training seeds on the same N faces.
        labels: (N,) codes.
        votes: (N, K).
        draws: bootstrap draws.
        seed: of the draws; the same seed draws the same faces for every model.
    """
    each = [vote_scores(p, labels, votes) for p in probs]
    names = list(each[0])
    values = np.mean([[one[name][0] for name in names] for one in each], 0)  # (M, N)
    counted = np.array([each[0][name][1] for name in names], dtype=np.float64)
    parts = [
        _ratio(weights @ (values * counted).T, weights @ counted.T)
        for weights in (np.ones((1, len(labels))), *_draws(len(labels), draws, seed))
    ]
    columns = np.concatenate(parts).T
    return {name: _interval(column) for name, column in zip(names, columns, strict=True)}


@dataclass(frozen=True)
class LabelOrder:
    """Best renaming of the predicted classes; the identity unless two vocabularies got mixed up."""

    permutation: tuple[int, ...]  # predicted code p most plausibly means class permutation[p]
    accuracy: float
    accuracy_permuted: float

    @property
    def suspicious(self) -> bool:
        """Renaming classes would gain more than 5 points: look at the label order."""
        return self.accuracy_permuted - self.accuracy > 0.05


def label_order(confusion: Ints) -> LabelOrder:
    """Label-order audit of counts (K, K): the permutation of predicted classes with most hits."""
    true, predicted = linear_sum_assignment(-confusion)
    meaning = np.empty(len(confusion), dtype=np.int64)
    meaning[predicted] = true
    best = float(confusion[true, predicted].sum() / confusion.sum())
    return LabelOrder(tuple(int(m) for m in meaning), float(accuracy(confusion)), best)


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean_present(values: Floats, subset: Sequence[int] | None) -> Floats:
    chosen = values if subset is None else values[..., list(subset)]
    present = ~np.isnan(chosen)
    total = np.where(present, chosen, 0.0).sum(-1)
    return _ratio(np.atleast_1d(total), np.atleast_1d(present.sum(-1))).reshape(total.shape)


def _binned(probs: Floats, labels: Ints) -> tuple[Floats, Floats, Ints]:
    """Confidence, correctness and bin (all (N,)); bins are (low, high], as in the source."""
    confidence = probs.max(1).astype(np.float64)
    right = (probs.argmax(1) == labels).astype(np.float64)
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return confidence, right, place


def _gaps(probs: Floats, labels: Ints) -> Floats:
    """Confidence minus correctness of each face in its bin's column (N, BINS), zero elsewhere."""
    confidence, right, place = _binned(probs, labels)
    gaps = np.zeros((len(labels), BINS))
    gaps[np.arange(len(labels)), place] = confidence - right
    return gaps


def _draws(faces: int, draws: int, seed: int) -> Iterator[Floats]:
    """Weights (D, N) of bootstrap draws: how often each face was drawn; D as memory allows."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_CELLS // faces)
    for first in range(0, draws, step):
        rows = min(step, draws - first)
        drawn = rng.integers(0, faces, size=(rows, faces)) + np.arange(rows)[:, None] * faces
        counts = np.bincount(drawn.ravel(), minlength=rows * faces)
        yield counts.reshape(rows, faces).astype(np.float64)


def _interval(values: Floats) -> Interval:
    """First value is of the full set, the rest are draws; NaN where nothing defines the value."""
    if np.isnan(values[0]):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.nanpercentile(values[1:], (2.5, 97.5)) if len(values) > 1 else values[[0, 0]]
    return Interval(float(values[0]), float(low), float(high))
