"""What every acquisition function takes and gives, and the checks they share.

A function is asked with a pool, a budget and a random generator and answers with the rows of as
many unlabeled faces, int64, in the order chosen, no row twice. A :class:`Pool` holds columns that
inference has made before; each function reads a few of them and refuses, in one line, a pool that
lacks one. The heavier functions take `candidates`: they then see the labeled faces and a uniform
random sample of that many unlabeled ones instead of all, and choose among these.

Cost of making a pool: one pass over each column that checks for values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
_Number = TypeVar("_Number", bound=np.generic)

ROUNDED = 0.02
"""How far the probabilities of a face may sum from 1: half precision loses this much."""


@dataclass(frozen=True)
class Pool:
    """Labeled and unlabeled faces together, N of them.

    Raises:
        ConfigError: a column of another length or shape, values that are not finite, or
            probabilities that are none (logits, for example).
    """

    labeled: Mask  # (N,)
    embeddings: Floats | None = None  # (N, D), any length; unit rows where a function says so
    probs: Floats | None = None  # (N, K), rows sum to 1
    passes: Floats | None = None  # (T, N, K), probs of T stochastic passes (dropout, ensemble)
    labels: NDArray[np.integer[Any]] | None = None  # (N,) codes in [0, K), read where labeled
    boundary: Floats | None = None  # (N,), see :func:`pipeline.acquisition.adversarial.boundary`

    def __post_init__(self) -> None:
        faces = len(self.labeled)
        shapes = {
            "labeled": (self.labeled, (faces,)),
            "embeddings": (self.embeddings, (faces, -1)),
            "probs": (self.probs, (faces, -1)),
            "passes": (self.passes, (-1, faces, -1)),
            "labels": (self.labels, (faces,)),
            "boundary": (self.boundary, (faces,)),
        }
        for name, (column, shape) in shapes.items():
            if column is None:
                continue
            fits = len(shape) == column.ndim and all(
                asked in (-1, found) for asked, found in zip(shape, column.shape, strict=True)
            )
            if not fits or not column.size:
                wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
                raise ConfigError(f"pool: {name} has shape {column.shape}, expected ({wanted})")
            # A sum is finite only where all it adds are, and needs no mask of the column's size.
            total = column.sum(dtype=np.float64)
            far = name == "boundary" and total == np.inf  # no boundary in reach: that is an answer
            if not np.isfinite(total) and not far:
                raise ConfigError(f"pool: {name} has values that are not finite")
        if self.labeled.dtype != np.bool_:
            raise ConfigError(f"pool: labeled is {self.labeled.dtype}, expected bool")
        for name, column in (("probs", self.probs), ("passes", self.passes)):
            if column is None:
                continue
            off = np.abs(column.sum(axis=-1, dtype=np.float32) - 1).max()
            if column.shape[-1] < 2 or column.min() < 0 or off > ROUNDED:
                raise ConfigError(
                    f"pool: {name} are no probabilities of two classes or more: least "
                    f"{column.min():.3g}, a face's sum is off 1 by up to {off:.3g}"
                )


Acquisition = Callable[[Pool, int, np.random.Generator], Rows]


def required(column: NDArray[_Number] | None, function: str, name: str) -> NDArray[_Number]:
    """The column, or ConfigError naming the function and what it needs."""
    if column is None:
        raise ConfigError(f"acquisition {function} needs {name}, which this pool lacks")
    return column


def unlabeled_rows(pool: Pool, budget: int, candidates: int | None = None) -> Rows:
    """Rows (U,) of the unlabeled faces, ascending.

    Raises:
        ConfigError: the budget is not in [1, U], or `candidates` is below the budget.
    """
    rows = np.flatnonzero(~pool.labeled)
    if not 1 <= budget <= len(rows):
        raise ConfigError(
            f"budget is {budget}, expected 1 to {len(rows)}, the unlabeled faces of the pool"
        )
    if candidates is not None and candidates < budget:
        raise ConfigError(f"candidates is {candidates}, expected the budget of {budget} or more")
    return rows


def sampled(rows: Rows, candidates: int | None, rng: np.random.Generator) -> Rows:
    """`candidates` of the rows, uniform without replacement, ascending; None or enough: all."""
    if candidates is None or candidates >= len(rows):
        return rows
    return np.sort(rng.choice(rows, candidates, replace=False))


def in_play(pool: Pool, budget: int, candidates: int | None, rng: np.random.Generator) -> Rows:
    """Rows (P,) of the labeled faces and the unlabeled ones, or `candidates` of those, ascending.

    Raises:
        ConfigError: as :func:`unlabeled_rows`.
    """
    seen = pool.labeled.copy()
    seen[sampled(unlabeled_rows(pool, budget, candidates), candidates, rng)] = True
    return np.flatnonzero(seen)


def taken(column: NDArray[_Number], rows: Rows) -> NDArray[_Number]:
    """`column[rows]`, and the column itself, not a copy, where these are all of its rows."""
    return column if len(rows) == len(column) else column[rows]


def lowest(scores: Floats, rows: Rows, budget: int) -> Rows:
    """The `budget` rows of least score (U,), least first; ties go to the lowest row."""
    return rows[np.argsort(scores, kind="stable")[:budget]]
