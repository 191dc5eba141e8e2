"""Procedural gray faces with known expressions: any number, without a disk or a download.

Every face is a pure function of (seed, index): all randomness is a counter hashed by splitmix64,
so a face does not depend on which others are asked for with it. An identity sets the shapes
(head, jaw, eyes, brows, nose, hair, skin), the face adds pose, light, blur and noise, and one of
the eight expressions moves brows, lids and mouth by its intensity. Weak expressions look neutral
and raters disagree about them, so nobody reaches 100 %. About 1,600 faces of 48 px per second and
core.

Source: which muscles an expression moves follows the Facial Action Coding System (Ekman and
    Friesen 1978; prototypes as in Du, Tao and Martinez 2014, table 1). splitmix64: Steele, Lea and
    Flood 2014.
Departs: drawings, not photographs. Nothing learned here transfers to people; they prove that a
    pipeline works, not that a model does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.schema import EMOTIONS

IDENTITIES = 4096
PRIOR = (0.33, 0.25, 0.13, 0.12, 0.05, 0.03, 0.07, 0.02)
"""Share of each emotion, about that of web faces."""

MOVES = (
    "brow_inner",  # up
    "brow_outer",  # up
    "knit",  # brows together, frown lines
    "lids",  # upper lid up
    "squint",  # lower lid up
    "corners",  # mouth corners up
    "width",  # mouth wider
    "open",  # jaw down
    "teeth",
    "lip",  # upper lip up, nose wrinkled
    "press",  # lips thinner
    "smirk",  # one corner up
)
PROTOTYPES = np.array(
    [
        #  bi    bo    kn    li    sq    co    wi    op    te    up    pr    sm
        [0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00],
        [0.10, 0.10, 0.00, 0.00, 0.70, 1.00, 0.80, 0.35, 1.00, 0.20, 0.00, 0.00],
        [0.90, -0.40, 0.50, -0.45, 0.00, -1.00, -0.15, 0.00, 0.00, 0.00, 0.10, 0.00],
        [1.00, 1.00, 0.00, 0.90, 0.00, 0.00, -0.45, 1.00, 0.10, 0.00, 0.00, 0.00],
        [0.95, 0.45, 0.60, 0.85, 0.00, -0.45, 0.50, 0.45, 0.50, 0.00, 0.00, 0.00],
        [-0.45, -0.25, 0.50, -0.20, 0.80, -0.50, 0.00, 0.20, 0.30, 1.00, 0.00, 0.00],
        [-1.00, 0.15, 1.00, 0.25, 0.50, -0.35, 0.10, 0.05, 0.10, 0.20, 1.00, 0.00],
        [0.00, 0.15, 0.00, -0.25, 0.25, 0.00, 0.00, 0.00, 0.00, 0.00, 0.30, 1.00],
    ],
    np.float32,
)
"""How far each emotion (row, EMOTIONS order) moves each part (column, MOVES order)."""

CONFUSED = np.array(
    [
        [0, 2, 4, 1, 0.5, 0.5, 1.5, 1.5],
        [6, 0, 0.5, 1.5, 0.2, 0.3, 0.2, 1.5],
        [6, 0.3, 0, 0.3, 1.5, 1, 1.5, 0.6],
        [3, 1.5, 0.3, 0, 4, 0.2, 0.3, 0.1],
        [2, 0.3, 2, 5, 0, 0.6, 0.6, 0.1],
        [3, 0.3, 1.5, 0.2, 0.6, 0, 5, 1],
        [4, 0.2, 1.5, 0.3, 0.5, 2.5, 0, 1],
        [6, 2, 0.6, 0.1, 0.1, 1, 1.2, 0],
    ]
)
"""What a rater who misses the emotion (row) says instead, in relative weights."""

EXPRESSION_JITTER = 0.16
PIXEL_NOISE = 0.05
CHUNK = 16  # faces drawn at once: the arrays of one stroke stay in the second-level cache
U64 = np.uint64


@dataclass(frozen=True)
class Facts:
    """What is true of N faces; codes are in EMOTIONS order."""

    label: np.ndarray  # (N,) int64, the expression drawn: the hidden truth
    intensity: np.ndarray  # (N,) float32 in [0, 1]; 0 for neutral
    identity: np.ndarray  # (N,) int64 in [0, IDENTITIES)
    votes: np.ndarray  # (N, 8) int64, sums to raters; the most voted is the label people see


def facts(seed: int, indices: Sequence[int] | np.ndarray, raters: int = 10) -> Facts:
    """Label, intensity, identity and votes of the faces `indices`, without drawing them."""
    index = np.asarray(indices, np.int64).astype(U64)
    picks = _uniform(seed, index, 0, 3)
    label = np.searchsorted(np.cumsum(PRIOR)[:-1], picks[:, 0], side="right")
    intensity = np.where(label == 0, 0.0, 0.12 + 0.88 * picks[:, 1]).astype(np.float32)
    identity = (picks[:, 2] * IDENTITIES).astype(np.int64)
    right = np.where(label == 0, 0.8, np.clip(0.25 + 0.85 * intensity, 0, 0.97))[:, None]
    chance = CONFUSED[label] / CONFUSED[label].sum(1, keepdims=True) * (1 - right)
    chance[np.arange(len(label)), label] = right[:, 0]
    bounds = np.cumsum(chance, axis=1)[:, None, :-1]
    said = (_uniform(seed, index, 64, raters)[:, :, None] >= bounds).sum(2)
    votes = (said[:, :, None] == np.arange(len(EMOTIONS))).sum(1)
    return Facts(label.astype(np.int64), intensity, identity, votes.astype(np.int64))


def majority(votes: np.ndarray) -> np.ndarray:
    """Most voted code (N,) int64 of votes (N, 8); of equal ones the first in EMOTIONS order."""
    return votes.argmax(axis=1).astype(np.int64)


def draw(seed: int, indices: Sequence[int] | np.ndarray, size: int = 48) -> np.ndarray:
    """Faces `indices` as uint8 (N, size, size)."""
    index = np.asarray(indices, np.int64)
    pictures = np.empty((len(index), size, size), np.uint8)
    for first in range(0, len(index), CHUNK):
        part = slice(first, first + CHUNK)
        pictures[part] = _draw(seed, index[part], size)
    return pictures


def encode(pixels: np.ndarray) -> bytes:
    """One gray face (H, W) uint8 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw(seed: int, index: np.ndarray, size: int) -> np.ndarray:
    known = facts(seed, index, raters=1)
    person = _Traits(_uniform(seed ^ 0x1D, known.identity.astype(U64), 0, 40))
    chance = _Traits(_uniform(seed, index.astype(U64), 128, 56))
    moves = PROTOTYPES[known.label] * known.intensity[:, None]
    moves = moves + EXPRESSION_JITTER * chance.bells(len(MOVES))
    habits = 0.12 * person.bells(len(MOVES))  # how this person looks at rest
    move = dict(zip(MOVES, (moves + habits).T[:, :, None, None], strict=True))

    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1)[None]
    x, y = axis[:, None, :], axis[:, :, None]
    scale = chance.between(0.95, 1.25)
    tangent = chance.between(-0.16, 0.16)
    cosine = 1 / np.sqrt(1 + tangent * tangent)
    right, down = x - chance.between(-0.1, 0.1), y - chance.between(-0.1, 0.1)
    u = (right + tangent * down) * (cosine / scale)
    v = (down - tangent * right) * (cosine / scale)
    sharp = size / 2.2 / chance.between(0.8, 3.0)  # blur: one over the width of every edge

    skin = person.between(0.45, 0.85)
    canvas = chance.between(0.1, 0.9) + chance.between(-0.2, 0.2) * x + 0 * y
    for _ in range(3):  # things behind the head: without them many faces are near twins
        edge = (x - chance.between(-1, 1)) ** 2 + (y - chance.between(-1, 1)) ** 2
        canvas = _paint(canvas, chance.between(0, 1), edge - chance.between(0.1, 0.7), sharp / 2)
    canvas = _head(canvas, u, v, person, skin, sharp)
    canvas = _eyes(canvas, u, v, person, move, skin, sharp)
    canvas = _nose(canvas, u, v, person, move, skin, sharp)
    canvas = _mouth(canvas, u, v, person, chance, move, skin, sharp)
    lit = canvas * (1 + chance.between(-0.45, 0.45) * u + chance.between(-0.35, 0.35) * v)
    lit = 0.5 + (lit - 0.5) * chance.between(0.6, 1.1) + chance.between(-0.08, 0.08)
    grain = PIXEL_NOISE * chance.between(0.3, 1.4) * _grain(seed, index, size)
    return (np.clip(lit + grain, 0, 1) * 255 + 0.5).astype(np.uint8)


