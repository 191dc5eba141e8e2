"""Lance pools read exactly the rows of an extent, of the version that was planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline import s3
from pipeline.errors import SourceError
from pipeline.schema import READ
from pipeline.sources.extents import Extent
from pipeline.sources.lance import LancePool
from pipeline.sources.reader import fetch, plan_slices, read_slice
from pipeline.storage import location
from sources.writers import write_lance

N = 25


def images(name: str, first: int = 0, count: int = N) -> list[bytes]:
    return [b"%s-%d" % (name.encode(), i) for i in range(first, first + count)]


def write(at: Path, name: str = "a", rows: int = 10, **columns: Any) -> str:
    return write_lance(at, pa.table({"image": images(name), **columns}), rows)


def whole(pool: LancePool, faces: int) -> pa.Table:
    tables = [pool.read(extent) for extent in pool.slices(faces)]
    assert all(table.schema.equals(READ) for table in tables)
    return pa.concat_tables(tables)


@pytest.mark.parametrize("faces", [1, 7, 10, 100])
def test_read__every_row_once_in_order(tmp_path: Path, faces: int) -> None:
    write(tmp_path / "a.lance")
    write(tmp_path / "b.lance", "b", rows=100)
    table = whole(LancePool(path=str(tmp_path)), faces)
    assert table["image"].to_pylist() == [*images("a"), *images("b")]
    assert table["id"].to_pylist() == [f"{s}.lance#{i}" for s in "ab" for i in range(N)]
    assert table["position"].to_pylist() == [*range(N), *range(N)]


def test_slices__are_cut_at_fragments(tmp_path: Path) -> None:
    pool = LancePool(path=write(tmp_path / "a.lance"))
    assert [(e.start, e.stop, e.faces) for e in pool.slices(12)] == [
        (0, 10, 10),
        (10, 20, 10),
        (20, 25, 5),
    ]
    assert [(e.start, e.stop) for e in pool.slices(20)] == [(0, 20), (20, 25)]


def test_slices__a_pattern_names_the_sets(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"p-{i:02d}.lance", f"p{i}")
    table = whole(LancePool(path=str(tmp_path / "p-{01..02}.lance")), 100)
    assert table["image"].to_pylist() == [*images("p1"), *images("p2")]
    assert table["id"][0].as_py() == "p-01.lance#0"


def test_read__positions_group_box_and_struct_images(tmp_path: Path) -> None:
    table = pa.table(
        {
            "face": [{"bytes": b"x", "path": "x.jpg"}, {"bytes": None, "path": "y.jpg"}, None],
            "who": [5, None, 6],
            "at": pa.array([[1, 2, 3, 4], None, [5, 6, 7, 8]], pa.list_(pa.float64())),
        }
    )
    path = write_lance(tmp_path / "a.lance", table, 2)
    pool = LancePool(path=path, image_column="face", group_column="who", box_column="at")
    (extent,) = pool.slices(10)
    found = pool.read(extent)
    assert found["image"].to_pylist() == [b"x", None, None]
    assert found["reason"].to_pylist() == [None, "empty", "empty"]
    assert found["group"].to_pylist() == ["5", None, "6"]
    assert found["box"].to_pylist() == [[1, 2, 3, 4], None, [5, 6, 7, 8]]
    assert pool.read(extent, [2, 0])["position"].to_pylist() == [0, 2]
    assert pool.read(extent, []).num_rows == 0


def test_read__later_versions_change_nothing(tmp_path: Path) -> None:
    import lance

    path = write(tmp_path / "a.lance")
    pool = LancePool(path=path)
    before = list(pool.slices(100))
    write_lance(tmp_path / "a.lance", pa.table({"image": images("new", N, 5)}), 10, mode="append")
    lance.dataset(path).delete("image = X'612D33'")  # a-3
    assert [i for e in before for i in pool.read(e)["image"].to_pylist()] == images("a")
    kept = [image for image in images("a") if image != b"a-3"]
    assert whole(pool, 100)["image"].to_pylist() == [*kept, *images("new", N, 5)]
    assert list(LancePool(path=path, version=1).slices(100)) == before


def test_read__another_set_in_its_place_is_refused(tmp_path: Path) -> None:
    pool = LancePool(path=write(tmp_path / "a.lance"))
    (extent,) = pool.slices(100)
    shutil.rmtree(tmp_path / "a.lance")
    with pytest.raises(SourceError, match=r"a\.lance: broken Lance dataset, or no such version"):
        pool.read(extent)
    write(tmp_path / "a.lance", "b")
    with pytest.raises(SourceError, match="changed since it was planned"):
        pool.read(extent)


@pytest.mark.parametrize("faces", [4, 100])
def test_fetch__same_bytes_as_the_slice(tmp_path: Path, faces: int) -> None:
    sources = {"web": LancePool(path=write(tmp_path / "a.lance"))}
    for s in plan_slices(sources, faces, location(tmp_path / "plan")):
        table = read_slice(s, sources)
        some = table.take(list(range(0, len(table), 3)))
        assert fetch(s, some["position"].to_pylist()[::-1], sources).equals(some)


def test_read__from_s3(tmp_path: Path) -> None:
    write(tmp_path / "a.lance")
    with s3_bucket() as root:
        at = root.parent / "pool"
        s3.filesystem().put(str(tmp_path / "a.lance"), f"{at.uri}/a.lance", recursive=True)
        for path in (at, at / "a.lance"):
            table = whole(LancePool(path=path.uri), 10)
            assert table["image"].to_pylist() == images("a")
            assert table["id"][0].as_py() == "a.lance#0"


def _cut(at: Path, share: float) -> None:
    data = at.read_bytes()
    at.write_bytes(data[: int(len(data) * share)])


def _empty(at: Path) -> None:
    write_lance(at, pa.table({"image": pa.array([], pa.binary())}), 10, mode="overwrite")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda at: shutil.rmtree(at / "_versions"), "expected a Lance dataset"),
        (lambda at: _cut(next((at / "_versions").glob("*.manifest")), 0.5), "broken Lance dataset"),
        (_empty, "1 Lance datasets without a row"),
    ],
)
def test_slices__what_is_no_pool_is_said(tmp_path: Path, spoil: Any, line: str) -> None:
    at = tmp_path / "a.lance"
    write(at)
    spoil(at)
    with pytest.raises(SourceError, match=line) as caught:
        list(LancePool(path=str(at)).slices(10))
    assert "\n" not in str(caught.value)


def test_slices__other_columns_and_versions_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", x=list(range(N)))
    with pytest.raises(SourceError, match="face"):
        list(LancePool(path=path, image_column="face").slices(10))
    with pytest.raises(SourceError, match="column x: type int64; expected binary"):
        list(LancePool(path=path, image_column="x").slices(10))
    with pytest.raises(SourceError, match="no such version"):
        list(LancePool(path=path, version=7).slices(10))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_read__broken_data_is_one_line(tmp_path: Path, share: float) -> None:
    pool = LancePool(path=write(tmp_path / "a.lance", rows=100))
    (extent,) = pool.slices(100)
    _cut(next((tmp_path / "a.lance" / "data").glob("*.lance")), share)
    with pytest.raises(SourceError, match="broken Lance dataset") as caught:
        pool.read(extent)
    assert "\n" not in str(caught.value)


def test_slices__without_pylance_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    path = write(tmp_path / "a.lance")
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(SourceError, match=r"extra omnifer\[lance\]"):
        list(LancePool(path=path).slices(10))
    with pytest.raises(SourceError, match=r"extra omnifer\[lance\]"):
        LancePool(path=path).read(Extent(path, 0, 1, "1-x", 1))
