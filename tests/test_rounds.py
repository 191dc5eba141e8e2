"""Proves that a round is asked once and answered once, on disk and on S3, and what it closes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import RunError
from pipeline.rounds import ANSWERS, QUERIES, Round, closed, labels, rounds, waiting
from pipeline.storage import Location, location


@pytest.fixture(params=["disk", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "disk":
        yield location(tmp_path) / "annotate"
    else:
        with s3_bucket() as runs:
            yield runs / "annotate"


def queries(*ids: str) -> pa.Table:
    rows = [
        {
            "id": face,
            "source": "pool",
            "shard": "memory",
            "position": i,
            "rank": i + 1,
            "pseudo_label": "fear",
            "confidence": 0.5,
            "margin": 0.25,
            "acquisition": "badge",
        }
        for i, face in enumerate(ids)
    ]
    return pa.Table.from_pylist(rows, schema=QUERIES)


def answers(given: dict[str, str | None], gone: tuple[str, ...] = ()) -> pa.Table:
    rows = [
        {
            "id": face,
            "label": label,
            "image": b"x" if label is not None and face not in gone else None,
            "source": "pool" if label is not None and face not in gone else None,
            "box": [0.0, 1.0, 2.0, 3.0] if label == "fear" else None,
            "when": "2024-01-01T00:00:00+00:00",
        }
        for face, label in given.items()
    ]
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def test_round__asked_then_answered(home: Location) -> None:
    assert rounds(home) == []
    one = Round(home, 1)
    one.ask(queries("a", "b", "c", "d"))
    assert rounds(home) == [one]
    assert (one.name, waiting([one]), one.answers()) == ("round-001", one, None)
    assert one.labels().num_rows == 0
    assert closed([one]) == {"a", "b", "c", "d"}
    assert labels([one]) == {}
    given = answers({"a": "fear", "b": None, "c": "anger"}, gone=("c",))
    one.answer(given)
    assert waiting([one]) is None
    assert one.answers() == given
    assert one.labels()["id"].to_pylist() == ["a"]  # b was skipped, c removed
    assert closed([one]) == {"a", "b", "c"}  # d was left empty
    assert labels([one]) == {"a": (1, "fear")}


def test_round__another_question_or_answer_is_refused(home: Location) -> None:
    one = Round(home, 1)
    one.ask(queries("a"))
    one.ask(queries("a"))  # the answer to the first request was lost
    with pytest.raises(RunError, match="asked by another command"):
        one.ask(queries("b"))
    assert one.queries()["id"].to_pylist() == ["a"]
    one.answer(answers({"a": "fear"}))
    with pytest.raises(RunError, match="answered by another command"):
        one.answer(answers({"a": "anger"}))
    assert labels([one]) == {"a": (1, "fear")}


def test_rounds__in_the_order_of_their_numbers(tmp_path: Path) -> None:
    home = location(tmp_path)
    for number in (1000, 2, 999):
        Round(home, number).ask(queries(f"face {number}"))
    Round(home, 3).at.mkdir()  # killed before it was asked
    (home / "round-4.txt").write_bytes(b"")
    every = rounds(home)
    assert [one.number for one in every] == [2, 999, 1000]
    every[2].answer(answers({"face 1000": None}))
    assert waiting(every) == every[1]
