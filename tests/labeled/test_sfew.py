"""SFEW: class folders by name, whole frames or aligned faces, the unlabeled test set stays out."""

import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.sfew import SfewSet


def rows(records):
    return {row["id"]: (row["role"], row["label"]) for row in records.table.to_pylist()}


def test_records__frames(tmp_path):
    writers.pictures(tmp_path, ["Train/Angry/a.png", "Val/Happy/b.png", "Test/c.png"])
    records = SfewSet(path=str(tmp_path), image="frame").records("s")
    assert rows(records) == {
        "s/Train/Angry/a.png": ("train", "anger"),
        "s/Val/Happy/b.png": ("test", "happiness"),
    }
    assert records.official == {"train": {"faces": 958}, "test": {"faces": 436}}


@pytest.mark.parametrize("folder", ["Val_Aligned_Faces", "Val_Aligned_Faces_new/Val_Aligned_Faces"])
def test_records__aligned_faces(tmp_path, folder):
    writers.pictures(
        tmp_path, ["Train_Aligned_Faces/Sad/a.png", f"{folder}/Neutral/b.png", "Train/Sad/a.png"]
    )
    records = SfewSet(path=str(tmp_path), held_out="validation").records("s")
    assert rows(records) == {
        "s/Train_Aligned_Faces/Sad/a.png": ("train", "sadness"),
        f"s/{folder}/Neutral/b.png": ("validation", "neutral"),
    }
    only = SfewSet(path=str(tmp_path), split="train").records("s")
    assert list(rows(only)) == ["s/Train_Aligned_Faces/Sad/a.png"]


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected Train_Aligned_Faces in it"):
        SfewSet(path=str(tmp_path)).records("s")
    writers.pictures(tmp_path, ["Train/Hapy/a.png"])
    with pytest.raises(LabelError, match=r"Hapy/a.png: unknown class name 'Hapy'; did you mean"):
        SfewSet(path=str(tmp_path), image="frame").records("s")
