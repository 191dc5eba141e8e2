"""Proves that the content digest sees values only, and that packs give back what went in."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import packs
from pipeline.errors import LedgerError
from pipeline.packs import content_digest, row_ranges, write_pack
from pipeline.parquet import Reader
from pipeline.schema import FACES, READ, embeddings_schema, scores_schema


def _rich() -> pa.Table:
    """Every kind of column in use, with nulls, empties and repeated text."""
    halves = pa.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float16(), 2))
    return pa.table(
        {
            "flag": pa.array([True, None, False, True]),
            "number": pa.array([1, None, 3, 4], pa.uint64()),
            "text": pa.array(["a", None, "", "a"]),
            "bytes": pa.array([b"x", b"", None, b"yz"], pa.large_binary()),
            "hash": pa.array([b"aa", None, b"bb", b"cc"], pa.binary(2)),
            "halves": halves,
            "soft": pa.array([[0.5], [], None, [0.25, 0.75]], pa.list_(pa.float32())),
            "names": pa.array([["a"], None, ["b", None], []], pa.list_(pa.string())),
            "pair": pa.array([{"x": 1}, None, {"x": None}, {"x": 2}]),
            "nothing": pa.nulls(4),
        }
    )


def _rechunked(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1, 3)])


def _shifted(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(2), table]).combine_chunks().slice(2)


def _dictionary(table: pa.Table) -> pa.Table:
    at = table.column_names.index("text")
    return table.set_column(at, "text", table["text"].dictionary_encode())


def _wide_offsets(table: pa.Table) -> pa.Table:
    kinds = {"text": pa.large_string(), "soft": pa.large_list(pa.float32()), "bytes": pa.binary()}
    fields = [pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema]
    return table.cast(pa.schema(fields, metadata={"made": "otherwise"}))


def _stored(table: pa.Table) -> pa.Table:
    sink = io.BytesIO()
    write_pack(sink, [table.slice(0, 3), table.slice(3)])
    return Reader(sink, "memory").read()


@pytest.mark.parametrize("same", [_rechunked, _shifted, _dictionary, _wide_offsets, _stored])
def test_content_digest__layout_does_not_count(same: Any) -> None:
    assert content_digest(same(_rich())) == content_digest(_rich())


def test_content_digest__every_value_counts() -> None:
    """Each single cell set to null, each row swapped, each name changed: all digests differ."""
    table = _rich()
    seen = {content_digest(table)}
    for at, name in enumerate(table.column_names[:-1]):
        column = table[name].to_pylist()
        for row, value in enumerate(column):
            if value is not None:
                changed = pa.array([*column[:row], None, *column[row + 1 :]], table[name].type)
                seen.add(content_digest(table.set_column(at, name, changed)))
    cells = sum(4 - table[name].null_count for name in table.column_names)
    assert len(seen) == 1 + cells
    assert content_digest(table.take([1, 0, 2, 3])) not in seen
    assert content_digest(table.slice(0, 3)) not in seen
    assert content_digest(table.rename_columns([f"{n}_" for n in table.column_names])) not in seen


def test_content_digest__boundaries_and_types_count() -> None:
    def of(values: list[Any], kind: pa.DataType) -> str:
        return content_digest(pa.table({"a": pa.array(values, kind)}))

    assert of(["ab", "c"], pa.string()) != of(["a", "bc"], pa.string())
    assert of([[1], [2, 3]], pa.list_(pa.int8())) != of([[1, 2], [3]], pa.list_(pa.int8()))
    assert of([1], pa.int32()) != of([1], pa.uint32())
    assert of(["a"], pa.string()) != of([b"a"], pa.binary())
    assert of([], pa.string()) != of([], pa.int8())
    assert of([0.0], pa.float32()) != of([-0.0], pa.float32())


def test_content_digest__what_lies_under_a_null_does_not_count() -> None:
    valid = pa.array([True, False]).buffers()[1]

    def of(hidden: int) -> str:
        data = pa.py_buffer(np.array([1, hidden], np.int32))
        return content_digest(pa.table({"a": pa.Array.from_buffers(pa.int32(), 2, [valid, data])}))

    assert of(7) == of(8)


@pytest.mark.parametrize("schema", [READ, FACES, embeddings_schema(4, 2, 3), scores_schema(3, 2)])
def test_content_digest__takes_every_stage_schema(schema: pa.Schema) -> None:
    assert len(content_digest(schema.empty_table())) == 64


def test_content_digest__refuses_what_it_cannot_spell() -> None:
    table = pa.table({"a": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8()))})
    with pytest.raises(LedgerError, match="no canonical bytes"):
        content_digest(table)


def test_write_pack__row_groups_and_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "ROW_GROUP", 10)
    sizes = [3, 0, 12, 7, 25, 0]
    tables = [pa.table({"a": np.full(n, i), "b": ["x"] * n}) for i, n in enumerate(sizes)]
    tables = [t.cast(pa.schema([("a", pa.int64()), ("b", pa.string())])) for t in tables]
    sink = io.BytesIO()
    write_pack(sink, iter(tables))
    file = Reader(sink, "memory")
    assert file.bounds == [0, 10, 20, 30, 40, 47]
    stops = np.cumsum(sizes)
    ranges = list(zip(stops - sizes, stops, strict=True))
    assert [t.combine_chunks() for t in row_ranges(file, ranges)] == tables
    narrow = list(row_ranges(file, ranges, ["b"]))
    assert [t.column_names for t in narrow] == [["b"]] * 6


def test_write_pack__wide_rows_end_a_row_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_MOST_BYTES", 1000)
    sink = io.BytesIO()
    write_pack(sink, [pa.table({"a": [b"x" * 600]})] * 5)
    assert Reader(sink, "memory").bounds == [0, 2, 4, 5]


def test_write_pack__refuses_mixed_columns() -> None:
    with pytest.raises(LedgerError, match="columns"):
        write_pack(io.BytesIO(), [pa.table({"a": [1]}), pa.table({"b": [1]})])
