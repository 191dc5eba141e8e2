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


POINTS = [(30.0, 40.5), (60.0, 41.0), (45.0, 60.0), (33.0, 75.0), (58.0, 76.0)]


def attributes(points=POINTS, codes=(1, 2, 4), tab="\t"):
    return "".join([*(f"{x}{tab}{y}\n" for x, y in points), *(f"{code}\n" for code in codes)])


@pytest.mark.parametrize("tab", ["\t", " "])
def test_records__landmarks_and_perceived_attributes_of_originals(tmp_path, tab):
    writers.rafdb(tmp_path, CODES)
    named_by_person = [POINTS[i] for i in (1, 0, 2, 4, 3)]
    texts = [attributes(tab=tab), attributes(named_by_person, (0, 0, 0), tab)]
    texts += [attributes(codes=(2, 1, 2), tab=tab)] * 2
    writers.rafdb_attributes(tmp_path, dict(zip(CODES, texts, strict=True)))
    config = RafdbSet(path=str(tmp_path), image="original", landmarks=True, attributes=True)
    table = config.records("raf").table
    expected = [value for point in POINTS for value in point]
    assert table["landmarks"].to_pylist() == [expected] * 4
    assert table["perceived_gender"].to_pylist() == ["female", "male", "unsure", "unsure"]
    assert table["perceived_race"].to_pylist()[:3] == ["Asian", "Caucasian", "African-American"]
    assert table["perceived_age"].to_pylist()[:3] == ["70+", "0-3", "20-39"]


def test_records__each_only_where_it_is_asked_for(tmp_path):
    writers.rafdb(tmp_path, CODES)
    table = RafdbSet(path=str(tmp_path), image="original").records("raf").table
    assert table["landmarks"].null_count == table["perceived_age"].null_count == 4
    with pytest.raises(SourceError, match=r"train_00001_manu_attri.txt: no such file"):
        RafdbSet(path=str(tmp_path), attributes=True).records("raf")
    writers.rafdb_attributes(tmp_path, dict.fromkeys(CODES, attributes()))
    table = RafdbSet(path=str(tmp_path), attributes=True).records("raf").table  # of aligned ones
    assert table["landmarks"].null_count == 4
    assert table["perceived_gender"].to_pylist() == ["female"] * 4
    table = RafdbSet(path=str(tmp_path), image="original", landmarks=True).records("raf").table
    assert table["perceived_gender"].null_count == 4
    with pytest.raises(ValueError, match="landmarks are those of the original images"):
        RafdbSet(path=str(tmp_path), landmarks=True)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (attributes(codes=(3, 0, 0)), LabelError, r"line 6: perceived_gender '3'; expected 0-2"),
        (attributes(codes=(0, 0, "old")), LabelError, r"line 8: perceived_age 'old'; expected 0-4"),
        (attributes(codes=(0, 0)), SourceError, r"7 lines; expected 8"),
        (attributes([*POINTS[:4], (1, "")]), SourceError, r"line 5: '1\\t'; expected x and y"),
    ],
)
def test_records__attributes_of_another_form(tmp_path, content, error, message):
    writers.rafdb(tmp_path, {"train_00001.jpg": 1})
    writers.rafdb_attributes(tmp_path, {"train_00001.jpg": content})
    with pytest.raises(error, match=message):
        RafdbSet(path=str(tmp_path), attributes=True).records("raf")
