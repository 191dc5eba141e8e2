"""AffectNet 2017 and 2021: header or none, boxes, codes that are no emotion, arrays of text."""

import pickle

import numpy as np
import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.affectnet import AffectnetSet
from pipeline.schema import EMOTIONS

ROWS = [
    ("1/a.JPG", (4, 5, 6, 7), 1),
    ("1/b.png", (1, 2, 8, 8), 6),
    ("2/c.bmp", (0, 0, 9, 9), 8),
    ("2/d.jpg", (0, 0, -1, -1), 3),
    ("2/e.tif", (0, 0, 9, 9), 7),
    ("2/f.jpg", (-1, -1, -1, -1), 10),
]


FIVE = [38.5, 138.5, 44.5, 144.5, 30, 130, 48, 148, 54, 154]
"""Of writers.POINTS_68: middles of points 36-41 and 42-47, points 30, 48 and 54."""


def release_2017(root, header):
    written = writers.affectnet_2017(root, "training", ROWS, header=header)
    writers.affectnet_2017(root, "validation", [("3/g.jpg", (1, 1, 5, 5), 0)], header=header)
    return written


@pytest.mark.parametrize("header", [True, False])
def test_records_2017__header_or_none(tmp_path, header):
    written = release_2017(tmp_path, header)
    records = AffectnetSet(path=str(tmp_path)).records("a")
    paths = [f"Manually_Annotated_Images/{name}" for name in ("1/a.JPG", "1/b.png", "2/e.tif")]
    assert records.table["id"].to_pylist()[:3] == [f"a/{path}" for path in paths]
    assert records.table["image"].to_pylist()[:3] == [written[path] for path in paths]
    assert records.table["label"].to_pylist() == ["happiness", "anger", "contempt", "neutral"]
    assert records.table["role"].to_pylist() == ["train"] * 3 + ["test"]
    assert records.table["box"].to_pylist()[:2] == [[4, 5, 10, 12], [1, 2, 9, 10]]
    assert records.table["landmarks"].to_pylist() == [FIVE] * 4
    assert records.rules == {}
    assert dict(records.dropped) == {"no_emotion": 2, "no_face_box": 1, "contempt": 0}
    assert records.label_names == EMOTIONS


def test_records_2017__seven_classes_and_a_validation_set(tmp_path):
    release_2017(tmp_path, True)
    config = AffectnetSet(path=str(tmp_path), classes=7, held_out="validation")
    records = config.records("a")
    assert records.table["label"].to_pylist() == ["happiness", "anger", "neutral"]
    assert records.table["role"].to_pylist() == ["train", "train", "validation"]
    assert records.dropped["contempt"] == 1
    assert records.label_names == EMOTIONS[:7]
    assert records.official["train"]["faces"] == 283_901
    assert records.official["validation"]["faces"] == 3_500


@pytest.mark.parametrize("lists", ["", "Automatically_annotated_file_list"])
def test_records_2017__automatic_training_labels(tmp_path, lists):
    release_2017(tmp_path, True)
    rows = [("9/x.jpg", (4, 5, 6, 7), 4), ("9/y.jpg", (0, 0, 9, 9), 8)]
    images = "Automatically_Annotated_Images"
    written = writers.affectnet_2017(
        tmp_path, "automatically_annotated", rows, lists=lists, images=images
    )
    records = AffectnetSet(path=str(tmp_path), annotation="automatic").records("a")
    assert records.table["id"].to_pylist()[0] == f"a/{images}/9/x.jpg"
    assert records.table["image"].to_pylist()[0] == written[f"{images}/9/x.jpg"]
    assert records.table["label"].to_pylist() == ["fear", "neutral"]
    assert records.table["role"].to_pylist() == ["train", "test"]  # validation is manual
    assert records.dropped["no_emotion"] == 1
    assert "network" in records.rules["protocol"]
    assert list(records.official) == ["test"]
    manual = AffectnetSet(path=str(tmp_path)).records("a")
    assert f"a/{images}/9/x.jpg" not in manual.table["id"].to_pylist()


def test_records_2017__landmarks_of_another_form(tmp_path):
    writers.affectnet_2017(tmp_path, "training", ROWS[:1], landmarks="1;2;3")
    config = AffectnetSet(path=str(tmp_path), split="train")
    with pytest.raises(SourceError, match=r"training.csv row 0: '1;2;3'...; expected 136"):
        config.records("a")
    writers.affectnet_2017(tmp_path, "training", ROWS[:1], landmarks="")
    assert config.records("a").table["landmarks"].to_pylist() == [None]


