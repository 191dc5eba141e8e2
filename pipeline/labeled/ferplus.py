"""FER2013 faces with their seven codes, and with the ten-rater votes of FERPlus.

Two layouts: one Parquet file (columns usage, image, emotion, and one column per vote class), or
the files people hold: fer2013.csv (or icml_face_data.csv) and fer2013new.csv beside it. Votes are
joined by row, never by image name: names are missing or doubled in the distributed file.

Training is `train` and PublicTest is `test`; PrivateTest is read only where `split` names it.
Cost: the csv is 300 MB of text, about ten seconds to read; Parquet takes a tenth of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from pipeline.ambiguity import RULES, Rule
from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.records import Records, image_bytes, records_table
from pipeline.schema import EMOTIONS, require_columns
from pipeline.storage import Location, location, read_table
from pipeline.synthetic import encode

CODES = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
"""Emotions by FER2013 code."""

VOTES = (*EMOTIONS, "unknown", "NF")
ROLES = {"Training": "train", "PublicTest": "test"}
SIDE = 48
CSV_FILES = ("fer2013.csv", "icml_face_data.csv")
VOTES_FILE = "fer2013new.csv"


class Fer2013Set(Config):
    """FER2013 by its own codes: seven emotions."""

    kind: Literal["fer2013"] = "fer2013"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # a Parquet file, fer2013.csv, or the folder it lies in
    split: str | None = None  # read only Training, PublicTest or PrivateTest

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a code outside 0-6."""
        at = location(self.path)
        rows = _read(at, votes=False).where(self.split, at)
        bad = np.flatnonzero((rows.emotion < 0) | (rows.emotion >= len(CODES)))
        if len(bad):
            first = bad[0]
            raise LabelError(
                f"{at} row {rows.row[first]}: emotion code {rows.emotion[first]}; expected 0-6"
            )
        table = records_table(
            rows.ids(name), rows.roles(), [CODES[code] for code in rows.emotion], rows.image
        )
        return Records(table, tuple(e for e in EMOTIONS if e in CODES), {})


class FerplusSet(Config):
    """FER2013 faces by the votes of FERPlus: eight emotions and soft labels."""

    kind: Literal["ferplus"] = "ferplus"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # a Parquet file, or the folder of fer2013.csv and fer2013new.csv
    split: str | None = None  # read only Training, PublicTest or PrivateTest
    rule: Rule = "majority"  # from votes to a label; faces without one can still be mined

    def records(self, name: str) -> Records:
        """Read the set; faces without a label by the rule keep their row.

        Raises:
            SourceError: missing files or columns, or rows of the two csv files that do not match.
        """
        at = location(self.path)
        rows = _read(at, votes=True).where(self.split, at)
        codes, soft = RULES[self.rule](rows.votes)
        labels = [EMOTIONS[code] if code >= 0 else None for code in codes]
        table = records_table(rows.ids(name), rows.roles(), labels, rows.image, soft=soft)
        return Records(table, EMOTIONS, {rule: _sizes(rows, rule) for rule in RULES})


@dataclass(frozen=True)
class _Rows:
    """Columns of FER2013, N rows, in file order."""

    file: str
    row: np.ndarray  # (N,) int64, in the file
    usage: np.ndarray  # (N,) str
    emotion: np.ndarray  # (N,) int64; -1 in sets read for their votes
    votes: np.ndarray  # (N, 10) int64, VOTES order; (N, 0) if not asked for
    image: pa.Array  # large_binary

    def where(self, usage: str | None, at: Location) -> _Rows:
        """Only the rows of one usage; all for None."""
        if usage is None:
            return self
        keep = np.flatnonzero(self.usage == usage)
        if not len(keep):
            there = ", ".join(sorted(set(self.usage.tolist()))) or "none"
            raise SourceError(f"{at}: no row of split {usage!r}; found: {there}")
        return _Rows(
            self.file, self.row[keep], self.usage[keep], self.emotion[keep], self.votes[keep],
            self.image.take(pa.array(keep)),
        )  # fmt: skip

    def ids(self, name: str) -> list[str]:
        return [f"{name}/{self.file}#{row}" for row in self.row]

    def roles(self) -> list[str | None]:
        return [ROLES.get(usage) for usage in self.usage]


