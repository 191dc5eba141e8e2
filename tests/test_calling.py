"""Calls in vain end soon, and what waits survives the process that could not tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.s3 import s3_bucket

from pipeline import calling
from pipeline.calling import Patience, Waiting
from pipeline.storage import location


def test_patience__pauses_grow_and_all_of_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(calling.time, "monotonic", lambda: clock[0])
    patience = Patience()
    assert patience.may_call()
    tries = []
    for second in range(100_000):
        clock[0] = float(second)
        if patience.may_call():
            tries.append(second)
            patience.failed(0.5)
    assert tries == [0, 30, 90, 210, 450, 930, 1530, 2130, 2730, 3330]
    assert 0.5 * len(tries) == calling.PATIENCE
    patience.worked()
    assert patience.may_call()


def test_waiting__next_process_adopts_what_the_dead_left(tmp_path: Path) -> None:
    at = location(tmp_path / "waiting")
    first = Waiting(at)
    first.clear()
    assert not (tmp_path / "waiting").exists()
    for number in range(3):
        first.add({"child": "a", "number": number})
    second = Waiting(at).adopt()
    assert [one["number"] for one in second.records] == [0, 1, 2]
    second.add({"child": "b", "number": 3})
    assert [one["number"] for one in Waiting(at).adopt().records] == [0, 1, 2, 3]
    second.clear()
    assert second.records == []
    assert not (tmp_path / "waiting").exists()


def test_waiting__what_drivers_of_other_parts_left_is_not_touched(tmp_path: Path) -> None:
    at = location(tmp_path / "waiting")
    Waiting(at, "1of2").add({"child": "a", "number": 1})
    other = Waiting(at, "2of2").adopt()
    other.add({"child": "b", "number": 2})
    assert [one["number"] for one in Waiting(at, "1of2").adopt().records] == [1]
    other.clear()
    assert [one["number"] for one in Waiting(at).adopt().records] == [1]


def test_waiting__on_s3_from_the_end_of_a_stage_on() -> None:
    with s3_bucket() as bucket:
        first = Waiting(bucket / "waiting")
        first.add({"child": "a", "number": 1})
        first.add({"child": "a", "end": "FINISHED"})
        second = Waiting(bucket / "waiting").adopt()
        assert second.records == first.records
        second.clear()
        assert Waiting(bucket / "waiting").adopt().records == []
