"""BADGE and GLISTER: faces by the gradient they would give the last layer.

With pseudo-label y = argmax p the gradient of the cross entropy is g = (p - onehot(y)) h^T: two
short factors, never K D numbers.

Cost: BADGE draws like k-means++, but by rejection from distances that may be out of date (upper
bounds, see nearest.py): the distribution is exact and a draw costs a few rows, not the pool; when
fewer than one draw in four is accepted, the whole pool is brought up to date. Memory: nearest.py's
and 2 K numbers per face. GLISTER passes three times over all embeddings in play for every face
chosen, in float32 (other types are copied), and holds 4 K + 6 float64 numbers per face.

Source: Ash et al., Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds (arXiv
1906.03671), algorithm 1; Killamsetty et al., GLISTER (arXiv 2012.10630), section 3.2, with the
diversity term and the settings that ActiveFER uses (arXiv 2307.02744).
Departs: BADGE's first face is the one of largest gradient, as in the released code; k-means++ would
draw it. GLISTER updates the validation gradient after every face (logits change by a matrix of
rank one), not once for several; the validation loss is a mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from pipeline.acquisition.interface import (
    Pool,
    Rows,
    in_play,
    required,
    taken,
)
from pipeline.acquisition.nearest import Nearest
from pipeline.errors import ConfigError

ETA = 0.01
LAM = 10.0
_DRAWS = 256  # proposals at once: their distances are one product
_ACCEPTED = 4  # one proposal in so many, or the pool is brought up to date


def badge(
    pool: Pool, budget: int, rng: np.random.Generator, *, candidates: int | None = None
) -> Rows:
    """k-means++ seeds of the gradients: large (unsure) and unlike one another.

    The first is the largest (ties: lowest row), each next one is drawn by `rng` with probability
    proportional to the squared distance to the nearest chosen one; uniformly once all distances
    are 0. Reads embeddings, probs. `candidates`: see interface.py.
    """
    embeddings = required(pool.embeddings, "badge", "embeddings (N, D)")
    probs = required(pool.probs, "badge", "probs (N, K)")
    # Labeled faces are carried along, for their weight 0: without a sample nothing is copied.
    rows = in_play(pool, budget, candidates, rng)
    p = probs[rows].astype(np.float32)
    near = Nearest(taken(embeddings, rows), p - _one_hot(p.argmax(axis=1), p.shape[1]), budget)
    return rows[_plus_plus(near, pool.labeled[rows], budget, rng)]


def _plus_plus(
    near: Nearest, closed: NDArray[np.bool_], budget: int, rng: np.random.Generator
) -> Rows:
    """Rows, less the closed ones, drawn by squared distance; `near` has no center yet."""
    first = int(np.where(closed, -1, near.norms()).argmax())
    chosen = [first]
    near.add(np.array([first]))
    near.bound[closed] = near.bound[first] = 0
    while len(chosen) < budget:
        near.refresh()
        weight = near.bound.astype(np.float64)
        total = weight.cumsum()
        if total[-1] <= 0:
            rest = np.setdiff1d(np.flatnonzero(~closed), chosen)
            chosen.extend(rng.choice(rest, budget - len(chosen), replace=False).tolist())
            break
        accepted, drawn = 0, 0
        # The weights drawn from stay what they were until the pool is brought up to date; a
        # proposal is accepted by what has become of its weight since.
        while len(chosen) < budget and accepted * _ACCEPTED >= drawn:
            draws = rng.random((_DRAWS, 2))
            at = np.searchsorted(total, draws[:, 0] * total[-1], side="right")
            at = np.minimum(at, len(total) - 1)
            before = len(chosen)
            near.refresh(np.unique(at))
            for row, lot in zip(at.tolist(), draws[:, 1].tolist(), strict=True):
                if len(chosen) == budget:
                    break
                if lot * weight[row] >= near.bound[row]:
                    continue
                near.refresh(np.array([row]))  # with those accepted a moment ago
                if lot * weight[row] < near.bound[row]:
                    chosen.append(row)
                    near.add(np.array([row]))
                    near.bound[row] = 0
            accepted, drawn = accepted + len(chosen) - before, drawn + _DRAWS
    return np.array(chosen, dtype=np.int64)


def glister(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    *,
    eta: float = ETA,
    lam: float = LAM,
    candidates: int | None = None,
) -> Rows:
    """Faces whose gradient step lowers the validation loss most, and that are unlike one another.

    Validation set: the labeled faces with their labels and the unlabeled ones with the model's. The
    last layer steps by -eta times the sum of the gradients (with bias) of labeled and chosen faces;
    the gain of face e is g_e . grad L - lam sum_chosen exp(-|g_e - g_s|^2 / 2), to first order.
    Ties: lowest row. Reads embeddings, probs and, where labeled, labels. `candidates`: see
    interface.py.

    Args:
        pool: as above; probs are of the same last layer, without another temperature.
        budget: faces to choose.
        rng: draws the candidates, nothing else.
        eta: length of the step.
        lam: strength of the diversity term; 0 leaves it out.
        candidates: unlabeled faces looked at; None for all.
    """
    embeddings = required(pool.embeddings, "glister", "embeddings (N, D)")
    probs = required(pool.probs, "glister", "probs (N, K)")
    rows = in_play(pool, budget, candidates, rng)
    labeled = pool.labeled[rows]
    p = probs[rows].astype(np.float64)
    codes = p.argmax(axis=1)
    if labeled.any():
        labels = required(pool.labels, "glister", "labels (N,) of the labeled faces")
        own = labels[rows[labeled]]
        if own.min() < 0 or own.max() >= p.shape[1]:
            raise ConfigError(
                f"acquisition glister: labels from {own.min()} to {own.max()}, expected codes "
                f"in [0, {p.shape[1]})"
            )
        codes[labeled] = own
    h = np.asarray(taken(embeddings, rows), np.float32)
    return rows[_greedy_steps(h, p, codes, labeled, budget, eta, lam)]


def _greedy_steps(
    h: np.ndarray,
    probs: np.ndarray,
    codes: np.ndarray,
    labeled: np.ndarray,
    budget: int,
    eta: float,
    lam: float,
) -> Rows:
    target = _one_hot(codes, probs.shape[1])
    a = probs - target  # (N, K); gradient a [h, 1]^T
    # Softmax ignores what is added to all logits of a face: log p will do.
    logits = np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    step, shift = a[labeled].T @ h[labeled], a[labeled].sum(axis=0)
    logits -= eta * (h @ step.T.astype(np.float32) + shift)
    norm = (np.einsum("nd,nd->n", h, h) + 1.0) * np.einsum("nk,nk->n", a, a)
    alike = np.zeros(len(h))  # sum over the chosen of exp(-distance^2 / 2)
    closed = labeled.copy()
    chosen: list[int] = []
    for _ in range(budget):
        residual = (np.exp(log_softmax(logits, axis=1)) - target) / len(h)
        slope = residual.T.astype(np.float32) @ h  # (K, D)
        gain = ((h @ slope.T + residual.sum(axis=0)) * a).sum(axis=1) - lam * alike
        gain[closed] = -np.inf
        e = int(gain.argmax())
        chosen.append(e)
        closed[e] = True
        inner = (h @ h[e] + 1.0).astype(np.float64)  # (N,)
        logits -= eta * inner[:, None] * a[e]
        apart = norm + norm[e] - 2 * (a @ a[e]) * inner
        alike += np.exp(-np.maximum(apart, 0) / 2)
    return np.array(chosen, dtype=np.int64)


def _one_hot(codes: np.ndarray, classes: int) -> np.ndarray:
    """Float32 (N, K)."""
    found = np.zeros((len(codes), classes), np.float32)
    found[np.arange(len(codes)), codes] = 1
    return found
