"""FER2013 in the shapes that people hold; FERPlus reads its faces through this module.

    fer2013.csv           emotion,pixels,Usage
    icml_face_data.csv    the same in another order, with blanks in the header
    train.csv             emotion,pixels: all training; test.csv beside it has no labels, not read
    *.parquet             columns usage, image, emotion
    train/angry/*.jpg, test/happy/*.jpg   names sorted, so that a folder's place is not its code

Training is `train` and PublicTest is `test`; PrivateTest is read only where `split` names it. In
the folders `test` holds both test sets: `protocol` says so, no number on it compares with others.
Cost: the csv is 300 MB of text, about ten seconds to read; Parquet takes a tenth of one.

Source: Goodfellow et al., Challenges in Representation Learning, arXiv 1307.0414.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.labeled.codes import emotion_of, label_names
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.records import Records, image_bytes, records_table
from pipeline.schema import require_columns
from pipeline.storage import Location, location
from pipeline.synthetic import encode
from pipeline.tables import read_table

ROLES = {"Training": "train", "PublicTest": "test"}
SIDE = 48
CSV_FILES = ("fer2013.csv", "icml_face_data.csv", "train.csv")
WITHOUT_USAGE = "train.csv"
MERGED = {"protocol": "fer2013-merged"}

OFFICIAL = {"Training": 28_709, "PublicTest": 3_589, "PrivateTest": 3_589}


class Fer2013Set(Config):
    """FER2013 by its own codes: seven emotions."""

    kind: Literal["fer2013"] = "fer2013"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # a Parquet or csv file, or the folder of a csv file or of train and test
    split: str | None = None  # read only Training, PublicTest or PrivateTest; train or test

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a code outside 0-6."""
        at = location(self.path)
        names = label_names("fer2013")
        if csv_in(at) is None and (at / "train").is_dir():
            folders = FolderSet(path=self.path, split=self.split)
            return Records(folders.records(name).table, names, MERGED, official=self._merged())
        rows = _read(at).where(self.split, at)
        labels = [
            emotion_of(str(code), "fer2013", f"{at.parent}/{key.replace('#', ' row ')}")
            for key, code in zip(rows.keys, rows.values[:, 0], strict=True)
        ]
        roles = rows.roles()
        table = records_table(rows.ids(name), roles, labels, rows.image)
        official = {
            role: {"faces": OFFICIAL[usage]} for usage, role in ROLES.items() if role in roles
        }
        return Records(table, names, official=official)

    def _merged(self) -> dict[str, dict[str, int]]:
        """Published numbers of the class folders."""
        train = OFFICIAL["Training"]
        faces = {"train": train, "test": sum(OFFICIAL.values()) - train}
        return {role: {"faces": n} for role, n in faces.items() if self.split in (None, role)}


@dataclass(frozen=True)
class Rows:
    """Columns of FER2013, N rows, in file order."""

    keys: list[str]  # what the ids are made of: file#row, or the path of a picture
    usage: np.ndarray  # (N,) str
    values: np.ndarray  # (N, C) int64: one code, or the votes
    image: pa.Array  # large_binary

    def where(self, usage: str | None, at: Location) -> Rows:
        """Only the rows of one usage; all for None."""
        if usage is None:
            return self
        keep = np.flatnonzero(self.usage == usage)
        if not len(keep):
            there = ", ".join(sorted(set(self.usage.tolist()))) or "none"
            raise SourceError(f"{at}: no row of split {usage!r}; found: {there}")
        return Rows(
            [self.keys[i] for i in keep], self.usage[keep], self.values[keep],
            self.image.take(pa.array(keep)),
        )  # fmt: skip

    def ids(self, name: str) -> list[str]:
        """Ids of the faces."""
        return [f"{name}/{key}" for key in self.keys]

    def roles(self) -> list[str | None]:
        """Roles of the faces; None for PrivateTest."""
        return [ROLES.get(usage) for usage in self.usage]


def csv_in(at: Location) -> Location | None:
    """A file as such; of a folder, the first csv file of faces that is in it, or None."""
    if not at.is_dir():
        return at if at.exists() else None
    return next((at / name for name in CSV_FILES if (at / name).exists()), None)


def _read(at: Location) -> Rows:
    if at.name.endswith(".parquet"):
        return read_parquet(at, ["emotion"])
    file = csv_in(at)
    if file is None:
        raise SourceError(
            f"{at}: expected a Parquet file or a folder with {' or '.join(CSV_FILES)} or train"
        )
    return read_csv(file)


def read_parquet(at: Location, columns: Sequence[str]) -> Rows:
    """Rows of a Parquet file; `columns` are their values."""
    table = read_table(at, ["usage", "image", *columns])
    return Rows(
        keys=[f"{at.name}#{row}" for row in range(len(table))],
        usage=strings(table["usage"]),
        values=integers(table, columns, at),
        image=image_bytes(table["image"], f"{at} column image"),
    )


def read_csv(at: Location) -> Rows:
    """Rows of a csv file with pixels in it; the code is their value."""
    table = csv_table(at)
    require_columns(table.column_names, ["emotion", "pixels"], at.uri)
    if at.name == WITHOUT_USAGE and "Usage" not in table.column_names:
        usage = np.full(len(table), "Training")
    else:
        require_columns(table.column_names, ["Usage"], at.uri)
        usage = strings(table["Usage"])
    pixels = (
        _pixels(text, row, at) for row, text in enumerate(map(str, table["pixels"].to_pylist()))
    )
    return Rows(
        keys=[f"{at.name}#{row}" for row in range(len(table))],
        usage=usage,
        values=integers(table, ["emotion"], at),
        image=pa.array([encode(face) for face in pixels], pa.large_binary()),
    )


def csv_table(at: Location) -> pa.Table:
    """A csv file with the blanks around its column names removed (icml_face_data.csv has some)."""
    try:
        with at.open() as file:
            table = pcsv.read_csv(file)
    except pa.ArrowInvalid as err:
        raise SourceError(f"{at}: expected CSV: {str(err).splitlines()[0]}") from err
    return table.rename_columns([name.strip() for name in table.column_names])


def integers(table: pa.Table, names: Sequence[str], at: Location) -> np.ndarray:
    """Columns as (N, C) int64; SourceError where a value is missing or no whole number."""
    for name in names:
        if not pa.types.is_integer(table[name].type) or table[name].null_count:
            raise SourceError(f"{at}: column {name!r}; expected a whole number in every row")
    columns = [table[name].combine_chunks().to_numpy() for name in names]
    return np.stack(columns, axis=1).astype(np.int64)


def strings(column: pa.ChunkedArray) -> np.ndarray:
    """Values (N,) of a text column without the blanks around them."""
    return np.array([str(value).strip() for value in column.to_pylist()], dtype=np.str_)


def _pixels(text: str, row: int, at: Location) -> np.ndarray:
    try:
        values = np.array(text.split(), dtype=np.int64)
    except ValueError as err:
        raise SourceError(f"{at} row {row}: pixels; expected numbers of 0-255: {err}") from err
    if len(values) != SIDE * SIDE or values.min() < 0 or values.max() > 255:
        raise SourceError(f"{at} row {row}: {len(values)} pixels; expected {SIDE * SIDE} of 0-255")
    return values.astype(np.uint8).reshape(SIDE, SIDE)
