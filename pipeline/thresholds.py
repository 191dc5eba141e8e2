"""Confidence cuts and weights from out-of-fold predictions. Pure NumPy.

A cut for a target precision is read off the curve "precision of what lies at or above this
confidence". Curves of single classes are noisy (a dozen contempt faces in 2,500), so each is shrunk
toward the curve of all classes together, and a class with fewer than `min_positives` labeled faces
uses the pooled curve alone. One sort per class: milliseconds for thousands of faces.

Source: per-class thresholds for pseudo-labels, arXiv 2110.08263 (FlexMatch) section 3;
Gaussian weights, arXiv 2301.10921 (SoftMatch), truncated Gaussian.
Departs: cuts come from labeled out-of-fold faces, not from training progress; shrinkage is the
posterior mean under a Beta prior centered on the pooled curve; SoftMatch's mean and variance are
those of the whole pool instead of a moving average over batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

PRIOR = 20.0
"""Strength of the Beta prior, in faces."""

MIN_POSITIVES = 30
"""A class with fewer labeled faces never gets a cut of its own."""

NOTHING = 2.0
"""A cut above every confidence: the target is out of reach, nothing of the class is kept."""


@dataclass(frozen=True)
class Curve:
    """Estimated precision at every cut worth trying, for one class or for all together."""

    cuts: Floats  # (M,) ascending confidences
    precision: Floats  # (M,) of what lies at or above the cut, [0, 1]
    kept: Ints  # (M,) faces at or above the cut
    positives: int  # labeled faces of the class
    pooled: bool

    def at(self, target: float) -> tuple[float, float, int]:
        """Lowest cut whose precision reaches `target`, that precision, and the faces kept."""
        reached = np.flatnonzero(self.precision >= target)
        if not len(reached):
            return NOTHING, 0.0, 0
        first = reached[0]
        return float(self.cuts[first]), float(self.precision[first]), int(self.kept[first])


@dataclass(frozen=True)
class Cut:
    """Cut of one class."""

    code: int
    cut: float  # keep confidence >= cut; NOTHING where the target is out of reach
    positives: int
    kept: int  # out-of-fold faces at or above the cut on the curve used
    precision: float  # estimated, [0, 1]; 0 where nothing is kept
    pooled: bool  # True: the class was too small for its own curve


def precision_curves(
    confidence: Floats,
    predicted: Ints,
    labels: Ints,
    classes: int,
    prior: float = PRIOR,
    min_positives: int = MIN_POSITIVES,
    positives: Ints | None = None,
) -> list[Curve]:
    """Precision-at-cut curve of each class.

    Args:
        confidence: (N,) out-of-fold confidence, [0, 1].
        predicted: (N,) predicted codes.
        labels: (N,) true codes.
        classes: K.
        prior: strength of the Beta prior in faces; 0 trusts each class's own curve.
        min_positives: classes with fewer labeled faces use the pooled curve.
        positives: (K,) labeled faces per class where the rows given are only a part of them
            (another rule kept the rest out); default: counts of `labels`.

    Returns:
        K curves; precision at a cut is (right + prior * pooled) / (kept + prior).
    """
    right = predicted == labels
    count = np.bincount(labels, minlength=classes) if positives is None else positives
    everything = np.unique(confidence)
    pooled_right, pooled_kept = _above(confidence, right, everything)
    pooled = pooled_right / np.maximum(pooled_kept, 1)
    curves = []
    for code in range(classes):
        n = int(count[code])
        if n < min_positives:
            curves.append(Curve(everything, pooled, pooled_kept, n, True))
            continue
        own = predicted == code
        cuts = np.unique(confidence[own])
        hits, kept = _above(confidence[own], right[own], cuts)
        center = pooled[np.searchsorted(everything, cuts)]
        curves.append(Curve(cuts, (hits + prior * center) / (kept + prior), kept, n, False))
    return curves


def cuts_at(curves: list[Curve], target: float) -> list[Cut]:
    """One cut per class for a target precision in (0, 1]."""
    found = []
    for code, curve in enumerate(curves):
        cut, precision, kept = curve.at(target)
        found.append(Cut(code, cut, curve.positives, kept, precision, curve.pooled))
    return found


@dataclass(frozen=True)
class Estimate:
    """What an operating point is worth."""

    purity: float  # share of kept labels that are right, [0, 1]; 0 where nothing is kept
    utilization: float  # share of faces kept, [0, 1]
    precision: Floats  # (K,) per predicted class, shrunk toward all classes together
    kept: Ints  # (K,) labeled faces kept


def estimate(
    keep: Mask,
    predicted: Ints,
    labels: Ints,
    classes: int,
    prior: float = PRIOR,
    mix: NDArray[np.generic] | None = None,
) -> Estimate:
    """Purity and utilization of an operating point from out-of-fold rows.

    Args:
        keep: (N,) rows the operating point keeps.
        predicted: (N,) predicted codes.
        labels: (N,) true codes.
        classes: K.
        prior: strength in faces with which a class's precision is pulled to that of all kept rows.
        mix: (K,) kept pool faces per predicted class; purity is then the mean of the class
            precisions in the pool's proportions. None: the labeled rows' own proportions, unshrunk.
    """
    right = (predicted == labels) & keep
    kept = np.bincount(predicted[keep], minlength=classes)
    hits = np.bincount(predicted[right], minlength=classes)
    utilization = float(keep.mean()) if len(keep) else 0.0
    overall = float(hits.sum() / kept.sum()) if kept.sum() else 0.0
    precision = (hits + prior * overall) / np.maximum(kept + prior, 1e-9)
    purity = overall
    if mix is not None:
        weight = np.asarray(mix, dtype=np.float64)
        purity = float((weight * precision).sum() / weight.sum()) if weight.sum() else 0.0
    return Estimate(purity, utilization, precision, kept)


def gaussian_weight(confidence: Floats, mean: float, variance: float) -> Floats:
    """SoftMatch weight (N,) in (0, 1]: 1 from the mean up, falling off as a Gaussian below it.

    The variance is divided by 4 (two standard deviations), as in the released code.
    """
    below = np.minimum(np.asarray(confidence, dtype=np.float64) - mean, 0.0)
    weight = np.exp(-(below**2) / (2 * max(variance, 1e-12) / 4))
    return np.maximum(weight, np.finfo(np.float32).tiny)


def _above(confidence: Floats, right: Mask, cuts: Floats) -> tuple[Ints, Ints]:
    """Right and all faces at or above each cut (M,), ties kept together."""
    order = np.argsort(confidence, kind="stable")
    place = np.searchsorted(confidence[order], cuts, side="left")
    hits = np.concatenate(([0], np.cumsum(right[order])))
    return hits[-1] - hits[place], len(confidence) - place
