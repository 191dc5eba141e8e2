"""Codes of each data set, compared with the canonical order worked out by hand."""

import pytest

from pipeline.config import Config, parse
from pipeline.errors import ConfigError, LabelError
from pipeline.labeled.codes import SCHEMES, emotion_of, label_names
from pipeline.labeled.records import ClassNames
from pipeline.schema import EMOTIONS

# native code, from the first one on -> place in EMOTIONS; None: no emotion
CANONICAL = {
    "affectnet": [0, 1, 2, 3, 4, 5, 6, 7, None, None, None],
    "affwild2": [0, 6, 5, 4, 1, 2, 3],
    "ckplus": [0, 6, 7, 5, 4, 1, 2, 3],
    "expw": [6, 5, 4, 1, 2, 3, 0],
    "fer2013": [6, 5, 4, 1, 2, 3, 0],
    "rafdb": [3, 4, 5, 1, 2, 6, 0],
}


@pytest.mark.parametrize("scheme", CANONICAL)
def test_schemes__canonical(scheme):
    names = [name for name in SCHEMES[scheme].values() if name != "other"]
    assert [None if name is None else EMOTIONS.index(name) for name in names] == CANONICAL[scheme]
    assert next(iter(SCHEMES[scheme])) == ("1" if scheme == "rafdb" else "0")


def test_schemes__are_all_checked():
    assert CANONICAL.keys() == SCHEMES.keys()


def test_emotion_of__unknown_code_names_the_place_and_the_range():
    with pytest.raises(LabelError, match=r"^list line 4: emotion code 0; expected 1-7 \(rafdb\)$"):
        emotion_of("0", "rafdb", "list line 4")


def test_label_names__canonical_order_without_other():
    assert label_names("affwild2") == label_names("fer2013") == EMOTIONS[:7]
    assert label_names("ckplus") == EMOTIONS


class Holder(Config):
    names: ClassNames


def test_class_names__scheme_by_name():
    assert parse(Holder, {"names": "rafdb"}).names == dict(SCHEMES["rafdb"])
    with pytest.raises(ConfigError, match=r"names: no scheme of codes; known: affectnet, .*'raf'"):
        parse(Holder, {"names": "raf"})
