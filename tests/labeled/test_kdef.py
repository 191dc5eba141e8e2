"""KDEF: names by position, a person in both sessions, angles of one letter or two, defects."""

import pytest

from labeled import writers
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.kdef import KdefSet


def rows(records):
    table = records.table.to_pylist()
    return {row["id"].rpartition("/")[2]: (row["label"], row["group"]) for row in table}


def test_records__af_opens_a_name_and_means_afraid(tmp_path):
    writers.kdef(tmp_path, ["AF01ANS", "AF01AFS", "AF02HAS", "BM02AFS"])
    assert rows(KdefSet(path=str(tmp_path)).records("k")) == {
        "AF01ANS.JPG": ("anger", "F01"),
        "AF01AFS.JPG": ("fear", "F01"),
        "AF02HAS.JPG": ("happiness", "F02"),
        "BM02AFS.JPG": ("fear", "M02"),
    }


def test_records__a_person_is_one_group_in_both_sessions(tmp_path):
    writers.kdef(tmp_path, ["AF01NES", "BF01NES", "AM01NES"])
    records = KdefSet(path=str(tmp_path)).records("k")
    assert [group for _, group in rows(records).values()] == ["F01", "M01", "F01"]
    assert set(records.table["role"].to_pylist()) == {"train"}


def test_records__angles_of_one_letter_or_two(tmp_path):
    written = writers.kdef(tmp_path, ["AF01SUS", "AF01SUHL", "AF01SUHR", "BF01SUFL"])
    assert list(rows(KdefSet(path=str(tmp_path)).records("k"))) == ["AF01SUS.JPG"]
    records = KdefSet(path=str(tmp_path), angles=("HL", "FL")).records("k")
    assert list(rows(records)) == ["AF01SUHL.JPG", "BF01SUFL.JPG"]
    assert records.table["image"][0].as_py() == written["AF01/AF01SUHL.JPG"]


def test_records__defects_are_counted(tmp_path):
    writers.kdef(tmp_path, ["AF01SUS", "AF31V", "AM31H", "AM05ANFR", "AF01SUFR", "BF13NEHR"])
    records = KdefSet(path=str(tmp_path), angles=("S", "FR", "HR")).records("k")
    assert list(rows(records)) == ["AF01SUS.JPG"]
    assert dict(records.dropped) == {"misnamed": 2, "misshapen": 1, "nearly_black": 2}


def test_official__less_the_defects_of_the_angles():
    sizes = {"S": 980, "FL": 979, "HL": 978, "FR": 975}
    for angle, faces in sizes.items():
        assert KdefSet(path="unread", angles=(angle,))._official() == {"faces": faces}


def test_records__bad_input(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        KdefSet(path=str(tmp_path / "gone")).records("k")
    writers.kdef(tmp_path, ["AF01XXS"])
    with pytest.raises(LabelError, match=r"AF01XXS.JPG: expected a name such as AF01ANS"):
        KdefSet(path=str(tmp_path)).records("k")
