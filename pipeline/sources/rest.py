"""Labeled faces that the recipe's `fraction` left out, as unlabeled pool faces.

They are read from the table that the labeled stage stored, keep their ids, and arrive without a
label: the hidden truth is another file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
from pipeline.storage import Location, read_table

COLUMNS = ("id", "group", "image", "box", "landmarks")


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
        roles = read_table(rest, ["role"])["role"].to_pylist()
        if "rest" not in roles:
            raise SourceError(f"{rest}: no face left for source kind 'rest'; set labeled.fraction")
        mark = content_fingerprint(rest)
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
        require_fingerprint(extent, content_fingerprint(at))
        rows, table = read_rows(at, COLUMNS, extent, positions)
        images = table["image"].combine_chunks()
        columns = [
            table["id"],
            pa.array(rows, pa.int64()),
            table["group"],
            images,
            box_floats(table["box"], f"{at} column box"),
            landmark_floats(table["landmarks"], f"{at} column landmarks"),
            no_image(images),
        ]
        return pa.table(columns, schema=READ)
