"""Proves that any bytes become pixels or a RecordError, and crops, sizes and hashes exact."""

from __future__ import annotations

import csv
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.alignment import TEMPLATES
from pipeline.errors import RecordError
from pipeline.images import Align, Crop, crop_face, decode, face


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def reason_of(data: bytes) -> str:
    with pytest.raises(RecordError) as caught:
        decode(data)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_decode__lossless_formats_are_exact(kind: str) -> None:
    pixels = smooth()
    assert np.array_equal(decode(encoded(pixels, kind)), pixels)
    assert np.array_equal(decode(encoded(pixels[..., 0], kind)), pixels[..., 0])


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {})])
def test_decode__lossy_formats_are_near(kind: str, options: dict[str, int]) -> None:
    pixels = smooth()
    got = decode(encoded(pixels, kind, **options))
    assert got.shape == pixels.shape
    assert np.abs(got.astype(int) - pixels).mean() < 6


def test_decode__gray_jpeg_has_two_axes() -> None:
    assert decode(encoded(smooth()[..., 0], "JPEG")).shape == (40, 60)


def test_decode__first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (200, 10)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode(buffer.getvalue()).mean() == pytest.approx(200, abs=2)


def test_decode__sixteen_bits_are_scaled() -> None:
    wide = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    expected = np.floor(wide * (255 / 65535) + 0.5)
    assert np.abs(decode(encoded(wide, "PNG")).astype(float) - expected).max() <= 1
    assert decode(encoded(wide, "TIFF")).max() == 255


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "RGBA", "1"])
def test_decode__other_modes_become_gray_or_rgb(mode: str) -> None:
    picture = Image.fromarray(smooth()).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    got = decode(buffer.getvalue())
    assert got.dtype == np.uint8
    assert got.shape == ((40, 60) if mode in ("LA", "1") else (40, 60, 3))
    reference = np.asarray(picture.convert("L" if got.ndim == 2 else "RGB")).astype(int)
    assert np.abs(got - reference).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode__applies_every_exif_orientation(orientation: int, kind: str) -> None:
    upright = smooth()
    turn_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turn_back[orientation](upright))
    got = decode(encoded(stored, kind, exif=exif))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 8


