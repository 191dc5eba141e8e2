"""Tables of many slices in one Parquet file, and the digest of what a table says.

A pack is written and read a row group at a time: memory is one row group however large the pack
is. Cost of the digest: about three CPU seconds per gigabyte, in one thread. Who reads slice after
slice (:class:`Pack`) decodes a row group once, and for 64 MB of them per process.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline import config
from pipeline.errors import LedgerError
from pipeline.parquet import ROW_GROUP, Reader, Writer
from pipeline.storage import Location
from pipeline.tables import open_stored

_MOST_BYTES = 16 * 2**20  # a row group ends here too: who reads one slice decodes all of it
_HELD = 64 * 2**20  # bytes of decoded row groups that a process keeps, and always the last one

_FLAT = "sha256 of a table: type {} has no canonical bytes; expected numbers, text, lists, structs"


def content_digest(table: pa.Table) -> str:
    """Hex sha256 of the column names, types and values in row order.

    Equal for tables that read the same. It does not depend on chunks, on offsets into larger
    buffers, on 32 or 64 bit offsets (`string` and `large_string`), on dictionary encoding, on what
    lies under a null, or on metadata. Floats count by their bits.

    Each column becomes streams of bytes: at every level one byte per entry for null or not, the
    lengths (int64) of what varies in length, and the bytes of the entries that are not null. The
    digest is over the number of rows and every stream's name, type and sha256, in column order.

    Raises:
        LedgerError: a column type outside numbers, text, binary, times, lists and structs.
    """
    columns: list[Any] = [table.num_rows]
    for name, column in zip(table.column_names, table.columns, strict=True):
        streams: dict[str, Any] = {}
        for chunk in column.chunks or [pa.array([], column.type)]:
            _feed(streams, "", chunk)
        columns.append([name, {path: stream.hexdigest() for path, stream in streams.items()}])
    return config.digest(columns)


def write_pack(sink: IO[bytes], tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema one after the other, in row groups of `ROW_GROUP`.

    Raises:
        LedgerError: no table, or one whose schema is not the first one's.
    """
    rest = iter(tables)
    first = next(rest, None)
    if first is None:
        raise LedgerError("pack: expected at least one table")
    schema = first.schema
    held: list[pa.Table] = []
    rows = size = 0
    with Writer(sink, schema) as writer:
        for table in itertools.chain([first], rest):
            if not table.schema.equals(schema):
                raise LedgerError(f"pack: columns {table.schema.names}, expected {schema.names}")
            held.append(table)
            rows, size = rows + table.num_rows, size + table.nbytes
            while rows >= ROW_GROUP or size >= _MOST_BYTES:
                joined = pa.concat_tables(held)
                writer.write(joined.slice(0, ROW_GROUP))
                held = [joined.slice(ROW_GROUP)]
                rows, size = held[0].num_rows, held[0].nbytes
        writer.write(pa.concat_tables(held))


class Pack:
    """A stored pack to read slices from, one by one and by many instances in a process.

    The row groups decoded last stay in the process; a pack that is written again is another one.

    Attributes:
        bounds: first row of every row group, and the number of rows.
    """

    _decoded: ClassVar[OrderedDict[tuple[Any, ...], pa.Table]] = OrderedDict()
    _lock = threading.Lock()

    def __init__(self, at: Location) -> None:
        self._at, self._stamp = at, at.stamp()
        self.bounds, self._schema = _layout(at, self._stamp)

    def empty(self, columns: Sequence[str] | None = None) -> pa.Table:
        """As :meth:`pipeline.parquet.Reader.empty`."""
        table = self._schema.empty_table()
        return table if columns is None else table.select(list(columns))

    def read(self, columns: Sequence[str] | None = None, row_group: int | None = None) -> pa.Table:
        """As :meth:`pipeline.parquet.Reader.read`."""
        named = None if columns is None else tuple(columns)
        key = (self._at, self._stamp, row_group, named)
        with self._lock:
            if (known := self._decoded.get(key)) is not None:
                self._decoded.move_to_end(key)
                return known
        with open_stored(self._at) as file:
            table = file.read(columns, row_group=row_group)
        with self._lock:
            self._decoded[key] = table
            held = sum(kept.nbytes for kept in self._decoded.values())
            while held > _HELD and len(self._decoded) > 1:
                held -= self._decoded.popitem(last=False)[1].nbytes
        return table


@functools.lru_cache(maxsize=16)
def _layout(at: Location, stamp: str) -> tuple[list[int], pa.Schema]:
    """Bounds and schema of a pack; `stamp` makes the cache forget one that was written again."""
    del stamp
    with open_stored(at) as file:
        return file.bounds, file.schema


def row_ranges(
    file: Reader | Pack, ranges: Iterable[tuple[int, int]], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """One table per [first, last) of rows; ranges that rise decode each row group once."""
    bounds = file.bounds
    empty = file.empty(columns)
    loaded, group = -1, empty
    for first, last in ranges:
        pieces = [empty]
        i = bisect.bisect_right(bounds, first) - 1
        while first < last:
            if loaded != i:
                loaded, group = i, file.read(columns, row_group=i)
            stop = min(last, bounds[i + 1])
            pieces.append(group.slice(first - bounds[i], stop - first))
            first, i = stop, i + 1
        yield pa.concat_tables(pieces)


def _feed(streams: dict[str, Any], path: str, array: pa.Array) -> None:
    """Add an array to the streams of its column; a later chunk continues where this one ends."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    _add(streams, f"{path}:valid", np.asarray(array.is_valid()))
    if pa.types.is_null(kind):
        return
    if array.null_count:
        array = array.drop_null()
    if pa.types.is_boolean(kind):
        _add(streams, f"{path}:bool", array.to_numpy(zero_copy_only=False))
    elif pa.types.is_struct(kind):
        for field, child in zip(kind, array.flatten(), strict=True):
            _feed(streams, f"{path}.{field.name}", child)
    elif pa.types.is_fixed_size_list(kind):
        _feed(streams, f"{path}[{kind.list_size}]", array.flatten())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _add(streams, f"{path}:list", np.diff(np.asarray(array.offsets)).astype("<i8"))
        _feed(streams, f"{path}[]", array.flatten())
    elif (name := str(kind).removeprefix("large_")) in ("string", "binary"):
        wide = str(kind).startswith("large_")
        offsets = np.frombuffer(array.buffers()[1] or b"", np.int64 if wide else np.int32)
        offsets = offsets[array.offset : array.offset + len(array) + 1]
        _add(streams, f"{path}:{name} lengths", np.diff(offsets).astype("<i8"))
        data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
        _add(streams, f"{path}:{name}", data[offsets[0] : offsets[-1]] if len(offsets) else data)
    elif pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
        _add(streams, f"{path}:{kind}", data[array.offset * width :][: len(array) * width])
    else:
        raise LedgerError(_FLAT.format(kind))


def _add(streams: dict[str, Any], name: str, values: np.ndarray) -> None:
    streams.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(values).view(np.uint8))
