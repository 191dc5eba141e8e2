"""A multinomial logistic head on fixed features: what labels teach, in a tenth of a second.

What for: the search judges thresholds by the head that the selected faces train, instead of by a
network. Solver: SciPy's L-BFGS-B on the exact gradient; products in float32, sums in float64.
Cost: about 40 steps of 4 N D K multiplications from a start that fits nearly.
Source: linear evaluation of representations, arXiv 1805.01978, section 4.1.
Departs: weights per face, and a start that is given, so that a head depends on nothing but its
arguments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float32]
Weights = NDArray[np.float64]
Codes = NDArray[np.int64]

SCALE = 8.0
"""Features have length 1; multiplied by this they suit the solver's first step."""
STEPS = 100
TOLERANCE = 1e-6


def fit_head(
    x: Floats,
    labels: Codes,
    weights: Weights,
    classes: int,
    l2: float,
    start: Weights | None = None,
) -> Weights:
    """The head of least weighted cross entropy plus l2 / 2 of its squared weights, biases apart.

    Args:
        x: (N, D) features of unit length.
        labels: (N,) codes below `classes`; not every class needs a face.
        weights: (N,) not negative; they are divided by their sum.
        classes: K.
        l2: not negative.
        start: (K, D + 1) a head to start from; None: zeros.

    Returns:
        (K, D + 1) weights and, last, biases.
    """
    share = weights / weights.sum()
    scaled = x * np.float32(SCALE)
    rows = np.arange(len(x))

    def loss(flat: Weights) -> tuple[float, Weights]:
        head = flat.reshape(classes, -1)
        logits = _logits(head, scaled)
        logits -= logits.max(1, keepdims=True)
        own = logits[rows, labels].astype(np.float64)
        probs = np.exp(logits)
        total = probs.sum(1, keepdims=True)
        entropy = np.log(total[:, 0].astype(np.float64)) - own
        probs /= total
        probs[rows, labels] -= 1
        probs *= share[:, None].astype(np.float32)
        slope = np.empty_like(head)
        slope[:, :-1] = probs.T @ scaled + l2 * head[:, :-1]
        slope[:, -1] = probs.sum(0, dtype=np.float64)
        return float(share @ entropy + l2 / 2 * (head[:, :-1] ** 2).sum()), slope.ravel()

    first = np.zeros((classes, x.shape[1] + 1)) if start is None else start
    options = {"maxiter": STEPS, "ftol": TOLERANCE, "gtol": TOLERANCE}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x, np.float64).reshape(classes, -1)


def named(head: Weights, x: Floats) -> Codes:
    """Most probable class (N,) of features (N, D)."""
    return _logits(head, x * np.float32(SCALE)).argmax(1).astype(np.int64)


def _logits(head: Weights, scaled: Floats) -> Floats:
    single = head.astype(np.float32)
    return scaled @ single[:, :-1].T + single[:, -1]