def _head(
    canvas: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    person: _Traits,
    skin: np.ndarray,
    sharp: np.ndarray,
) -> np.ndarray:
    hair = person.between(0.05, 0.6)
    wide, tall = person.between(0.58, 0.72), person.between(0.82, 0.95)
    long = person.between(0.0, 0.5)
    above = np.maximum(-v, 0)
    cap = np.maximum(np.abs(u) - wide - 0.13 + 0.25 * above, v - long)
    cap = np.maximum(cap, -v - tall - 0.08 + 0.9 * u * u)
    canvas = _paint(canvas, hair, cap, sharp)
    neck = np.maximum(np.abs(u) - 0.36, 0.4 - v)
    canvas = _paint(canvas, 0.78 * skin, neck, sharp)
    jaw = person.between(0.1, 0.45) * np.maximum(v, 0)
    radius = (u / (wide * (1 - jaw))) ** 2 + (v / tall) ** 2
    canvas = _paint(canvas, skin * (1.06 - 0.28 * radius), 0.3 * (radius - 1), sharp)
    hairline = -tall + person.between(0.12, 0.36) + person.between(-0.3, 0.5) * u * u
    return _paint(canvas, hair, np.maximum(v - hairline, 0.3 * (radius - 1)), sharp)


def _eyes(
    canvas: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    person: _Traits,
    move: dict[str, np.ndarray],
    skin: np.ndarray,
    sharp: np.ndarray,
) -> np.ndarray:
    side = np.abs(u)  # both at once
    apart, level = person.between(0.28, 0.35), person.between(-0.2, -0.1)
    half = person.between(0.13, 0.18)
    across = side - apart
    bow = np.maximum(1 - (across / half) ** 2, 0)
    upper = level - np.maximum(0.085 + 0.08 * move["lids"] - 0.02 * move["squint"], 0.012) * bow
    lower = level + np.maximum(0.05 - 0.045 * move["squint"] + 0.01 * move["lids"], 0.008) * bow
    opening = np.maximum(np.maximum(upper - v, v - lower), 0.5 * (np.abs(across) - half))
    canvas = _paint(canvas, 0.2 + 0.75 * skin, opening, sharp)
    iris = (across**2 + (v - level) ** 2) * 8 - 0.045
    canvas = _paint(canvas, person.between(0.05, 0.3), np.maximum(opening, iris), sharp)
    lash = np.maximum(np.abs(v - upper) - 0.016, np.abs(across) - half)
    canvas = _paint(canvas, 0.15 * skin, lash, sharp)

    inner = apart - half - 0.03 - 0.05 * move["knit"]
    length = 2 * half + 0.09
    along = np.clip((side - inner) / length, 0, 1)
    rest = level - person.between(0.15, 0.2) - 0.22 * along * (1 - along)
    lift = move["brow_inner"] * (1 - along) + move["brow_outer"] * along
    brow = np.abs(v - rest + 0.14 * lift) - person.between(0.02, 0.045)
    brow = np.maximum(brow, np.abs(side - inner - length / 2) - length / 2)
    canvas = _paint(canvas, person.between(0.1, 0.45) * skin, brow, sharp)

    frown = np.maximum(np.abs(side - 0.055) - 0.014, np.abs(v - level + 0.16) - 0.09)
    canvas = _shade(canvas, 0.35 * move["knit"], frown, sharp)
    raised = 0.5 * (move["brow_inner"] + move["brow_outer"])
    crease = np.maximum(np.abs(np.abs(v - level + 0.4) - 0.05) - 0.012, side - 0.34)
    return _shade(canvas, 0.3 * raised, crease, sharp)


