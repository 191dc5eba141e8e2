"""Chosen faces instead of learned images: random, herding, k-center.

What for: the baselines that a learned set has to beat at the same number of images; they cost an
embedding of every face. Faces come class after class, `ipc` of each; where a class has too few,
they come again from the first.
Source: herding: Welling 2009, as used for exemplars in iCaRL (arXiv 1611.07725, algorithm 4);
k-center: greedy farthest-first traversal, Sener and Savarese (arXiv 1708.00489, algorithm 1).
Departs: k-center starts from the face nearest to its class mean, so that nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Choose = Callable[[Floats, int, np.random.Generator], Ints]
"""Embeddings (n, D) of one class's faces, how many, a generator -> positions, at most n."""


def choose(
    method: str,
    labels: Ints,
    embeddings: Floats | None,
    classes: int,
    ipc: int,
    rng: np.random.Generator,
) -> Ints:
    """Positions (K * ipc,) of the faces that stand for each class.

    Args:
        method: a name of :data:`CORESETS`.
        labels: class codes (N,).
        embeddings: unit embeddings (N, D); may be None for `random`.
        classes: K.
        ipc: faces per class.
        rng: what `random` draws from.

    Raises:
        LabelError: a class without a face.
    """
    found = []
    for code in range(classes):
        rows = np.flatnonzero(labels == code)
        if len(rows) == 0:
            raise LabelError(f"distill: class {code} has no face to choose from")
        own = np.zeros((len(rows), 1), np.float32) if embeddings is None else embeddings[rows]
        order = CORESETS[method](own, min(ipc, len(rows)), rng)
        found.append(np.resize(rows[order], ipc))
    return np.concatenate(found)


def random(embeddings: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Any faces, each at most once."""
    return rng.permutation(len(embeddings))[:count]


def herding(embeddings: Floats, count: int, rng: np.random.Generator) -> Ints:
    """One by one the face that brings the mean of the chosen ones nearest to the class mean."""
    mean, total = embeddings.mean(0), np.zeros(embeddings.shape[1])
    left = np.ones(len(embeddings), bool)
    chosen = []
    squares = (embeddings**2).sum(1)
    for number in range(1, count + 1):
        # |(total + x) / number - mean|^2 up to what is the same for all x.
        wanted = number * mean - total
        cost = np.where(left, squares - 2 * embeddings @ wanted, np.inf)
        best = int(cost.argmin())
        chosen.append(best)
        left[best] = False
        total = total + embeddings[best]
    return np.array(chosen, np.int64)


def k_center(embeddings: Floats, count: int, rng: np.random.Generator) -> Ints:
    """The face nearest to the class mean, then one by one the one farthest from all chosen."""
    gap = ((embeddings - embeddings.mean(0)) ** 2).sum(1)
    chosen = [int(gap.argmin())]
    nearest = np.full(len(embeddings), np.inf)
    for _ in range(1, count):
        nearest = np.minimum(nearest, ((embeddings - embeddings[chosen[-1]]) ** 2).sum(1))
        nearest[chosen[-1]] = -1.0  # copies of a chosen face go before the face itself
        chosen.append(int(nearest.argmax()))
    return np.array(chosen, np.int64)


CORESETS: Mapping[str, Choose] = {"random": random, "herding": herding, "k_center": k_center}
