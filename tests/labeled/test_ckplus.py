"""CK+: the last frames show the emotion, the first is neutral, no file means no label."""

import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.ckplus import CkplusSet
from pipeline.schema import EMOTIONS

SEQUENCES = {"S005/001": (11, 3), "S005/002": (5, None), "S010/001": (6, 7)}


def rows(records):
    table = records.table.to_pylist()
    return [(row["id"].rpartition("/")[2][:-4], row["label"], row["group"]) for row in table]


def test_records__last_frames(tmp_path):
    written = writers.ckplus(tmp_path, SEQUENCES)
    records = CkplusSet(path=str(tmp_path)).records("c")
    assert rows(records) == [
        *((f"S005_001_{k:08d}", "disgust", "S005") for k in (9, 10, 11)),
        *((f"S005_002_{k:08d}", None, "S005") for k in (3, 4, 5)),
        *((f"S010_001_{k:08d}", "surprise", "S010") for k in (4, 5, 6)),
    ]
    first = records.table["id"][0].as_py().removeprefix("c/")
    assert records.table["image"][0].as_py() == written[first]
    assert set(records.table["role"].to_pylist()) == {"train"}
    assert records.label_names == EMOTIONS
    assert records.official == {"train": {"faces": 981}}


def test_records__neutral_first_frame_of_labeled_sequences(tmp_path):
    writers.ckplus(tmp_path, SEQUENCES)
    records = CkplusSet(path=str(tmp_path), frames=1, neutral=True).records("c")
    assert rows(records) == [
        ("S005_001_00000001", "neutral", "S005"),
        ("S005_001_00000011", "disgust", "S005"),
        ("S005_002_00000005", None, "S005"),
        ("S010_001_00000001", "neutral", "S010"),
        ("S010_001_00000006", "surprise", "S010"),
    ]


def test_records__first_frame_never_shows_the_emotion(tmp_path):
    writers.ckplus(tmp_path, {"S001/001": (3, 5)})
    found = rows(CkplusSet(path=str(tmp_path), frames=9, neutral=True).records("c"))
    assert [label for _, label, _ in found] == ["neutral", "happiness", "happiness"]


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected cohn-kanade-images in it"):
        CkplusSet(path=str(tmp_path)).records("c")
    writers.ckplus(tmp_path, {"S001/001": (3, 8)})
    with pytest.raises(LabelError, match=r"_emotion.txt line 1: emotion code 8; expected 0-7"):
        CkplusSet(path=str(tmp_path)).records("c")
    file = tmp_path / "Emotion/S001/001/S001_001_00000003_emotion.txt"
    for text in ("happy", "", "1\n2\n", "2.5"):
        file.write_text(text)
        with pytest.raises(LabelError, match=r"emotion.txt"):
            CkplusSet(path=str(tmp_path)).records("c")
