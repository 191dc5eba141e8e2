"""RecordIO is read as its writers write it: header and identity records, splits, broken indexes."""

import logging
import os
import struct

import numpy as np
import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import RecordError, SourceError
from pipeline.schema import READ
from pipeline.sources import recordio
from pipeline.sources.reader import fetch, plan_slices, read_slice
from pipeline.sources.recordio import RecordIOPool, read_record
from pipeline.storage import location
from sources.writers import JPEG, MAGIC, insightface, payload, random_images, record, write_rec


@pytest.fixture
def at(tmp_path):
    return tmp_path / "data" / "train.rec"


@pytest.fixture
def index(tmp_path):
    return location(tmp_path / "plan" / "web.index.parquet")


def whole(at, index, faces=5, **config):
    pool = RecordIOPool(path=str(at), **config)
    tables = [pool.read(extent) for extent in pool.slices(faces, index)]
    assert all(table.schema.equals(READ) for table in tables)
    return pa.concat_tables(tables)


def people(images, each=3):
    return [images[i : i + each] for i in range(0, len(images), each)]


def from_bytes(data):
    return lambda start, stop: data[start:stop]


def patch(at, offset, data):
    content = bytearray(at.read_bytes())
    content[offset : offset + len(data)] = data
    at.write_bytes(content)


