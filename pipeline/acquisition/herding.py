"""MaxHerding and Uncertainty Herding: faces that together resemble all others.

A face n is covered by max_s k(n, s) over labeled and chosen faces s; the gain of x is the mean over
all faces of what it would add. Gains only fall as faces are chosen (the coverage is submodular), so
a gain computed for fewer of them is an upper bound: only faces whose bound leads are computed
again, and a face whose gain is up to date and leads is the one that the plain greedy takes.

Cost, n faces in play: n^2 D multiplications and n^2 exponentials for the first gains, then a few
times as much in the first rounds, when every choice changes all gains. As soon as each face has
more resemblance to a chosen one than to most others, the pairs still worth anything are listed once
(another n^2 D) and the remaining choices cost next to nothing. Memory: the unit rows in play as
float32, blocks of 12 MB, and the list: 16 bytes for at most n^2 / 64 pairs, 2^26 at most.

Source: Bae et al., Generalized Coverage for More Robust Low-Budget Active Learning (arXiv
2407.12212), the greedy rule of MaxHerding; Bae et al., Uncertainty Herding (arXiv 2412.20644),
which multiplies each term by the uncertainty of the face covered, one less the margin.
Departs: exact lazy evaluation. Uncertainty Herding also fits a temperature and narrows its kernel
from round to round; here probs come calibrated (:func:`pipeline.losses.fit_temperature`) and sigma
is an argument. We could not read the papers' form of the kernel; ours is exp(-|x - y|^2 / sigma^2).
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from pipeline.acquisition.interface import (
    Pool,
    Rows,
    in_play,
    required,
    taken,
)
from pipeline.acquisition.uncertainty import margins
from pipeline.errors import ConfigError
from pipeline.similarity import unit

SIGMA = 1.0
_TILE = 1024
_REFRESHED = 64  # gains computed again at once: enough for a product
_SHARE = 64  # pairs are listed once fewer than one in so many is worth anything
_LISTED = 1 << 26
_EQUAL = 1e-5  # of a gain: two faces that resemble each other and nobody else gain the same
_NOISE = 1e-6  # of one face's coverage, for wide kernels
_PROBED = 256  # faces whose worthwhile pairs are counted to guess the number of all

Vectors = NDArray[np.float32]


def max_herding(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    *,
    sigma: float = SIGMA,
    candidates: int | None = None,
) -> Rows:
    """The face that adds most to mean_n max_s k(n, s), again and again.

    k(x, y) = exp(-|x - y|^2 / sigma^2) of unit embeddings; a row of zeros counts as orthogonal
    to all. Ties (gains that float32 cannot tell apart): lowest row. Reads embeddings.

    Args:
        pool: as above.
        budget: faces to choose.
        rng: draws the candidates, nothing else.
        sigma: width of the kernel, above 0; unit vectors are at most 2 apart.
        candidates: see interface.py; the mean runs over them and the labeled faces.
    """
    return _herd(pool, budget, rng, "max_herding", sigma, candidates)


def uncertainty_herding(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    *,
    sigma: float = SIGMA,
    candidates: int | None = None,
) -> Rows:
    """As :func:`max_herding`, each face n weighted by one less its margin. Reads probs too."""
    probs = required(pool.probs, "uncertainty_herding", "probs (N, K)")
    weight = 1 - margins(probs).astype(np.float32)
    return _herd(pool, budget, rng, "uncertainty_herding", sigma, candidates, weight)


def _herd(
    pool: Pool,
    budget: int,
    rng: np.random.Generator,
    function: str,
    sigma: float,
    candidates: int | None,
    weight: Vectors | None = None,
) -> Rows:
    embeddings = required(pool.embeddings, function, "embeddings (N, D)")
    if not sigma > 0:
        raise ConfigError(f"acquisition {function}: sigma is {sigma}, expected above 0")
    rows = in_play(pool, budget, candidates, rng)
    weight = np.ones(len(rows), np.float32) if weight is None else taken(weight, rows)
    herd = _Herd(unit(taken(embeddings, rows)), weight, pool.labeled[rows], sigma)
    return rows[herd.choose(budget)]


class _Herd:
    """Faces (n, D) in play, how well each is covered, and an upper bound of each one's gain."""

    def __init__(
        self, x: Vectors, weight: Vectors, labeled: NDArray[np.bool_], sigma: float
    ) -> None:
        self._x, self._weight, self._sigma = x, weight, sigma
        self._noise = _NOISE * max(1.0, 2 / sigma**2)
        self._covered = np.zeros(len(x), np.float32)  # max_s k(n, s), [0, 1]
        taken_rows = np.flatnonzero(labeled)
        for first in range(0, len(taken_rows), _TILE):
            theirs = taken_rows[first : first + _TILE]
            for at in range(0, len(x), _TILE):
                here = slice(at, at + _TILE)
                best = self._kernel(here, theirs).max(axis=1)
                np.maximum(self._covered[here], best, out=self._covered[here])
        self._bound = np.full(len(x), np.inf)
        self._bound[labeled] = -1
        self._refresh(np.flatnonzero(~labeled))
        self._fresh = np.zeros(len(x), np.int64)  # faces chosen when the bound was computed
        self.chosen: list[int] = []

    def choose(self, budget: int) -> Rows:
        """The greedy choice, (budget,) rows."""
        look = 1  # looking for the moment to list costs a few rows' gains: ever more rarely
        while len(self.chosen) < budget:
            if len(self.chosen) >= look:
                look = len(self.chosen) + 1 + len(self.chosen) // 4
                if self._worthwhile() <= min(len(self._x) ** 2 / _SHARE, _LISTED):
                    self._choose_listed(budget)
                    break
            best = self._best()
            if self._bound[best] <= self._noise:
                break
            self._take(best)
            for at in range(0, len(self._x), _TILE):
                here = slice(at, at + _TILE)
                like = self._kernel(here, np.array([best]))[:, 0]
                np.maximum(self._covered[here], like, out=self._covered[here])
        # Everything is covered, by copies for example: what is left adds nothing.
        self.chosen.extend(self._open()[: budget - len(self.chosen)].tolist())
        return np.array(self.chosen, dtype=np.int64)

    def _best(self) -> int:
        """The lowest row among those of largest gain, which are all brought up to date."""
        while True:
            lead = int(self._bound.argmax())
            if self._fresh[lead] < len(self.chosen):
                self._refresh(self._leading())
                continue
            equal = np.flatnonzero(self._bound >= self._equal(float(self._bound[lead])))
            stale = equal[self._fresh[equal] < len(self.chosen)]
            if not len(stale):
                return int(equal[0])
            self._fresh[stale] = len(self.chosen)
            self._refresh(stale)

    def _equal(self, gain: float) -> float:
        """Least gain that float32 cannot tell from this one."""
        return max(gain - max(_EQUAL * gain, self._noise), 0.0)

    def _take(self, face: int) -> None:
        self.chosen.append(face)
        self._bound[face] = -1

    def _leading(self) -> Rows:
        """The rows of largest bound among those that are out of date."""
        stale = np.where(self._fresh < len(self.chosen), self._bound, -1)
        first = max(len(stale) - _REFRESHED, 0)
        rows = np.argpartition(stale, first)[first:]
        rows = rows[stale[rows] >= 0]
        self._fresh[rows] = len(self.chosen)
        return rows

    def _kernel(self, here: slice, rows: Rows) -> Vectors:
        like = self._x[here] @ self._x[rows].T
        like -= 1
        like *= 2 / self._sigma**2  # |x - y|^2 = 2 - 2 x.y
        return np.exp(like, out=like)

    def _refresh(self, rows: Rows) -> None:
        for first in range(0, len(rows), _TILE):
            theirs = rows[first : first + _TILE]
            gain = np.zeros(len(theirs))
            for at in range(0, len(self._x), _TILE):
                here = slice(at, at + _TILE)
                more = self._kernel(here, theirs)
                more -= self._covered[here, None]
                np.maximum(more, 0, out=more)
                gain += self._weight[here] @ more
            # Rounding must not let a bound rise.
            self._bound[theirs] = np.minimum(self._bound[theirs], gain)

    def _open(self) -> Rows:
        return np.flatnonzero(self._bound >= 0)

    def _worthwhile(self) -> float:
        """About how many pairs (n, y) still have k(n, y) above what covers n; y may be chosen."""
        rows = self._open()
        probe = rows[:: max(1, len(rows) // _PROBED)]
        found = 0
        for at in range(0, len(self._x), _TILE):
            here = slice(at, at + _TILE)
            found += int((self._kernel(here, probe) > self._covered[here, None]).sum())
        return found * len(rows) / len(probe)

    def _choose_listed(self, budget: int) -> None:
        """Go on with the list of worthwhile pairs: bounds in a heap, gains from a face's pairs."""
        rows = self._open()
        start = np.zeros(len(self._x) + 1, np.int64)
        faces: list[NDArray[np.int32]] = []
        likes: list[Vectors] = []
        for first in range(0, len(rows), _TILE):
            theirs = rows[first : first + _TILE]
            y, n, like = self._pairs(theirs)
            start[theirs + 1] = np.bincount(y, minlength=len(theirs))
            faces.append(n)
            likes.append(like)
        start = np.cumsum(start)
        others, like = np.concatenate(faces), np.concatenate(likes)
        queue = [(-float(self._bound[row]), int(row), -1) for row in rows]
        heapq.heapify(queue)
        equal: list[tuple[float, int, int]] = []  # up to date, largest gain first
        while len(self.chosen) < budget:
            if queue and (not equal or -queue[0][0] >= self._equal(-equal[0][0])):
                bound, row, when = heapq.heappop(queue)
                if when < len(self.chosen):
                    own = slice(start[row], start[row + 1])
                    more = np.maximum(like[own] - self._covered[others[own]], 0)
                    gain = min(float(self._weight[others[own]] @ more), -bound)
                    heapq.heappush(queue, (-gain, row, len(self.chosen)))
                else:
                    equal.append((bound, row, when))
                continue
            if -equal[0][0] <= self._noise:
                break
            best = min(equal, key=lambda entry: entry[1])
            for entry in equal:
                if entry is not best:
                    heapq.heappush(queue, entry)
            equal.clear()
            own = slice(start[best[1]], start[best[1] + 1])
            self._take(best[1])
            self._covered[others[own]] = np.maximum(self._covered[others[own]], like[own])

    def _pairs(self, rows: Rows) -> tuple[Rows, NDArray[np.int32], Vectors]:
        """Worthwhile pairs of these rows, by place in `rows`: place, face and likeness, (P,)."""
        places, faces, likes = [], [], []
        for at in range(0, len(self._x), _TILE):
            here = slice(at, at + _TILE)
            like = self._kernel(here, rows).T
            place, face = np.nonzero(like > self._covered[here])
            places.append(place)
            faces.append((face + at).astype(np.int32))
            likes.append(like[place, face])
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        return place[order], np.concatenate(faces)[order], np.concatenate(likes)[order]
