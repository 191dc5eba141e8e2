"""Boxes of faces in what training sees of a picture: shares of the crop's side.

What for: a source says where the face is in its picture; losses that compare where two faces lie
need it in the square that the network sees. Pixels are never touched. Cost: 3 us per face with a
box, 70 us where the crop aligns.

What results, by crop: without any, the box in the whole picture, its sides stretched as the
picture's are. A central `fraction` may leave parts of the box outside [0, 1]. Cut by `box`, the box
lies in the middle and its longer side takes 1 / (1 + 2 margin) of the square; to one side where the
square was moved to stay inside the picture, and with parts outside where it had to be made smaller.
With a margin of 0 the longer side fills the square: only the shapes of two boxes then differ.
Aligned, the box is turned with the face, and what counts is the upright box around it.

Source: the face without a known box follows SSFER, arXiv 2410.17622, whose released code takes
(25, 25, 220, 220) of 224 pixels where a detector does not find exactly one face.
Departs: the square of that side in the middle, so that a mirrored face keeps its box; and it goes
through the random view's geometry as every other box, where the released code looks for faces in
the finished view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.alignment import TEMPLATES, similarity
from pipeline.images import Crop, upright

_MARGIN = (1 - 195 / 224) / 2
FALLBACK = np.array([_MARGIN, _MARGIN, 1 - _MARGIN, 1 - _MARGIN], np.float32)
"""Box of a face whose place nobody knows: the middle 195/224 of the crop."""


def box_in_crop(
    box: Sequence[float],
    landmarks: Sequence[float] | None,
    crop: Crop,
    width: int,
    height: int,
) -> tuple[float, float, float, float]:
    """A box of a picture in shares of the side of its crop.

    Args:
        box: x0 y0 x1 y1 in pixels of the picture, see :data:`pipeline.schema.BOX`.
        landmarks: ten numbers, see :data:`pipeline.schema.LANDMARKS`, or None.
        crop: which part of the picture is packed.
        width: of the whole picture, pixels.
        height: of it.

    Returns:
        x0 y0 x1 y1; parts may lie outside [0, 1].

    Raises:
        RecordError: the crop has no such part, as :func:`pipeline.images.crop_face`.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    if crop.align is not None and landmarks is not None:
        points = np.asarray(landmarks, np.float64).reshape(-1, 2)
        a, b = similarity(points, TEMPLATES[crop.align.template])
        corners = [a * complex(x, y) + b for x in (x0, x1) for y in (y0, y1)]
        across, down = [w.real for w in corners], [w.imag for w in corners]
        return min(across), min(down), max(across), max(down)
    left, top, across_, down_ = upright(width, height, crop, box)
    return (x0 - left) / across_, (y0 - top) / down_, (x1 - left) / across_, (y1 - top) / down_


def boxes_in_crop(
    boxes: Sequence[Sequence[float] | None],
    landmarks: Sequence[Sequence[float] | None],
    crop: Crop,
    sizes: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Boxes (N, 4) float32 of pictures in shares of the sides of their crops.

    A face without a box, or with one that is empty or not finite, has the FALLBACK; so has one that
    is aligned by its landmarks and has no box, since alignment puts all faces in one place.

    Args:
        boxes: of each face, pixels, or None.
        landmarks: of each face, or None.
        crop: which part of the pictures is packed.
        sizes: width and height of each whole picture, pixels.

    Raises:
        RecordError: as :func:`box_in_crop`.
    """
    found = np.tile(FALLBACK, (len(boxes), 1))
    for row, (box, points, (width, height)) in enumerate(zip(boxes, landmarks, sizes, strict=True)):
        if box is not None and _is_box(box):
            found[row] = box_in_crop(box, points, crop, width, height)
    return found


def _is_box(box: Sequence[float]) -> bool:
    return all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1]
