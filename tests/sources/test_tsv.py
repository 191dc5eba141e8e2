"""MS-Celeb lines are read once each, wherever the slices are cut; broken ones are rows."""

import base64
import itertools
import os
import random

import numpy as np
import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.images import Crop
from pipeline.schema import READ
from pipeline.sources import tsv
from pipeline.sources.reader import fetch, plan_slices, read_slice
from pipeline.sources.tsv import MsCelebPool
from pipeline.storage import location
from pipeline.survey import describe
from sources.writers import offsets_of, random_images, tsv_line

PEOPLE = 7


def write(path, images, columns=7, end=b"\n", last=b"\n"):
    lines = [tsv_line(image, i % PEOPLE, i, columns) for i, image in enumerate(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(end.join(lines) + last)
    return offsets_of(lines, end)


def whole(pool, faces):
    tables = [pool.read(extent) for extent in pool.slices(faces)]
    assert all(table.schema.equals(READ) for table in tables)
    return pa.concat_tables(tables)


def only(tmp_path, line, before=b"", after=b""):
    """The row of one line; a good line in front and behind must stay good."""
    good = tsv_line(b"good")
    (tmp_path / "a.tsv").write_bytes(b"\n".join([good, line, good]) + b"\n")
    table = whole(MsCelebPool(path=str(tmp_path / "a.tsv")), 100)
    assert table["image"].to_pylist()[::2] == [b"good", b"good"]
    assert table["reason"].to_pylist()[::2] == [None, None]
    return table.slice(1, 1).to_pylist()[0]


@pytest.mark.parametrize("columns", [6, 7])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n\n"])
def test_read__every_line_once(tmp_path, columns, end, last):
    images = random_images(40)
    offsets = write(tmp_path / "a.tsv", images, columns, end, last)
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    for faces in (1, 3, 7, 39, 1000):
        table = whole(pool, faces)
        assert table["image"].to_pylist() == images
        assert table["position"].to_pylist() == offsets
        assert table["id"].to_pylist() == [f"a.tsv#{offset}" for offset in offsets]
        assert table["reason"].null_count == len(images)


def test_lines__every_cut_of_a_file(tmp_path):
    rng = np.random.default_rng(3)
    for _ in range(20):
        lines = [bytes(rng.integers(97, 123, rng.integers(0, 6), dtype=np.uint8)) for _ in range(9)]
        text = b"\n".join(lines) + b"\n" * int(rng.integers(0, 2))
        (tmp_path / "a").write_bytes(text)
        want = [pair for pair in zip(offsets_of(lines), lines, strict=True) if pair[1]]
        cuts = sorted({0, len(text), *rng.integers(0, len(text) + 1, 5).tolist()})
        found = []
        for start, stop in itertools.pairwise(cuts):
            found += tsv._lines(location(tmp_path / "a"), start, stop)
        assert found == want


def test_slices__hold_about_the_faces_asked_for(tmp_path):
    write(tmp_path / "a.tsv", random_images(400, largest=200))
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    extents = list(pool.slices(20))
    counts = [len(pool.read(extent)) for extent in extents]
    assert all(extent.faces is None for extent in extents)
    assert 15 <= len(extents) <= 25
    assert max(counts) <= 30


def test_slices__bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "SLICE_BYTES", 10_000)
    write(tmp_path / "a.tsv", random_images(100))
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    assert all(extent.stop - extent.start <= 10_000 for extent in pool.slices(10**9))


def test_read__line_longer_than_a_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "STEP", 16)
    images = [b"a", bytes(50_000), b"b", bytes(300), b"c" * 20_000]
    write(tmp_path / "a.tsv", images, last=b"")
    monkeypatch.setattr(tsv, "SLICE_BYTES", 1000)
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    extents = list(pool.slices(1))
    assert len(extents) > 90
    assert whole(pool, 1)["image"].to_pylist() == images
    empty = pool.read(extents[10])
    assert empty.equals(READ.empty_table())
    assert describe(empty, Crop(), "gray", threads=1).num_rows == 0


def test_read__positions(tmp_path):
    images = random_images(30)
    write(tmp_path / "a.tsv", images)
    sources = {"web": MsCelebPool(path=str(tmp_path / "a.tsv"))}
    for s in plan_slices(sources, 8, location(tmp_path / "plan")):
        table = read_slice(s, sources)
        some = table.take(list(range(0, len(table), 3)))
        assert fetch(s, some["position"].to_pylist()[::-1], sources).equals(some)
        assert fetch(s, [], sources).num_rows == 0


