"""Cutting keeps every face once, whole parts together, and within the limits of faces and bytes."""

import os

import pytest

from pipeline.errors import SourceError
from pipeline.sources.extents import (
    SLICE_BYTES,
    Extent,
    Part,
    content_fingerprint,
    cut,
    fingerprint,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.storage import location


def test_cut__gathers_whole_parts():
    parts = [Part(n, 0) for n in (500, 500, 500, 500, 206)]
    assert list(cut(parts, 1024)) == [(0, 1000), (1000, 2000), (2000, 2206)]


def test_cut__divides_a_large_part_evenly_and_alone():
    parts = [Part(10, 0), Part(250, 0), Part(10, 0)]
    assert list(cut(parts, 100)) == [(0, 10), (10, 93), (93, 176), (176, 260), (260, 270)]


def test_cut__by_bytes():
    parts = [Part(1, SLICE_BYTES // 2)] * 5
    assert list(cut(parts, 1024)) == [(0, 2), (2, 4), (4, 5)]
    assert list(cut([Part(4, 2 * SLICE_BYTES)], 1024)) == [(0, 2), (2, 4)]
    assert list(cut([Part(1, 9 * SLICE_BYTES)], 1024)) == [(0, 1)]


def test_cut__nothing():
    assert list(cut([], 10)) == []
    assert list(cut([Part(0, 0), Part(3, 0), Part(0, 0)], 10)) == [(0, 3)]


def test_fingerprint__sees_content_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(300_000))
    at = location(file)
    first, content = fingerprint(at), content_fingerprint(at)
    assert fingerprint(at) == first
    os.utime(file, ns=(1, 1))
    assert fingerprint(at) != first
    assert content_fingerprint(at) == content
    file.write_bytes(bytes(299_999) + b"x")
    assert content_fingerprint(at) != content


def test_require_fingerprint__names_the_shard():
    with pytest.raises(SourceError, match=r"/d/a.parquet: changed since it was planned"):
        require_fingerprint(Extent("/d/a.parquet", 0, 1, "f" * 32, 1), "0" * 32)


def test_shards__file_folder_and_numbered_pattern(tmp_path):
    for name in ("a/f-08.x", "a/f-09.x", "a/f-10.x", "b/f-08.x", "b/note.txt"):
        location(tmp_path / name).write_bytes(b"1")

    def names(path):
        root = root_of(f"{tmp_path}/{path}")
        return [name_below(root, at) for at in shards(f"{tmp_path}/{path}", [".x"])]

    assert names("a/f-08.x") == ["f-08.x"]
    assert names("b") == ["f-08.x"]
    assert names("") == ["a/f-08.x", "a/f-09.x", "a/f-10.x", "b/f-08.x"]
    assert names("a/f-{08..10}.x") == ["f-08.x", "f-09.x", "f-10.x"]
    assert names("{8..9}/f-{1..2}.x") == ["8/f-1.x", "8/f-2.x", "9/f-1.x", "9/f-2.x"]
    assert root_of("s3://bucket/deep/f-{0..9}.x").uri == "s3://bucket/deep"
    assert root_of("s3://bucket/{0..9}.x").uri == "s3://bucket"
    with pytest.raises(SourceError, match=r"\{9\.\.1\} falls"):
        names("a/f-{9..1}.x")
    with pytest.raises(SourceError, match=r"b: no .y or .z file in this folder"):
        shards(str(tmp_path / "b"), [".y", ".z"])
