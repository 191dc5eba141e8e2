"""Encoded bytes to face pixels: decode, orient, crop, gray, resize, and what the guard compares.

JPEG goes through simplejpeg (libjpeg-turbo, 0.38 ms for 250 x 250 where Pillow takes 0.63);
everything else, and JPEG in a color space that it does not convert, through Pillow, which is told
the one format that the leading bytes announce and is never asked to guess. torchvision's decoders
are deprecated and not used. Nothing here unpickles. Memory is bounded by MAX_PIXELS: the header is
read before any pixel is.

Departs: transparency is dropped, not composed onto a background; that is what common loaders show
a network. The perceptual hash takes the signs of the 64 lowest DCT frequencies (the mean replaced
by the vertical frequency 8) instead of comparing them with their median, so a mirror image flips
a fixed set of bits.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow_version
from pydantic import Field, model_validator

from pipeline.alignment import Template, align
from pipeline.config import Config
from pipeline.errors import RecordError
from pipeline.resampling import luma, resampled, rounded

Color = Literal["gray", "rgb"]

MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
THUMBNAIL = 16
SEEN = 96
"""Side of an aligned face where no model's size is known: a multiple of all that hashes look at."""
DECODER = f"simplejpeg {simplejpeg.__version__}, pillow {pillow_version}"

JPEG = b"\xff\xd8\xff"
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    *((b"P%d" % n, "PPM") for n in range(1, 7)),
)
UNSUPPORTED: tuple[tuple[int, bytes], ...] = (
    (4, b"ftyp"),  # AVIF, HEIC
    (0, b"\x00\x00\x00\x0cjP  "),  # JPEG 2000
    (0, b"\xff\x4f\xff\x51"),  # its bare code stream
    (0, b"\x00\x00\x01\x00"),  # ICO
    (0, b"8BPS"),  # Photoshop
)
# EXIF orientation -> (quarter turns counterclockwise, then mirror left-right)
ORIENTATION = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}


class Align(Config):
    """Turn, scale and shift a face so that its landmarks come to lie on a template.

    `missing` says what becomes of a face without landmarks: cropped by its `box`, or a bad record.
    Landmarks that cannot be a face's are a bad record always.
    """

    template: Template = "arcface112"
    missing: Literal["box", "quarantine"] = "quarantine"


class Crop(Config):
    """Which part of a picture is the face. Without any, the whole picture, stretched to a square.

    `fraction` takes the central square of that share of the shorter side; `box` takes the square
    around the record's box, its longer side widened by `margin` of itself on each side and moved
    inside the picture; `align` draws a square around the record's landmarks and goes before both.
    """

    fraction: float | None = Field(default=None, gt=0, le=1)
    box: bool = False
    margin: float = Field(default=0.0, ge=0, le=4)
    align: Align | None = None

    @model_validator(mode="after")
    def _margin_is_of_a_box(self) -> Crop:
        boxes = self.box or (self.align is not None and self.align.missing == "box")
        if self.margin and not boxes:
            raise ValueError(
                "margin: widens the record's box, and no box is cut out; set box: true"
            )
        return self


def decode(data: bytes) -> np.ndarray:
    """Decode the first frame to uint8 pixels, (H, W, 3) RGB or (H, W) gray, EXIF turn applied.

    16-bit gray is scaled to 8 bits. Memory stays under about 12 bytes per pixel.

    Raises:
        RecordError: empty, not_an_image, unsupported, truncated, too_large or unreadable.
    """
    if not data:
        raise RecordError("empty", "0 bytes")
    if len(data) > MAX_BYTES:
        raise RecordError("too_large", f"{len(data):,} bytes, limit {MAX_BYTES:,}")
    if data.startswith(JPEG):
        return _decode_jpeg(data)
    return _decode_pillow(data, format_of(data))


def crop_face(
    pixels: np.ndarray,
    crop: Crop,
    box: Sequence[float] | None = None,
    landmarks: Sequence[float] | None = None,
    size: int = SEEN,
) -> np.ndarray:
    """The face's part of `pixels`: a view of any size, or an aligned square of `size` pixels.

    Args:
        pixels: the whole picture, (H, W) or (H, W, 3).
        crop: which part.
        box: x0 y0 x1 y1 in pixels.
        landmarks: ten numbers, see :data:`pipeline.schema.LANDMARKS`.
        size: side of an aligned face.

    Raises:
        RecordError: unreadable, where the crop needs a box and there is none or an empty one;
            no_landmarks or bad_landmarks, where it aligns.
    """
    height, width = pixels.shape[:2]
    if crop.align is not None and landmarks is not None:
        return align(pixels, landmarks, crop.align.template, size)
    if crop.align is not None and crop.align.missing == "quarantine":
        raise RecordError("no_landmarks", "the crop aligns faces, the record has no landmarks")
    left, top, across, down = upright(width, height, crop, box)
    if (across, down) == (width, height):
        return pixels
    return pixels[top : top + down, left : left + across]