def test_read__groups_are_opaque(tmp_path):
    write(tmp_path / "a.tsv", random_images(30))
    groups = whole(MsCelebPool(path=str(tmp_path)), 10)["group"].to_pylist()
    assert groups == [groups[i % PEOPLE] for i in range(30)]
    assert len(set(groups)) == PEOPLE
    assert not any("m.0" in group for group in groups)


def test_read__folder_and_pattern(tmp_path):
    one, two = random_images(10), random_images(10, seed=1)
    write(tmp_path / "f-09.tsv", one)
    write(tmp_path / "f-10.tsv", two, columns=6)
    (tmp_path / "notes.txt").write_text("no tsv")
    by_folder = whole(MsCelebPool(path=str(tmp_path)), 4)
    assert by_folder["image"].to_pylist() == one + two
    assert by_folder["id"][10].as_py() == "f-10.tsv#0"
    by_pattern = whole(MsCelebPool(path=f"{tmp_path}/f-{{09..10}}.tsv"), 4)
    assert by_pattern.equals(by_folder)


def test_read__broken_lines_are_rows(tmp_path):
    line = tsv_line(b"some image", person=3)
    assert only(tmp_path, line)["image"] == b"some image"
    group = only(tmp_path, line)["group"]
    cut = only(tmp_path, line[:-3])
    assert (cut["reason"], cut["image"], cut["group"]) == ("truncated", None, group)
    assert cut["detail"] == f"byte {cut['position']}: base64 ended early"
    assert only(tmp_path, line.rsplit(b"\t", 2)[0])["reason"] == "unreadable"
    assert only(tmp_path, line.rpartition(b"\t")[0] + b"\t")["reason"] == "empty"
    assert only(tmp_path, line[:-6] + b"!@#$==")["reason"] == "unreadable"
    assert only(tmp_path, line + b"\textra")["reason"] == "unreadable"
    noise = random.Random(0).randbytes(500).replace(b"\n", b"").replace(b"\t", b"")
    assert only(tmp_path, noise)["reason"] == "unreadable"


def test_read__line_too_long_for_a_face(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "MAX_BYTES", 1000)
    monkeypatch.setattr(tsv, "MAX_LINE", 2000)
    monkeypatch.setattr(tsv, "STEP", 100)
    write(tmp_path / "a.tsv", [b"a", bytes(1100), bytes(100_000), b"b"])
    monkeypatch.setattr(tsv, "SLICE_BYTES", 500)
    table = whole(MsCelebPool(path=str(tmp_path / "a.tsv")), 1)
    assert table["reason"].to_pylist() == [None, "too_large", "too_large", None]


def test_image__base64_round_trip():
    for size in range(50):
        data = os.urandom(size + 1)
        assert tsv._image(base64.b64encode(data)) == data


def test_slices__faults(tmp_path):
    with pytest.raises(SourceError, match=r"gone.tsv: no such file"):
        list(MsCelebPool(path=str(tmp_path / "gone.tsv")).slices(10))
    with pytest.raises(SourceError, match=r"no .tsv file in this folder"):
        list(MsCelebPool(path=str(tmp_path)).slices(10))
    (tmp_path / "a.tsv").write_bytes(b"")
    with pytest.raises(SourceError, match="1 files without a line"):
        list(MsCelebPool(path=str(tmp_path)).slices(10))
    (tmp_path / "a.tsv").write_text("id,label\n1,2\n")
    with pytest.raises(SourceError, match=r"a.tsv: expected lines of 6 or 7 columns.*found: 1$"):
        list(MsCelebPool(path=str(tmp_path)).slices(10))


def test_read__changed_file(tmp_path):
    write(tmp_path / "a.tsv", random_images(10))
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    extent = next(pool.slices(5))
    write(tmp_path / "a.tsv", random_images(11))
    with pytest.raises(SourceError, match=r"a.tsv: changed since it was planned"):
        pool.read(extent)


def test_read__from_s3(tmp_path):
    write(tmp_path / "a.tsv", random_images(20))
    ours = whole(MsCelebPool(path=str(tmp_path / "a.tsv")), 6)
    with s3_bucket() as bucket:
        (bucket / "a.tsv").write_bytes((tmp_path / "a.tsv").read_bytes())
        assert whole(MsCelebPool(path=f"{bucket}/a.tsv"), 6).equals(ours)


def test_read__file_replaced_while_it_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a.tsv", random_images(10))
    pool = MsCelebPool(path=str(tmp_path / "a.tsv"))
    extent = next(pool.slices(5))
    marks = iter([extent.fingerprint, "0" * 32])
    monkeypatch.setattr(tsv, "fingerprint", lambda at: next(marks))
    with pytest.raises(SourceError, match=r"a.tsv: changed since it was planned"):
        pool.read(extent)
