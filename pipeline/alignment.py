"""Five landmarks onto a template: the plane's similarity of least squares, and one resampling.

Landmarks are ten numbers, x and y of the left eye, the right eye, the tip of the nose, the left
and the right corner of the mouth; left as seen in an upright picture, which is the person's right.
Pixels of the decoded, turned picture: the first one spans 0 to 1.

The face is drawn from the whole picture, so nothing that a crop would have cut off is missing.
Where it is made smaller, its surroundings are first reduced by a whole factor (area average), then
every pixel is the mean of up to 3 x 3 bilinear samples; that is near the exact area average, and
no detail aliases. Enlarging is bilinear. Beyond the picture its outermost pixels are repeated.

Cost: 0.4 ms for a gray face of 48 pixels, 10 ms for one of 224 in color out of 1000 x 1000.

Source: Umeyama, Least-squares estimation of transformation parameters between two point patterns,
    TPAMI 1991, equations 40 to 42. The points of `arcface112` are those to which public 112 x 112
    face sets are aligned (Deng et al., ArcFace, arXiv 1801.07698).
Departs: in the plane, with reflection ruled out, the singular value decomposition is a quotient of
    complex numbers. Landmarks that lie on a line, in one point or do not resemble a face are an
    error where the formula would give some transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.errors import RecordError

Template = Literal["arcface112", "centered"]

NUMBERS = 10
FLATTEST = 0.1
"""Least spread of the landmarks across their main direction, as a share of the spread along it."""
UNLIKE = 0.5
"""Largest share of the template's variance that the fit may leave; exchanged sides leave 0.95, a
pure profile 0.4."""
LARGEST = 2
"""Largest side of a face's square, as a multiple of the picture's width and height together."""
COARSEST = 1.5
"""Pixels of the picture per pixel of the square that a reduction must leave; it leaves less than
twice as many, so at most 3 x 3 samples make a pixel."""

_ARCFACE = (
    np.array(
        [
            [38.2946, 51.6963],
            [73.5318, 51.5014],
            [56.0252, 71.7366],
            [41.5493, 92.3655],
            [70.7299, 92.2041],
        ]
    )
    / 112
)
_LOOSER = 0.8
TEMPLATES: dict[Template, np.ndarray] = {
    "arcface112": _ARCFACE,
    # smaller and in the middle, with forehead and chin: what expression sets show
    "centered": (_ARCFACE - _ARCFACE.mean(0)) * _LOOSER + 0.5,
}
"""Where the five points come to lie, (5, 2) in shares of the side."""


def similarity(points: np.ndarray, template: np.ndarray) -> tuple[complex, complex]:
    """The similarity z -> a z + b (complex: x + iy) that brings points nearest to a template.

    Args:
        points: (N, 2), from.
        template: (N, 2), to.

    Returns:
        a and b; abs(a) is the scale, the angle of a the rotation.

    Raises:
        RecordError: bad_landmarks: not finite, on a line or in one point, or unlike the template.
    """
    if not np.isfinite(points).all():
        raise RecordError("bad_landmarks", "a coordinate is not finite")
    middle, center = points.mean(0), template.mean(0)
    spread = np.linalg.svd(points - middle, compute_uv=False)
    if not spread[1] > FLATTEST * spread[0]:
        raise RecordError("bad_landmarks", "the five points lie on a line or in one point")
    z, w = _complex(points - middle), _complex(template - center)
    both = complex((z.conj() * w).sum())
    own, other = float((abs(z) ** 2).sum()), float((abs(w) ** 2).sum())
    left = 1 - abs(both) ** 2 / (own * other)
    if left > UNLIKE:
        raise RecordError(
            "bad_landmarks",
            f"the five points leave {left:.0%} of a face's shape; are left and right exchanged?",
        )
    a = both / own
    return a, complex(*center) - a * complex(*middle)


def align(
    pixels: np.ndarray, landmarks: Sequence[float], template: Template, size: int
) -> np.ndarray:
    """The face in an upright square, uint8 (size, size) or (size, size, 3).

    Args:
        pixels: the whole picture, uint8 (H, W) or (H, W, 3).
        landmarks: ten numbers, see the module.
        template: where they come to lie.
        size: side, pixels.

    Raises:
        RecordError: bad_landmarks, as :func:`similarity`, or their middle is not in the picture, or
            they are far larger than it.
    """
    points = np.asarray(landmarks, np.float64).reshape(-1, 2)
    a, b = similarity(points, TEMPLATES[template] * size)
    height, width = pixels.shape[:2]
    x, y = points.mean(0)
    inside = 0 <= x < width and 0 <= y < height
    if not inside or size / abs(a) > LARGEST * (width + height):
        raise RecordError(
            "bad_landmarks", f"around {x:g} {y:g}, {size / abs(a):g} wide, in {width}x{height}"
        )
    return resample(pixels, 1 / a, -b / a, size)


def resample(pixels: np.ndarray, a: complex, b: complex, size: int) -> np.ndarray:
    """The square whose point w shows the picture's point a w + b, uint8 (size, size[, 3]).

    Args:
        pixels: uint8 (H, W) or (H, W, 3).
        a: rotation and scale, pixels of the picture per pixel of the square.
        b: where the square's upper left corner lies in the picture.
        size: side of the square.
    """
    factor = max(1, int(abs(a) / COARSEST))
    part, b = _surroundings(pixels, a, b, size, factor)
    a, b = a / factor, b / factor
    samples = max(1, int(np.ceil(abs(a) - 1e-6)))
    step = a / samples
    rows = (step.real, -step.imag, b.real, step.imag, step.real, b.imag)

    def drawn(plane: np.ndarray) -> np.ndarray:
        # 32-bit float: on bytes Pillow cuts off the fraction of what it mixes
        fine = Image.fromarray(plane.astype(np.float32)).transform(
            (size * samples, size * samples),
            Image.Transform.AFFINE,
            rows,
            Image.Resampling.BILINEAR,
        )
        return (np.asarray(fine.reduce(samples)) + 0.5).astype(np.uint8)

    if part.ndim == 2:
        return drawn(part)
    return np.stack([drawn(part[..., c]) for c in range(part.shape[2])], axis=2)


def seen_order(points: np.ndarray) -> np.ndarray:
    """Five points (5, 2) with left and right as seen, whichever way a source names them.

    Holds for a face turned by any angle; a mirror image has no other order than its own.
    """
    down = points[3:].mean(0) - points[:2].mean(0)
    out = points.copy()
    for first in (0, 3):
        across = out[first + 1] - out[first]
        if across[0] * down[1] - across[1] * down[0] < 0:
            out[first : first + 2] = out[first : first + 2][::-1].copy()
    return out


def five_of_68(points: np.ndarray) -> np.ndarray:
    """Middles of the eyes, tip of the nose, corners of the mouth (5, 2) out of 68 points (68, 2).

    The 68 points are the usual ones of the face's outline, brows, nose, eyes and mouth, numbered
    from the left side of the picture.
    """
    eyes = points[36:42].mean(0), points[42:48].mean(0)
    return np.stack([*eyes, points[30], points[48], points[54]])


def _complex(points: np.ndarray) -> np.ndarray:
    return points[:, 0] + 1j * points[:, 1]


def _surroundings(
    pixels: np.ndarray, a: complex, b: complex, size: int, factor: int
) -> tuple[np.ndarray, complex]:
    """What a square shows of a picture, its edges repeated, reduced by a factor; and b within it.

    Its size does not depend on the picture's: at most 3 x 1.5 times the square's side and a frame.
    """
    corners = np.array([a * w + b for w in (0, size, 1j * size, size + 1j * size)])
    across, x0, beyond_x = _span(corners.real, 2 * factor, pixels.shape[1])
    down, y0, beyond_y = _span(corners.imag, 2 * factor, pixels.shape[0])
    part = pixels[down, across]
    if factor > 1:
        part = np.asarray(Image.fromarray(np.ascontiguousarray(part)).reduce(factor))
    frame = [tuple(-(-n // factor) for n in ends) for ends in (beyond_y, beyond_x)]
    part = np.pad(part, [*frame, (0, 0)][: part.ndim], mode="edge")
    return part, b - complex(x0, y0) + factor * complex(frame[1][0], frame[0][0])


def _span(ends: np.ndarray, frame: int, length: int) -> tuple[slice, int, tuple[int, int]]:
    """Pixels between the ends and a frame around them.

    Returns:
        those there are, the first one's place, how many are missing before and behind.
    """
    start, stop = int(np.floor(ends.min())) - frame, int(np.ceil(ends.max())) + frame
    first, last = min(max(start, 0), length - 1), max(min(stop, length), 1)
    return slice(first, last), first, (max(first - start, 0), max(stop - last, 0))
