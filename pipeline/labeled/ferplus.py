"""FERPlus: the faces of FER2013 with the votes of ten raters each, for eight emotions.

    fer2013.csv (or icml_face_data.csv) and fer2013new.csv beside it: joined by row, never by image
        name; names are missing or doubled in the distributed file
    FER2013Train/fer0000000.png, FER2013Train/label.csv, and so for FER2013Valid, FER2013Test
        `fer0000000.png,"(0, 0, 48, 48)",4,0,0,1,3,2,0,0,0,0`, no header
    *.parquet: columns usage, image, and one column per vote class

Training is `train` and PublicTest is `test`; PrivateTest is read only where `split` names it.

Source: Barsoum et al., arXiv 1608.01041; its rules are in :mod:`pipeline.ambiguity`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from pipeline.ambiguity import RULES, Rule
from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.labeled.fer2013 import (
    CSV_FILES,
    ROLES,
    Rows,
    csv_in,
    csv_table,
    integers,
    read_csv,
    read_parquet,
    strings,
)
from pipeline.labeled.records import Records, records_table
from pipeline.schema import EMOTIONS, require_columns
from pipeline.storage import Location, location

VOTES = (*EMOTIONS, "unknown", "NF")
VOTES_FILE = "fer2013new.csv"
FOLDERS = {
    "FER2013Train": "Training",
    "FER2013Valid": "PublicTest",
    "FER2013Test": "PrivateTest",
}
LABEL_FILE = "label.csv"
LABEL_COLUMNS = (
    "picture", "box", "neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear",
    "contempt", "unknown", "NF",
)  # fmt: skip

OFFICIAL = {
    "train": {
        "faces": 25_060, "neutral": 8_740, "happiness": 7_287, "surprise": 3_149,
        "sadness": 3_014, "anger": 2_100, "disgust": 119, "fear": 532, "contempt": 119,
    },
    "test": {"faces": 3_199},
}  # fmt: skip
"""By the majority rule, counted in the distributed votes."""


class FerplusSet(Config):
    """FER2013 faces by the votes of FERPlus: eight emotions and soft labels."""

    kind: Literal["ferplus"] = "ferplus"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # a Parquet file, the folder of the two csv files, or that of FER2013Train
    split: str | None = None  # read only Training, PublicTest or PrivateTest
    rule: Rule = "majority"  # votes to a label, voted: all; faces without one can still be mined

    def records(self, name: str) -> Records:
        """Read the set; faces without a label by the rule keep their row.

        Raises:
            SourceError: missing files or columns, or rows of the two csv files that do not match.
        """
        at = location(self.path)
        rows = _read(at).where(self.split, at)
        codes, soft = RULES[self.rule](rows.values)
        labels = [EMOTIONS[code] if code >= 0 else None for code in codes]
        table = records_table(rows.ids(name), rows.roles(), labels, rows.image, soft=soft)
        sizes = {str(rule): _sizes(rows, rule) for rule in RULES}
        wanted = {role for usage, role in ROLES.items() if self.split in (None, usage)}
        official = {
            role: counts
            for role, counts in OFFICIAL.items()
            if self.rule == "majority" and role in wanted
        }
        return Records(table, EMOTIONS, sizes, official=official)


def _sizes(rows: Rows, rule: Rule) -> dict[str, int]:
    """How many faces of each usage get a label by the rule."""
    labels, _ = RULES[rule](rows.values)
    found = zip(*np.unique(rows.usage[labels >= 0], return_counts=True), strict=True)
    return {str(usage): int(count) for usage, count in found}


def _read(at: Location) -> Rows:
    if at.name.endswith(".parquet"):
        return read_parquet(at, VOTES)
    pictures = [at / folder for folder in FOLDERS if (at / folder / LABEL_FILE).exists()]
    if pictures:
        parts = [_read_pictures(folder) for folder in pictures]
        return Rows(
            [key for part in parts for key in part.keys],
            np.concatenate([part.usage for part in parts]),
            np.concatenate([part.values for part in parts]),
            pa.concat_arrays([part.image for part in parts]),
        )
    file = csv_in(at)
    if file is None:
        raise SourceError(
            f"{at}: expected a Parquet file or a folder with {' or '.join(CSV_FILES[:2])} "
            f"and {VOTES_FILE}, or with {' '.join(FOLDERS)}"
        )
    return _read_pair(file, file.parent / VOTES_FILE)


def _read_pair(at: Location, votes_at: Location) -> Rows:
    ballot = csv_table(votes_at)
    require_columns(ballot.column_names, ["Usage", *VOTES], votes_at.uri)
    rows = read_csv(at)
    _same_rows(rows.usage, strings(ballot["Usage"]), at, votes_at)
    return replace(rows, values=integers(ballot, VOTES, votes_at))


def _read_pictures(folder: Location) -> Rows:
    """Pictures and votes of one folder; the votes stand in their own order, not in ours."""
    file = folder / LABEL_FILE
    try:
        table = pcsv.read_csv(
            pa.BufferReader(file.read_bytes()),
            read_options=pcsv.ReadOptions(column_names=LABEL_COLUMNS),
        )
    except pa.ArrowInvalid as err:
        raise SourceError(f"{file}: expected CSV: {str(err).splitlines()[0]}") from err
    names = strings(table["picture"])
    return Rows(
        keys=[f"{folder.name}/{name}" for name in names],
        usage=np.full(len(table), FOLDERS[folder.name]),
        values=integers(table, VOTES, file),
        image=pa.array([(folder / str(name)).read_bytes() for name in names], pa.large_binary()),
    )


def _same_rows(usage: np.ndarray, other: np.ndarray, at: Location, votes_at: Location) -> None:
    if len(usage) != len(other):
        raise SourceError(f"{votes_at}: {len(other)} rows, {at.name} has {len(usage)}")
    differ = np.flatnonzero(usage != other)
    if len(differ):
        row = int(differ[0])
        raise SourceError(
            f"{votes_at} row {row}: usage {other[row]}, {at.name} says {usage[row]}; join is by row"
        )
