"""Proves that a plan comes back as written, in parts too, and that wrong keys are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import LedgerError, SourceError
from pipeline.plan import GROUP, Plan, Slice, number_of
from pipeline.storage import location
from pipeline.tables import read_table, write_table


def _slice(number: int, suffix: str = "") -> Slice:
    faces = None if number % 2 else 10
    return Slice(
        f"s{number:07d}{suffix}", number // GROUP, "lfw", "/data/a", 0, 10, f"f{number}", faces
    )


def test_write__roundtrip_in_parts(tmp_path: Path) -> None:
    slices = [_slice(n) for n in (0, 1, 5, 1024, 1030, 5000)]
    plan = Plan.write(location(tmp_path) / "plan.parquet", slices)
    assert len(plan) == 6
    assert plan.slices() == slices
    assert plan.slices(2, 4) == slices[2:4]
    assert plan.slices(4, 99) == slices[4:]
    assert plan.slices(99, 120) == plan.slices(3, 3) == []
    assert [[s.group for s in group] for group in plan.groups()] == [[0, 0, 0], [1, 1], [4]]
    assert Plan(plan.at).digest == plan.digest


def test_faces__known_only_if_every_source_knows(tmp_path: Path) -> None:
    at = location(tmp_path)
    assert Plan.write(at / "1", [_slice(0), _slice(2)]).faces == 20
    assert Plan.write(at / "2", [_slice(0), _slice(1)]).faces is None
    assert Plan.write(at / "3", []).faces == 0


def test_write__chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.CHUNK", 4)
    slices = [_slice(n) for n in range(11)]
    plan = Plan.write(location(tmp_path) / "plan", iter(slices))
    assert list(plan) == plan.slices() == slices
    assert plan.slices(3, 9) == slices[3:9]
    with pytest.raises(LedgerError, match="slice number 3 follows 3"):
        Plan.write(location(tmp_path) / "other", [*slices[:4], *slices[3:]])


def test_digest__is_of_the_slices(tmp_path: Path) -> None:
    at = location(tmp_path)
    one = Plan.write(at / "1", [_slice(0), _slice(1)])
    assert Plan.write(at / "2", [_slice(0), _slice(1)]).digest == one.digest
    assert Plan.write(at / "3", [_slice(0), _slice(1, ".r0011aabb")]).digest != one.digest
    empty = Plan.write(at / "4", [])
    assert (len(empty), empty.slices(), list(empty.groups())) == (0, [], [])


def test_write__refuses_wrong_keys(tmp_path: Path) -> None:
    at = location(tmp_path) / "plan.parquet"
    with pytest.raises(LedgerError, match="slice number 1 follows 1; they must rise"):
        Plan.write(at, [_slice(1), _slice(1, ".r0011aabb")])
    with pytest.raises(LedgerError, match="s0001024 is in group 1, not 0"):
        Plan.write(at, [replace(_slice(1024), group=0)])
    for key in ("s123", "x0000001", "s0000001.r12", "../0000001"):
        with pytest.raises(LedgerError, match="slice key"):
            number_of(key)
    assert number_of("s12345678.r0011aabb") == 12_345_678


def test_init__refuses_what_is_no_plan(tmp_path: Path) -> None:
    at = location(tmp_path) / "plan.parquet"
    with pytest.raises(SourceError, match="no such file"):
        Plan(at)
    plan = Plan.write(location(tmp_path) / "other", [_slice(0)])
    write_table(at, read_table(plan.at).replace_schema_metadata(None))
    with pytest.raises(SourceError, match="not a plan of slices"):
        Plan(at)
