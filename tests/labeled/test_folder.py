"""Class folders are matched by name, splits by folder, and a name nobody knows is an error."""

import numpy as np
import pytest
from helpers.s3 import s3_bucket

from pipeline import s3
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.records import MapOther
from pipeline.synthetic import draw, encode


@pytest.fixture
def put(tmp_path):
    """Writes one face per given path and returns the root."""

    def write(*paths):
        faces = draw(0, np.arange(len(paths)), 16)
        for path, face in zip(paths, faces, strict=True):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(face))
        return str(tmp_path)

    return write


def test_records__splits_classes_and_aliases(put):
    root = put("Train/Angry/a.png", "Train/sad/deep/b.PNG", "val/Neutral/c.png", "test/fear/d.png")
    records = FolderSet(path=root).records("set")
    rows = {row["id"]: (row["role"], row["label"]) for row in records.table.to_pylist()}
    assert rows == {
        "set/Train/Angry/a.png": ("train", "anger"),
        "set/Train/sad/deep/b.PNG": ("train", "sadness"),
        "set/test/fear/d.png": ("test", "fear"),
        "set/val/Neutral/c.png": ("validation", "neutral"),
    }
    assert records.label_names == ("neutral", "sadness", "fear", "anger")


def test_records__from_s3_as_from_disk(put):
    root = put("train/happy/a.png", "train/fear/b.png", "test/fear/c.png")
    local = FolderSet(path=root).records("set")
    with s3_bucket() as runs:
        at = runs.parent / "set"
        s3.filesystem().put(f"{root}/", f"{at.uri}/", recursive=True)
        found = FolderSet(path=at.uri).records("set")
    assert found.table.equals(local.table)


def test_records__without_splits_all_is_train(put):
    records = FolderSet(path=put("happy/a.png", "disgusted/b.png")).records("set")
    assert records.table["role"].to_pylist() == ["train", "train"]


def test_records__split_picks_one_folder(put):
    root = put("train/sad/a.png", "Val/sad/b.png")
    for split in ("Val", "validation"):
        table = FolderSet(path=root, split=split).records("set").table
        assert table["id"].to_pylist() == ["set/Val/sad/b.png"]
    with pytest.raises(SourceError, match="no image of split 'test'; found: Val, train"):
        FolderSet(path=root, split="test").records("set")


def test_records__unknown_class_names_the_file(put):
    with pytest.raises(LabelError, match=r"hapy/a.png: unknown class name 'hapy'; did you mean"):
        FolderSet(path=put("hapy/a.png")).records("set")


def test_records__numbers_need_names(put):
    root = put("1/a.png", "2/b.png", "8/c.png")
    with pytest.raises(LabelError, match=r"unknown class name '1'.*`names`"):
        FolderSet(path=root).records("set")
    config = FolderSet.model_validate(
        {"path": root, "names": {1: "surprise", "2": "fear", 8: None}}
    )
    assert config.records("set").table["label"].to_pylist() == ["surprise", "fear"]


def test_records__other_needs_a_policy(put):
    root = put("other/a.png", "fear/b.png")
    with pytest.raises(LabelError, match="class 'other' needs label_policy"):
        FolderSet(path=root).records("set")
    labels = {}
    for policy in ("keep", "drop", MapOther(map="neutral")):
        records = FolderSet(path=root, label_policy=policy).records("set")
        labels[str(policy)] = (records.table["label"].to_pylist(), records.label_names)
    assert labels["keep"] == (["fear", "other"], ("fear", "other"))
    assert labels["drop"] == (["fear"], ("fear",))
    assert labels["map='neutral'"] == (["fear", "neutral"], ("neutral", "fear"))


def test_records__nothing_to_read(put, tmp_path):
    with pytest.raises(SourceError, match="no image in it"):
        FolderSet(path=str(tmp_path)).records("set")
    with pytest.raises(SourceError, match="no such folder"):
        FolderSet(path=str(tmp_path / "gone")).records("set")
    with pytest.raises(LabelError, match=r"a.png: lies in no class folder"):
        FolderSet(path=put("a.png")).records("set")