def test_decode__broken_exif_costs_the_turn_only() -> None:
    data = encoded(smooth(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode(data).shape == (40, 60, 3)


def test_decode__reasons() -> None:
    jpeg, png = encoded(smooth(), "JPEG"), encoded(smooth(), "PNG")
    assert reason_of(b"") == "empty"
    assert reason_of(b"version https://git-lfs.github.com/spec/v1\noid") == "not_an_image"
    assert reason_of(pickle.dumps([1])) == "not_an_image"
    assert reason_of(b"<html>not found</html>") == "not_an_image"
    assert reason_of(b"\x00\x00\x00 ftypavif" + bytes(40)) == "unsupported"
    assert reason_of(jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason_of(jpeg[:100]) == "truncated"
    assert reason_of(png[: len(png) // 2]) == "truncated"


def test_decode__never_unpickles() -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, ("unpickled",))

    assert reason_of(pickle.dumps(Trap())) == "not_an_image"
    assert not Path("unpickled").exists()


def test_decode__refuses_huge_pictures_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = bytearray(encoded(np.zeros((9, 9), np.uint8), "BMP"))
    huge[18:26] = (9000).to_bytes(4, "little") + (9000).to_bytes(4, "little")
    assert reason_of(bytes(huge)) == "too_large"
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    assert reason_of(encoded(smooth(), "JPEG")) == "too_large"
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    assert reason_of(encoded(smooth(), "PNG")) == "too_large"


def test_decode__flipped_bytes_never_escape() -> None:
    rng = np.random.default_rng(7)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(smooth(), kind)
        for _ in range(40):
            broken = np.frombuffer(whole, np.uint8).copy()
            broken[rng.integers(4, len(broken), 5)] ^= 255
            try:
                pixels = decode(broken.tobytes())
            except RecordError:
                continue
            assert pixels.dtype == np.uint8


def test_crop_face__central_share_of_the_shorter_side() -> None:
    pixels = np.arange(100 * 60).reshape(100, 60)
    assert np.array_equal(crop_face(pixels, Crop(fraction=0.5)), pixels[35:65, 15:45])
    assert crop_face(pixels, Crop()) is pixels


def test_crop_face__box_is_widened_and_moved_inside() -> None:
    pixels = np.arange(100 * 60).reshape(100, 60)
    crop = Crop(box=True, margin=0.25)
    assert np.array_equal(crop_face(pixels, crop, (20, 40, 36, 60)), pixels[35:65, 13:43])
    assert np.array_equal(crop_face(pixels, crop, (-4, -4, 16, 16)), pixels[:30, :30])
    assert crop_face(pixels, crop, (-500, -500, 500, 500)).shape == (60, 60)


@pytest.mark.parametrize("box", [None, (5, 5, 5, 9), (70, 0, 90, 10), (0, 0, np.nan, 9)])
def test_crop_face__unusable_box_is_a_bad_record(box: tuple[float, ...] | None) -> None:
    with pytest.raises(RecordError, match="unreadable"):
        crop_face(np.zeros((100, 60)), Crop(box=True), box)


ALIGNED = Crop(align=Align(template="centered"))
POINTS = (TEMPLATES["centered"] * 40 + [10, 0]).ravel().tolist()


def test_crop_face__alignment_goes_first_and_needs_landmarks() -> None:
    pixels = smooth(40, 60)
    square = crop_face(pixels, ALIGNED, (0, 0, 9, 9), POINTS, 40)
    assert np.abs(square.astype(int) - pixels[:, 10:50]).max() <= 1
    with pytest.raises(RecordError, match="has no landmarks") as caught:
        crop_face(pixels, ALIGNED, (0, 0, 9, 9))
    assert caught.value.reason == "no_landmarks"


def test_crop_face__without_landmarks_the_box_where_that_is_said() -> None:
    pixels = smooth(40, 60)
    crop = Crop(margin=0.25, align=Align(missing="box"))
    boxed = crop_face(pixels, Crop(box=True, margin=0.25), (10, 10, 20, 20))
    assert np.array_equal(crop_face(pixels, crop, (10, 10, 20, 20)), boxed)
    with pytest.raises(RecordError, match="needs a box"):
        crop_face(pixels, crop)
    with pytest.raises(RecordError, match="bad_landmarks"):
        crop_face(pixels, crop, (10, 10, 20, 20), [5.0] * 10)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_face__landmarks_are_of_the_turned_picture(orientation: int) -> None:
    upright = smooth(40, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: 0, 3: 2, 6: 1}[orientation]
    data = encoded(np.ascontiguousarray(np.rot90(upright, turns)), "PNG", exif=exif)
    got = face(data, crop=ALIGNED, color="rgb", size=40, landmarks=POINTS)
    assert np.abs(got.transpose(1, 2, 0).astype(int) - upright[:, 10:50]).max() <= 1
    gray = face(data, crop=ALIGNED, color="gray", size=40, landmarks=POINTS)
    assert np.abs(gray[0].astype(int) - images.to_gray(upright)[:, 10:50]).max() <= 2


def test_face__shapes_and_luma() -> None:
    data = encoded(np.full((30, 30, 3), (200, 100, 50), np.uint8), "PNG")
    gray = face(data, crop=Crop(fraction=0.8), color="gray", size=48)
    assert gray.shape == (1, 48, 48)
    assert np.all(gray == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50))
    rgb = face(data, crop=Crop(), color="rgb", size=12)
    assert rgb.shape == (3, 12, 12)
    assert rgb[:, 3, 3].tolist() == [200, 100, 50]
    assert face(encoded(smooth()[..., 0], "PNG"), crop=Crop(), color="rgb", size=9).shape[0] == 3


def test_phash__mirror_flips_every_other_bit() -> None:
    rng = np.random.default_rng(1)
    for _ in range(8):
        gray = rng.integers(0, 256, (48, 48), dtype=np.uint8)
        mirrored = np.ascontiguousarray(gray[:, ::-1])
        flipped = images.phash(gray) ^ images.phash(mirrored)
        assert (flipped ^ 0x5555555555555555).bit_count() <= 3


def test_phash__survives_jpeg_and_size_but_tells_pictures_apart() -> None:
    faces = [smooth(64, 64, seed)[..., 0] for seed in range(12)]
    hashes = [images.phash(gray) for gray in faces]
    for gray, own in zip(faces, hashes, strict=True):
        copy = images.resize(decode(encoded(gray, "JPEG", quality=50)), 40)
        assert (images.phash(copy) ^ own).bit_count() <= 6
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 12


def test_hash_bits__thumbnail_gives_nearly_the_same() -> None:
    for seed in range(8):
        gray = smooth(48, 48, seed)[..., 0]
        from_thumbnail = int(images.hash_bits(images.thumbnail(gray)[None])[0])
        assert (from_thumbnail ^ images.phash(gray)).bit_count() <= 5


def test_quality__closed_forms() -> None:
    checker = (np.indices((48, 48)).sum(0) % 2 * 200).astype(np.uint8)
    brightness, contrast, sharpness = images.quality(checker)
    assert (brightness, contrast) == (100, 100)
    assert sharpness == pytest.approx(800**2)
    assert images.quality(np.full((20, 20), 7, np.uint8)) == (7, 0, pytest.approx(0, abs=1e-6))


def test_pixel_digest__same_pixels_in_other_clothes() -> None:
    gray = smooth()[..., 0]
    as_rgb = np.repeat(gray[..., None], 3, axis=2)
    assert images.pixel_digest(gray) == images.pixel_digest(decode(encoded(as_rgb, "PNG")))
    assert images.pixel_digest(gray) != images.pixel_digest(gray.reshape(60, 40))


ODD = """
import resource, sys
from pathlib import Path
from pipeline.errors import RecordError
from pipeline.images import decode
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
root = Path(sys.argv[1])
for path in sorted(p for p in root.rglob("*") if p.is_file()):
    try:
        got = "x".join(map(str, decode(path.read_bytes()).shape[:2]))
    except RecordError as err:
        got = err.reason
    print(path.relative_to(root), got, sep="\\t")
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent before exec
print("peak", int(status.split("VmHWM:")[1].split()[0]) // 1024, sep="\\t")
"""


@pytest.mark.real
def test_decode__every_odd_file_within_400_mb() -> None:
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    root = Path(os.environ["OMNIFER_DATA"]) / "odd"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ODD, str(root)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    got = dict(line.split("\t") for line in child.stdout.splitlines())
    assert int(got.pop("peak")) < 400
    lines = [x for x in (root / "MANIFEST.tsv").read_text().splitlines() if x[0] != "#"]
    known = {row["file"]: row for row in csv.DictReader(lines, delimiter="\t")}
    supported = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
    # Pillow refuses these three too once it is asked for pixels with its default settings
    stricter = {"apng/chunk_no_fctl.png", "broken_data_stream.png", "truncated_end_chunk.png"}
    for name, row in known.items():
        good = row["load"] == "ok" and row["format"] in supported
        if name.removeprefix("pillow/") in stricter:
            continue
        assert ("x" in got[name] and got[name][0].isdigit()) == good, (name, got[name], row)
        # Pillow turns TIFF itself, so its width and height are of the turned picture
        turned = row["orient"] in ("5", "6", "7", "8") and row["format"] != "TIFF"
        if good:
            sides = (row["w"], row["h"]) if turned else (row["h"], row["w"])
            assert got[name] == "x".join(sides), name
    assert got["lfs-pointer/AJ_Cook_0001.jpg"] == "not_an_image"
    assert got["recordio/small_lfw.bin"] == "not_an_image"
    assert got["pillow/truncated_jpeg.jpg"] == "truncated"
    assert got["pillow/decompression_bomb.gif"] == "too_large"
    assert got["pillow/l2rgb_read.bmp"] == "too_large"
