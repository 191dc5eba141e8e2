"""ExpW: boxes are top left right bottom, faces of one photograph are one group."""

import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.expw import ExpwSet

LINES = ["a.jpg 0 20 30 70 90 60.5 3", "b.jpg 2 1 2 3 4 11.25 6", "a.jpg 1 5 6 16 25 9.5 0"]


def test_records__boxes_and_several_faces(tmp_path):
    written = writers.expw(tmp_path, LINES)
    table = ExpwSet(path=str(tmp_path)).records("e").table
    ids = ["e/origin/a.jpg#0", "e/origin/b.jpg#2", "e/origin/a.jpg#1"]
    assert table["id"].to_pylist() == ids
    assert table["label"].to_pylist() == ["happiness", "neutral", "anger"]
    assert table["group"].to_pylist() == ["a.jpg", "b.jpg", "a.jpg"]
    assert table["box"].to_pylist() == [[30, 20, 70, 90], [2, 1, 3, 4], [6, 5, 16, 25]]
    assert table["image"].to_pylist() == [written[f"origin/{n}.jpg"] for n in "aba"]
    assert set(table["role"].to_pylist()) == {"train"}


def test_records__faces_left_out_are_counted(tmp_path):
    writers.expw(tmp_path, [*LINES, "c.jpg 0 9 9 9 20 50 1"])
    records = ExpwSet(path=str(tmp_path), min_confidence=11.25).records("e")
    assert records.table["id"].to_pylist() == ["e/origin/a.jpg#0", "e/origin/b.jpg#2"]
    assert dict(records.dropped) == {"below_confidence": 1, "empty_box": 1}


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match=r"expected origin in it"):
        ExpwSet(path=str(tmp_path)).records("e")
    for line, error, message in (
        ("a.jpg 0 20 30 70 90 60.5 7", LabelError, r"line 2: emotion code 7; expected 0-6"),
        ("a.jpg 0 20 30 70 90 3", SourceError, r"line 2: 7 columns; expected 8"),
        ("a.jpg 0 20 x 70 90 60.5 3", SourceError, r"line 2: '20 x 70 90 60.5'; expected box"),
    ):
        writers.expw(tmp_path, [LINES[0], line])
        with pytest.raises(error, match=message):
            ExpwSet(path=str(tmp_path)).records("e")
    writers.expw(tmp_path, LINES)
    (tmp_path / "origin/b.jpg").unlink()
    with pytest.raises(SourceError, match=r"b.jpg: no such file"):
        ExpwSet(path=str(tmp_path)).records("e")