@pytest.mark.parametrize("as_text", [True, False])
def test_records_2021__landmarks_where_asked_for(tmp_path, as_text):
    writers.affectnet_2021(tmp_path, "train_set", {"1": "3"})
    values = np.array(writers.POINTS_68.split(";"))
    file = tmp_path / "train_set/annotations/1_lnd.npy"
    np.save(file, values if as_text else values.astype(float))
    config = AffectnetSet(path=str(tmp_path), split="train", landmarks=True)
    assert config.records("a").table["landmarks"].to_pylist() == [FIVE]
    plain = AffectnetSet(path=str(tmp_path), split="train").records("a").table
    assert plain["landmarks"].to_pylist() == [None]
    np.save(file, values[:10])
    with pytest.raises(SourceError, match=r"1_lnd.npy: expected 136 landmark numbers"):
        config.records("a")
    with pytest.raises(SourceError, match="release of 2021; `automatic` is of 2017"):
        AffectnetSet(path=str(tmp_path), annotation="automatic").records("a")


def test_records_2021__codes_are_text(tmp_path):
    written = writers.affectnet_2021(tmp_path, "train_set", {"7": "3", "12": 5, "9": b"0"})
    writers.affectnet_2021(tmp_path, "val_set", {"7": "7"})
    records = AffectnetSet(path=str(tmp_path)).records("a")
    rows = {row["id"]: (row["role"], row["label"]) for row in records.table.to_pylist()}
    assert rows == {
        "a/train_set/images/7.jpg": ("train", "surprise"),
        "a/train_set/images/9.jpg": ("train", "neutral"),
        "a/train_set/images/12.jpg": ("train", "disgust"),
        "a/val_set/images/7.jpg": ("test", "contempt"),
    }
    assert set(records.table["image"].to_pylist()) >= set(written.values())
    only = AffectnetSet(path=str(tmp_path), split="validation").records("a").table
    assert only["id"].to_pylist() == ["a/val_set/images/7.jpg"]


class Opened:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_records_2021__a_pickle_is_never_opened(tmp_path):
    writers.affectnet_2021(tmp_path, "train_set", {"1": "3"})
    file = tmp_path / "train_set/annotations/1_exp.npy"
    trap = np.array(Opened(), dtype=object)
    for content in (pickle.dumps(Opened()), None):
        if content is None:
            np.save(file, trap, allow_pickle=True)
        else:
            file.write_bytes(content)
        with pytest.raises(LabelError, match=r"1_exp.npy: expected one emotion code"):
            AffectnetSet(path=str(tmp_path), split="train").records("a")


@pytest.mark.parametrize("code", ["happy", [1, 2], "8"])
def test_records_2021__bad_codes(tmp_path, code):
    writers.affectnet_2021(tmp_path, "train_set", {"1": code})
    with pytest.raises(LabelError, match=r"1_exp.npy: "):
        AffectnetSet(path=str(tmp_path), split="train").records("a")


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected training.csv in it"):
        AffectnetSet(path=str(tmp_path)).records("a")
    writers.affectnet_2017(tmp_path, "training", [("a.jpg", (0, 0, 9, 9), 11)])
    with pytest.raises(LabelError, match=r"training.csv row 0: emotion code 11; expected 0-10"):
        AffectnetSet(path=str(tmp_path), split="train").records("a")
    file = tmp_path / "Manually_Annotated_file_lists/training.csv"
    file.write_text("a.jpg,0,0,9,9\n")
    with pytest.raises(SourceError, match=r"training.csv: 5 columns, no header; expected 9"):
        AffectnetSet(path=str(tmp_path), split="train").records("a")
    file.write_text("subDirectory_filePath,face_x,face_y,face_width,face_height\n")
    with pytest.raises(SourceError, match=r"training.csv: missing column expression"):
        AffectnetSet(path=str(tmp_path), split="train").records("a")


def test_records_2021__missing_annotation(tmp_path):
    writers.affectnet_2021(tmp_path, "train_set", {"1": "3"})
    (tmp_path / "train_set/annotations/1_exp.npy").unlink()
    with pytest.raises(SourceError, match=r"1_exp.npy: no such file"):
        AffectnetSet(path=str(tmp_path), split="train").records("a")
