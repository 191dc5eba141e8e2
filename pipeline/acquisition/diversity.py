"""CoreSet: faces far from everything labeled or chosen, by greedy k-centers.

Cost: the plain greedy compares every face with every center, budget times through the whole pool.
Here only faces that may be the farthest are brought up to date (see nearest.py), the most promising
4,096 at a time, which stay in the cache while centers are drawn from them; the choice is that of
the plain greedy. Never more than N (|L| + budget) D multiplications. Memory: nearest.py's, and the
front's rows, 8 MB for 512 dimensions.

Source: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach
(arXiv 1708.00489), algorithm 1, k-Center-Greedy.
"""

from __future__ import annotations

import numpy as np

from pipeline.acquisition.interface import (
    Floats,
    Pool,
    Rows,
    in_play,
    required,
    taken,
)
from pipeline.acquisition.nearest import Nearest, Outer, nearest_squared

_FRONT = 4096
_FIRST = 256  # labeled faces that all faces meet before any is preferred


def coreset(
    pool: Pool, budget: int, rng: np.random.Generator, *, candidates: int | None = None
) -> Rows:
    """The face farthest from its nearest labeled or chosen one, again and again.

    Euclidean distance of embeddings as they are. Ties: lowest row. Without labeled faces the first
    is drawn uniformly by `rng`. Reads embeddings. `candidates`: see interface.py.
    """
    embeddings = required(pool.embeddings, "coreset", "embeddings (N, D)")
    rows = in_play(pool, budget, candidates, rng)
    labeled = np.flatnonzero(pool.labeled[rows])
    return rows[_k_centers(taken(embeddings, rows), labeled, budget, rng)]


def _k_centers(x: Floats, labeled: Rows, budget: int, rng: np.random.Generator) -> Rows:
    near = Nearest(x, None, len(labeled) + budget)
    chosen: list[int] = []
    if len(labeled):
        near.add(labeled)
    else:
        chosen.append(int(rng.integers(len(x))))
        near.add(np.array(chosen))
    near.refresh(until=_FIRST)
    near.keep(labeled, np.full(len(labeled), -1, np.float32))
    near.keep(np.array(chosen, np.int64), np.full(len(chosen), -1, np.float32))
    while len(chosen) < budget:
        front, others, first_other = _front(near.bound)
        near.refresh(front)
        x_front, least = near.at(front), near.bound[front]
        while len(chosen) < budget:
            j = int(least.argmax())
            if least[j] < others or (least[j] == others and front[j] > first_other):
                break  # a face outside may be farther or, as far, come first
            chosen.append(int(front[j]))
            near.add(front[j : j + 1])
            a_center = Outer(x_front.h[j : j + 1], None, x_front.norm[j : j + 1])
            np.minimum(least, nearest_squared(x_front, a_center), out=least)
            least[j] = -1
        near.keep(front, least)
    return np.array(chosen, dtype=np.int64)


def _front(bound: np.ndarray) -> tuple[Rows, float, int]:
    """Rows of largest bound, ascending; a bound of all others, and the first other that has it."""
    if len(bound) <= _FRONT:
        return np.arange(len(bound)), -np.inf, len(bound)
    least = np.partition(bound, len(bound) - _FRONT)[len(bound) - _FRONT]
    above, equal = np.flatnonzero(bound > least), np.flatnonzero(bound == least)
    inside = equal[: _FRONT - len(above)]
    outside = equal[len(inside) :]
    front = np.sort(np.concatenate([above, inside]))
    return front, float(least), int(outside[0]) if len(outside) else len(bound)
