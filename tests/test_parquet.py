"""Proves that every stage's table survives Parquet, with nulls where bad faces have them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.parquet import Reader, Writer
from pipeline.schema import FACES, READ, embeddings_schema, scores_schema, with_label_names


def _through(table: pa.Table) -> pa.Table:
    sink = io.BytesIO()
    with Writer(sink, table.schema) as writer:
        writer.write(table)
    return Reader(sink, "memory").read()


def _same(a: pa.Table, b: pa.Table) -> bool:
    return bool(a.equals(b, check_metadata=True))


rows = st.lists(st.booleans(), max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows, rows, st.integers(0, 3), st.sampled_from([pa.float16(), pa.float32(), pa.string()]))
def test_roundtrip__null_fixed_size_lists(
    first: list[bool], second: list[bool], cut: int, kind: pa.DataType
) -> None:
    """Any pattern of null lists, in two chunks, the first of them a slice of something longer."""

    def lists(pattern: list[bool]) -> pa.Array:
        values = [[f"{i}", f"-{i}"] for i in range(len(pattern))]
        cells: list[Any] = (
            values if pa.types.is_string(kind) else [[float(v) for v in p] for p in values]
        )
        return pa.array(
            [c if ok else None for c, ok in zip(cells, pattern, strict=True)], pa.list_(kind, 2)
        )

    table = pa.table({"a": pa.chunked_array([lists(first).slice(cut), lists(second)])})
    assert _same(_through(table), table)


@pytest.mark.parametrize("schema", [READ, FACES, embeddings_schema(4, 2, 3), scores_schema(3, 2)])
def test_roundtrip__stage_schemas(schema: pa.Schema) -> None:
    schema = with_label_names(schema, ["neutral", "fear"])
    nulls = [None if f.nullable else ("x" if f.type == pa.string() else 1) for f in schema]
    table = pa.table({f.name: pa.array([v], f.type) for f, v in zip(schema, nulls, strict=True)})
    assert _same(_through(table.cast(schema)), table.cast(schema))
    assert _same(_through(schema.empty_table()), schema.empty_table())


def test_roundtrip__embeddings_are_bit_equal() -> None:
    values = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float16)
    flat = pa.array(values.reshape(-1))
    mask = pa.array(np.arange(50) % 7 == 0)
    lists = pa.FixedSizeListArray.from_arrays(flat, 16, mask=mask)
    back = _through(pa.table({"e": lists}))["e"].combine_chunks()
    assert back.null_count == 8
    kept = np.arange(50) % 7 != 0
    assert np.array_equal(back.flatten().to_numpy().reshape(-1, 16), values[kept])


def test_write__refuses_a_null_inside_an_embedding() -> None:
    lists = pa.array([[1.0, None]], pa.list_(pa.float16(), 2))
    with pytest.raises(SourceError, match="column e: a null inside"):
        _through(pa.table({"e": lists}))


def test_read__columns_in_the_order_asked_for() -> None:
    sink = io.BytesIO()
    table = pa.table({"a": [1], "b": pa.array([None], pa.list_(pa.int8(), 3)), "c": ["x"]})
    with Writer(sink, table.schema) as writer:
        writer.write(table)
        writer.write(table)
    file = Reader(sink, "memory")
    assert file.bounds == [0, 1, 2]
    assert _same(file.read(["c", "b"], row_group=1), table.select(["c", "b"]))
    assert _same(file.empty(["c", "b"]), table.select(["c", "b"]).slice(0, 0))
    with pytest.raises(SourceError, match="memory: missing column d; found: a, b, c"):
        file.read(["d"])


def test_read__takes_files_of_others() -> None:
    sink = io.BytesIO()
    table = pa.table({"a": [1], "b": [[1, 2]]})
    pq.write_table(table, sink)
    assert Reader(sink, "memory").read().equals(table)
    with pytest.raises(SourceError, match="memory: expected Parquet"):
        Reader(io.BytesIO(b"something else"), "memory")
