"""Rounds of annotation on storage: what was asked, and what was answered.

    annotate/round-001/queries.parquet   the faces asked for, by rank; its creation opens the round
    annotate/round-001/sheet.csv         what the person fills in
    annotate/round-001/sheet.html        what the person looks at
    annotate/round-001/labels.parquet    the answers with the faces' bytes; its creation closes it
    annotate/curve.json, curve.svg       what the labels have brought, round by round

Both tables are created exclusively and never change, so of two commands that ask or answer at the
same time one wins. The answers are self-contained: they hold where the pool may be gone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunError
from pipeline.parquet import Writer
from pipeline.schema import BOX, LANDMARKS
from pipeline.storage import Location
from pipeline.tables import read_table

HOME = "annotate"
QUERIES_FILE = "queries.parquet"
LABELS_FILE = "labels.parquet"
SHEET = "sheet"
"""The sheets' name, less its suffix."""

QUERIES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # the recipe's name of the source
        pa.field("shard", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1, in the order chosen
        pa.field("pseudo_label", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
        pa.field("acquisition", pa.string(), nullable=False),
    ]
)
"""The faces of a round, in the order of their ranks."""

ANSWERS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # null: skipped, and not asked again
        pa.field("image", pa.large_binary()),
        pa.field("group", pa.string()),
        pa.field("box", BOX),
        pa.field("landmarks", LANDMARKS),
        pa.field("source", pa.string()),  # decides how the face is cropped; null: without bytes
        pa.field("by", pa.string()),
        pa.field("when", pa.string(), nullable=False),  # UTC, ISO 8601
    ]
)
"""What a person said of the faces of a round; faces left empty have no row.

Skipped faces, and labeled ones that were removed before the answers came, are without bytes.
"""

_NAME = re.compile(r"round-(\d{3,})")


@dataclass(frozen=True)
class Round:
    """One round below the folder `home`."""

    home: Location
    number: int

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"round-{self.number:03d}"

    @property
    def at(self) -> Location:
        """Its folder."""
        return self.home / self.name

    @property
    def answered(self) -> bool:
        """Whether its sheet was imported."""
        return (self.at / LABELS_FILE).exists()

    def queries(self) -> pa.Table:
        """QUERIES rows."""
        return read_table(self.at / QUERIES_FILE)

    def answers(self) -> pa.Table | None:
        """ANSWERS rows, or None before the sheet was imported."""
        return read_table(self.at / LABELS_FILE) if self.answered else None

    def labels(self) -> pa.Table:
        """ANSWERS rows of the faces that can be learned; none before the sheet was imported."""
        table = self.answers()
        if table is None:
            return ANSWERS.empty_table()
        return learnable(table)

    def ask(self, queries: pa.Table) -> None:
        """Open the round; RunError where another command was faster."""
        self._create(QUERIES_FILE, queries.cast(QUERIES), "asked")

    def answer(self, answers: pa.Table) -> None:
        """Close the round; RunError where another command was faster."""
        self._create(LABELS_FILE, answers.cast(ANSWERS), "answered")

    def _create(self, name: str, table: pa.Table, what: str) -> None:
        sink = io.BytesIO()
        with Writer(sink, table.schema) as writer:
            writer.write(table)
        at = self.at / name
        if not at.create(sink.getvalue()) and at.read_bytes() != sink.getvalue():
            raise RunError(f"{at}: {self.name} was {what} by another command at the same time")


def rounds(home: Location) -> list[Round]:
    """Rounds that were asked, in the order of their numbers."""
    found = [_NAME.fullmatch(child.name) for child in home.children()]
    every = [Round(home, number) for number in sorted(int(m.group(1)) for m in found if m)]
    return [one for one in every if (one.at / QUERIES_FILE).exists()]


def waiting(every: Sequence[Round]) -> Round | None:
    """The newest round that was asked and not answered."""
    return next((one for one in reversed(every) if not one.answered), None)


def closed(every: Sequence[Round]) -> set[str]:
    """Faces that are not asked for again: answered, skipped, or still waiting for an answer.

    What a person left empty in a sheet that was imported may be asked again.
    """
    ids: set[str] = set()
    for one in every:
        answers = one.answers()
        ids.update((one.queries() if answers is None else answers)["id"].to_pylist())
    return ids


def learnable(answers: pa.Table) -> pa.Table:
    """ANSWERS rows that have their bytes."""
    return answers.filter(pc.is_valid(answers["source"]))


def labels(every: Sequence[Round]) -> dict[str, tuple[int, str]]:
    """The number of its round and the label of every face that can be learned."""
    found: dict[str, tuple[int, str]] = {}
    for one in every:
        table = one.labels()
        pairs = zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
        found.update({face: (one.number, label) for face, label in pairs})
    return found