@pytest.mark.parametrize("header_first", [True, False])
def test_read__insightface(at, index, header_first):
    images = random_images(20)
    records = insightface(people(images))
    order = list(records) if header_first else [*list(records)[1:], 0]
    offsets = write_rec(at, records, order)
    for faces in (1, 4, 7, 100):
        table = whole(at, index, faces)
        assert table["image"].to_pylist() == images
        assert table["id"].to_pylist() == [f"train.rec#{offsets[k]}" for k in range(1, 21)]
        assert table["position"].to_pylist() == list(range(20))
        groups = table["group"].to_pylist()
        assert groups == [groups[i // 3 * 3] for i in range(20)]
        assert len(set(groups)) == 7


def test_read__every_key_is_a_face_without_a_header(at, index):
    images = random_images(12)
    order = [4, 0, 7, 1, 11, 2, 3, 5, 6, 10, 9, 8]
    write_rec(at, {key: payload(images[key], float(key % 2), key) for key in range(12)}, order)
    table = whole(at, index)
    assert table["image"].to_pylist() == [images[key] for key in order]
    assert len(set(table["group"].to_pylist())) == 2


def test_read__arrays_of_labels_are_no_sign_of_metadata(at, index):
    images = random_images(9)
    records = insightface(people(images))
    for key, image in enumerate(images, start=1):
        records[key] = payload(image, [key % 2, 1.0, 7.0], key)
    write_rec(at, records)
    with_idx = whole(at, index)
    assert with_idx["image"].to_pylist() == images
    assert len(set(with_idx["group"].to_pylist())) == 2
    at.with_suffix(".idx").unlink()
    assert whole(at, index).equals(with_idx)
    records = {key: payload(image, [5.0, 1.0], key) for key, image in enumerate(images)}
    write_rec(at, records)
    assert whole(at, index)["image"].to_pylist() == images


def test_read_record__magic_at_an_aligned_word():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = rng.integers(0, 6, rng.integers(0, 12)).tolist()
        data = b"".join(MAGIC if word == 0 else bytes([word]) * 4 for word in words)
        data += rng.bytes(int(rng.integers(0, 4)))
        assert read_record(from_bytes(b"pad!" + record(data) + record(b"next")), 4) == data


def test_read__split_records(at, index):
    images = [JPEG + b"x" * n + MAGIC * m + b"end" for n in range(5) for m in range(3)]
    records = insightface(people(images))
    write_rec(at, records)
    assert any(struct.unpack_from("<I", record(data), 4)[0] >> 29 for data in records.values())
    with_idx = whole(at, index)
    assert with_idx["image"].to_pylist() == images
    at.with_suffix(".idx").unlink()
    assert whole(at, index).equals(with_idx)


def bad_text(idx):
    idx.write_text("0\t0\none\ttwo\n")


def bad_columns(idx):
    idx.write_text("0 0\n1 2\n")


def empty(idx):
    idx.write_text("")


def last_lines_lost(idx):
    idx.write_text("".join(idx.read_text().splitlines(keepends=True)[:-3]))


def face_lost(idx):
    lines = idx.read_text().splitlines(keepends=True)
    idx.write_text("".join(lines[:4] + lines[5:]))


def header_lost(idx):
    idx.write_text("".join(idx.read_text().splitlines(keepends=True)[1:]))


def header_wrong(idx):
    idx.write_text(idx.read_text().replace("0\t0\n", "0\t4\n", 1))


def offset_twice(idx):
    lines = idx.read_text().splitlines(keepends=True)
    lines[2] = "2\t" + lines[1].split("\t")[1]
    idx.write_text("".join(lines))


def offset_behind(idx):
    lines = idx.read_text().splitlines(keepends=True)
    lines[2] = "2\t99999999\n"
    idx.write_text("".join(lines))


@pytest.mark.parametrize(
    "spoil",
    [
        os.unlink, bad_text, bad_columns, empty, last_lines_lost, face_lost, header_lost,
        header_wrong, offset_twice, offset_behind,
    ],
)  # fmt: skip
def test_read__no_good_index(at, index, spoil, caplog):
    write_rec(at, insightface(people(random_images(20))))
    good = whole(at, index)
    spoil(at.with_suffix(".idx"))
    with caplog.at_level(logging.WARNING):
        assert whole(at, index).equals(good)
    assert "train.idx is not used, all of train.rec is looked through" in caplog.text


def test_read__index_entry_without_a_record(at, index):
    images = random_images(20)
    offsets = write_rec(at, insightface(people(images)))
    idx = at.with_suffix(".idx")
    wrong = offsets[6] + 8
    idx.write_text(idx.read_text().replace(f"\n6\t{offsets[6]}\n", f"\n6\t{wrong}\n"))
    table = whole(at, index)
    assert table["image"].to_pylist() == [*images[:5], None, *images[6:]]
    assert table["reason"].to_pylist() == [None] * 5 + ["unreadable"] + [None] * 14
    assert table["id"][5].as_py() == f"train.rec#{wrong}"
    # the entry in front is cut short by the wrong one, and read to its end nevertheless
    idx.write_text(idx.read_text().replace(f"\n6\t{wrong}\n", f"\n6\t{offsets[5] + 40}\n"))
    assert whole(at, index)["image"].to_pylist() == [*images[:5], None, *images[6:]]


@pytest.mark.parametrize("with_idx", [True, False])
def test_read__broken_records_are_rows(at, index, with_idx):
    images = random_images(12)
    offsets = write_rec(at, insightface(people(images)), idx=with_idx)
    patch(at, offsets[3], b"\0\0\0\0")  # no magic
    patch(at, offsets[6] + 8, struct.pack("<I", 10**6))  # a million labels
    patch(at, offsets[9] + 4, struct.pack("<I", 5 << 29 | 100))  # a kind of part there is none
    table = whole(at, index)
    reasons = [None] * 12
    reasons[2] = reasons[5] = reasons[8] = "unreadable"
    if not with_idx:  # labels without a body: by its head no face
        del reasons[5], images[5]
        images[2] = images[7] = None
    else:
        images[2] = images[5] = images[8] = None
    assert table["reason"].to_pylist() == reasons
    assert table["image"].to_pylist() == images


def test_read__truncated_file(at, index):
    images = random_images(6)
    offsets = write_rec(at, {k: payload(i, 0.0, k) for k, i in enumerate(images)})
    at.write_bytes(at.read_bytes()[: offsets[5] + 60])
    table = whole(at, index)
    assert table["image"].to_pylist() == [*images[:5], None]
    assert table["reason"].to_pylist() == [None] * 5 + ["truncated"]


def test_read__empty_and_too_large(at, index, monkeypatch):
    monkeypatch.setattr(recordio, "MAX_BYTES", 5000)
    images = [b"a", b"", bytes(6000), b"b"]
    for idx in (True, False):
        write_rec(at, {k: payload(i, 0.0, k) for k, i in enumerate(images)}, idx=idx)
        table = whole(at, index)
        assert table["image"].to_pylist() == [b"a", None, None, b"b"]
        assert table["reason"].to_pylist() == [None, "empty", "too_large", None]
        at.with_suffix(".idx").unlink(missing_ok=True)


def test_read__labels_that_float32_cannot_tell_apart_are_no_groups(at, index):
    labels = [2.0**24 - 1, 2.0**24, 2.0**24 + 2, 0.5, -1.0, float("nan"), float("inf")]
    write_rec(at, {k: payload(b"x%d" % k, label, k) for k, label in enumerate(labels)})
    groups = whole(at, index)["group"].to_pylist()
    assert groups[0] is not None
    assert groups[1:] == [None] * 6
    assert whole(at, index, group_from=None)["group"].null_count == 7


def test_face_keys__a_rounded_header_is_checked_record_by_record():
    many = 2**24 + 3  # N + 1, not a float32
    label = float(np.float32(many))
    assert label != many
    keys = np.array([0, 1, *range(many - 4, many + 4)])
    payloads = [payload(b"", [label, label + 1])]
    payloads += [payload(b"x", 0.0) if key < many else payload(b"", [1, 2]) for key in keys[1:]]
    offsets = np.cumsum([0, *(len(record(p)) for p in payloads)])[:-1]
    read = from_bytes(b"".join(map(record, payloads)))
    faces = recordio._face_keys(keys, offsets, read)
    assert keys[faces].tolist() == [key for key in keys.tolist() if 0 < key < many]


def test_read__header_that_counts_nothing(at, index, caplog):
    images = random_images(5)
    for label in (float("nan"), float("inf"), -1.0, 4.0, 7.0):
        records = insightface(people(images))
        records[0] = payload(b"", [label, 8.0])
        write_rec(at, records)
        assert whole(at, index)["image"].to_pylist() == images
        assert "train.idx is not used" in caplog.text
        caplog.clear()


def test_read_record__faults():
    for data, reason in [
        (b"", "truncated"),
        (b"\0" * 20, "unreadable"),
        (record(b"abcdef")[:-4], "truncated"),
        (record(b"ab" + MAGIC * 2)[:12], "truncated"),
        (MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd" + record(b"whole"), "unreadable"),
        (MAGIC + struct.pack("<I", 3 << 29 | 4) + b"abcd", "unreadable"),
    ]:
        with pytest.raises(RecordError) as caught:
            read_record(from_bytes(data), 0)
        assert caught.value.reason == reason, data


def test_fetch__same_bytes_as_the_slice(at, tmp_path):
    write_rec(at, insightface(people(random_images(20))))
    sources = {"web": RecordIOPool(path=str(at))}
    for s in plan_slices(sources, 6, location(tmp_path / "plan")):
        table = read_slice(s, sources)
        some = table.take(list(range(0, len(table), 4)))
        assert fetch(s, some["position"].to_pylist()[::-1], sources).equals(some)


def test_slices__faults(at, index, tmp_path):
    def refused(data, match, name="train.rec"):
        at.parent.mkdir(exist_ok=True)
        (at.parent / name).write_bytes(data)
        with pytest.raises(SourceError, match=match):
            whole(at.parent / name, index)

    refused(struct.pack("<II", 0x3ED7230A, 8), r"train.rec: RecordIO of an early dmlc-core")
    refused(b"", r"train.rec: expected RecordIO")
    refused(b"PK\x03\x04", r"train.rec: expected RecordIO \(magic ced7230a\), found '04034b50'")
    refused(b"\x80\x04\x95", r"lfw.bin: a pickle, which is never opened", "lfw.bin")
    only_header = {0: payload(b"", [1.0, 1.0])}
    write_rec(at, only_header)
    with pytest.raises(SourceError, match="no image in it"):
        whole(at, index)
    with pytest.raises(SourceError, match=r"gone.rec: no such file"):
        whole(tmp_path / "gone.rec", index)


def test_read__changed_file(at, index):
    write_rec(at, insightface(people(random_images(20))))
    pool = RecordIOPool(path=str(at))
    extent = next(pool.slices(5, index))
    write_rec(at, insightface(people(random_images(20, seed=1))))
    with pytest.raises(SourceError, match=r"train.rec: changed since it was planned"):
        pool.read(extent)


def test_slices__a_repaired_index_is_read(at, index):
    offsets = write_rec(at, insightface(people(random_images(20))))
    idx = at.with_suffix(".idx")
    good = idx.read_text()
    idx.write_text(good.replace(f"\n6\t{offsets[6]}\n", f"\n6\t{offsets[6] + 8}\n"))
    assert whole(at, index)["image"].null_count == 1
    idx.write_text(good)
    assert whole(at, index)["image"].null_count == 0


def test_read__from_s3(at, index):
    write_rec(at, insightface(people(random_images(20))))
    with s3_bucket() as bucket:
        for file in (at, at.with_suffix(".idx")):
            (bucket / "data" / file.name).write_bytes(file.read_bytes())
        theirs = whole(f"{bucket}/data", bucket / "plan.parquet")
    assert theirs.equals(whole(at.parent, index))


@pytest.mark.real
def test_real__im2rec_without_a_header(index):
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    table = whole("$OMNIFER_DATA/odd/recordio/adaface8.rec", index)
    assert len(table) == 8
    assert all(image.startswith(JPEG) for image in table["image"].to_pylist())
    assert len(set(table["group"].to_pylist())) == 2
    with pytest.raises(SourceError, match="a pickle"):
        whole("$OMNIFER_DATA/odd/recordio/small_lfw.bin", index)
