"""Proves that groups sealed by tasks are those that one process seals, and that faults keep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline import sealing
from pipeline.errors import LedgerError, RunError
from pipeline.ledger import GROUP, Ledger, Plan, Slice
from pipeline.storage import Location, location
from pipeline.tables import write_table

GROUPS = 3


def _open(at: Location) -> tuple[Ledger, Plan]:
    """A ledger with two committed slices in each of three groups."""
    numbers = [group * GROUP + i for group in range(GROUPS) for i in range(2)]
    slices = [
        Slice(f"s{n:07d}", n // GROUP, "pool", "a.tar", n, n + 2, "print", 2) for n in numbers
    ]
    ledger, plan = Ledger(at / "scores"), Plan.write(at / "plan.parquet", slices)
    for slice in plan:
        ledger.attempt(slice)
        ledger.commit(slice, _table(slice))
    return ledger, plan


def _table(slice: Slice) -> pa.Table:
    return pa.table({"id": [f"face{slice.start}", f"face{slice.start + 1}"], "score": [0.5, 0.25]})


def _bytes(ledger: Ledger, folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (ledger.at / folder).children()}


def _left(ledger: Ledger) -> list[str]:
    return [f.name for kind in ("parts", "attempts") for f in (ledger.at / kind).files([""])]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The packs that one process makes of the same tables."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    ledger, plan = _open(location(tmp_path / "alone"))
    sealing.seal(ledger, plan)
    monkeypatch.undo()
    return _bytes(ledger, "packs")


def test_seal__tasks_leave_the_same_packs(
    alone: dict[str, bytes], tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, plan = _open(location(tmp_path / "tasks"))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ledger._TABLES", 0)  # no threads: this process cannot do it
        with pytest.raises(ValueError, match="must be greater than 0"):
            ledger.close(plan.slices(0, 2))
        sealing.seal(ledger, plan)
    assert _bytes(ledger, "packs") == alone
    assert len(alone) == GROUPS
    assert len(_left(ledger)) == 4 * GROUPS
    sealing.sweep(ledger, plan)
    assert _left(ledger) == []
    assert [(s, t) for s, t in Ledger(ledger.at).tables(plan)] == [(s, _table(s)) for s in plan]
    sealing.seal(ledger, plan)  # nothing left to do
    sealing.sweep(ledger, plan)


def test_seal__a_task_that_fails_says_what_rotted(tmp_path: Path, local_ray: None) -> None:
    ledger, plan = _open(location(tmp_path))
    parts = sorted((tmp_path / "scores/parts/100000").iterdir())
    write_table(location(parts[1]), pa.table({"id": ["face9"], "score": [0.5]}))
    with pytest.raises(LedgerError, match=r"s0001025-\w+\.parquet: content sha256 \w+") as caught:
        sealing.seal(ledger, plan)
    assert "\n" not in str(caught.value)
    with pytest.raises(LedgerError, match="group 1 is not sealed, no sweep"):
        sealing.sweep(ledger, plan)
    assert len(_left(ledger)) == 4 * GROUPS


def _dies(work: object, at: Location, slices: list[Slice]) -> None:
    os._exit(1)


def _sleeps(work: object, at: Location, slices: list[Slice]) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("task", "patience", "said"),
    [
        (_dies, sealing.PATIENCE, "WorkerCrashedError: "),
        (_sleeps, 3.0, "no group was done in 3 s; is a CPU free"),
    ],
)
def test_seal__tasks_that_die_again_and_again_or_never_end_cost_one_line(
    task: Callable[..., None],
    patience: float,
    said: str,
    tmp_path: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, plan = _open(location(tmp_path))
    monkeypatch.setattr(sealing, "_apply", task)
    monkeypatch.setattr(sealing, "PATIENCE", patience)
    with pytest.raises(RunError, match=f"^seal: {said}") as caught:
        sealing.seal(ledger, plan)
    assert "\n" not in str(caught.value)
    assert len(_left(ledger)) == 4 * GROUPS


def test_sweep__one_request_per_file_on_s3() -> None:
    seen: list[str] = []
    with s3_bucket(lambda method, path: seen.append(method)) as root:
        ledger, plan = _open(root)
        for slices in ledger.complete(plan):
            ledger.close(slices)
        groups = list(ledger.closed(plan))
        seen.clear()
        for slices in groups:
            ledger.clear(slices)
        assert seen.count("DELETE") == 4 * GROUPS
        assert len(seen) == 4 * GROUPS + 2 * GROUPS  # and two listings a group
        assert _left(ledger) == []
