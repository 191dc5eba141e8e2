"""Tars are read once per member, whole or compressed; what breaks off is a row, never silence."""

import gzip
import io
import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.schema import READ
from pipeline.sources import index as indexes
from pipeline.sources import webdataset
from pipeline.sources.extents import fingerprint
from pipeline.sources.reader import fetch, plan_slices, read_slice
from pipeline.sources.webdataset import WebDatasetPool
from pipeline.storage import location
from sources.writers import random_images, tar_bytes


@pytest.fixture
def index(tmp_path):
    return location(tmp_path / "plan" / "web.index.parquet")


@pytest.fixture(params=[".tar", ".tar.gz", ".tgz"])
def suffix(request):
    return request.param


def write(at, members, **options):
    data = tar_bytes(members, **options)
    return write_bytes(at, data)


def write_bytes(at, data):
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_bytes(data if at.suffix == ".tar" else gzip.compress(data))
    return str(at)


def samples(images, folder="", people=3):
    """A .json, a .jpg and a .cls per image; the .json comes first, in the middle or last."""
    members = []
    for i, image in enumerate(images):
        sample = [
            (f"{folder}{i:04d}.jpg", image),
            (f"{folder}{i:04d}.cls", b"%d" % i),
            (f"{folder}{i:04d}.json", json.dumps({"who": f"person {i % people}"}).encode()),
        ]
        members += sample[i % 3 :] + sample[: i % 3]
    return members


def whole(path, index, faces=5, **config):
    pool = WebDatasetPool(path=str(path), **config)
    tables = [pool.read(extent) for extent in pool.slices(faces, index)]
    assert all(table.schema.equals(READ) for table in tables)
    return pa.concat_tables(tables)


def test_read__every_image_once(tmp_path, index, suffix):
    images = random_images(20)
    at = write(tmp_path / f"a{suffix}", samples(images, "./deep/"))
    for faces in (1, 6, 100):
        table = whole(at, index, faces, group_field="who")
        assert table["image"].to_pylist() == images
        assert table["id"].to_pylist() == [f"a{suffix}/./deep/{i:04d}.jpg" for i in range(20)]
        groups = table["group"].to_pylist()
        assert groups == [groups[i % 3] for i in range(20)]
        assert len(set(groups)) == 3
        assert not any("person" in group for group in groups)


def test_slices__compressed_ones_are_cut_like_plain_ones(tmp_path, index):
    write(tmp_path / "a.tar", samples(random_images(10)))
    write(tmp_path / "b.tgz", samples(random_images(10)))
    extents = list(WebDatasetPool(path=str(tmp_path)).slices(4, index))
    assert [extent.faces for extent in extents] == [4] * 5
    assert {extent.shard for extent in extents} == {file.uri for file in index.parent.children()}


def test_read__slices_of_a_compressed_tar_in_any_order(tmp_path, index, monkeypatch):
    images = random_images(60, largest=20_000)  # over several pieces
    pool = WebDatasetPool(path=write(tmp_path / "a.tgz", samples(images)))
    extents = list(pool.slices(7, index))
    want = [pool.read(extent) for extent in extents]
    assert pa.concat_tables(want)["image"].to_pylist() == images
    for i in np.random.default_rng(0).permutation(len(extents)):
        assert pool.read(extents[i]).equals(want[i])
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(pool.read, extents)) == want


def test_fetch__same_bytes_as_the_slice(tmp_path):
    write(tmp_path / "a.tar", samples(random_images(20)))
    write(tmp_path / "b.tgz", samples(random_images(20, seed=1)))
    sources = {"web": WebDatasetPool(path=str(tmp_path), group_field="who")}
    slices = list(plan_slices(sources, 8, location(tmp_path / "plan")))
    assert len(slices) == 5
    for s in slices:
        table = read_slice(s, sources)
        some = table.take(list(range(0, len(table), 3)))
        assert fetch(s, some["position"].to_pylist()[::-1], sources).equals(some)
        assert fetch(s, [], sources).num_rows == 0


def test_read__numbered_pattern(tmp_path, index):
    images = random_images(12)
    for i in range(3):
        write(tmp_path / f"part-{i}" / "x-009.tar", samples(images[4 * i : 4 * i + 4]))
    table = whole(f"{tmp_path}/part-{{0..2}}/x-{{009..009}}.tar", index)
    assert table["image"].to_pylist() == images
    assert table["id"][4].as_py() == "part-1/x-009.tar/0000.jpg"
    with pytest.raises(SourceError, match=r"part-3/x-009.tar: no such file"):
        whole(f"{tmp_path}/part-{{0..3}}/x-009.tar", index)


