"""Squared distance of every face to the nearest of a growing set of centers, exact and lazy.

A distance to the nearest center only falls as centers are added. So what was computed for fewer
centers is an upper bound, and who asks for a few faces needs those few brought up to date. A center
meets a face at most once, in matrix products of many faces and many centers, never N x N at a time.

Faces may be vectors h, or outer products a h^T that are compared without being formed (the last
layer's gradient of a face is one, of K D numbers):
|a_i h_i^T - a_j h_j^T|^2 = |a_i|^2 |h_i|^2 + |a_j|^2 |h_j|^2 - 2 (a_i . a_j)(h_i . h_j).

Cost: 2 (D + K) operations a pair that is asked for. Memory: 12 bytes per face, the centers' rows as
float32, and blocks of 40 MB for 512 dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.acquisition.interface import Rows

Floats32 = NDArray[np.float32]

_FACES = 4096  # faces and
_CENTERS = 1024  # centers of one product
_SAME = 4e-6  # of both norms: float32 cannot tell a smaller squared distance from none


class Outer(NamedTuple):
    """Rows a_i h_i^T in two factors; without `a` they are the vectors h_i."""

    h: Floats32  # (R, D)
    a: Floats32 | None  # (R, K)
    norm: Floats32  # (R,) squared length


def outer(h: NDArray[np.floating[Any]], a: NDArray[np.floating[Any]] | None) -> Outer:
    """These rows as float32, with their lengths."""
    h = np.ascontiguousarray(h, np.float32)
    norm = np.einsum("nd,nd->n", h, h)
    if a is None:
        return Outer(h, None, norm)
    a = np.ascontiguousarray(a, np.float32)
    return Outer(h, a, norm * np.einsum("nk,nk->n", a, a))


def nearest_squared(x: Outer, y: Outer) -> Floats32:
    """Least squared distance (R,) of each row to the rows of `y`.

    At least 0; 0 where float32 cannot tell the rows apart.
    """
    product = x.h @ y.h.T
    if x.a is not None and y.a is not None:
        product *= x.a @ y.a.T
    product *= -2
    product += y.norm
    least = product.min(axis=1) + x.norm
    least[least < 2 * _SAME * x.norm] = 0
    return least


class Nearest:
    """Squared distances of N rows to the nearest of up to `capacity` centers among them."""

    def __init__(
        self,
        h: NDArray[np.floating[Any]],
        a: NDArray[np.floating[Any]] | None,
        capacity: int,
    ) -> None:
        """Rows h (N, D), or a h^T with a (N, K), of any floating type; they are not copied."""
        self._h, self._a = h, a
        self.bound = np.full(len(h), np.inf, np.float32)
        """(N,) at least the squared distance; equal to it where refreshed since the last center."""
        self.count = 0
        self._seen = np.zeros(len(h), np.int32)
        width = None if a is None else np.empty((capacity, a.shape[1]), np.float32)
        self._centers = Outer(
            np.empty((capacity, h.shape[1]), np.float32), width, np.empty(capacity, np.float32)
        )

    def at(self, rows: Rows | slice) -> Outer:
        """These rows, converted."""
        return outer(self._h[rows], None if self._a is None else self._a[rows])

    def norms(self) -> Floats32:
        """Squared lengths (N,) of all rows, by blocks."""
        blocks = range(0, len(self.bound), _FACES)
        return np.concatenate([self.at(slice(at, at + _FACES)).norm for at in blocks])

    def add(self, rows: Rows) -> None:
        """Make these rows centers."""
        for first in range(0, len(rows), _FACES):
            part = self.at(rows[first : first + _FACES])
            here = slice(self.count, self.count + len(part.h))
            self._centers.h[here], self._centers.norm[here] = part.h, part.norm
            if self._centers.a is not None and part.a is not None:
                self._centers.a[here] = part.a
            self.count += len(part.h)

    def refresh(self, rows: Rows | None = None, until: int | None = None) -> None:
        """Bring `rows` (ascending; None: all) up to date with the first `until` centers (all)."""
        until = self.count if until is None else min(until, self.count)
        if rows is None:
            rows = np.arange(len(self.bound))
        rows = rows[self._seen[rows] < until]
        seen = self._seen[rows]
        # Faces that have met the same centers stay together: one product for all of them.
        order = np.argsort(seen, kind="stable")
        for group in np.split(rows[order], np.flatnonzero(np.diff(seen[order])) + 1):
            for first in range(0, len(group), _FACES):
                self._meet(group[first : first + _FACES], until)

    def _meet(self, rows: Rows, until: int) -> None:
        if not len(rows):
            return
        whole = rows[-1] - rows[0] + 1 == len(rows)  # neighbors in memory: no copy
        x = self.at(slice(rows[0], rows[-1] + 1) if whole else rows)
        least = self.bound[rows]
        for first in range(int(self._seen[rows[0]]), until, _CENTERS):
            part = slice(first, min(first + _CENTERS, until))
            a = None if self._centers.a is None else self._centers.a[part]
            y = Outer(self._centers.h[part], a, self._centers.norm[part])
            np.minimum(least, nearest_squared(x, y), out=least)
        self.bound[rows], self._seen[rows] = least, until

    def keep(self, rows: Rows, squared: Floats32) -> None:
        """Set distances that the caller has brought up to date with all centers himself."""
        self.bound[rows], self._seen[rows] = squared, self.count
