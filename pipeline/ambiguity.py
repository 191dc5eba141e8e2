"""From votes or probabilities to one label, a soft label and a candidate set per face.

Votes are counts (N, K + 2): K emotions in any fixed order, then `unknown` and `not a face`. Every
rule first sets single votes to 0; shares are of what is left in all K + 2 columns. A face's
candidates are the classes that its soft label gives anything to, so that each rule has its own:
`voted` all that raters agreed on, `probability` three at most, `multi_target` those of a share.
Where nobody voted, sets come from probabilities that a model gave to faces it has not seen: the
classes near the top (derived from single labels, never human ambiguity), the classes that cover a
share of the probability, or conformal sets, which hold the truth as often as asked for. Vectorized
over faces; a million rows take seconds.

Source: Barsoum et al., Training Deep Networks for Facial Expression Recognition with Crowd-Sourced
    Label Distribution, arXiv 1608.01041, section 3. Split-conformal sets: LAC, Sadinle, Lei and
    Wasserman, arXiv 1609.00451; APS, Romano, Sesia and Candes, arXiv 2006.02544, section 2.
Departs: the `probability` rule of the paper draws one label per epoch; here it yields the
    distribution to draw from, and the label is its largest entry (the first one on a tie). APS is
    not randomized: a face has one set, a little larger than it must be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

Rule = Literal["majority", "probability", "multi_target", "voted"]
Conformal = Literal["lac", "aps"]

NOT_EMOTIONS = 2
"""Trailing columns of a vote table that are no emotion: unknown, not a face."""

MAJORITY = 0.5
COVERED = 0.75
MAX_CLASSES = 3
TARGET_SHARE = 0.3


def drop_single_votes(votes: np.ndarray) -> np.ndarray:
    """Votes (N, K + 2) float64 with every single vote set to 0."""
    cleaned = np.asarray(votes, dtype=np.float64)
    return np.where(cleaned <= 1, 0.0, cleaned)


def majority(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One emotion with more than half of the votes.

    Args:
        votes: counts (N, K + 2).

    Returns:
        labels (N,) int64 in [0, K), -1 where the face is dropped; soft labels (N, K) float32, the
        emotions' shares of their own votes: they sum to 1, or are all 0 where dropped.
    """
    cleaned = drop_single_votes(votes)
    emotions = cleaned[:, :-NOT_EMOTIONS]
    keep = cleaned.max(axis=1) > MAJORITY * cleaned.sum(axis=1)
    keep &= cleaned.argmax(axis=1) < emotions.shape[1]
    return _labeled(emotions, keep)


