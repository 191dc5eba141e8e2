"""READ rows made one by one, for formats whose records are parsed in Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from pipeline.schema import READ


class Face(NamedTuple):
    """One READ row: an image, or the reason why there is none."""

    id: str
    position: int
    group: str | None = None
    image: bytes | None = None
    box: tuple[float, float, float, float] | None = None
    landmarks: tuple[float, ...] | None = None  # see pipeline.schema.LANDMARKS
    reason: str | None = None


def read_table(faces: Iterable[Face]) -> pa.Table:
    """READ rows of faces, in their order."""
    columns = list(zip(*faces, strict=True)) or [()] * len(READ)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, READ, strict=True)], schema=READ)


def opaque(text: str) -> str:
    """A group id of 16 hex digits that does not show the name it stands for."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_group(path: str) -> str:
    """Group of the files of one folder; hashed, since folders are often named after a person."""
    return opaque(path.rpartition("/")[0])


def is_hidden(name: str) -> bool:
    """Whether an archive member lies behind a leading dot, as leftovers of desktops do."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def member_tail(name: str, offset: int, seen: set[str]) -> str:
    """What a member adds to its archive's id: its name, and its offset where the name repeats."""
    tail = f"/{name}@{offset}" if name in seen else f"/{name}"
    seen.add(name)
    return tail
