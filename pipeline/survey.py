"""survey: decode every face once and keep what later stages compare instead of pixels.

A bad face is a row with a reason, never a crash. A JPEG of 250 x 250 costs about 1.2 ms of one
core, a third of it the decoder; decoder, hash and products release the interpreter lock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import images
from pipeline.config import Config
from pipeline.errors import RecordError
from pipeline.images import Color, Crop
from pipeline.ledger import Ledger, Slice
from pipeline.schema import FACES, HEAD, OK, QUARANTINED
from pipeline.screening import MOST_ATTEMPTS, screen
from pipeline.storage import Location

BLANK_CONTRAST = 1.0
"""Gray levels. A face whose pixels deviate less from their mean shows nothing."""


class SurveyConfig(Config):
    """How a slice is decoded; none of it changes the result."""

    threads: int = Field(default=2, ge=1, le=64)


@dataclass(frozen=True)
class _Seen:
    pixel_sha256: bytes
    width: int
    height: int
    square: np.ndarray  # (32, 32) uint8, what the hashes are made of
    thumbnail: bytes
    quality: tuple[float, float, float]


class Surveyor:
    """Surveys slices and commits them to the ledger at `at`.

    `crops` says for each source of the recipe which part of a picture is the face and whether
    color counts.
    """

    def __init__(self, at: Location, crops: Mapping[str, tuple[Crop, Color]], threads: int) -> None:
        self._ledger = Ledger(at)
        self._crops = dict(crops)
        self._threads = threads

    def __call__(self, slice: Slice, table: pa.Table) -> pa.Table:
        """Commit the FACES table of a READ table; returns one row: rows, quarantined."""
        began = time.monotonic()
        crop, color = self._crops[slice.source]
        if self._ledger.attempt(slice) > MOST_ATTEMPTS:
            table = screen(table)
        faces = describe(table, crop, color, threads=self._threads)
        bad = int(np.sum(faces["status"].to_numpy(zero_copy_only=False) == QUARANTINED))
        commit = self._ledger.commit(
            slice, faces, quarantined=bad, seconds=time.monotonic() - began
        )
        return pa.table({"rows": [commit.rows], "quarantined": [commit.quarantined]})


def describe(table: pa.Table, crop: Crop, color: Color, *, threads: int) -> pa.Table:
    """What is to know about the faces of a READ table, as FACES, row by row in the same order.

    Where `color` is gray the pixel digest is of the luma, so that a picture and its gray copy are
    twins. Bad faces keep their row: quarantined, with the reason, what reader or decoder said, and
    their sha256 and first bytes if they have any. A face all of one gray level is blank, and
    quarantined.
    """
    encoded = table["image"].to_pylist()
    boxes, landmarks = table["box"].to_pylist(), table["landmarks"].to_pylist()
    reasons, details = table["reason"].to_pylist(), table["detail"].to_pylist()

    def look(row: int) -> _Seen | RecordError:
        data = encoded[row]
        if reasons[row] is not None or data is None:
            return RecordError(reasons[row] or "unreadable", details[row] or "")
        try:
            return _look(data, crop, color, boxes[row], landmarks[row])
        except RecordError as err:
            return err

    with ThreadPoolExecutor(threads) as pool:
        seen = list(pool.map(look, range(len(table))))
        sha256 = list(pool.map(_sha256, encoded))
    good = [face for face in seen if isinstance(face, _Seen)]
    squares = np.stack([f.square for f in good]) if good else np.zeros((0, 32, 32), np.uint8)
    hashes = iter(images.hash_bits(squares).tolist())
    flipped = iter(images.hash_bits(squares[:, :, ::-1]).tolist())

    rows: list[tuple[Any, ...]] = []
    for face, digest, data in zip(seen, sha256, encoded, strict=True):
        head = None if data is None else data[:HEAD]
        if isinstance(face, RecordError):
            said = (face.detail or None, head)
            rows.append((QUARANTINED, face.reason, digest, *([None] * 9), *said))
            continue
        blank = face.quality[1] < BLANK_CONTRAST
        status = (QUARANTINED, "blank") if blank else (OK, None)
        found = (face.pixel_sha256, next(hashes), next(flipped), face.thumbnail)
        facts = (*found, face.width, face.height, *face.quality)
        rows.append((*status, digest, *facts, None, head if blank else None))
    made = list(zip(*rows, strict=True)) if rows else [()] * (len(FACES) - 3)
    kept = [table[name].combine_chunks() for name in ("id", "position", "group")]
    columns = [pa.array(v, f.type) for v, f in zip(made, list(FACES)[3:], strict=True)]
    return pa.table([*kept, *columns], schema=FACES)


def _look(
    data: bytes, crop: Crop, color: Color, box: list[float] | None, landmarks: list[float] | None
) -> _Seen:
    pixels = images.decode(data)
    if color == "gray":
        pixels = images.to_gray(pixels)
    gray = images.to_gray(images.crop_face(pixels, crop, box, landmarks))
    return _Seen(
        pixel_sha256=images.pixel_digest(pixels),
        width=pixels.shape[1],
        height=pixels.shape[0],
        square=images.resize(gray, 32),
        thumbnail=images.thumbnail(gray).tobytes(),
        quality=images.quality(gray),
    )


def _sha256(data: bytes | None) -> bytes | None:
    return None if data is None else hashlib.sha256(data).digest()
