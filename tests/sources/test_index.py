"""An index holds every entry once, is cut by faces and bytes, and notices another in its place."""

import itertools

import numpy as np
import pytest

from pipeline.errors import RecordError, SourceError
from pipeline.labeled.records import records_table
from pipeline.schema import READ
from pipeline.sources import index
from pipeline.sources.extents import SLICE_BYTES, fingerprint
from pipeline.sources.index import Entry, build, extents, read_entries, read_faces, slices
from pipeline.sources.rows import (
    Face,
    folder_group,
    is_hidden,
    labeled_rows_as_read,
    member_tail,
    opaque,
    read_table,
)
from pipeline.storage import location


@pytest.fixture
def at(tmp_path):
    return location(tmp_path / "plan" / "web.index.parquet")


def entries(count, size=1):
    return [Entry("a", "m", size, f"#{i}", 10 * i, group=f"g{i % 3}") for i in range(count)]


@pytest.mark.parametrize("rows", [7, 8192])
def test_extents__every_entry_once(at, rows, monkeypatch):
    monkeypatch.setattr(index, "INDEX_ROWS", rows)
    given = entries(50)
    build(at, iter(given), "none")
    for faces in (1, 7, 13, 100):
        found = list(extents(at, faces))
        assert [e.start for e in found] == list(range(0, 50, faces))
        assert list(itertools.chain(*(read_entries(e, None)[1] for e in found))) == given
        assert all(e.faces == e.stop - e.start for e in found)


