"""READ rows: made one by one, where records are parsed in Python, or from columns of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.labeled.records import box_floats, image_bytes, landmark_floats
from pipeline.schema import BOX, LANDMARKS, READ, REASONS


class Face(NamedTuple):
    """One READ row: an image, or the reason why there is none."""

    id: str
    position: int
    group: str | None = None
    image: bytes | None = None
    box: tuple[float, float, float, float] | None = None
    landmarks: tuple[float, ...] | None = None  # see pipeline.schema.LANDMARKS
    reason: str | None = None
    detail: str | None = None  # what was found where, in words that hold wherever the file lies


def read_table(faces: Iterable[Face]) -> pa.Table:
    """READ rows of faces, in their order."""
    columns = list(zip(*faces, strict=True)) or [()] * len(READ)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, READ, strict=True)], schema=READ)


def labeled_rows_as_read(labeled: pa.Table) -> pa.Table:
    """READ rows of LABELED rows, in their order."""
    made = {
        "position": pa.array(np.arange(labeled.num_rows), pa.int64()),
        "reason": pa.nulls(labeled.num_rows, pa.string()),
        "detail": pa.nulls(labeled.num_rows, pa.string()),
    }
    columns = [made[name] if name in made else labeled[name] for name in READ.names]
    return pa.table(columns, schema=READ)


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None where there is none."""

    image: str
    group: str | None = None
    box: str | None = None
    landmarks: str | None = None
    id: str | None = None
    reason: str | None = None

    @property
    def named(self) -> list[str]:
        """Those there are, each once."""
        return list(dict.fromkeys(name for name in astuple(self) if name))


def column_table(
    shard: str, rows: NDArray[np.int64], table: pa.Table, columns: Columns, where: str
) -> pa.Table:
    """READ rows of a table's rows; ids are `shard#row` where there is no column of ids.

    Args:
        shard: name of the file or data set.
        rows: numbers of the table's rows in it.
        table: as read.
        columns: what is what.
        where: for messages.

    Raises:
        SourceError: a column of another type, a row without an id, an unknown reason.
    """
    images = image_bytes(table[columns.image], f"{where} column {columns.image}")

    def given(name: str | None, kind: pa.DataType, convert: Convert = _text) -> pa.Array:
        if name is None:
            return pa.nulls(len(rows), kind)
        return convert(table[name], f"{where} column {name}")

    ids = given(columns.id, pa.string())
    if columns.id is None:
        ids = pa.array([f"{shard}#{row}" for row in rows], pa.string())
    elif ids.null_count:
        raise SourceError(f"{where} column {columns.id}: a row without an id")
    missing, said = no_image(images), given(columns.reason, pa.string(), _reasons)
    lacking = pc.and_(pc.is_valid(missing), pc.is_null(said))
    return pa.table(
        [
            ids,
            pa.array(rows, pa.int64()),
            given(columns.group, pa.string()),
            images,
            given(columns.box, BOX, box_floats),
            given(columns.landmarks, LANDMARKS, landmark_floats),
            pc.coalesce(said, missing),
            pc.if_else(lacking, f"column {columns.image} is null", pa.scalar(None, pa.string())),
        ],
        schema=READ,
    )


Convert = Callable[[pa.ChunkedArray, str], pa.Array]
"""(column, where it is, for messages) -> one array of the type READ asks for."""


def _text(column: pa.ChunkedArray, where: str) -> pa.Array:
    del where
    return column.combine_chunks().cast(pa.string())


def _reasons(column: pa.ChunkedArray, where: str) -> pa.Array:
    found = _text(column, where)
    unknown = set(found.drop_null().to_pylist()) - set(REASONS)
    if unknown:
        raise SourceError(f"{where}: reason {min(unknown)!r}; expected one of pipeline.schema")
    return found


def no_image(images: pa.Array) -> pa.Array:
    """Reason `empty` where a row has no image, else null."""
    reasons = ["empty" if missing else None for missing in images.is_null().to_pylist()]
    return pa.array(reasons, pa.string())


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
