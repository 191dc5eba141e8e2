"""Tables of faces: bytes or paths, names or codes, splits, groups, boxes; errors name the row."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import LabelError, SourceError
from pipeline.labeled.table import TableSet
from pipeline.synthetic import draw, encode

IMAGES = [encode(face) for face in draw(0, np.arange(4), 16)]


def write(path, table, **metadata):
    pq.write_table(table.replace_schema_metadata(metadata or None), path)
    return str(path)


def test_records__parquet_with_everything(tmp_path):
    table = pa.table(
        {
            "face": [{"bytes": image, "path": None} for image in IMAGES],
            "emotion": ["happy", "Anger", None, "fear"],
            "part": ["train", "train", "train", "test"],
            "who": [7, 7, 8, 9],
            "at": [[0.0, 1.0, 2.0, 3.0]] * 4,
            "points": [[float(i) for i in range(10)], None, None, None],
        }
    )
    config = TableSet(
        path=write(tmp_path / "t.parquet", table), image_column="face", label_column="emotion",
        split_column="part", group_column="who", box_column="at",
        landmarks_column="points",
    )  # fmt: skip
    records = config.records("mine")
    assert records.table["id"].to_pylist() == [f"mine/t.parquet#{i}" for i in range(4)]
    assert records.table["label"].to_pylist() == ["happiness", "anger", None, "fear"]
    assert records.table["role"].to_pylist() == ["train", "train", "train", "test"]
    assert records.table["group"].to_pylist() == ["7", "7", "8", "9"]
    assert records.table["box"][0].as_py() == [0, 1, 2, 3]
    assert records.table["landmarks"].to_pylist() == [list(range(10)), None, None, None]
    assert records.table["perceived_gender"].null_count == 4
    assert records.table["image"].to_pylist() == IMAGES


def test_records__a_folder_of_parts_in_the_order_of_their_names(tmp_path):
    for part, labels in (
        ("data/train-00001-of-00002", ["fear", "happy"]),
        ("data/train-00000-of-00002", ["sad"]),
        ("data/test-00000-of-00001", ["anger"]),
    ):
        at = tmp_path / "set" / f"{part}.parquet"
        at.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"] * len(labels), "label": labels}), at)
    found = TableSet(path=str(tmp_path / "set")).records("t")
    assert found.table["id"].to_pylist() == [
        "t/data/test-00000-of-00001.parquet#0",
        "t/data/train-00000-of-00002.parquet#0",
        "t/data/train-00001-of-00002.parquet#0",
        "t/data/train-00001-of-00002.parquet#1",
    ]
    assert found.table["label"].to_pylist() == ["anger", "sadness", "fear", "happiness"]
    assert found.table["role"].to_pylist() == ["test", "train", "train", "train"]
    assert found.label_names == ("happiness", "sadness", "fear", "anger")
    only = TableSet(path=str(tmp_path / "set"), split="test").records("t")
    assert only.table["label"].to_pylist() == ["anger"]
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"a folder of \.parquet files; holds none"):
        TableSet(path=str(tmp_path / "none")).records("t")
    with pytest.raises(SourceError, match="no row of split 'validation'; found: test, train"):
        TableSet(path=str(tmp_path / "set"), split="validation").records("t")


def test_records__csv_of_paths(tmp_path):
    (tmp_path / "img").mkdir()
    for i, image in enumerate(IMAGES[:2]):
        (tmp_path / "img" / f"{i}.png").write_bytes(image)
    (tmp_path / "list.csv").write_text("image,label\nimg/0.png,sad\nimg/1.png,surprised\n")
    table = TableSet(path=str(tmp_path / "list.csv")).records("x").table
    assert table["label"].to_pylist() == ["sadness", "surprise"]
    assert table["image"].to_pylist() == IMAGES[:2]
    (tmp_path / "list.csv").write_text("image,label\nimg/0.png,sad\nimg/7.png,sad\n")
    with pytest.raises(SourceError, match=r"img/7.png: no such file"):
        TableSet(path=str(tmp_path / "list.csv")).records("x")


def test_records__codes_take_their_names_from_the_schema(tmp_path):
    features = {"info": {"features": {"label": {"names": ["fear", "joy"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": IMAGES[:3], "label": [1, 0, None]})
    path = write(tmp_path / "hf.parquet", table, huggingface=json.dumps(features))
    assert TableSet(path=path).records("x").table["label"].to_pylist() == [
        "happiness",
        "fear",
        None,
    ]
    path = write(tmp_path / "bad.parquet", pa.table({"image": IMAGES[:2], "label": [1, 2]}),
                 huggingface=json.dumps(features))  # fmt: skip
    with pytest.raises(LabelError, match=r"bad.parquet row 1: label code 2"):
        TableSet(path=path).records("x")


def test_records__codes_without_meaning_are_refused(tmp_path):
    path = write(tmp_path / "t.parquet", pa.table({"image": IMAGES[:3], "label": [0, 1, 8]}))
    with pytest.raises(LabelError, match="labels are codes"):
        TableSet(path=path).records("x")
    config = TableSet.model_validate({"path": path, "names": {0: "fear", 1: "sad", 8: None}})
    table = config.records("x").table
    assert table["label"].to_pylist() == ["fear", "sadness"]
    assert table["id"].to_pylist() == ["x/t.parquet#0", "x/t.parquet#1"]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"label": ["sad"]}, SourceError, "missing column image; found: label"),
        ({"image": [1.5], "label": ["sad"]}, SourceError, "column image: type double; expected"),
        ({"image": [IMAGES[0]], "label": [0.5]}, LabelError, "labels of type double"),
        ({"image": [IMAGES[0]], "label": ["sadd"]}, LabelError, r"t.parquet row 0: unknown class"),
    ],
)
def test_records__faults(tmp_path, columns, error, message):
    path = write(tmp_path / "t.parquet", pa.table(columns))
    with pytest.raises(error, match=message):
        TableSet(path=path).records("x")


def test_records__unknown_split_names_the_row(tmp_path):
    table = pa.table({"image": IMAGES[:2], "label": ["sad"] * 2, "part": ["train", "dev2"]})
    path = write(tmp_path / "t.parquet", table)
    with pytest.raises(SourceError, match=r"row 1: split 'dev2'; expected train"):
        TableSet(path=path, split_column="part").records("x")


def test_records__a_line_of_a_csv_file_is_counted_as_editors_do(tmp_path):
    path = str(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("image,label,part\na.png,sad,train\nb.png,sadd,train\n")
    with pytest.raises(LabelError, match=r"list.csv line 3: unknown class"):
        TableSet(path=path).records("x")
    (tmp_path / "list.csv").write_text("image,label,part\na.png,sad,\n")
    with pytest.raises(SourceError, match=r"list.csv line 2: split ''; expected train"):
        TableSet(path=path, split_column="part").records("x")


def test_records__wrong_box(tmp_path):
    table = pa.table({"image": IMAGES[:1], "label": ["sad"], "box": [[1.0, 2.0]]})
    path = write(tmp_path / "t.parquet", table)
    with pytest.raises(SourceError, match="column box: type list"):
        TableSet(path=path, box_column="box").records("x")
