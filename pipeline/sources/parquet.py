"""Faces in Parquet: one file, a numbered pattern, or all files below a folder; disk or S3.

Slices are gathered from whole row groups, and cut a row group only where it alone is larger than a
slice. Reading one decodes the image column of the row groups it touches, from their first row to
its last: row groups of 100-1,000 faces are read once, one of 100,000 many times over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.records import image_bytes
from pipeline.schema import require_columns
from pipeline.sources.extents import (
    Extent,
    Part,
    cut,
    fingerprint,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.sources.rows import Columns, column_table
from pipeline.storage import Location

BATCH = 1024


class ParquetPool(Config):
    """A pool in Parquet files."""

    kind: Literal["parquet"] = "parquet"
    name: str | None = None
    path: str  # file, folder, or name-{000..146}.parquet
    image_column: str = "image"  # binary, or struct<bytes, path> as Hugging Face datasets write it
    group_column: str | None = None  # opaque; serves splitting and capping only
    box_column: str | None = None  # x0 y0 x1 y1 in pixels
    landmarks_column: str | None = None  # ten numbers, see pipeline.schema.LANDMARKS
    id_column: str | None = None  # unique in the whole source; None: file#row
    reason_column: str | None = None  # why a row has no image, in the words of schema.REASONS
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int) -> Iterator[Extent]:
        """Extents of at most `faces` faces; reads the footers.

        Raises:
            SourceError: no such path, no Parquet file below it, a missing column, a broken file.
        """
        files = shards(self.path, [".parquet"])
        total = 0
        for at in files:
            mark = fingerprint(at)
            with _open(at, self._columns().named) as file:
                image_bytes(_empty(file, self.image_column), f"{at} column {self.image_column}")
                parts = list(_parts(file.metadata, self.image_column))
            total += sum(part.faces for part in parts)
            for start, stop in cut(parts, faces):
                yield Extent(at.uri, start, stop, mark, stop - start)
        if not total:
            raise SourceError(f"{self.path}: {len(files)} Parquet files without a row")

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        Raises:
            SourceError: the file changed, is broken, or lacks a column.
        """
        at = Location(extent.shard)
        require_fingerprint(extent, fingerprint(at))
        rows, table = read_rows(at, self._columns().named, extent, positions)
        require_fingerprint(extent, fingerprint(at))  # a file replaced meanwhile would be a mixture
        shard = name_below(root_of(self.path), at)
        return column_table(shard, rows, table, self._columns(), at.uri)

    def _columns(self) -> Columns:
        return Columns(
            self.image_column,
            self.group_column,
            self.box_column,
            self.landmarks_column,
            self.id_column,
            self.reason_column,
        )


def read_rows(
    at: Location, columns: Sequence[str], extent: Extent, positions: Sequence[int] | None
) -> tuple[np.ndarray, pa.Table]:
    """Rows of a Parquet file: their numbers (N,) and the columns.

    Decodes only the row groups touched, and each only up to the last row asked for.

    Raises:
        SourceError: a file that breaks off.
    """
    wanted = np.arange(extent.start, extent.stop)
    if positions is not None:
        wanted = np.sort(np.asarray(positions, dtype=np.int64))
    with _open(at, columns) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        batches = list(_batches(file, columns, wanted))
    return wanted, pa.Table.from_batches(batches, schema=schema)


def _batches(
    file: pq.ParquetFile, columns: Sequence[str], wanted: np.ndarray
) -> Iterator[pa.RecordBatch]:
    first = 0
    for index in range(file.num_row_groups):
        behind = first + file.metadata.row_group(index).num_rows
        rows = wanted[(wanted >= first) & (wanted < behind)]
        row = first
        first = behind
        if not len(rows):
            continue
        for batch in file.iter_batches(BATCH, row_groups=[index], columns=list(columns)):
            inside = rows[(rows >= row) & (rows < row + len(batch))] - row
            if len(inside):
                yield batch.take(pa.array(inside)).select(list(columns))
            row += len(batch)
            if row > rows[-1]:
                break


def _parts(metadata: pq.FileMetaData, image_column: str) -> Iterator[Part]:
    """Row groups with the bytes of their image column."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = [group.column(i) for i in range(group.num_columns)]
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == image_column
        )
        yield Part(group.num_rows, size)


def _empty(file: pq.ParquetFile, column: str) -> pa.ChunkedArray:
    return pa.chunked_array([], type=file.schema_arrow.field(column).type)


@contextlib.contextmanager
def _open(at: Location, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """The file, opened for pieces of row groups; a file that breaks off is a SourceError."""
    with contextlib.ExitStack() as stack:
        source = at.uri if at.is_local else stack.enter_context(at.open())
        try:
            file = stack.enter_context(pq.ParquetFile(source, pre_buffer=True))
            require_columns(file.schema_arrow.names, columns, at.uri)
            yield file
        except (pa.ArrowException, OSError) as err:
            raise SourceError(f"{at}: broken Parquet: {str(err).partition(chr(10))[0]}") from err
