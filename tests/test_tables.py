"""Proves that tables come back from disk and from S3, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.storage import Location, location
from pipeline.tables import read_table, write_table


def _comes_back(root: Location) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None], "c": pa.array([[1.0], None])})
    at = root / "t.parquet"
    with pytest.raises(SourceError, match=r"t\.parquet: no such file"):
        read_table(at)
    write_table(at, table)
    assert read_table(at).equals(table)
    assert read_table(at, ["b", "a"]).equals(table.select(["b", "a"]))
    with pytest.raises(SourceError, match=r"t\.parquet: missing column d; found: a, b, c"):
        read_table(at, ["d"])
    at.write_bytes(b"not parquet at all")
    with pytest.raises(SourceError, match="expected Parquet"):
        read_table(at)


def test_tables__roundtrip_and_columns(tmp_path: Path) -> None:
    _comes_back(location(tmp_path))
    with s3_bucket() as bucket:
        _comes_back(bucket / "tables")
