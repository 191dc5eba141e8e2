"""Parquet files at a location: written whole or not at all, read from disk and from S3 alike.

Cost: of a file its footer, and of its rows the columns that are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.parquet import Reader, Writer, open_file
from pipeline.schema import require_columns
from pipeline.storage import Location


def write_table(at: Location, table: pa.Table) -> None:
    """Write one Parquet file atomically."""
    with at.replacing() as sink, Writer(sink, table.schema) as writer:
        writer.write(table)


def read_table(at: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, all columns or the named ones in the order asked for.

    Raises:
        SourceError: no such file, not Parquet, or a column is missing.
    """
    with open_stored(at) as file:
        return file.read(columns)


@contextlib.contextmanager
def open_stored(at: Location, coded: Sequence[str] = ()) -> Iterator[Reader]:
    """A file of :func:`write_table`, only its footer read; raises as :func:`read_table`.

    Columns named in `coded` are read as dictionaries.
    """
    with _parquet_source(at) as source, Reader(source, at.uri, coded) as file:
        yield file


@contextlib.contextmanager
def open_table(at: Location, columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A Parquet file of anyone's, as it is on disk; its footer must name `columns`.

    Raises:
        SourceError: as :func:`read_table`.
    """
    with _parquet_source(at) as source, open_file(source, at.uri) as file:
        require_columns(file.schema_arrow.names, columns, at.uri)
        yield file


@contextlib.contextmanager
def _parquet_source(at: Location) -> Iterator[str | IO[bytes]]:
    if at.is_local:
        at.size()  # or Arrow's own FileNotFoundError would end up unexplained
        yield at.uri
    else:
        with at.open() as file:
            yield file