def _nose(
    canvas: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    person: _Traits,
    move: dict[str, np.ndarray],
    skin: np.ndarray,
    sharp: np.ndarray,
) -> np.ndarray:
    side, tip = np.abs(u), person.between(0.18, 0.26)
    wing = person.between(0.08, 0.13)
    flank = np.maximum(np.abs(side - 0.05 - 0.09 * (v + 0.1)) - 0.015, np.abs(v - 0.05) - 0.16)
    canvas = _shade(canvas, 0.12 + 0 * tip, flank, sharp)
    nostril = np.maximum(np.abs(side - 0.6 * wing) - 0.35 * wing, np.abs(v - tip) - 0.018)
    canvas = _paint(canvas, 0.35 * skin, nostril, sharp)
    wrinkle = np.maximum(np.abs(np.abs(v + 0.06 - 0.3 * side) - 0.04) - 0.012, side - 0.13)
    canvas = _shade(canvas, 0.4 * move["lip"], wrinkle, sharp)
    fold = np.maximum(np.abs(side - wing - 0.05 - 0.5 * (v - tip)) - 0.016, np.abs(v - 0.33) - 0.14)
    return _shade(canvas, 0.3 * (move["lip"] + 0.8 * move["corners"]), fold, sharp)


def _mouth(
    canvas: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    person: _Traits,
    chance: _Traits,
    move: dict[str, np.ndarray],
    skin: np.ndarray,
    sharp: np.ndarray,
) -> np.ndarray:
    half = person.between(0.24, 0.32) * (1 + 0.3 * move["width"])
    level = person.between(0.45, 0.54)
    across = np.clip(u / half, -1.3, 1.3)
    bow = np.maximum(1 - across * across, 0)
    sided = np.where(chance.between(-1, 1) < 0, -across, across)
    rise = move["corners"] * (across * across - 0.35) + move["smirk"] * np.maximum(sided, 0) ** 2
    middle = level - 0.2 * rise
    gap = 0.3 * np.maximum(move["open"], 0)
    top = middle - (0.06 * np.maximum(move["lip"], 0) + 0.1 * gap) * bow
    teeth = np.clip(move["teeth"], 0, 1.2)
    bottom = middle + (gap + 0.1 * teeth * (move["open"] > 0.05)) * bow
    lip = person.between(0.035, 0.065) * np.clip(1 - 0.75 * move["press"], 0.15, 1.3)
    ends = np.abs(u) - half
    lips = np.maximum(np.maximum(top - lip * bow - v, v - bottom - 1.3 * lip * bow), ends)
    canvas = _paint(canvas, person.between(0.55, 0.8) * skin, lips, sharp)
    inside = np.maximum(np.maximum(top - v, v - bottom), ends)
    canvas = _paint(canvas, 0.08 + 0 * level, inside, sharp)
    bite = np.maximum(inside, v - top - 0.13 * teeth)
    canvas = _paint(canvas, 0.9 + 0 * level, bite, sharp)
    line = np.maximum(np.abs(v - middle) - 0.018, ends)
    return _shade(canvas, 0.55 * np.clip(1 - 6 * gap, 0, 1), line, sharp)


