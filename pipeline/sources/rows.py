"""READ rows: made one by one, where records are parsed in Python, or from columns of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.labeled.records import box_floats, image_bytes
from pipeline.schema import READ


class Face(NamedTuple):
    """One READ row: an image, or the reason why there is none."""

    id: str
    position: int
    group: str | None = None
    image: bytes | None = None
    box: tuple[float, float, float, float] | None = None
    reason: str | None = None


def read_table(faces: Iterable[Face]) -> pa.Table:
    """READ rows of faces, in their order."""
    columns = list(zip(*faces, strict=True)) or [()] * len(READ)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, READ, strict=True)], schema=READ)


def column_table(
    shard: str,
    rows: NDArray[np.int64],
    table: pa.Table,
    columns: tuple[str, str | None, str | None],
    where: str,
) -> pa.Table:
    """READ rows of a table's rows; ids are `shard#row`.

    Args:
        shard: name of the file or data set.
        rows: numbers of the table's rows in it.
        table: as read.
        columns: names of the columns of images, groups and boxes; None where there is none.
        where: for messages.

    Raises:
        SourceError: a column of another type.
    """
    image, group, box = columns
    images = image_bytes(table[image], f"{where} column {image}")
    return pa.table(
        [
            pa.array([f"{shard}#{row}" for row in rows], pa.string()),
            pa.array(rows, pa.int64()),
            table[group].cast(pa.string()) if group else pa.nulls(len(rows), pa.string()),
            images,
            box_floats(table[box], f"{where} column {box}")
            if box
            else pa.nulls(len(rows), READ.field("box").type),
            no_image(images),
        ],
        schema=READ,
    )


def no_image(images: pa.Array) -> pa.Array:
    """Reason `empty` where a row has no image, else null."""
    return pa.array(["empty" if missing else None for missing in images.is_null().to_pylist()])


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
