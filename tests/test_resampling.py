"""Proves that resizing is the area average, linear where it enlarges, and what gray is."""

import numpy as np
import pytest

from pipeline.resampling import luma, resampled, rounded
from tests.test_images import smooth


def resize(gray: np.ndarray, size: int) -> np.ndarray:
    return rounded(resampled(gray, size, size))


@pytest.mark.parametrize("size", [8, 16, 12])
def test_resampled__is_the_area_average(size: int) -> None:
    gray = smooth(48, 48)[..., 1]
    fine = np.repeat(np.repeat(gray.astype(float), size, 0), size, 1)
    expected = fine.reshape(size, 48, size, 48).mean((1, 3))
    assert np.abs(resize(gray, size) - expected).max() <= 0.51


def test_resampled__enlarging_keeps_a_ramp() -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    large = resize(ramp, 48)
    assert np.all(np.diff(large.astype(int), axis=1) >= 0)
    assert abs(float(large.mean()) - float(ramp.mean())) < 1


def test_resampled__the_same_size_is_left_alone() -> None:
    gray = smooth(20, 30)[..., 0]
    assert np.array_equal(rounded(resampled(gray, 20, 30)), gray)


def test_luma__of_gray_is_itself_and_of_color_the_weighted_mean() -> None:
    color = smooth(4, 4)
    assert np.array_equal(luma(color[..., 0]), color[..., 0])
    np.testing.assert_allclose(luma(color), color @ [0.299, 0.587, 0.114], rtol=1e-5)