def _paint(
    canvas: np.ndarray, level: np.ndarray, distance: np.ndarray, sharp: np.ndarray
) -> np.ndarray:
    """Put `level` where the signed distance is negative, over an edge 1 / `sharp` wide."""
    return canvas + _cover(distance, sharp) * (level - canvas)


def _shade(
    canvas: np.ndarray, strength: np.ndarray, distance: np.ndarray, sharp: np.ndarray
) -> np.ndarray:
    return canvas - _cover(distance, sharp) * np.clip(strength, 0, 0.9) * canvas


def _cover(distance: np.ndarray, sharp: np.ndarray) -> np.ndarray:
    cover = distance * -sharp
    cover += np.float32(0.5)
    np.maximum(cover, 0, out=cover)
    return np.minimum(cover, 1, out=cover)


class _Traits:
    """Uniform numbers (N, n), each used once, in the order in which they are asked for."""

    def __init__(self, uniform: np.ndarray) -> None:
        self._uniform = uniform.astype(np.float32)
        self._next = 0

    def between(self, low: float, high: float) -> np.ndarray:
        """(N, 1, 1) float32 in [low, high)."""
        column = self._uniform[:, self._next, None, None]
        self._next += 1
        return np.float32(low) + np.float32(high - low) * column

    def bells(self, count: int) -> np.ndarray:
        """(N, count) float32 of mean 0 and deviation 1, triangular."""
        columns = self._uniform[:, self._next : self._next + count]
        self._next += count
        # the low digits of a uniform number are as good as another one
        other = np.modf(columns * np.float32(4096))[0]
        return (columns + other - 1) * np.float32(np.sqrt(6))


def _mix(counter: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer on uint64, wrapping around."""
    z = counter + U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def _keys(seed: int, index: np.ndarray) -> np.ndarray:
    start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], U64))
    return _mix(start ^ (index * U64(0xD1342543DE82EF95)))


def _uniform(seed: int, index: np.ndarray, channel: int, count: int) -> np.ndarray:
    """(N, count) float64 in [0, 1), of the face's own counters channel to channel + count."""
    counters = (np.arange(channel, channel + count, dtype=U64) * U64(0xA0761D6478BD642F))[None]
    return (_mix(_keys(seed, index)[:, None] + counters) >> U64(11)) * 2.0**-53


def _grain(seed: int, index: np.ndarray, size: int) -> np.ndarray:
    """Pixel noise (N, size, size) float32 of mean 0, deviation 1: four pixels a hash."""
    hashes = -(-size * size // 4)
    counters = np.arange(1 << 20, (1 << 20) + hashes, dtype=U64)[None]
    bits = _mix(_keys(seed, index.astype(U64))[:, None] + counters).view("<u2")
    uniform = bits[:, : size * size].reshape(-1, size, size).astype(np.float32)
    return (uniform * np.float32(2 / 65536) - 1) * np.float32(np.sqrt(3))
