"""Parquet pools read exactly the rows of an extent, and say which file or column is wrong."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.schema import READ
from pipeline.sources import parquet
from pipeline.sources.parquet import ParquetPool

N = 25


def write(path, n=N, row_group_size=10, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [b"%s-%d" % (path.stem.encode(), i) for i in range(n)], **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def test_read__every_row_once_in_order(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "deep" / "b.parquet", row_group_size=100)
    pool = ParquetPool(path=str(tmp_path))
    tables = [pool.read(extent) for extent in pool.slices(10)]
    assert all(table.schema.equals(READ) for table in tables)
    whole = pa.concat_tables(tables)
    assert whole["id"].to_pylist() == [
        *(f"a.parquet#{i}" for i in range(N)), *(f"deep/b.parquet#{i}" for i in range(N)),
    ]  # fmt: skip
    assert whole["image"].to_pylist() == [b"%s-%d" % (s, i) for s in (b"a", b"b") for i in range(N)]
    assert whole["position"].to_pylist() == [*range(N), *range(N)]


def test_read__single_file_has_its_name_in_the_id(tmp_path):
    pool = ParquetPool(path=write(tmp_path / "a.parquet"))
    extent = next(pool.slices(4))
    assert pool.read(extent)["id"][0].as_py() == "a.parquet#0"


def test_read__positions(tmp_path):
    pool = ParquetPool(path=write(tmp_path / "a.parquet", row_group_size=7))
    (extent,) = pool.slices(100)
    table = pool.read(extent, [23, 3, 8])
    assert table["image"].to_pylist() == [b"a-3", b"a-8", b"a-23"]
    assert pool.read(extent, []).num_rows == 0


def test_read__large_row_group_is_left_early(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH", 16)
    pool = ParquetPool(path=write(tmp_path / "a.parquet", n=1000, row_group_size=1000))
    extents = list(pool.slices(100))
    assert len(extents) == 10
    for extent in extents:
        want = [b"a-%d" % i for i in range(extent.start, extent.stop)]
        assert pool.read(extent)["image"].to_pylist() == want


def test_read__group_box_and_struct_images(tmp_path):
    table = pa.table(
        {
            "face": [{"bytes": b"x", "path": "x.jpg"}, {"bytes": None, "path": "y.jpg"}, None],
            "who": [5, None, 6],
            "at": pa.array([[1, 2, 3, 4], None, [5, 6, 7, 8]], pa.list_(pa.float64())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pool = ParquetPool(
        path=str(tmp_path / "a.parquet"), image_column="face", group_column="who", box_column="at"
    )
    (extent,) = pool.slices(10)
    found = pool.read(extent)
    assert found["image"].to_pylist() == [b"x", None, None]
    assert found["reason"].to_pylist() == [None, "empty", "empty"]
    assert found["group"].to_pylist() == ["5", None, "6"]
    assert found["box"].to_pylist() == [[1, 2, 3, 4], None, [5, 6, 7, 8]]
    assert found["landmarks"].to_pylist() == [None] * 3


def test_read__landmarks_ids_and_reasons_of_the_table(tmp_path):
    points = [[float(i) for i in range(10)], None, None]
    table = pa.table(
        {
            "image": [b"x", None, None],
            "points": pa.array(points, pa.list_(pa.float64())),
            "name": ["a#0", "b", "c"],
            "why": [None, "no_face", None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    settings = {"landmarks_column": "points", "id_column": "name", "reason_column": "why"}
    pool = ParquetPool(path=str(tmp_path / "a.parquet"), **settings)
    (extent,) = pool.slices(10)
    found = pool.read(extent)
    assert found.schema.equals(READ)
    assert found["landmarks"].to_pylist() == points
    assert found["id"].to_pylist() == ["a#0", "b", "c"]
    assert found["reason"].to_pylist() == [None, "no_face", "empty"]
    assert found["detail"].to_pylist()[:2] == [None, None]
    assert found["detail"][2].as_py().endswith(" is null")
    assert pool.read(extent, [1])["id"].to_pylist() == ["b"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"points": [[1.0, 2.0]]}, "column points: type list.*expected lists of 10 numbers"),
        ({"name": pa.nulls(1, pa.string())}, "column name: a row without an id"),
        ({"why": ["tired"]}, "column why: reason 'tired'; expected one of"),
    ],
)
def test_read__columns_of_another_form(tmp_path, column, message):
    pq.write_table(pa.table({"image": [b"x"], **column}), tmp_path / "a.parquet")
    names = {"points": "landmarks_column", "name": "id_column", "why": "reason_column"}
    (name,) = column
    pool = ParquetPool(path=str(tmp_path / "a.parquet"), **{names[name]: name})
    with pytest.raises(SourceError, match=message):
        pool.read(next(pool.slices(1)))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_read__every_type_of_bytes(tmp_path, kind):
    images = [b"x" * i for i in range(20)]
    bare = pa.array(images, kind)
    paths = pa.array([f"{i}.jpg" for i in range(20)])
    inside = pa.StructArray.from_arrays([bare, paths], ["bytes", "path"])
    for i, column in enumerate((bare, inside)):
        pq.write_table(pa.table({"image": column}), tmp_path / f"{i}.parquet", row_group_size=6)
        pool = ParquetPool(path=str(tmp_path / f"{i}.parquet"))
        table = pa.concat_tables([pool.read(extent) for extent in pool.slices(7)])
        assert table.schema.equals(READ)
        assert table["image"].to_pylist() == images


def test_read__only_paths(tmp_path):
    """A Hugging Face data set that was saved without its pictures: rows with a reason."""
    for bytes_type in (pa.binary(), pa.null()):
        column = pa.StructArray.from_arrays(
            [pa.nulls(3, bytes_type), pa.array(["a.jpg", "b.jpg", "c.jpg"])], ["bytes", "path"]
        )
        pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
        (table,) = map((pool := ParquetPool(path=str(tmp_path))).read, pool.slices(10))
        assert table["image"].null_count == 3
        assert table["reason"].to_pylist() == ["empty"] * 3


def test_read__numbered_pattern(tmp_path):
    for i in range(3):
        write(tmp_path / f"train-{i:05d}-of-00003.parquet", n=2)
    pool = ParquetPool(path=f"{tmp_path}/train-{{00000..00002}}-of-00003.parquet")
    ids = [i for extent in pool.slices(10) for i in pool.read(extent)["id"].to_pylist()]
    assert ids == [f"train-{i:05d}-of-00003.parquet#{row}" for i in range(3) for row in range(2)]


def test_slices__faults_name_place_and_columns(tmp_path):
    with pytest.raises(SourceError, match=r"gone: no such file"):
        list(ParquetPool(path=str(tmp_path / "gone")).slices(10))
    with pytest.raises(SourceError, match=r"no .parquet file in this folder"):
        list(ParquetPool(path=str(tmp_path)).slices(10))
    path = write(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a.parquet: missing column face; found: image"):
        list(ParquetPool(path=path, image_column="face").slices(10))
    path = write(tmp_path / "b.parquet", n=3, label=[1, 2, 3])
    with pytest.raises(SourceError, match=r"column label: type int64; expected binary"):
        list(ParquetPool(path=path, image_column="label").slices(10))
    path = write(tmp_path / "c.parquet", n=0)
    with pytest.raises(SourceError, match="1 Parquet files without a row"):
        list(ParquetPool(path=path).slices(10))


def test_slices__truncated_file(tmp_path):
    path = write(tmp_path / "a.parquet")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"a.parquet: broken Parquet: .*magic bytes"):
        list(ParquetPool(path=path).slices(10))


def test_read__broken_pages(tmp_path):
    path = write(tmp_path / "a.parquet", n=2000, row_group_size=1000)
    pool = ParquetPool(path=path)
    stat = os.stat(path)
    data = bytearray(Path(path).read_bytes())
    data[4:200] = bytes(196)
    Path(path).write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SourceError, match=r"a.parquet: broken Parquet"):
        pool.read(next(pool.slices(1000)))


def test_read__changed_file(tmp_path):
    pool = ParquetPool(path=write(tmp_path / "a.parquet"))
    extent = next(pool.slices(10))
    write(tmp_path / "a.parquet", n=30)
    with pytest.raises(SourceError, match=r"a.parquet: changed since it was planned"):
        pool.read(extent)


def test_read__file_replaced_while_it_is_read(tmp_path, monkeypatch):
    pool = ParquetPool(path=write(tmp_path / "a.parquet"))
    extent = next(pool.slices(10))
    marks = iter([extent.fingerprint, "0" * 32])
    monkeypatch.setattr(parquet, "fingerprint", lambda at: next(marks))
    with pytest.raises(SourceError, match=r"a.parquet: changed since it was planned"):
        pool.read(extent)


@pytest.mark.real
def test_real__pool():
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    pool = ParquetPool(path="$OMNIFER_DATA/faces", group_column="group")
    extents = list(pool.slices(1024))
    assert sum(extent.faces for extent in extents) == 13_233
    table = pool.read(extents[1])
    assert all(image[:3] == b"\xff\xd8\xff" for image in table["image"].to_pylist())