def test_read__several_images_of_a_sample(tmp_path, index, suffix):
    members = [
        ("0.left.jpg", b"l"), ("0.right.PNG", b"r"), ("0.json", b'{"who": 7}'), ("0.seg.npy", b"n"),
        ("1.left.jpg", b"L"), ("1.right.PNG", b"R"), ("1.json", b"no json"),
    ]  # fmt: skip
    at = write(tmp_path / f"a{suffix}", members)
    table = whole(at, index, group_field="who")
    assert table["image"].to_pylist() == [b"l", b"r", b"L", b"R"]
    first, second, *rest = table["group"].to_pylist()
    assert first == second is not None
    assert rest == [None, None]
    assert whole(at, index, extension=".left.jpg")["image"].to_pylist() == [b"l", b"L"]
    assert whole(at, index, extension="right.png")["image"].to_pylist() == [b"r", b"R"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_read__long_and_odd_names(tmp_path, index, suffix, format):
    names = ["x/" * 200 + "a.jpg", "ü" * 90 + ".jpg", "._hidden.jpg", ".git/b.jpg", "same.jpg"]
    members = [(name, name.encode()) for name in [*names, "same.jpg"]]
    table = whole(write(tmp_path / f"a{suffix}", members, format=format), index)
    assert table["image"].to_pylist() == [names[i].encode() for i in (0, 1, 4, 4)]
    ids = table["id"].to_pylist()
    assert ids[:3] == [f"a{suffix}/{names[i]}" for i in (0, 1, 4)]
    assert ids[3].startswith(f"a{suffix}/same.jpg@")


def test_read__names_that_are_no_utf8(tmp_path, index):
    with tarfile.open(
        tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        header = tarfile.TarInfo("\xe9.jpg")
        header.size = 1
        tar.addfile(header, io.BytesIO(b"x"))
    table = whole(tmp_path / "a.tar", index)
    assert table["id"].to_pylist() == ["a.tar/\ufffd.jpg"]


def test_read__links_and_folders_are_no_faces(tmp_path, index, suffix):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind, name in [(tarfile.DIRTYPE, "d.jpg"), (tarfile.SYMTYPE, "s.jpg"),
                           (tarfile.LNKTYPE, "h.jpg")]:  # fmt: skip
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "0000.jpg"
            tar.addfile(header)
        header = tarfile.TarInfo("0000.jpg")
        header.size = 4
        tar.addfile(header, io.BytesIO(b"face"))
    at = write_bytes(tmp_path / f"a{suffix}", file.getvalue())
    assert whole(at, index)["image"].to_pylist() == [b"face"]


def test_read__member_too_large(tmp_path, index, suffix, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 100)
    at = write(tmp_path / f"a{suffix}", [("0.jpg", b"a"), ("1.jpg", bytes(101)), ("2.jpg", b"b")])
    table = whole(at, index)
    assert table["image"].to_pylist() == [b"a", None, b"b"]
    assert table["reason"].to_pylist() == [None, "too_large", None]


def test_read__truncated_tar(tmp_path, index, suffix, caplog):
    images = random_images(6, largest=400)
    data = tar_bytes([(f"{i}.jpg", image) for i, image in enumerate(images)])
    at = write_bytes(tmp_path / f"a{suffix}", data[: 1024 * 4 + 512 + 10])  # 10 bytes of the fifth
    with caplog.at_level(logging.WARNING):
        table = whole(at, index)
    assert table["image"].to_pylist() == [*images[:4], None, None]
    assert table["reason"].to_pylist() == [None] * 4 + ["truncated"] * 2
    assert table["id"].to_pylist()[-2:] == [f"a{suffix}/4.jpg", f"a{suffix}@{1024 * 5}"]
    assert "breaks off at byte 5120" in caplog.text


def test_read__truncated_gzip(tmp_path, index, caplog):
    images = random_images(30)
    at = tmp_path / "a.tgz"
    write(at, [(f"{i}.jpg", image) for i, image in enumerate(images)])
    good = whole(at, index)
    at.write_bytes(at.read_bytes()[: at.stat().st_size // 2])
    table = whole(at, index)
    readable = table["image"].null_count
    kept = len(table) - readable
    assert 5 < kept < 30
    assert table["image"].to_pylist()[:kept] == images[:kept]
    assert table["reason"][-1].as_py() == "truncated"
    assert table["id"].to_pylist()[:kept] == good["id"].to_pylist()[:kept]


@pytest.mark.parametrize("member", [1, 4])
def test_read__damaged_header(tmp_path, index, suffix, member, caplog):
    images = random_images(6, largest=400)
    data = bytearray(tar_bytes([(f"{i}.jpg", image) for i, image in enumerate(images)]))
    data[1024 * member : 1024 * member + 512] = os.urandom(512)
    at = write_bytes(tmp_path / f"a{suffix}", bytes(data))
    table = whole(at, index)
    assert table["image"].to_pylist() == [*images[:member], None]
    assert table["reason"][-1].as_py() == "truncated"
    assert f"breaks off at byte {1024 * member}" in caplog.text


def test_read__without_an_end_mark(tmp_path, index, suffix):
    images = random_images(3, largest=400)
    data = tar_bytes([(f"{i}.jpg", image) for i, image in enumerate(images)])
    at = write_bytes(tmp_path / f"a{suffix}", data[: 3 * 1024])
    table = whole(at, index)
    assert table["image"].to_pylist() == [*images, None]
    assert table["reason"].to_pylist() == [None] * 3 + ["truncated"]
    assert table["id"][-1].as_py() == f"a{suffix}@{3 * 1024}"


def test_slices__index_is_made_once(tmp_path, index, monkeypatch):
    write(tmp_path / "a.tar", samples(random_images(5)))
    first = whole(tmp_path, index)
    monkeypatch.setattr(WebDatasetPool, "_scan", None)
    assert whole(tmp_path, index).equals(first)
    write(tmp_path / "b.tar", samples(random_images(5)))
    with pytest.raises(TypeError):
        whole(tmp_path, index)


def test_slices__faults(tmp_path, index, monkeypatch):
    with pytest.raises(SourceError, match=r"no .tar or .tar.gz or .tgz file in this folder"):
        whole(tmp_path, index)
    (tmp_path / "a.tar").write_bytes(os.urandom(2000))
    with pytest.raises(SourceError, match=r"a.tar: expected a plain tar"):
        whole(tmp_path, index)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"a.tar: expected a plain tar: empty file"):
        whole(tmp_path, index)
    write(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(SourceError, match=r"no image in it \(1 files\)"):
        whole(tmp_path, index)
    assert index.parent.children() == []
    (tmp_path / "b.tgz").write_bytes(b"no gzip")
    with pytest.raises(SourceError, match=r"b.tgz: expected a compressed tar"):
        whole(tmp_path / "b.tgz", index)


def test_read__changed_file(tmp_path, index, suffix):
    at = tmp_path / f"a{suffix}"
    write(at, samples(random_images(5)))
    pool = WebDatasetPool(path=str(at))
    extent = next(pool.slices(5, index))
    write(at, samples(random_images(5, seed=1)))
    with pytest.raises(SourceError, match=rf"a{suffix}: changed since it was planned"):
        pool.read(extent)


def test_read__packed_tar_replaced_while_it_is_read(tmp_path, index, monkeypatch):
    at = tmp_path / "a.tgz"
    write(at, samples(random_images(5)))
    pool = WebDatasetPool(path=str(at))
    extent = next(pool.slices(5, index))
    marks = iter([fingerprint(location(at)), "0" * 32])
    monkeypatch.setattr(indexes, "fingerprint", lambda at: next(marks))
    with pytest.raises(SourceError, match=r"a.tgz: changed since it was planned"):
        pool.read(extent)


def test_read__from_s3(tmp_path, index):
    write(tmp_path / "f" / "a.tar", samples(random_images(20)))
    write(tmp_path / "f" / "b.tgz", samples(random_images(20, seed=1)))
    ours = whole(tmp_path / "f", index, 7)
    with s3_bucket() as bucket:
        for file in (tmp_path / "f").iterdir():
            (bucket / "f" / file.name).write_bytes(file.read_bytes())
        assert whole(f"{bucket}/f", bucket / "plan.parquet", 7).equals(ours)


@pytest.mark.real
def test_real__tars(index):
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    table = whole("$OMNIFER_DATA/odd/webdataset/sample.tgz", index)
    assert table["id"][0].as_py() == "sample.tgz/10.png"
    assert all(image.startswith(b"\x89PNG") for image in table["image"].to_pylist())
    for name in ("mpdata", "tendata", "compressed"):
        with pytest.raises(SourceError, match="no image in it"):
            whole(f"$OMNIFER_DATA/odd/webdataset/{name}.tar", index)
