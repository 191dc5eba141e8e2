"""OpenCV runs a small network with YuNet's heads: all faces of a photo, in its pixels, in order."""

import hashlib
import io
import sys

import numpy as np
import pyarrow as pa
import pytest
from helpers.yunet import BOX, POINTS, write_yunet
from PIL import Image

from pipeline.detection import DETECTED, DetectConfig, YuNet, cut_out, find_faces, in_order
from pipeline.errors import ConfigError, ModelError, SourceError
from pipeline.images import Align, Crop, decode, face
from pipeline.schema import READ

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def config(tmp_path):
    return DetectConfig(model=str(write_yunet(tmp_path / "yunet.onnx")))


def photo(spots, width=320, height=240):
    """Gray, with spots (column and row of the cell, stride, color)."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for column, row, stride, color in spots:
        pixels[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = color
    return pixels


def expected(column, row, stride):
    """Box and landmarks in closed form."""
    middle = (np.array([column, row]) + 0.5) * stride
    half = BOX * stride / 2
    return np.concatenate([middle - half, middle + half, (middle + POINTS * stride).ravel()])


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def read_rows(images, reasons=None, groups=None):
    n = len(images)
    columns = [
        [f"p{i}.png" for i in range(n)], list(range(n)), groups or [None] * n, images,
        [None] * n, [None] * n, reasons or [None] * n, [None] * n,
    ]  # fmt: skip
    arrays = [pa.array(c, f.type) for c, f in zip(columns, READ, strict=True)]
    return pa.table(arrays, schema=READ)


def test_yunet__boxes_points_and_scores_of_three_strides(config):
    spots = [(20, 10, 8, RED), (4, 9, 16, GREEN), (7, 3, 32, BLUE)]
    found = in_order(YuNet(config)(photo(spots)))
    wanted = sorted((expected(*spot[:3]) for spot in spots), key=lambda row: row[0])
    assert np.abs(found[:, :14] - wanted).max() < 1e-3
    assert np.allclose(found[:, 14], 1, atol=1e-3)


def test_yunet__score_is_a_threshold_and_overlaps_are_one(config):
    faint = photo([(5, 5, 16, (185, 160, 0)), (12, 5, 16, GREEN)])
    assert len(YuNet(config)(faint)) == 1
    loose = config.model_copy(update={"score": 0.1})
    # cls is red less green over 255, and the score its root, since obj is 1
    assert sorted(YuNet(loose)(faint)[:, 14]) == pytest.approx([(25 / 255) ** 0.5, 1], abs=1e-3)
    close = photo([(5, 5, 16, GREEN), (6, 5, 16, GREEN)])
    assert len(YuNet(config)(close)) == 1
    assert len(YuNet(config.model_copy(update={"nms": 1.0}))(close)) == 2


@pytest.mark.parametrize(("width", "height"), [(33, 250), (321, 47), (1, 1)])
def test_yunet__any_size_and_gray(config, width, height):
    pixels = photo([(1, 1, 8, RED)], width, height)
    assert len(YuNet(config)(pixels)) == (width > 1)
    assert len(YuNet(config)(pixels[..., 0])) == 0


def test_yunet__a_large_photo_is_reduced_and_its_faces_are_in_its_pixels(config):
    spots = [(20, 10, 8, RED), (2, 2, 32, BLUE)]
    large = np.repeat(np.repeat(photo(spots), 5, 0), 5, 1)
    found = in_order(YuNet(config.model_copy(update={"longest": 320}))(large))
    wanted = 5 * np.stack([expected(2, 2, 32), expected(20, 10, 8)])
    assert np.abs(found[:, :14] - wanted).max() < 0.01


def test_yunet__identity_names_the_bytes_not_the_path(config, tmp_path):
    data = (tmp_path / "yunet.onnx").read_bytes()
    (tmp_path / "copy.onnx").write_bytes(data)
    copy = YuNet(config.model_copy(update={"model": str(tmp_path / "copy.onnx")}))
    assert copy.identity == YuNet(config).identity
    assert copy.identity["model"] == hashlib.sha256(data).hexdigest()
    other = YuNet(config.model_copy(update={"score": 0.7})).identity
    assert other != copy.identity


def test_yunet__what_is_none(config, tmp_path, monkeypatch):
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(ModelError, match=r"bad.onnx: expected an ONNX file of YuNet"):
        YuNet(DetectConfig(model=str(tmp_path / "bad.onnx")))
    with pytest.raises(SourceError, match="no such file"):
        YuNet(DetectConfig(model=str(tmp_path / "gone.onnx")))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"pip install omnifer\[detect\]"):
        YuNet(config)


def test_find_faces__every_photo_has_rows(config):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned clockwise
    two = photo([(20, 10, 8, RED), (4, 9, 16, GREEN)])
    images = [png(two), png(photo([])), b"no image", None, png(np.rot90(two), exif=turned)]
    table = find_faces(
        read_rows(images, [None, None, None, "crashed", None], ["g", None, None, None, None]),
        YuNet(config), config, threads=3,
    )  # fmt: skip
    assert table.schema.equals(DETECTED)
    rows = table.to_pylist()
    ids = ["p0.png#0", "p0.png#1", "p1.png", "p2.png", "p3.png", "p4.png#0", "p4.png#1"]
    assert [row["id"] for row in rows] == ids
    assert [row["reason"] for row in rows][2:5] == ["no_face", "not_an_image", "crashed"]
    assert [row["group"] for row in rows] == ["g", "g", *[f"p{i}.png" for i in (1, 2, 3, 4, 4)]]
    for first in (0, 5):  # the turned photo too
        for row, spot in zip(rows[first : first + 2], [(4, 9, 16), (20, 10, 8)], strict=True):
            assert np.allclose(row["photo_box"], expected(*spot)[:4], atol=1e-3)
            corner = np.array(row["photo_box"][:2]) - row["box"][:2]
            inside = np.tile(corner, 5) + row["landmarks"]
            assert np.allclose(inside, expected(*spot)[4:], atol=1e-3)
            pixels = decode(row["image"])
            left, top = corner.round().astype(int)
            height, width = pixels.shape[:2]
            assert np.array_equal(pixels, two[top : top + height, left : left + width])
            assert row["score"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("crop", [Crop(box=True, margin=0.4), Crop(align=Align())])
def test_find_faces__a_cut_out_gives_the_pixels_that_the_photo_gives(config, crop):
    pixels = photo([(20, 14, 8, RED)])
    pixels[..., 1] = np.clip(pixels[..., 1] + np.indices((240, 320))[1] // 8, 0, 255)
    row = find_faces(read_rows([png(pixels)]), YuNet(config), config, threads=1).to_pylist()[0]
    points = expected(20, 14, 8)[4:].tolist()
    whole = face(
        png(pixels), crop=crop, color="rgb", size=48, box=row["photo_box"], landmarks=points
    )
    part = face(
        row["image"], crop=crop, color="rgb", size=48, box=row["box"], landmarks=row["landmarks"]
    )
    assert np.abs(whole.astype(int) - part).max() <= 1


def test_in_order__left_to_right_whatever_the_score():
    rows = np.zeros((4, 15))
    rows[:, 0] = [30.2, 10.9, 10.1, 30.8]
    rows[:, 1] = [9, 5, 7, 2]
    rows[:, 14] = [0.9, 0.8, 0.95, 0.7]
    assert in_order(rows)[:, 1].tolist() == [5, 7, 2, 9]
    assert in_order(rows[:0]).shape == (0, 15)


def test_cut_out__as_far_as_the_picture_reaches_and_no_larger_than_asked():
    pixels = np.arange(100 * 200).reshape(100, 200) % 251
    pixels = pixels.astype(np.uint8)
    part, start, factor = cut_out(pixels, (10, 20, 30, 30), 0.5, 1024)
    assert (start.tolist(), factor) == ([0, 5], 1)
    assert np.array_equal(part, pixels[5:45, 0:40])
    part, _, factor = cut_out(pixels, (0, 0, 200, 100), 0.0, 64)
    assert (part.shape, factor) == ((25, 50), 4)
    assert cut_out(pixels, (500, 500, 501, 501), 0.5, 64)[0].size
