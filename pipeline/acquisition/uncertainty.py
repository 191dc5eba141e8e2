"""Faces the model is unsure of, each judged by itself; and random faces, the baseline.

Cost: one pass over (N, K) probabilities and one sort; BALD one over (T, N, K), in blocks.

Source: the functions that Roy and Etemad compare, Active Learning with Contrastive Pre-training
for Facial Expression Recognition (arXiv 2307.02744). Entropy, margin and least confidence: Settles,
Active Learning Literature Survey (2009), section 3.1. BALD: Houlsby et al., Bayesian Active
Learning for Classification and Preference Learning (arXiv 1112.5745), eq. 1, estimated from dropout
passes as in Gal et al., Deep Bayesian Active Learning with Image Data (arXiv 1703.02910).
Departs: 0 log 0 is 0 (the released code has NaN there). BALD wants passes that differ by dropout or
by the members of an ensemble: a released loop runs a network without dropout in training mode and
so measures batch statistics.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from pipeline.acquisition.interface import Floats, Pool, Rows, lowest, required, unlabeled_rows

_BLOCK = 1 << 16  # faces whose passes are converted to float64 at once


def random(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """Unlabeled faces drawn uniformly without replacement. Reads no column."""
    return rng.choice(unlabeled_rows(pool, budget), budget, replace=False)


def entropy(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """The faces of largest entropy -sum_k p_k log p_k. Ties: lowest row. Reads probs."""
    rows = unlabeled_rows(pool, budget)
    probs = required(pool.probs, "entropy", "probs (N, K)")
    return lowest(-entropies(probs[rows]), rows, budget)


def margin(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """The faces of smallest gap between the two best classes. Ties: lowest row. Reads probs."""
    rows = unlabeled_rows(pool, budget)
    probs = required(pool.probs, "margin", "probs (N, K)")
    return lowest(margins(probs[rows]), rows, budget)


def least_confidence(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """The faces whose best class has the least probability. Ties: lowest row. Reads probs."""
    rows = unlabeled_rows(pool, budget)
    probs = required(pool.probs, "least_confidence", "probs (N, K)")
    return lowest(probs[rows].max(axis=1), rows, budget)


def bald(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """The faces whose label says most about the model's weights. Ties: lowest row. Reads passes.

    Mutual information H[mean_t p_t] - mean_t H[p_t]: passes that are each sure and do not agree.
    """
    rows = unlabeled_rows(pool, budget)
    passes = required(pool.passes, "bald", "passes (T, N, K), probs of T stochastic passes")
    return lowest(-mutual_information(passes)[rows], rows, budget)


def entropies(probs: Floats) -> NDArray[np.float64]:
    """Entropy (...), nats in [0, log K], of probabilities (..., K)."""
    return entr(probs.astype(np.float64)).sum(axis=-1)


def margins(probs: Floats) -> Floats:
    """Best less second best probability (N,), in [0, 1], of (N, K)."""
    best = np.partition(probs, -2, axis=1)[:, -2:]
    return best[:, 1] - best[:, 0]


def mutual_information(passes: Floats) -> NDArray[np.float64]:
    """BALD's score (N,), nats in [0, log K], of passes (T, N, K)."""
    found = np.empty(passes.shape[1])
    for first in range(0, len(found), _BLOCK):
        part = passes[:, first : first + _BLOCK].astype(np.float64)
        found[first : first + _BLOCK] = entropies(part.mean(axis=0)) - entropies(part).mean(axis=0)
    return found
