"""Aff-Wild2: line k is frame k, frames without a face or an emotion are left out and counted."""

from collections import Counter

import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.affwild2 import Affwild2Set

SEVEN = writers.AFFWILD2_HEADER.removesuffix(",Other")


def rows(records):
    table = records.table.to_pylist()
    return [(row["id"].removeprefix("w/cropped_aligned/"), row["label"]) for row in table]


@pytest.fixture
def root(tmp_path):
    writers.affwild2(tmp_path, "Train_Set", "v1", [4, -1, 5, 1, 7], [1, 2, 4, 5])
    writers.affwild2(tmp_path, "Train_Set", "v2_left", [0, 0], [1, 2])
    writers.affwild2(tmp_path, "Train_Set", "v2_right", [2], [1])
    writers.affwild2(tmp_path, "Validation_Set", "v3", [6], [1])
    return tmp_path


def test_records__frames_join_on_existence(root):
    records = Affwild2Set(path=str(root), label_policy="drop").records("w")
    assert rows(records) == [
        ("v1/00001.jpg", "happiness"),
        ("v1/00004.jpg", "anger"),
        ("v2_left/00001.jpg", "neutral"),
        ("v2_left/00002.jpg", "neutral"),
        ("v2_right/00001.jpg", "disgust"),
        ("v3/00001.jpg", "surprise"),
    ]
    assert dict(records.dropped) == {"no_emotion": 1, "no_face": 1, "other": 1}
    assert records.table["role"].to_pylist() == ["train"] * 5 + ["test"]
    assert records.table["group"].to_pylist() == ["v1", "v1", "v2", "v2", "v2", "v3"]


def test_records__pictures_are_those_of_the_frames(tmp_path):
    written = writers.affwild2(tmp_path, "Train_Set", "v", [3, 4, 5], [1, 3], SEVEN)
    table = Affwild2Set(path=str(tmp_path), split="train").records("w").table
    assert table["image"].to_pylist() == [written[f"cropped_aligned/v/0000{k}.jpg"] for k in (1, 3)]
    assert table["label"].to_pylist() == ["fear", "sadness"]


def test_records__every_nth_frame_of_training_videos(tmp_path):
    writers.affwild2(tmp_path, "Train_Set", "v", [0, 1, 2, 3, 4, 5, 6], range(1, 8), SEVEN)
    records = Affwild2Set(path=str(tmp_path), split="train", every=3).records("w")
    want = [("v/00001.jpg", "neutral"), ("v/00004.jpg", "fear"), ("v/00007.jpg", "surprise")]
    assert rows(records) == want


def test_records__validation_videos_are_whole(tmp_path):
    writers.affwild2(tmp_path, "Train_Set", "v", [0, 1, 2, 3], range(1, 5), SEVEN)
    writers.affwild2(tmp_path, "Validation_Set", "w", [3, -1, 4, 5, 6], range(1, 6), SEVEN)
    records = Affwild2Set(path=str(tmp_path), every=3).records("w")
    assert Counter(records.table["role"].to_pylist()) == {"train": 2, "test": 4}
    assert dict(records.dropped) == {"no_emotion": 1}


def test_records__header_names_the_codes(tmp_path):
    writers.affwild2(tmp_path, "Train_Set", "v", [0, 1], [1, 2], "Anger,Neutral")
    records = Affwild2Set(path=str(tmp_path), split="train").records("w")
    assert [label for _, label in rows(records)] == ["anger", "neutral"]


def test_records__other_is_a_policy(root):
    kept = Affwild2Set(path=str(root), label_policy="keep", split="train").records("w")
    assert ("v1/00005.jpg", "other") in rows(kept)
    assert kept.label_names[-1] == "other"
    with pytest.raises(LabelError, match=r"v1.txt line 1: class 'other' needs label_policy"):
        Affwild2Set(path=str(root)).records("w")


def test_records__held_out_as_validation(root):
    config = Affwild2Set(path=str(root), held_out="validation", label_policy="drop")
    assert config.records("w").table["role"].to_pylist()[-1] == "validation"


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 7], r"v.txt line 3: emotion code '7'; expected -1 to 6"),
        ([0, "", 2], r"v.txt line 3: emotion code ''"),
        ([-5, 2], r"v.txt line 2: emotion code '-5'"),
    ],
)
def test_records__bad_codes(tmp_path, codes, message):
    writers.affwild2(tmp_path, "Train_Set", "v", codes, [1], SEVEN)
    with pytest.raises(LabelError, match=message):
        Affwild2Set(path=str(tmp_path), split="train").records("w")


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected cropped_aligned in it"):
        Affwild2Set(path=str(tmp_path)).records("w")
    writers.affwild2(tmp_path, "Train_Set", "v", [0], [1], "4")
    with pytest.raises(LabelError, match=r"v.txt line 1: unknown class name '4'"):
        Affwild2Set(path=str(tmp_path), split="train").records("w")
    with pytest.raises(SourceError, match=r"expected Validation_Set in it"):
        Affwild2Set(path=str(tmp_path), split="validation").records("w")