def probability(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most voted classes until three quarters of the votes are covered, three at most.

    Classes with equal votes enter together; more than three drop the face. The adding stops at
    unknown or not-a-face, which never enter. Half of the votes or less covered, or unknown or
    not-a-face ahead of every emotion: dropped.

    Args:
        votes: counts (N, K + 2).

    Returns:
        labels and soft labels as in :func:`majority`; the soft label covers the classes that
        entered.
    """
    cleaned = drop_single_votes(votes)
    total = cleaned.sum(axis=1)
    classes = cleaned.shape[1] - NOT_EMOTIONS
    left = cleaned.copy()
    taken = np.zeros((len(cleaned), classes), dtype=bool)
    adding = total > 0
    for _ in range(MAX_CLASSES):
        top = left.max(axis=1)
        level = (left == top[:, None]) & ((top > 0) & adding)[:, None]
        taken |= level[:, :classes]
        left[level] = 0.0
        covered = np.where(taken, cleaned[:, :classes], 0.0).sum(axis=1)
        adding &= ~level[:, classes:].any(axis=1)
        adding &= (covered < COVERED * total) & (taken.sum(axis=1) < MAX_CLASSES)
    entered = np.where(taken, cleaned[:, :classes], 0.0)
    keep = (entered.sum(axis=1) > MAJORITY * total) & (taken.sum(axis=1) <= MAX_CLASSES)
    return _labeled(entered, keep & _emotion_leads(cleaned))


def multi_target(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every emotion with at least three tenths of the votes is a right answer.

    A face is dropped where the columns that reach that share, unknown and not-a-face among them,
    hold half of the votes or less together, or where one of these two is ahead of every emotion.

    Args:
        votes: counts (N, K + 2).

    Returns:
        labels and soft labels as in :func:`majority`; the soft label covers the emotions that
        reach the share.
    """
    cleaned = drop_single_votes(votes)
    total = cleaned.sum(axis=1)
    entered = np.where(cleaned >= TARGET_SHARE * total[:, None], cleaned, 0.0)
    keep = (entered.sum(axis=1) > MAJORITY * total) & _emotion_leads(cleaned)
    return _labeled(entered[:, :-NOT_EMOTIONS], keep)


def voted(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every face with any vote for an emotion, its label the most voted one.

    Dropped are faces that unknown or not-a-face leads, by the votes as they came. Where no emotion
    has more than a single vote, the single votes count: they are all there is.

    Args:
        votes: counts (N, K + 2).

    Returns:
        labels and soft labels as in :func:`majority`.
    """
    counts = np.asarray(votes, dtype=np.float64)
    emotions = drop_single_votes(counts)[:, :-NOT_EMOTIONS]
    lonely = ~emotions.any(axis=1, keepdims=True)
    emotions = np.where(lonely, counts[:, :-NOT_EMOTIONS], emotions)
    return _labeled(emotions, emotions.any(axis=1) & _emotion_leads(counts))


RULES: Mapping[Rule, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "majority": majority,
    "probability": probability,
    "multi_target": multi_target,
    "voted": voted,
}


# -- candidate sets -------------------------------------------------------------------------------


def within(soft: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) float32 of the candidates alone, rows summing to 1.

    Args:
        soft: probabilities (N, K).
        candidates: (N, K) bool, at least one in each row; a row whose candidates have no
            probability at all shares it among them alike.
    """
    inside = np.where(candidates, np.asarray(soft, np.float64), 0.0)
    inside = np.where(inside.any(axis=1, keepdims=True), inside, candidates)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def near_top(probs: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    """Derived sets (N, K) bool: the label and what is `ratio` times as probable as the top class.

    Args:
        probs: probabilities (N, K) of models that have not seen the faces.
        labels: their codes (N,).
        ratio: (0, 1].
    """
    near = probs >= ratio * probs.max(axis=1, keepdims=True)
    near[np.arange(len(labels)), labels] = True
    return near


def cumulative_sets(probs: np.ndarray, coverage: float) -> np.ndarray:
    """The fewest most probable classes (N, K) bool that hold `coverage` of the probability.

    Args:
        probs: probabilities (N, K).
        coverage: (0, 1]; 1 takes every class that is not impossible.
    """
    order, before = _ranked(probs)
    # float32 rows sum to 1 only nearly: a class must have something to add.
    taken = (before < coverage) & (np.take_along_axis(probs, order, 1) > 0)
    taken[:, 0] = True
    return _unranked(order, taken)


def conformal_cut(probs: np.ndarray, labels: np.ndarray, coverage: float, rule: Conformal) -> float:
    """The score up to which a class is in the set, from faces that the model has not seen.

    The k-th smallest score of the true classes, k = ceil((n + 1) * coverage); the set of a face
    drawn as these were holds its true class with a chance of at least `coverage`. Infinite, so that
    sets hold everything, where n faces are too few for it.

    Args:
        probs: probabilities (n, K).
        labels: true codes (n,).
        coverage: (0, 1).
        rule: lac: 1 - the class's probability; aps: the probability of all classes down to it.
    """
    scores = np.sort(_scores(probs, rule)[np.arange(len(labels)), labels])
    place = int(np.ceil((len(labels) + 1) * coverage - 1e-9))
    return float(scores[place - 1]) if place <= len(labels) else float("inf")


def conformal_sets(probs: np.ndarray, cut: float, rule: Conformal) -> np.ndarray:
    """Sets (N, K) bool of the classes whose score is at most `cut`; the top class is always in.

    Args:
        probs: probabilities (N, K), of the kind that the cut was made on.
        cut: of :func:`conformal_cut`.
        rule: the same.
    """
    taken = _scores(probs, rule) <= cut
    taken[np.arange(len(probs)), probs.argmax(axis=1)] = True
    return taken


def _scores(probs: np.ndarray, rule: Conformal) -> np.ndarray:
    values = np.asarray(probs, dtype=np.float64)
    if rule == "lac":
        return 1 - values
    order, before = _ranked(values)
    return _unranked(order, before + np.take_along_axis(values, order, 1))


def _ranked(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes (N, K), the most probable first, and the probability before each of them."""
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(np.asarray(probs, np.float64), order, 1)
    return order, np.cumsum(ranked, axis=1) - ranked


def _unranked(order: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Values (N, K) by class of values by rank."""
    values = np.empty_like(ranked)
    np.put_along_axis(values, order, ranked, 1)
    return values


def _emotion_leads(cleaned: np.ndarray) -> np.ndarray:
    """Whether (N,) no other column has more votes than the first emotion."""
    best = cleaned[:, :-NOT_EMOTIONS].max(axis=1)
    return best >= cleaned[:, -NOT_EMOTIONS:].max(axis=1)


def _labeled(emotions: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and soft labels (N, K) of emotion votes; -1 and 0 where not kept."""
    total = emotions.sum(axis=1, keepdims=True)
    shares = np.divide(emotions, total, out=np.zeros_like(emotions), where=total > 0)
    labels = np.where(keep, emotions.argmax(axis=1), -1).astype(np.int64)
    return labels, np.where(keep[:, None], shares, 0.0).astype(np.float32)
