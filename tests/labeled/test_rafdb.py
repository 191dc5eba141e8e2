"""RAF-DB: codes from 1, names with and without `_aligned`, raters' shares, and the mirrors."""

import numpy as np
import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.rafdb import RafdbSet
from pipeline.labeled.records import unlike_official
from pipeline.schema import EMOTIONS

CODES = {"train_00001.jpg": 5, "train_00002.jpg": 1, "test_0001.jpg": 7, "train_12271.jpg": 4}
LABELS = ["sadness", "surprise", "neutral", "happiness"]


def shares(file, rows):
    writers.text(file, "".join(f"{name} {' '.join(map(str, row))}\n" for name, row in rows.items()))


@pytest.mark.parametrize("listed", ["list_patition_label.txt", "list_partition_label.txt"])
def test_records__aligned(tmp_path, listed):
    written = writers.rafdb(tmp_path, CODES, listed)
    records = RafdbSet(path=str(tmp_path)).records("raf")
    paths = [f"Image/aligned/{name[:-4]}_aligned.jpg" for name in CODES]
    assert records.table["id"].to_pylist() == [f"raf/{path}" for path in paths]
    assert records.table["image"].to_pylist() == [written[path] for path in paths]
    assert records.table["label"].to_pylist() == LABELS
    assert records.table["role"].to_pylist() == ["train", "train", "test", "train"]
    assert records.label_names == EMOTIONS[:7]


def test_records__original_and_one_split(tmp_path):
    writers.rafdb(tmp_path, CODES)
    table = RafdbSet(path=str(tmp_path), image="original", split="test").records("raf").table
    assert table["id"].to_pylist() == ["raf/Image/original/test_0001.jpg"]


def test_records__shares_follow_the_label_names(tmp_path):
    writers.rafdb(tmp_path, CODES)
    rows = {name: np.full(7, 0.05) for name in CODES}
    for name, code in CODES.items():
        rows[name][code - 1] = 0.7
    shares(tmp_path / "EmoLabel/distribution_basic.txt", rows)
    records = RafdbSet(path=str(tmp_path), soft=True).records("raf")
    for label, soft in zip(LABELS, records.table["soft"].to_pylist(), strict=True):
        assert records.label_names[int(np.argmax(soft))] == label
        assert sum(soft) == pytest.approx(1)
        assert max(soft) == pytest.approx(0.7)


def test_records__shares_in_another_order_are_refused(tmp_path):
    writers.rafdb(tmp_path, CODES)
    file = tmp_path / "EmoLabel/distribution_basic.txt"
    shares(file, {name: np.eye(7)[code % 7] for name, code in CODES.items()})
    with pytest.raises(LabelError, match=r"label's in 0% of the lines; the columns are not in"):
        RafdbSet(path=str(tmp_path), soft=True).records("raf")
    shares(file, {name: [0.5, 0.1, 0, 0, 0, 0, 0] for name in CODES})
    with pytest.raises(SourceError, match=r"basic.txt line 1: 7 shares, sum 0.6; expected 7, sum"):
        RafdbSet(path=str(tmp_path), soft=True).records("raf")
    shares(file, {"train_00001.jpg": np.eye(7)[4]})
    with pytest.raises(SourceError, match=r"no line for train_00002.jpg"):
        RafdbSet(path=str(tmp_path), soft=True).records("raf")


def test_records__mirror_of_numbered_folders(tmp_path):
    writers.pictures(tmp_path, ["train/1/a.jpg", "train/7/b.jpg", "test/4/c.jpg"])
    for config in (RafdbSet(path=str(tmp_path)), FolderSet(path=str(tmp_path), names="rafdb")):
        rows = {
            row["id"]: (row["role"], row["label"]) for row in config.records("m").table.to_pylist()
        }
        assert rows == {
            "m/train/1/a.jpg": ("train", "surprise"),
            "m/train/7/b.jpg": ("train", "neutral"),
            "m/test/4/c.jpg": ("test", "happiness"),
        }


def test_records__counts_are_compared_with_the_published_ones(tmp_path):
    writers.rafdb(tmp_path, CODES)
    lines = unlike_official(RafdbSet(path=str(tmp_path), split="test").records("raf"))
    assert "test: 1 faces; published: 3,068" in lines
    assert "test: 1 neutral; published: 680" in lines
    assert not any(line.startswith("train") for line in lines)


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match="gone: expected EmoLabel or train or test in it"):
        RafdbSet(path=str(tmp_path / "gone")).records("raf")
    with pytest.raises(SourceError, match="expected EmoLabel in it"):
        RafdbSet(path=str(tmp_path), soft=True).records("raf")
    writers.rafdb(tmp_path, {"train_00001.jpg": 1, "train_00002.jpg": 0})
    with pytest.raises(LabelError, match=r"label.txt line 2: emotion code 0; expected 1-7 \(rafdb"):
        RafdbSet(path=str(tmp_path)).records("raf")
    writers.rafdb(tmp_path, {"train_00001.jpg": 1, "face.jpg": 1})
    with pytest.raises(SourceError, match=r"line 2: 'face.jpg 1'; expected a name train_\*"):
        RafdbSet(path=str(tmp_path)).records("raf")
    writers.rafdb(tmp_path, {"train_00001.jpg": 1})
    (tmp_path / "Image/aligned/train_00001_aligned.jpg").unlink()
    with pytest.raises(SourceError, match=r"train_00001_aligned.jpg: no such file"):
        RafdbSet(path=str(tmp_path)).records("raf")
