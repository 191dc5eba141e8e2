"""Zip members are read by range; encrypted, damaged and oversized ones are rows."""

import os
import struct
import zipfile
import zlib

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.schema import READ
from pipeline.sources import zipped
from pipeline.sources.extents import fingerprint
from pipeline.sources.reader import fetch, plan_slices, read_slice
from pipeline.sources.zipped import ZipPool
from pipeline.storage import location
from sources.writers import random_images

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


@pytest.fixture
def index(tmp_path):
    return location(tmp_path / "plan" / "web.index.parquet")


def write(at, members, method=zipfile.ZIP_DEFLATED):
    at.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(at, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return str(at)


def whole(path, index, faces=5, **config):
    pool = ZipPool(path=str(path), **config)
    tables = [pool.read(extent) for extent in pool.slices(faces, index)]
    assert all(table.schema.equals(READ) for table in tables)
    return pa.concat_tables(tables)


def numbered(images):
    return [(f"person{i % 3}/{i:03d}.jpg", image) for i, image in enumerate(images)]


def patch(at, offset, data):
    content = bytearray(at.read_bytes())
    content[offset : offset + len(data)] = data
    at.write_bytes(content)


def spoiled(tmp_path, index, change):
    """Image and reason of the middle one of three members after `change(archive, member)`."""
    at = tmp_path / "a.zip"
    write(at, [("0.jpg", b"first"), ("1.jpg", b"some image " * 20), ("2.jpg", b"last")])
    with zipfile.ZipFile(at) as archive:
        member = archive.getinfo("1.jpg")
        entry = at.read_bytes().index(b"1.jpg", archive.start_dir) - 46
    change(at, member.header_offset, entry)
    table = whole(at, index)
    assert table["image"].to_pylist()[::2] == [b"first", b"last"]
    row = table.slice(1, 1).to_pylist()[0]
    assert row["image"] is None
    return row["reason"]


@pytest.mark.parametrize("method", METHODS)
def test_read__every_image_once(tmp_path, index, method):
    images = random_images(25)
    at = write(tmp_path / "a.zip", [("readme.txt", b"x"), *numbered(images)], method)
    for faces in (1, 7, 100):
        table = whole(at, index, faces, group_from="parent")
        assert table["image"].to_pylist() == images
        assert table["id"].to_pylist() == [f"a.zip/{name}" for name, _ in numbered(images)]
        groups = table["group"].to_pylist()
        assert groups == [groups[i % 3] for i in range(25)]
        assert len(set(groups)) == 3
    assert whole(at, index)["group"].null_count == 25


def test_fetch__same_bytes_as_the_slice(tmp_path):
    write(tmp_path / "f" / "a.zip", numbered(random_images(20)))
    write(tmp_path / "f" / "b.zip", numbered(random_images(20, seed=1)), zipfile.ZIP_STORED)
    sources = {"web": ZipPool(path=str(tmp_path / "f"))}
    for s in plan_slices(sources, 16, location(tmp_path / "plan")):
        table = read_slice(s, sources)
        some = table.take(list(range(0, len(table), 3)))
        assert fetch(s, some["position"].to_pylist()[::-1], sources).equals(some)


def test_read__streamed_prefixed_and_odd_members(tmp_path, index):
    """Sizes behind the data, bytes in front of the archive, names that repeat or hide."""
    at = tmp_path / "a.zip"
    with open(at, "wb") as file:
        file.write(b"#!/bin/sh\n" + os.urandom(1000))
        with zipfile.ZipFile(file, "a") as archive:
            for name, data in [("é/a.jpg", b"a"), ("__MACOSX/._a.jpg", b"no"), ("b.jpg", b"b")]:
                with archive.open(name, "w") as member:
                    member.write(data)
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("b.jpg", b"c")
    table = whole(at, index)
    assert table["image"].to_pylist() == [b"a", b"b", b"c"]
    assert table["id"].to_pylist()[:2] == ["a.zip/é/a.jpg", "a.zip/b.jpg"]
    assert table["id"][2].as_py().startswith("a.zip/b.jpg@")


def test_read__broken_members_are_rows(tmp_path, index):
    def encrypted(at, local, entry):
        patch(at, entry + 8, struct.pack("<H", 1))

    def strange_method(at, local, entry):
        patch(at, entry + 10, struct.pack("<H", 14))

    def no_header(at, local, entry):
        patch(at, local, b"xxxx")

    def garbage(at, local, entry):
        patch(at, local + 30 + len("1.jpg"), b"\xff" * 12)

    def other_checksum(at, local, entry):
        patch(at, entry + 16, b"\0\0\0\0")

    def says_more(at, local, entry):
        patch(at, entry + 24, struct.pack("<I", 10_000))

    def bomb(at, local, entry):
        patch(at, entry + 24, struct.pack("<I", 5))

    def says_too_much(at, local, entry):
        patch(at, entry + 24, struct.pack("<I", zipped.MAX_BYTES + 1))

    changes = {
        encrypted: "unsupported", strange_method: "unsupported", no_header: "unreadable",
        garbage: "unreadable", other_checksum: "unreadable", says_more: "truncated",
        bomb: "too_large", says_too_much: "too_large",
    }  # fmt: skip
    for change, reason in changes.items():
        assert spoiled(tmp_path, index, change) == reason, change.__name__


def test_read__bombs_stay_small(tmp_path, index, monkeypatch):
    monkeypatch.setattr(zipped, "MAX_BYTES", 10_000)
    at = tmp_path / "a.zip"
    write(at, [("0.jpg", bytes(1_000_000)), ("1.jpg", bytes(10_000)), ("2.jpg", b"x")])
    table = whole(at, index)
    assert table["reason"].to_pylist() == ["too_large", None, None]


def test_read__overlapping_members_hold_their_bytes_once(tmp_path, index):
    at = tmp_path / "a.zip"
    write(at, [("0.jpg", b"x" * 500), ("1.jpg", b"y" * 500)])
    entry = at.read_bytes().rindex(b"1.jpg") - 46
    patch(at, entry + 42, struct.pack("<I", 0))  # both lead to the first
    table = whole(at, index)
    assert sorted(map(str, table["reason"].to_pylist())) == ["unreadable", "unreadable"]


def test_unpack__random_sizes():
    for size in range(0, 400, 7):
        image = os.urandom(size)
        deflated = zlib.compress(image)[2:-4]
        local = struct.pack("<4s4xH16xHH", b"PK\x03\x04", 8, 3, 2) + b"a.jEX" + deflated
        entry = zipped.Entry("a.zip", "", len(local), "/a.j", 0, size, zlib.crc32(image))
        assert zipped._unpack(location("/a.zip"), entry, local + b"behind") == (image, None)


def test_slices__faults(tmp_path, index):
    with pytest.raises(SourceError, match=r"no .zip file in this folder"):
        whole(tmp_path, index)
    at = tmp_path / "a.zip"
    write(at, numbered(random_images(5)))
    at.write_bytes(at.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"a.zip: expected a zip file: "):
        whole(at, index)
    write(at, [("a.txt", b"x")])
    with pytest.raises(SourceError, match="no image in it"):
        whole(at, index)


def test_read__changed_file(tmp_path, index):
    at = tmp_path / "a.zip"
    write(at, numbered(random_images(5)))
    pool = ZipPool(path=str(at))
    extent = next(pool.slices(5, index))
    write(at, numbered(random_images(5, seed=1)))
    with pytest.raises(SourceError, match=r"a.zip: changed since it was planned"):
        pool.read(extent)


def test_read__from_s3(tmp_path, index):
    at = write(tmp_path / "a.zip", numbered(random_images(20)))
    with s3_bucket() as bucket:
        (bucket / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes())
        theirs = whole(f"{bucket}/a.zip", bucket / "plan.parquet")
    assert theirs.equals(whole(at, index))


def test_read__file_replaced_while_it_is_read(tmp_path, index, monkeypatch):
    at = tmp_path / "a.zip"
    write(at, numbered(random_images(5)))
    pool = ZipPool(path=str(at))
    extent = next(pool.slices(5, index))
    marks = iter([fingerprint(location(at)), "0" * 32])
    monkeypatch.setattr("pipeline.sources.index.fingerprint", lambda at: next(marks))
    with pytest.raises(SourceError, match=r"a.zip: changed since it was planned"):
        pool.read(extent)
