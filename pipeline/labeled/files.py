"""Faces that a data set lists: where each picture lies and what the set says of it.

Readers of sets made of image files yield `ListedFace`s; this module reads the bytes.
Cost: files are read whole, one after the other, on S3 some at a time; all bytes are in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.labeled.records import records_table
from pipeline.schema import BOX, LANDMARKS, PERCEIVED
from pipeline.storage import Location

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

REQUESTS = 16  # S3 requests in flight

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ListedFace:
    """One face of a set; a picture may hold several."""

    file: Location
    role: str | None
    label: str | None  # an emotion name
    group: str | None = None
    box: Box | None = None  # x0 y0 x1 y1 in pixels
    number: str | None = None  # tells the faces of one picture apart
    landmarks: Sequence[float] | None = None  # ten numbers, see pipeline.schema.LANDMARKS
    perceived: Mapping[str, str] = field(default_factory=dict)  # by names of schema.PERCEIVED


def read_listed(
    name: str, root: Location, faces: Sequence[ListedFace], soft: np.ndarray | None = None
) -> pa.Table:
    """A RECORDS table; ids are `name/path below root`, with `#number` where faces have one.

    Args:
        name: prefix of the ids.
        root: folder that all files lie in.
        faces: in the order of the table; faces of one picture in a row are read once.
        soft: soft labels (N, K); None: there are none.

    Raises:
        SourceError: no face, or a file is missing.
    """
    if not faces:
        raise SourceError(f"{root}: no face in it that the settings ask for")
    return records_table(
        [_id(name, root, face) for face in faces],
        [face.role for face in faces],
        [face.label for face in faces],
        _bytes(faces),
        soft=soft,
        groups=pa.array([face.group for face in faces], pa.string()),
        boxes=pa.array([face.box for face in faces], BOX),
        landmarks=pa.array([face.landmarks for face in faces], LANDMARKS),
        perceived={name: [face.perceived.get(name) for face in faces] for name in PERCEIVED},
    )


def child(root: Location, *names: str) -> Location:
    """The first of `names` that is in the folder; mirrors spell some of them differently.

    Raises:
        SourceError: none of them.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise SourceError(f"{root}: expected {' or '.join(names)} in it")


def lines_of(file: Location) -> list[tuple[str, str]]:
    """Lines of a text file, less blank ones at its end, each behind `file line N` for messages."""
    try:
        text = file.read_text()
    except UnicodeDecodeError as err:
        raise SourceError(f"{file}: expected text: {err.reason}") from err
    lines = text.removeprefix("\ufeff").rstrip().splitlines()
    return [(f"{file} line {number}", line) for number, line in enumerate(lines, start=1)]


def _id(name: str, root: Location, face: ListedFace) -> str:
    path = face.file.uri.removeprefix(root.uri.rstrip("/") + "/")
    return f"{name}/{path}" if face.number is None else f"{name}/{path}#{face.number}"


def _bytes(faces: Sequence[ListedFace]) -> pa.Array:
    files = list(dict.fromkeys(face.file for face in faces))
    images = dict(zip(files, read_all(files), strict=True))
    return pa.array([images[face.file] for face in faces], pa.large_binary())


def read_all(files: Sequence[Location]) -> list[bytes]:
    """The bytes of each file; on S3 some at a time."""
    if not files or files[0].is_local:
        return [file.read_bytes() for file in files]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(Location.read_bytes, files))