def test_extents__by_bytes_as_a_worker_holds_them(at):
    build(at, entries(6, SLICE_BYTES // 2), "none")
    assert [e.faces for e in extents(at, 100)] == [2, 2, 2]
    inflated = [e._replace(size=1, unpacked=SLICE_BYTES // 3) for e in entries(6)]
    build(at, inflated, "none")
    assert [e.faces for e in extents(at, 100)] == [3, 3]


def test_build__nothing(at):
    with pytest.raises(SourceError, match="no face here"):
        build(at, [], "no face here")
    assert not at.exists()


def test_read_entries__positions_and_another_index(at):
    build(at, entries(20), "none")
    extent = list(extents(at, 8))[1]
    rows, found = read_entries(extent, [12, 9])
    assert rows == [9, 12]
    assert found == [entries(20)[i] for i in (9, 12)]
    assert read_entries(extent, [])[1] == []
    build(at, [e._replace(offset=e.offset + 1) for e in entries(20)], "none")
    with pytest.raises(SourceError, match=r"web.index.parquet: changed since it was planned"):
        read_entries(extent, None)


def test_read_faces__in_few_requests(at, tmp_path, monkeypatch):
    """Random members with random gaps: their bytes, from runs of near ones."""
    rng = np.random.default_rng(0)
    data = rng.bytes(2_000_000)
    (tmp_path / "a").write_bytes(data)
    file = location(tmp_path / "a")
    mark, offset, given = fingerprint(file), 0, []
    for i in range(200):
        offset += int(rng.choice([0, 10, 80_000], p=[0.5, 0.4, 0.1]))
        size = int(rng.integers(0, 3000))
        if offset + size < len(data):
            given.append(Entry("a", mark, size, f"#{i}", offset))
        offset += size
    build(at, given, "none")
    requests = []
    read_range = type(file).read_range
    monkeypatch.setattr(index, "fingerprint", lambda at: mark)
    monkeypatch.setattr(
        type(file), "read_range", lambda *a: (requests.append(a), read_range(*a))[1]
    )
    (extent,) = extents(at, 1000)
    table = read_faces(location(tmp_path), extent, None, lambda at, e, data: (data, None))
    assert table["image"].to_pylist() == [data[e.offset : e.offset + e.size] for e in given]
    gaps = sum(b.offset > a.offset + a.size + index.GAP for a, b in itertools.pairwise(given))
    assert len(requests) == gaps + 1


def test_read_faces__reasons_are_rows(at, tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789" * 20)
    mark = fingerprint(location(tmp_path / "a"))
    given = [e._replace(mark=mark) for e in entries(4)]
    given[1] = given[1]._replace(reason="unsupported", size=0)

    def load(at, entry, data):
        if entry.offset == 20:
            raise RecordError("truncated", "for a test")
        return data, entry.group

    build(at, given, "none")
    (extent,) = extents(at, 10)
    table = read_faces(location(tmp_path), extent, None, load)
    assert table["reason"].to_pylist() == [None, "unsupported", "truncated", None]
    assert table["detail"].to_pylist() == [
        None, "byte 10, when the file was listed", "byte 20: for a test", None,
    ]  # fmt: skip
    assert table["image"].to_pylist() == [b"0", None, None, b"0"]
    assert table["group"].to_pylist() == ["g0", "g1", "g2", "g0"]


def test_slices__made_again_only_if_files_or_settings_changed(at, tmp_path):
    scans = []

    def scan(file, path, mark):
        scans.append(path)
        yield Entry(path, mark, 1)

    def plan(settings):
        return list(slices(str(tmp_path / "f"), [".x"], scan, settings, at, 1))

    for name in ("a.x", "b.x"):
        location(tmp_path / "f" / name).write_bytes(b"1")
    first = plan(["s"])
    assert scans == ["a.x", "b.x"]
    assert plan(["s"]) == first
    assert len(scans) == 2
    plan(["t"])
    assert len(scans) == 4
    location(tmp_path / "f" / "b.x").write_bytes(b"12")
    assert plan(["t"])[1] != first[1]
    assert len(scans) == 6
    assert plan(["s"])[0] != first[0]
    assert len(scans) == 8
    assert [read_entries(extent, None)[1][0].path for extent in first] == ["a.x", "b.x"]
    newest = location(plan(["t"])[0].shard)
    newest.write_bytes(b"no index")
    plan(["t"])
    assert len(scans) == 10
    assert plan(["t"])[0].shard == newest.uri
    newest.local_path().rename(at.local_path())  # as an earlier version called it
    assert plan(["t"])[0].shard == at.uri
    assert len(scans) == 10


def test_read_table__rows_and_none():
    table = read_table([Face("a", 1, "g", b"x", (0, 1, 2, 3)), Face("b", 2, reason="empty")])
    assert table.schema.equals(READ)
    assert table.to_pylist()[0] == {
        "id": "a", "position": 1, "group": "g", "image": b"x", "box": [0, 1, 2, 3],
        "landmarks": None, "reason": None, "detail": None,
    }  # fmt: skip
    assert table.to_pylist()[1]["reason"] == "empty"
    assert read_table([]).equals(READ.empty_table())


def test_names__opaque_hidden_and_repeated():
    assert folder_group("who/a.jpg") == folder_group("who/b.jpg") == opaque("who")
    assert "who" not in opaque("who")
    assert all(map(is_hidden, [".a.jpg", "__MACOSX/._a.jpg", "a/.git/b.jpg"]))
    assert not any(map(is_hidden, ["a.b/c.jpg", "./a.jpg", "../a.jpg", "a..jpg"]))
    seen = set()
    assert [member_tail("a", i, seen) for i in (0, 512, 1024)] == ["/a", "/a@512", "/a@1024"]


def test_labeled_rows_as_read__same_columns_in_the_same_order():
    names = [f"x#{i}" for i in range(7)]
    table = records_table(names, ["train"] * 7, ["fear"] * 7, [bytes([i]) for i in range(7)])
    read = labeled_rows_as_read(table)
    assert read.schema == READ
    assert all(read[name].equals(table[name]) for name in table.schema.names if name in READ.names)
    assert read["position"].to_pylist() == list(range(7))
    assert read["reason"].null_count == read["detail"].null_count == 7
