"""Folder pools list once, read ranges of that list, and notice files that changed."""

import os
import re

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.schema import READ
from pipeline.sources.folder import FolderPool
from pipeline.storage import location


@pytest.fixture
def root(tmp_path):
    for i in range(12):
        file = tmp_path / "pool" / f"person{i % 3}" / f"{i:02d}.{'jpg' if i % 2 else 'PNG'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"image %d" % i)
    (tmp_path / "pool" / "notes.txt").write_text("no image")
    return tmp_path / "pool"


@pytest.fixture
def index(tmp_path):
    return location(tmp_path / "plan" / "pool.index.parquet")


def test_read__every_file_once(root, index):
    pool = FolderPool(path=str(root))
    extents = list(pool.slices(5, index))
    assert [extent.faces for extent in extents] == [5, 5, 2]
    (file,) = index.parent.children()
    assert {extent.shard for extent in extents} == {file.uri}
    assert re.fullmatch(r"pool\.[0-9a-f]{8}\.index\.parquet", file.name)
    whole = pa.concat_tables([pool.read(extent) for extent in extents])
    assert whole.schema.equals(READ)
    paths = sorted(
        str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".jpg", ".PNG")
    )
    assert whole["id"].to_pylist() == paths
    assert whole["position"].to_pylist() == list(range(12))
    assert whole["image"].to_pylist() == [(root / path).read_bytes() for path in paths]


def test_read__files_added_later_do_not_shift(root, index):
    pool = FolderPool(path=str(root))
    extents = list(pool.slices(5, index))
    before = [pool.read(extent) for extent in extents]
    (root / "aaa.jpg").write_bytes(b"new")
    assert [pool.read(extent) for extent in extents] == before


def test_read__positions(root, index):
    pool = FolderPool(path=str(root))
    extent = list(pool.slices(5, index))[1]
    table = pool.read(extent, [9, 6])
    assert table["position"].to_pylist() == [6, 9]
    everything = pool.read(extent)
    assert table["image"].to_pylist() == [everything["image"][i].as_py() for i in (1, 4)]


def test_read__groups_are_opaque(root, index):
    pool = FolderPool(path=str(root), group_from="parent")
    table = pool.read(next(pool.slices(12, index)))
    assert len(set(table["group"].to_pylist())) == 3
    assert not any("person" in group for group in table["group"].to_pylist())


def test_read__changed_or_lost_file(root, index):
    pool = FolderPool(path=str(root))
    (extent,) = pool.slices(50, index)
    file = root / "person0" / "00.PNG"
    stat = os.stat(file)
    file.write_bytes(b"other 0")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SourceError, match=r"person0/00.PNG: changed since it was planned"):
        pool.read(extent)
    file.unlink()
    with pytest.raises(SourceError, match=r"person0/00.PNG: no such file"):
        pool.read(extent)


def test_slices__planned_again_the_old_plan_stays_readable(root, index):
    pool = FolderPool(path=str(root))
    extents = list(pool.slices(5, index))
    before = [pool.read(extent) for extent in extents]
    (root / "aaa.jpg").write_bytes(b"new")
    more = list(pool.slices(5, index))
    assert pool.read(more[0])["id"][0].as_py() == "aaa.jpg"
    assert [pool.read(extent) for extent in extents] == before
    (root / "aaa.jpg").unlink()
    assert list(pool.slices(5, index)) == extents
    assert len(index.parent.children()) == 2


def test_slices__an_index_of_an_earlier_version_is_used_where_it_holds_the_same(root, index):
    pool = FolderPool(path=str(root))
    extents = list(pool.slices(5, index))
    (file,) = index.parent.children()
    file.local_path().rename(index.local_path())
    assert {extent.shard for extent in pool.slices(5, index)} == {index.uri}
    assert [e.fingerprint for e in pool.slices(5, index)] == [e.fingerprint for e in extents]
    held = index.read_bytes()
    (root / "aaa.jpg").write_bytes(b"new")
    assert index.uri not in {extent.shard for extent in pool.slices(5, index)}
    assert index.read_bytes() == held


def test_read__another_index_is_noticed(root, index):
    pool = FolderPool(path=str(root))
    (extent,) = pool.slices(50, index)
    (root / "aaa.jpg").write_bytes(b"new")
    (other,) = pool.slices(50, index)
    location(other.shard).local_path().rename(extent.shard)
    with pytest.raises(
        SourceError, match=r"pool\.\w+\.index.parquet: changed since it was planned"
    ):
        pool.read(extent)


def test_slices__faults(root, index, tmp_path):
    with pytest.raises(SourceError, match="gone: no such folder"):
        list(FolderPool(path=str(tmp_path / "gone")).slices(5, index))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: no image in it"):
        list(FolderPool(path=str(tmp_path / "empty")).slices(5, index))


def test_listed__stamps_and_sizes_without_a_request_per_file() -> None:
    asked: list[str] = []
    with s3_bucket(lambda method, path: asked.append(method)) as bucket:
        root = bucket / "listed"
        for i in range(5):
            (root / f"a/{i}.jpg").write_bytes(b"x" * i)
        before = [(at, at.stamp(), at.size()) for at in root.files([".jpg"])]
        asked.clear()
        assert list(root.listed([".jpg"])) == before
        assert len(before) == 5
        assert len(asked) <= 2, asked
