"""Proves that every spelling leads to one emotion, and that tables say what their codes mean."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import LabelError, SourceError
from pipeline.schema import (
    ALIASES,
    EMOTIONS,
    LABELED,
    OTHER,
    emotion,
    label_codes,
    label_names_of,
    require_columns,
    with_label_names,
)

SPELLINGS = [(s, name) for name, spellings in ALIASES.items() for s in (name, *spellings)]


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS)
def test_emotion__every_alias_in_any_case(spelling: str, name: str) -> None:
    assert {emotion(s) for s in (spelling, spelling.upper(), f" {spelling}_")} == {name}


def test_aliases__cover_all_classes_and_none_is_shared() -> None:
    assert tuple(ALIASES) == (*EMOTIONS, OTHER)
    assert len({spelling for spelling, _ in SPELLINGS}) == len(SPELLINGS)


@pytest.mark.parametrize(
    ("given", "hint"), [("hapiness", "did you mean 'happiness'"), ("suprise", "'surprise'")]
)
def test_emotion__unknown_name_gets_the_nearest(given: str, hint: str) -> None:
    with pytest.raises(LabelError, match=hint) as caught:
        emotion(given, "faces.csv row 3")
    assert str(caught.value).startswith(f"faces.csv row 3: unknown class name {given!r}")


def test_emotion__nothing_near_lists_the_classes() -> None:
    with pytest.raises(LabelError, match=r"known: neutral, happiness, .*, contempt, other"):
        emotion("42")


def test_label_names__round_trip_keeps_other_metadata() -> None:
    schema = with_label_names(LABELED.with_metadata({b"made_by": b"x"}), ["fear", "anger"])
    assert label_names_of(schema) == ("fear", "anger")
    assert schema.metadata[b"made_by"] == b"x"
    assert label_names_of(with_label_names(schema, ["anger"])) == ("anger",)


def test_label_names_of__missing_metadata() -> None:
    with pytest.raises(SourceError, match="label_names"):
        label_names_of(pa.schema([]))


def test_require_columns__names_place_missing_and_found() -> None:
    require_columns(["a", "b"], ["b"], "x.parquet")
    with pytest.raises(SourceError) as caught:
        require_columns(["a", "b"], ["image", "a", "label"], "x.parquet")
    assert str(caught.value) == "x.parquet: missing column image, label; found: a, b"
    with pytest.raises(SourceError, match="found: none"):
        require_columns([], ["image"], "x.parquet")


def test_label_codes__index_the_names_and_null_is_minus_one() -> None:
    codes = label_codes(["fear", None, "anger", "fear"], ("anger", "fear"))
    assert codes.tolist() == [1, -1, 0, 1]
    assert codes.dtype == "int64"
