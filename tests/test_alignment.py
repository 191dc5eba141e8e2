"""Alignment finds the transform that was applied, draws dots where the template has its points,
smooths what it makes smaller, and calls landmarks bad rather than give back something."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline import alignment, images
from pipeline.alignment import TEMPLATES, align, five_of_68, resample, seen_order, similarity
from pipeline.errors import RecordError

ARCFACE = TEMPLATES["arcface112"] * 112


def moved(points, scale=1.0, degrees=0.0, shift=(0.0, 0.0)):
    turn = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ matrix.T + shift


def smooth(side, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("degrees", [0, 17, -90, 179])
@pytest.mark.parametrize("scale", [0.05, 1, 7.5])
def test_similarity__recovers_what_was_applied(scale, degrees):
    a, b = similarity(moved(ARCFACE, scale, degrees, (300, -40)), ARCFACE)
    assert abs(a) == pytest.approx(1 / scale, rel=1e-9)
    assert abs(np.exp(1j * np.deg2rad(degrees)) * a / abs(a) - 1) < 1e-9
    z = moved(ARCFACE, scale, degrees, (300, -40)) @ [1, 1j]
    assert np.abs(a * z + b - ARCFACE @ [1, 1j]).max() < 1e-4


def test_similarity__is_the_least_squares_one():
    rng = np.random.default_rng(3)
    for _ in range(5):
        points = moved(ARCFACE, 2, 25, (9, 4)) + rng.normal(0, 6, (5, 2))
        a, b = similarity(points, ARCFACE)
        # unknowns re a, im a, re b, im b; rows of x, then rows of y: an orthogonal matrix, scaled
        x, y = points.T
        one, none = np.ones(5), np.zeros(5)
        design = np.block([[np.stack([x, -y, one, none], 1)], [np.stack([y, x, none, one], 1)]])
        best = np.linalg.lstsq(design, ARCFACE.T.ravel(), rcond=None)[0]
        assert np.allclose([a.real, a.imag, b.real, b.imag], best, rtol=1e-7, atol=1e-7)
        matrix = np.array([[a.real, -a.imag], [a.imag, a.real]]) / abs(a)
        assert np.abs(matrix @ matrix.T - np.eye(2)).max() < 1e-12
        assert np.linalg.det(matrix) == pytest.approx(1)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        (np.array([[i, 2 * i] for i in range(5)], float), "line"),
        (np.ones((5, 2)), "one point"),
        (ARCFACE * [1, 0.03], "line"),
        (np.where(ARCFACE > 92.3, np.nan, ARCFACE), "not finite"),
        (ARCFACE * [-1, 1], "exchanged"),
        (ARCFACE[[1, 0, 2, 4, 3]], "exchanged"),
    ],
)
def test_similarity__bad_landmarks(points, why):
    with pytest.raises(RecordError, match=why) as caught:
        similarity(points, ARCFACE)
    assert caught.value.reason == "bad_landmarks"


@pytest.mark.parametrize("yaw", [0.6, 0.3])
def test_similarity__a_turned_head_is_none_of_them(yaw):
    nose = np.array([[0, 0], [0, 0], [14, 0], [0, 0], [0, 0]])
    a, _ = similarity(ARCFACE * [yaw, 1] + nose, ARCFACE)
    assert 0.8 < abs(a) < 1.5


@pytest.mark.parametrize("template", ["arcface112", "centered"])
@pytest.mark.parametrize(
    ("scale", "degrees", "size"), [(4.0, 33, 112), (9.0, -70, 64), (1, 5, 128)]
)
def test_align__dots_land_on_the_template(template, scale, degrees, size):
    points = moved(ARCFACE - 60, scale, degrees, (620, 560))
    for number, target in enumerate(TEMPLATES[template] * size):
        y, x = np.indices((1100, 1200)) + 0.5
        away = np.hypot(x - points[number, 0], y - points[number, 1]) / scale
        picture = (255 * np.clip(3 - away, 0, 1)).astype(np.uint8)
        got = align(picture, points.ravel().tolist(), template, size).astype(float)
        rows, columns = np.indices(got.shape) + 0.5
        found = np.array([(columns * got).sum(), (rows * got).sum()]) / got.sum()
        assert np.abs(found - target).max() < 0.5


def test_align__the_template_itself_leaves_every_pixel():
    for pixels in (smooth(112), np.ascontiguousarray(smooth(112)[..., 0])):
        got = align(pixels, ARCFACE.ravel().tolist(), "arcface112", 112)
        assert np.abs(got.astype(int) - pixels).max() <= 1
        assert got.dtype == np.uint8


def test_align__a_quarter_turn_is_exact():
    pixels = smooth(112)
    turned = moved(ARCFACE - 56, 1, 90, (56, 56))
    got = align(pixels, turned.ravel().tolist(), "arcface112", 112)
    assert np.abs(got.astype(int) - np.rot90(pixels)).max() <= 1


@pytest.mark.parametrize("factor", [2, 4])
def test_resample__making_smaller_is_the_area_average(factor):
    pixels = np.random.default_rng(0).integers(0, 256, (48 * factor,) * 2, dtype=np.uint8)
    got = resample(pixels, complex(factor), 0j, 48)
    assert np.abs(got.astype(int) - images.resize(pixels, 48)).max() <= 1


@pytest.mark.parametrize("degrees", [0, 20, 45])
def test_resample__fine_detail_turns_gray_at_every_angle(degrees):
    checker = (np.indices((500, 500)).sum(0) % 2 * 255).astype(np.uint8)
    a = 5.3 * np.exp(1j * np.deg2rad(degrees))
    got = resample(checker, a, 250 + 250j - a * (20 + 20j), 40)
    assert np.abs(got.astype(float) - 127.5).max() < 12


def test_resample__repeats_the_edge_beyond_the_picture():
    ramp = np.tile(np.arange(50, 90, dtype=np.uint8), (40, 1))
    got = resample(ramp, 1 + 0j, -10 - 10j, 60)
    assert np.array_equal(got[30], np.clip(np.arange(60) - 10, 0, 39) + 50)
    assert np.array_equal(got[0], got[59])


def test_align__bad_places_are_bad_landmarks_and_cost_no_memory():
    pixels = smooth(64)
    for points in (ARCFACE + 500, (ARCFACE - 56) * 1e9 + 32, ARCFACE * np.nan):
        with pytest.raises(RecordError) as caught:
            align(pixels, points.ravel().tolist(), "centered", 48)
        assert caught.value.reason == "bad_landmarks"


def test_align__threads_give_the_same_bytes():
    pixels, points = smooth(300), moved(ARCFACE, 2.2, 12, (20, 20)).ravel().tolist()
    with ThreadPoolExecutor(4) as threads:
        got = [threads.submit(align, pixels, points, "centered", 48) for _ in range(40)]
    assert len({one.result().tobytes() for one in got}) == 1


def test_templates__centered_shows_more_and_stands_in_the_middle():
    loose, tight = TEMPLATES["centered"], TEMPLATES["arcface112"]
    assert np.allclose(loose.mean(0), 0.5)
    assert np.ptp(loose[:, 0]) == pytest.approx(0.8 * np.ptp(tight[:, 0]))


@pytest.mark.parametrize("degrees", [0, 100, -150])
def test_seen_order__either_naming_at_any_turn(degrees):
    points = moved(ARCFACE, 1, degrees)
    for named in (points, points[[1, 0, 2, 4, 3]], points[[1, 0, 2, 3, 4]]):
        assert np.array_equal(seen_order(named), points)


def test_five_of_68__middles_tip_and_corners():
    points = np.stack([np.arange(68), 100 + np.arange(68)], 1).astype(float)
    expected = [[38.5, 138.5], [44.5, 144.5], [30, 130], [48, 148], [54, 154]]
    assert five_of_68(points).tolist() == expected


def test_numbers__match_the_column():
    from pipeline.schema import LANDMARKS

    assert LANDMARKS.list_size == alignment.NUMBERS == TEMPLATES["centered"].size