def upright(
    width: int, height: int, crop: Crop, box: Sequence[float] | None = None
) -> tuple[int, int, int, int]:
    """Left, top, width and height of what a crop shows where it aligns nothing, pixels.

    Args:
        width: of the whole picture, pixels.
        height: of it.
        crop: which part; with `align`, of a face without landmarks.
        box: x0 y0 x1 y1 in pixels.

    Raises:
        RecordError: unreadable, as :func:`crop_face`.
    """
    if crop.box or crop.align is not None:
        if box is None:
            raise RecordError("unreadable", "the crop needs a box, the record has none")
        x0, y0, x1, y1 = (float(v) for v in box)
        longer = max(x1 - x0, y1 - y0)
        overlaps = x1 > x0 and y1 > y0 and x1 > 0 and y1 > 0 and x0 < width and y0 < height
        if not (overlaps and np.isfinite(longer)):
            raise RecordError("unreadable", f"box {x0:g} {y0:g} {x1:g} {y1:g} in {width}x{height}")
        side = max(1, min(round(longer * (1 + 2 * crop.margin)), height, width))
        top = min(max(round((y0 + y1 - side) / 2), 0), height - side)
        left = min(max(round((x0 + x1 - side) / 2), 0), width - side)
    elif crop.fraction is not None:
        side = max(1, round(crop.fraction * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
    else:
        return 0, 0, width, height
    return left, top, side, side


def face(
    data: bytes,
    *,
    crop: Crop,
    color: Color,
    size: int,
    box: Sequence[float] | None = None,
    landmarks: Sequence[float] | None = None,
) -> np.ndarray:
    """Decode, crop, convert and resize one face: uint8 (C, size, size), C 1 (gray) or 3 (rgb).

    Raises:
        RecordError: as :func:`decode` and :func:`crop_face`.
    """
    return planes(crop_face(decode(data), crop, box, landmarks, size), color, size)


def planes(pixels: np.ndarray, color: Color, size: int) -> np.ndarray:
    """Cropped pixels (H, W) or (H, W, 3) to uint8 (C, size, size)."""
    if color == "gray":
        return rounded(resampled(luma(pixels), size, size))[None]
    if pixels.ndim == 2:
        return np.repeat(rounded(resampled(pixels, size, size))[None], 3, axis=0)
    return np.stack([rounded(resampled(pixels[..., c], size, size)) for c in range(3)])


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma, uint8 (H, W)."""
    return pixels if pixels.ndim == 2 else rounded(luma(pixels))


def resize(gray: np.ndarray, size: int) -> np.ndarray:
    """Area average (linear where it enlarges) to uint8 (size, size)."""
    return rounded(resampled(gray, size, size))


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """Area average to uint8 (16, 16)."""
    return resize(gray, THUMBNAIL)


def phash(gray: np.ndarray) -> int:
    """64-bit perceptual hash: signs of the lowest DCT frequencies of the 32 x 32 face."""
    return int(hash_bits(resampled(gray, 32, 32)[None])[0])


def hash_bits(squares: np.ndarray) -> np.ndarray:
    """Perceptual hashes (N,) uint64 of square gray faces (N, S, S), S at least 16.

    The frequencies are so low that a 16 x 16 thumbnail gives nearly the bits of the full face.
    """
    basis = _cosines(squares.shape[1])
    waves = np.matmul(np.matmul(basis, squares.astype(np.float32)), basis.T)
    lowest = waves[:, :8, :8].copy()
    lowest[:, 0, 0] = waves[:, 8, 0]
    # float32 leaves noise of about 1e-5 of the gray range on waves that are exactly zero
    bits = lowest.reshape(len(squares), 64) > 1e-2
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def quality(gray: np.ndarray) -> tuple[float, float, float]:
    """Brightness (mean, 0-255), contrast (std, 0-255), sharpness (Laplacian variance at 48 px)."""
    small = resampled(gray, 48, 48)
    around = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]
    laplacian = around - 4 * small[1:-1, 1:-1]
    return float(gray.mean()), float(gray.std()), float(laplacian.var())


def pixel_digest(pixels: np.ndarray) -> bytes:
    """sha256 of decoded pixels and their shape; an RGB picture without color equals its gray."""
    if pixels.ndim == 3 and _is_gray(pixels[::7, ::7]) and _is_gray(pixels):
        pixels = pixels[..., 0]
    shape = "x".join(str(n) for n in pixels.shape)
    return hashlib.sha256(shape.encode() + pixels.tobytes()).digest()


def _is_gray(pixels: np.ndarray) -> bool:
    red = pixels[..., 0]
    return bool((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all())


def format_of(data: bytes) -> str:
    """Name of a picture's format, as Pillow has it; RecordError where it is none we read."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, name in SIGNATURES:
        if data.startswith(magic):
            return name
    known = any(data[at : at + len(magic)] == magic for at, magic in UNSUPPORTED)
    reason = "unsupported" if known else "not_an_image"
    raise RecordError(reason, f"{len(data):,} bytes starting {data[:16]!r}")


def _decode_jpeg(data: bytes) -> np.ndarray:
    if b"\xff\xda" not in data:
        raise RecordError("truncated", f"JPEG of {len(data):,} bytes ends before its scan")
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if space not in ("Gray", "YCbCr", "RGB"):
            return _decode_pillow(data, "JPEG")  # CMYK and YCCK, Adobe's inverted ones too
        _check_size(width, height)
        target = "GRAY" if space == "Gray" else "RGB"
        pixels = simplejpeg.decode_jpeg(data, target)
    except ValueError as err:
        text = str(err)
        if "extraneous bytes" in text or "ICC marker" in text:
            return _decode_pillow(data, "JPEG")  # harmless and common; Pillow sees to the scan
        reason = "unsupported" if "nsupported" in text else _reason(err)
        raise RecordError(reason, f"JPEG: {text}") from err
    if target == "GRAY":
        pixels = pixels[..., 0]
    segment = _exif_segment(data)
    return _orient(pixels, 1 if segment is None else _orientation(lambda: _parse_exif(segment)))


def _decode_pillow(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            _check_size(*image.size)
            image.load()
            return _orient(_pixels(image), _orientation(image.getexif))
    except RecordError:
        raise
    except Image.DecompressionBombError as err:
        raise RecordError("too_large", f"{name}: {err}") from err
    except Exception as err:  # a decoder may raise anything; the record becomes a row
        raise RecordError(_reason(err), f"{name}: {type(err).__name__}: {err}") from err


def _pixels(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise RecordError("unsupported", f"{image.format}: 32-bit gray")
        return ((wide * 255 + 32767) // 65535).astype(np.uint8)
    if mode in ("1", "L", "LA", "La"):
        return np.array(image.convert("L"))
    if mode in ("F", "LAB", "HSV"):
        raise RecordError("unsupported", f"{image.format} of mode {mode}")
    return np.array(image.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RecordError("too_large", f"{width}x{height} pixels, limit {MAX_PIXELS:,}")
    if width < 1 or height < 1:
        raise RecordError("unreadable", f"{width}x{height} pixels")


def _reason(err: Exception) -> str:
    if isinstance(err, (EOFError, zlib.error)):
        return "truncated"
    text = "" if isinstance(err, UnidentifiedImageError) else str(err).lower()
    return "truncated" if any(w in text for w in ("truncated", "premature")) else "unreadable"


def _exif_segment(data: bytes) -> bytes | None:
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            return data[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
    return None


def _parse_exif(segment: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(segment)
    return exif


def _orientation(tags: Callable[[], Image.Exif]) -> int:
    try:
        return tags().get(0x0112, 1)
    except Exception:  # noqa: BLE001  a broken tag block costs the turn, not the face
        return 1


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turns, mirror = ORIENTATION.get(orientation, (0, 0))
    if not turns and not mirror:
        return np.ascontiguousarray(pixels)
    turned = np.rot90(pixels, turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirror else turned)


@functools.lru_cache(maxsize=4)
def _cosines(size: int) -> np.ndarray:
    """DCT-II rows of the frequencies 0 to 8, float32 (9, size), scaled to means."""
    angles = np.pi * np.arange(9)[:, None] * (2 * np.arange(size) + 1) / (2 * size)
    return (np.cos(angles) / size).astype(np.float32)
