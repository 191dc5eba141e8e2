"""Parquet files that give back the table that was written, null fixed-size lists included.

Arrow writes a null fixed-size list to Parquet but, up to version 25 at least, refuses to read it
(apache/arrow issue 35692), and every bad face has one. So fixed-size lists are stored as lists of
any size, and those of float16 (embeddings) as fixed-size binary: no level per number, which writes
six times and reads three times as fast at 512 numbers. `fixed_size_lists` in the file's metadata
holds the sizes; other tools see lists and bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.schema import require_columns

ROW_GROUP = 131_072
"""Rows of a row group: the least that a reader of a few rows decodes."""

_SIZES = b"fixed_size_lists"


class Writer:
    """Writes tables of one schema to an open file; the file is complete when the block ends."""

    def __init__(self, sink: IO[bytes], schema: pa.Schema) -> None:
        self._writer = table_writer(sink, _stored_schema(schema))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Add the rows of a table, in row groups of at most :data:`ROW_GROUP`."""
        schema = _stored_schema(table.schema)
        columns = [
            _store(column, field) for column, field in zip(table.columns, schema, strict=True)
        ]
        self._writer.write_table(
            pa.Table.from_arrays(columns, schema=schema), row_group_size=ROW_GROUP
        )

    def annotate(self, metadata: Mapping[bytes, bytes]) -> None:
        """Add what is only known at the end to the schema's metadata."""
        self._writer.add_key_value_metadata(dict(metadata))


class Reader:
    """An open Parquet file, ours or anyone's; only its footer is read until rows are asked for.

    Attributes:
        schema: of the table that was written.
        bounds: first row of every row group, and the number of rows.
    """

    def __init__(self, source: str | IO[bytes], where: str, coded: Sequence[str] = ()) -> None:
        """Open `source`, called `where` in errors; columns in `coded` are read as dictionaries."""
        self._file = open_file(source, where, coded)
        self._where = where
        stored = self._file.schema_arrow
        # The footer's own: what was added at the end is not in the schema that Arrow stored.
        metadata = dict(self._file.metadata.metadata or {})
        metadata.pop(b"ARROW:schema", None)
        self._sizes: dict[str, int] = json.loads(metadata.pop(_SIZES, b"{}"))
        fields = [_restored_field(field, self._sizes.get(field.name)) for field in stored]
        self.schema = pa.schema(fields, metadata=metadata or None)
        groups = self._file.metadata
        counts = (groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        self.bounds = list(itertools.accumulate(counts, initial=0))

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, columns: Sequence[str] | None = None, row_group: int | None = None) -> pa.Table:
        """All rows, or one row group; all columns, or the named ones in that order.

        Raises:
            SourceError: a column is missing.
        """
        names = self.schema.names if columns is None else list(columns)
        require_columns(self.schema.names, names, self._where)
        if row_group is None:
            table = self._file.read(columns=names)
        else:
            table = self._file.read_row_group(row_group, columns=names)
        fields = [self.schema.field(name) for name in names]
        restored = [_restore(table[field.name], field) for field in fields]
        return pa.Table.from_arrays(
            restored, schema=pa.schema(fields, metadata=self.schema.metadata)
        )

    def empty(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A table without rows, with the columns that :meth:`read` would give."""
        table = self.schema.empty_table()
        return table if columns is None else table.select(list(columns))


def table_writer(sink: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    """Arrow's writer with the one set of options in use: zstd, dictionaries for text only."""
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
        use_compliant_nested_type=False,  # keeps the names of list items as they are
    )


def open_file(source: str | IO[bytes], where: str, coded: Sequence[str] = ()) -> pq.ParquetFile:
    """Arrow's reader of a file; SourceError naming `where` if it is not Parquet."""
    try:
        return pq.ParquetFile(source, read_dictionary=list(coded))
    except pa.ArrowInvalid as err:
        detail = str(err).partition("\n")[0]
        raise SourceError(f"{where}: expected Parquet: {detail}") from err


def _stored_schema(schema: pa.Schema) -> pa.Schema:
    fixed = {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}
    if not fixed:
        return schema
    fields = [field.with_type(_stored_type(field.type)) for field in schema]
    sizes = json.dumps(fixed, sort_keys=True).encode()
    return pa.schema(fields, metadata=dict(schema.metadata or {}) | {_SIZES: sizes})


def _stored_type(kind: pa.DataType) -> pa.DataType:
    if not pa.types.is_fixed_size_list(kind):
        return kind
    if pa.types.is_float16(kind.value_type):
        return pa.binary(2 * kind.list_size)
    return pa.list_(kind.value_field)


def _restored_field(field: pa.Field, size: int | None) -> pa.Field:
    if size is None:
        return field
    binary = pa.types.is_fixed_size_binary(field.type)
    inner = pa.float16() if binary else field.type.value_field
    return field.with_type(pa.list_(inner, size))


def _store(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if not pa.types.is_fixed_size_list(column.type):
        return column
    if not pa.types.is_fixed_size_binary(field.type):
        return column.cast(field.type)
    chunks = []
    for chunk in column.chunks:
        values = chunk.values
        if values.null_count and chunk.flatten().null_count:
            raise SourceError(f"column {field.name}: a null inside a list of float16, not storable")
        data = values.buffers()[1] or pa.py_buffer(b"")
        buffers = [chunk.buffers()[0], data.slice(2 * values.offset)]
        chunks.append(pa.Array.from_buffers(field.type, len(chunk), buffers, offset=chunk.offset))
    return pa.chunked_array(chunks, field.type)


def _restore(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if column.type == field.type:
        return column
    if not pa.types.is_fixed_size_binary(column.type):
        return column.cast(field.type)
    size = field.type.list_size
    chunks = []
    for chunk in column.chunks:
        validity, data = chunk.buffers()
        count = size * (chunk.offset + len(chunk))
        values = pa.Array.from_buffers(pa.float16(), count, [None, data or pa.py_buffer(b"")])
        chunks.append(
            pa.Array.from_buffers(
                field.type, len(chunk), [validity], offset=chunk.offset, children=[values]
            )
        )
    return pa.chunked_array(chunks, field.type)
