"""From the votes of several raters to one label and a soft label per face.

Votes are counts (N, K + 2): K emotions in any fixed order, then `unknown` and `not a face`. Every
rule first sets single votes to 0; shares are of what is left in all K + 2 columns. Vectorized over
faces; a million rows take seconds.

Source: Barsoum et al., Training Deep Networks for Facial Expression Recognition with Crowd-Sourced
    Label Distribution, arXiv 1608.01041, section 3.
Departs: the `probability` rule of the paper draws one label per epoch; here it yields the
    distribution to draw from, and the label is its largest entry (the first one on a tie).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

Rule = Literal["majority", "probability", "multi_target"]

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

    A face is dropped where no emotion reaches that share, or where unknown or not-a-face is ahead
    of every emotion.

    Args:
        votes: counts (N, K + 2).

    Returns:
        labels and soft labels as in :func:`majority`; the soft label covers the emotions that
        reach the share.
    """
    cleaned = drop_single_votes(votes)
    emotions = cleaned[:, :-NOT_EMOTIONS]
    enough = emotions >= TARGET_SHARE * cleaned.sum(axis=1, keepdims=True)
    entered = np.where(enough, emotions, 0.0)
    return _labeled(entered, (entered.sum(axis=1) > 0) & _emotion_leads(cleaned))


RULES: Mapping[Rule, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "majority": majority,
    "probability": probability,
    "multi_target": multi_target,
}


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