def _sizes(rows: _Rows, rule: Rule) -> dict[str, int]:
    """How many faces of each usage get a label by the rule."""
    labels, _ = RULES[rule](rows.votes)
    found = zip(*np.unique(rows.usage[labels >= 0], return_counts=True), strict=True)
    return {str(usage): int(count) for usage, count in found}


def _read(at: Location, votes: bool) -> _Rows:
    if at.name.endswith(".parquet"):
        return _read_parquet(at, votes)
    folder = at if at.is_dir() else at.parent
    files = [at] if not at.is_dir() else [folder / name for name in CSV_FILES]
    there = [file for file in files if file.exists()]
    if not there:
        raise SourceError(
            f"{at}: expected a Parquet file or a folder with {' or '.join(CSV_FILES)}"
        )
    return _read_csv(there[0], folder / VOTES_FILE if votes else None)


def _read_parquet(at: Location, votes: bool) -> _Rows:
    labels = VOTES if votes else ("emotion",)
    table = read_table(at, ["usage", "image", *labels])
    n = len(table)
    return _Rows(
        file=at.name,
        row=np.arange(n),
        usage=_strings(table["usage"]),
        emotion=np.full(n, -1)
        if votes
        else table["emotion"].combine_chunks().to_numpy().astype(np.int64),
        votes=_votes(table, at) if votes else np.zeros((n, 0), np.int64),
        image=image_bytes(table["image"], f"{at} column image"),
    )


def _read_csv(at: Location, votes_at: Location | None) -> _Rows:
    table = _csv(at)
    require_columns(table.column_names, ["emotion", "pixels", "Usage"], at.uri)
    usage = _strings(table["Usage"])
    if votes_at is not None:
        ballot = _csv(votes_at)
        require_columns(ballot.column_names, ["Usage", *VOTES], votes_at.uri)
        _same_rows(usage, _strings(ballot["Usage"]), at, votes_at)
    pixels = (_pixels(text, row, at) for row, text in enumerate(table["pixels"].to_pylist()))
    return _Rows(
        file=at.name,
        row=np.arange(len(table)),
        usage=usage,
        emotion=table["emotion"].combine_chunks().to_numpy().astype(np.int64),
        votes=_votes(ballot, votes_at) if votes_at else np.zeros((len(table), 0), np.int64),
        image=pa.array([encode(face) for face in pixels], pa.large_binary()),
    )


def _csv(at: Location) -> pa.Table:
    """A csv file with the blanks around its column names removed (icml_face_data.csv has some)."""
    try:
        with at.open() as file:
            table = pcsv.read_csv(file)
    except pa.ArrowInvalid as err:
        raise SourceError(f"{at}: expected CSV: {str(err).splitlines()[0]}") from err
    return table.rename_columns([name.strip() for name in table.column_names])


def _same_rows(usage: np.ndarray, other: np.ndarray, at: Location, votes_at: Location) -> None:
    if len(usage) != len(other):
        raise SourceError(f"{votes_at}: {len(other)} rows, {at.name} has {len(usage)}")
    differ = np.flatnonzero(usage != other)
    if len(differ):
        row = int(differ[0])
        raise SourceError(
            f"{votes_at} row {row}: usage {other[row]}, {at.name} says {usage[row]}; join is by row"
        )


def _votes(table: pa.Table, at: Location) -> np.ndarray:
    columns = [table[name] for name in VOTES]
    if any(column.null_count for column in columns):
        raise SourceError(f"{at}: a vote is missing; expected a count in every vote column")
    return np.stack([column.combine_chunks().to_numpy() for column in columns], axis=1).astype(
        np.int64
    )


def _pixels(text: str, row: int, at: Location) -> np.ndarray:
    values = np.array(text.split(), dtype=np.int64)
    if len(values) != SIDE * SIDE or values.min() < 0 or values.max() > 255:
        raise SourceError(f"{at} row {row}: {len(values)} pixels; expected {SIDE * SIDE} of 0-255")
    return values.astype(np.uint8).reshape(SIDE, SIDE)


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([str(value).strip() for value in column.to_pylist()], dtype=np.str_)
