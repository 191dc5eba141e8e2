"""Labeled faces listed in a CSV or in Parquet files: image bytes or paths, a label, a split.

Labels are class names, or codes with their meaning told by `names` (or, in a Parquet file written
by Hugging Face datasets, by the class names in its schema). A path is relative to the table.

Cost: all images are read whole into memory, one after the other where they are files.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.types as pt
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.records import (
    ClassNames,
    LabelPolicy,
    Records,
    box_floats,
    image_bytes,
    labels_present,
    landmark_floats,
    records_table,
    resolve_labels,
    split_role,
)
from pipeline.schema import require_columns
from pipeline.storage import Location, location
from pipeline.tables import read_table


class TableSet(Config):
    """One row per face."""

    kind: Literal["table"] = "table"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # .csv or .parquet, or a folder of .parquet files
    image_column: str = "image"  # encoded bytes, or the path of a file
    label_column: str = "label"
    split_column: str | None = None
    """None: every row is `train`, but for a folder's files named as test-00000-of-00002.parquet."""
    group_column: str | None = None  # faces that no split may part, as those of one person
    box_column: str | None = None  # x0 y0 x1 y1 in pixels
    landmarks_column: str | None = None  # ten numbers, see pipeline.schema.LANDMARKS
    split: str | None = None  # read only rows of this split, as the table spells it
    names: ClassNames = Field(default_factory=dict)  # class or code -> emotion; null drops it
    label_policy: LabelPolicy | None = None  # what becomes of the class `other`

    def records(self, name: str) -> Records:
        """Read the table; raises SourceError, or LabelError naming the row of a bad label."""
        at = location(self.path)
        parts = sorted(at.files((".parquet",)), key=lambda part: part.uri) if at.is_dir() else [at]
        if not parts:
            raise SourceError(f"{at}: expected a table or a folder of .parquet files; holds none")
        labels: list[str | None] = []
        splits: set[str] = set()
        read = []
        for part in parts:
            of = part.uri.removeprefix(at.uri).lstrip("/")  # "" of a file
            split = _split_of(of) or "train"
            rows, seen, told = self._part(part, f"{name}/{of or at.name}", split)
            read.append(rows)
            splits |= seen
            labels += told
        if not splits if self.split is None else self.split not in splits:
            there = ", ".join(sorted(splits)) or "none"
            raise SourceError(f"{at}: no row of split {self.split!r}; found: {there}")
        return Records(pa.concat_tables(read), labels_present(labels), {})

    def _part(
        self, at: Location, ids: str, split: str
    ) -> tuple[pa.Table, set[str], list[str | None]]:
        """LABELED rows of one file, the splits that are in it, and the labels of all its rows."""
        known = (self.box_column, self.landmarks_column)
        optional = (self.split_column, self.group_column, *known)
        columns = [self.image_column, self.label_column, *(c for c in optional if c)]
        table = _read(at, list(dict.fromkeys(columns)))
        splits = _splits(table, self.split_column, at) or [split] * len(table)
        native = _native_labels(table, self.label_column, self.names, at)
        labels = resolve_labels(native, self.names, self.label_policy, partial(_place, at))
        rows = [i for i, split in enumerate(splits) if self.split in (None, split)]
        dropped = {i for i in rows if labels[i] is None and native[i] is not None}
        rows = [i for i in rows if i not in dropped]
        kept = table.take(pa.array(rows, pa.int64()))
        records = records_table(
            [f"{ids}#{i}" for i in rows],
            [split_role(splits[i]) for i in rows],
            [labels[i] for i in rows],
            _images(kept[self.image_column], rows, at, f"{at} column {self.image_column}"),
            groups=_text(kept[self.group_column]) if self.group_column else None,
            boxes=box_floats(kept[self.box_column], f"{at} column {self.box_column}")
            if self.box_column
            else None,
            landmarks=landmark_floats(
                kept[self.landmarks_column], f"{at} column {self.landmarks_column}"
            )
            if self.landmarks_column
            else None,
        )
        return records, set(splits), labels


def _place(at: Location, row: int) -> str:
    """Where a row is: a CSV file's line as editors count, below its header."""
    return f"{at} line {row + 2}" if at.name.lower().endswith(".csv") else f"{at} row {row}"


def _split_of(part: str) -> str | None:
    """The split that the name of a folder's file tells."""
    first = part.rpartition("/")[2].partition("-")[0].removesuffix(".parquet")
    return first if split_role(first) else None


def _read(at: Location, columns: list[str]) -> pa.Table:
    if not at.name.lower().endswith(".csv"):
        return read_table(at, columns)
    try:
        with at.open() as file:
            table = pcsv.read_csv(file)
    except pa.ArrowInvalid as err:
        raise SourceError(f"{at}: expected CSV: {str(err).splitlines()[0]}") from err
    require_columns(table.column_names, columns, at.uri)
    return table.select(columns)


def _splits(table: pa.Table, column: str | None, at: Location) -> list[str]:
    if column is None:
        return []
    splits = ["" if value is None else str(value) for value in table[column].to_pylist()]
    for row, split in enumerate(splits):
        if split_role(split) is None:
            raise SourceError(
                f"{_place(at, row)}: split {split!r}; expected train, validation or test"
            )
    return splits


def _native_labels(
    table: pa.Table, name: str, names: dict[str, str | None], at: Location
) -> list[str | None]:
    """Class names; codes become the names that the file itself gives them, else their digits."""
    column = table[name]
    values = column.to_pylist()
    if pt.is_string(column.type) or pt.is_large_string(column.type):
        return values
    if not pt.is_integer(column.type):
        raise LabelError(f"{at}: labels of type {column.type}; expected class names or codes")
    if names:
        return [None if code is None else str(code) for code in values]
    own = _names_in_schema(table.schema, name)
    if not own:
        raise LabelError(
            f"{at}: labels are codes; tell their meaning by `names`, as in {{0: neutral, 1: fear}}"
        )
    for row, code in enumerate(values):
        if code is not None and not 0 <= code < len(own):
            raise LabelError(
                f"{_place(at, row)}: label code {code}; the file names {len(own)} classes"
            )
    return [None if code is None else own[code] for code in values]


def _names_in_schema(schema: pa.Schema, column: str) -> list[str]:
    """Class names that Hugging Face datasets write into the schema; [] if there are none."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features", column):
        features = features.get(key, {})
    return [str(name) for name in features.get("names", [])]


def _images(
    column: pa.ChunkedArray, rows: list[int], at: Location, where: str
) -> pa.Array | list[bytes]:
    if not (pt.is_string(column.type) or pt.is_large_string(column.type)):
        return image_bytes(column, where)
    return [
        _file(path, row, at).read_bytes()
        for path, row in zip(column.to_pylist(), rows, strict=True)
    ]


def _file(path: str | None, row: int, at: Location) -> Location:
    if not path:
        raise SourceError(f"{_place(at, row)}: no image path")
    return location(path) if path.startswith(("/", "s3://")) else at.parent / path


def _text(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().cast(pa.string())
