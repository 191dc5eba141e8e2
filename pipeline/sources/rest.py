"""Labeled faces that the recipe's `fraction` left out, as unlabeled pool faces.

They are read from the table that the labeled stage stored, keep their ids, and arrive without a
label: the hidden truth is another file.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.records import box_floats, landmark_floats
from pipeline.schema import READ
from pipeline.sources.extents import Extent, Part, content_fingerprint, cut, require_fingerprint
from pipeline.sources.parquet import read_rows
from pipeline.sources.rows import no_image
from pipeline.storage import Location
from pipeline.tables import read_table

COLUMNS = ("id", "group", "image", "box", "landmarks")


GONE_FILE = "gone.json"
"""Beside a labeled table that faces were forgotten from: what it was, without naming them."""


@dataclass(frozen=True)
class Gone:
    """Rows that a stored table no longer has; slices go on counting the rows it was made with."""

    fingerprint: str | None = None  # of the table before; None: nothing is gone
    roles: dict[int, str] = field(default_factory=dict)  # by row, as it was counted before

    @staticmethod
    def beside(table: Location) -> Gone:
        """What is known beside a table."""
        data = (table.parent / GONE_FILE).find_bytes()
        if data is None:
            return Gone()
        known = json.loads(data)
        return Gone(known["fingerprint"], {int(row): role for row, role in known["rows"]})

    def put_back(self, roles: list[str]) -> list[str]:
        """Roles of the stored rows, with those of the missing ones where they were."""
        whole = list(roles)
        for row in sorted(self.roles):
            whole.insert(row, self.roles[row])
        return whole

    def place(self, row: int) -> int:
        """Where a row stands now."""
        return row - bisect.bisect_left(sorted(self.roles), row)


class RestPool(Config):
    """The rest of the labeled set as a pool."""

    kind: Literal["rest"] = "rest"
    name: str | None = None
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, rest: Location) -> Iterator[Extent]:
        """Extents of the `rest` rows of the LABELED table at `rest`; reads its roles only.

        Raises:
            SourceError: no such table, or no rest face in it.
        """
        gone = Gone.beside(rest)
        roles = gone.put_back(read_table(rest, ["role"])["role"].to_pylist())
        if "rest" not in roles:
            raise SourceError(f"{rest}: no face left for source kind 'rest'; set labeled.fraction")
        mark = gone.fingerprint or content_fingerprint(rest)
        row = 0
        for role, run in itertools.groupby(roles):
            length = len(list(run))
            if role == "rest":
                for start, stop in cut([Part(length, 0)], faces):
                    yield Extent(rest.uri, row + start, row + stop, mark, stop - start)
            row += length

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`, with the labeled set's own ids.

        Raises:
            SourceError: the table changed or is broken.
        """
        at = Location(extent.shard)
        gone = Gone.beside(at)
        require_fingerprint(extent, gone.fingerprint or content_fingerprint(at))
        asked = range(extent.start, extent.stop) if positions is None else sorted(positions)
        rows = [row for row in asked if row not in gone.roles]
        here = [gone.place(row) for row in rows]
        _, table = read_rows(at, COLUMNS, extent, here)
        images = table["image"].combine_chunks()
        columns = [
            table["id"],
            pa.array(rows, pa.int64()),
            table["group"],
            images,
            box_floats(table["box"], f"{at} column box"),
            landmark_floats(table["landmarks"], f"{at} column landmarks"),
            no_image(images),
            pa.nulls(len(images), pa.string()),
        ]
        return pa.table(columns, schema=READ)
