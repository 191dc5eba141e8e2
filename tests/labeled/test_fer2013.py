"""FER2013 as csv of three kinds and as class folders: codes, roles, and the merged test set."""

import numpy as np
import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.images import decode
from pipeline.labeled.codes import FER2013
from pipeline.labeled.fer2013 import Fer2013Set
from pipeline.labeled.ferplus import FerplusSet
from pipeline.schema import EMOTIONS

CODES = [0, 1, 2, 3, 4, 5, 6]
USAGE = ["Training"] * 5 + ["PublicTest", "PrivateTest"]


@pytest.mark.parametrize(
    ("file", "header"),
    [("fer2013.csv", "emotion,pixels,Usage"), ("icml_face_data.csv", "emotion, Usage, pixels")],
)
def test_records__csv(tmp_path, file, header):
    faces = writers.fer2013_csv(tmp_path / file, CODES, USAGE, header)
    records = Fer2013Set(path=str(tmp_path)).records("f")
    assert records.table["id"].to_pylist() == [f"f/{file}#{i}" for i in range(7)]
    assert records.table["label"].to_pylist() == list(FER2013)
    assert records.table["role"].to_pylist() == ["train"] * 5 + ["test", None]
    for image, face in zip(records.table["image"].to_pylist(), faces, strict=True):
        np.testing.assert_array_equal(decode(image), face)
    assert records.official == {"train": {"faces": 28_709}, "test": {"faces": 3_589}}


def test_records__train_csv_is_all_training_and_test_csv_is_not_read(tmp_path):
    writers.fer2013_csv(tmp_path / "train.csv", [3, 0], None, "emotion,pixels")
    writers.text(tmp_path / "test.csv", "pixels\n0 0\n")
    table = Fer2013Set(path=str(tmp_path)).records("f").table
    assert table["label"].to_pylist() == ["happiness", "anger"]
    assert table["role"].to_pylist() == ["train", "train"]


def test_records__usage_is_missed_in_the_other_files(tmp_path):
    writers.fer2013_csv(tmp_path / "fer2013.csv", [3], None, "emotion,pixels")
    with pytest.raises(SourceError, match=r"fer2013.csv: missing column Usage"):
        Fer2013Set(path=str(tmp_path)).records("f")


def test_records__folders_go_by_name_and_say_that_test_is_merged(tmp_path):
    classes = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
    writers.pictures(tmp_path, [f"train/{name}/0.jpg" for name in classes] + ["test/sad/1.jpg"])
    records = Fer2013Set(path=str(tmp_path)).records("f")
    rows = {row["id"]: (row["role"], row["label"]) for row in records.table.to_pylist()}
    assert rows["f/train/neutral/0.jpg"] == ("train", "neutral")  # place 4, which is no code
    assert rows["f/train/angry/0.jpg"] == ("train", "anger")
    assert rows["f/test/sad/1.jpg"] == ("test", "sadness")
    assert records.rules == {"protocol": "fer2013-merged"}
    assert records.official["test"] == {"faces": 7_178}
    assert records.label_names == tuple(name for name in EMOTIONS if name != "contempt")


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected a Parquet file or a folder with fer2013.csv"):
        Fer2013Set(path=str(tmp_path)).records("f")
    file = tmp_path / "fer2013.csv"
    writers.fer2013_csv(file, [0, 7], ["Training"] * 2, "emotion,pixels,Usage")
    with pytest.raises(LabelError, match=r"fer2013.csv row 1: emotion code 7; expected 0-6"):
        Fer2013Set(path=str(tmp_path)).records("f")
    for row, message in (
        ("0,1 2 3,Training", r"row 0: 3 pixels; expected 2304"),
        ("0,17,Training", r"row 0: 1 pixels; expected 2304"),
        ("0,1 x 3,Training", r"row 0: pixels; expected numbers"),
        ("angry,1 2 3,Training", r"column 'emotion'; expected a whole number in every row"),
    ):
        file.write_text(f"emotion,pixels,Usage\n{row}\n")
        with pytest.raises(SourceError, match=message):
            Fer2013Set(path=str(file)).records("f")


# -- FERPlus as pictures --------------------------------------------------------------------------


def test_ferplus_pictures__votes_stand_in_the_order_of_the_file(tmp_path):
    ballots = {2: [0, 0, 9, 1, 0, 0, 0, 0, 0, 0], 30: [0, 0, 0, 9, 0, 0, 1, 0, 0, 0]}
    written = writers.ferplus_pictures(tmp_path, "FER2013Train", ballots)
    writers.ferplus_pictures(tmp_path, "FER2013Valid", {7: [0, 0, 0, 0, 9, 0, 0, 0, 0, 1]})
    writers.ferplus_pictures(tmp_path, "FER2013Test", {9: [0, 0, 0, 0, 0, 0, 0, 0, 0, 10]})
    records = FerplusSet(path=str(tmp_path)).records("p")
    assert records.table["label"].to_pylist() == ["surprise", "sadness", "anger", None]
    assert records.table["role"].to_pylist() == ["train", "train", "test", None]
    assert records.table["id"].to_pylist()[1] == "p/FER2013Train/fer0000030.png"
    assert records.table["image"].to_pylist()[:2] == list(written.values())
    assert records.rules["majority"] == {"Training": 2, "PublicTest": 1}


def test_ferplus_pictures__missing_picture(tmp_path):
    writers.ferplus_pictures(tmp_path, "FER2013Train", {2: [9, 0, 0, 0, 0, 0, 0, 0, 0, 0]})
    (tmp_path / "FER2013Train/fer0000002.png").unlink()
    with pytest.raises(SourceError, match=r"fer0000002.png: no such file"):
        FerplusSet(path=str(tmp_path)).records("p")
