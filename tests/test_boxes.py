"""Proves that a box goes through a crop as the pixels it encloses do."""

import numpy as np
import pytest

from pipeline.alignment import TEMPLATES
from pipeline.boxes import FALLBACK, box_in_crop, boxes_in_crop
from pipeline.errors import RecordError
from pipeline.images import Align, Crop, crop_face, planes

SIZE = 96
WIDTH, HEIGHT = 260, 200
BOX = (110, 70, 160, 140)
TURN = 70 * np.exp(0.3j)
"""Sides and angle of the square that the landmarks below stand for."""
POINTS = (TEMPLATES["centered"] - 0.5) @ [[1], [1j]] * TURN + (140 + 105j)
LANDMARKS = np.stack([POINTS.real, POINTS.imag], 2).ravel().tolist()


def bounds(bright: np.ndarray) -> np.ndarray:
    """x0 y0 x1 y1 of what is bright in (S, S), in shares of S."""
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(bright)


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        (Crop(), BOX),
        (Crop(fraction=0.9), BOX),
        (Crop(box=True, margin=0.3), BOX),
        (Crop(box=True, margin=0.3), (0, 120, 60, 200)),  # moved inside
        (Crop(box=True), (0, 40, 260, 180)),  # smaller than the box
        (Crop(align=Align(template="centered")), (125, 90, 155, 115)),
        (Crop(align=Align(missing="box"), margin=0.5), BOX),
    ],
)
def test_box_in_crop__encloses_what_it_enclosed(crop: Crop, box: tuple[int, ...]) -> None:
    x0, y0, x1, y1 = box
    picture = np.zeros((HEIGHT, WIDTH), np.uint8)
    picture[y0:y1, x0:x1] = 255
    aligned = crop.align is not None and crop.align.missing == "quarantine"
    landmarks = LANDMARKS if aligned else None
    seen = planes(crop_face(picture, crop, box, landmarks, SIZE), "gray", SIZE)[0]
    found = np.array(box_in_crop(box, landmarks, crop, WIDTH, HEIGHT))
    assert np.clip(found, 0, 1) == pytest.approx(bounds(seen > 40), abs=1 / SIZE)


def test_box_in_crop__margin_says_how_much_of_the_crop_the_longer_side_takes() -> None:
    x0, y0, x1, y1 = box_in_crop(BOX, None, Crop(box=True, margin=0.5), WIDTH, HEIGHT)
    assert (x0 + x1, y0 + y1) == pytest.approx((1, 1))
    assert (x1 - x0, y1 - y0) == pytest.approx((0.5 * 50 / 70, 0.5))


def test_box_in_crop__a_box_that_cannot_be_cut_is_a_bad_record() -> None:
    with pytest.raises(RecordError, match="box"):
        box_in_crop((300, 0, 320, 20), None, Crop(box=True), WIDTH, HEIGHT)


def test_boxes_in_crop__who_has_none_gets_the_middle() -> None:
    nothing = [None, [np.nan] * 4, [5.0, 5.0, 5.0, 9.0], [26.0, 20.0, 130.0, 200.0]]
    found = boxes_in_crop(nothing, [None] * 4, Crop(), [(WIDTH, HEIGHT)] * 4)
    assert found.dtype == np.float32
    assert np.array_equal(found[:3], np.tile(FALLBACK, (3, 1)))
    assert found[3] == pytest.approx([0.1, 0.1, 0.5, 1])
    assert FALLBACK[2] - FALLBACK[0] == pytest.approx(195 / 224)
    assert 1 - FALLBACK[[2, 1, 0, 3]] == pytest.approx(FALLBACK[[0, 3, 2, 1]])  # its own mirror
