"""Proves that a run whose driver is killed in the middle of scoring continues where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import flow

from pipeline import conduct, pool
from pipeline.ledger import Ledger
from pipeline.storage import location

pytestmark = pytest.mark.ray
LATER = (
    "embed",
    "score",
    "search",
    "select",
    "mine",
    "twins",
    "distill",
    "student",
    "control_a",
    "control_b",
    "evaluate",
)
TESTS = Path(__file__).parents[1]


def committed(root: Path, stage: str, job: flow.LoggedJob) -> set[str]:
    """Keys of the committed slices of a stage that may not be finished."""
    plan, found = pool.pool_plan(job), set()
    for generation in root.glob(f"{stage}/g*"):
        found |= {c.key for c in Ledger(location(generation)).committed(plan)}
    return found


@pytest.mark.slow
def test_run_all__killed_while_scoring_reads_no_committed_slice_again(
    tiny_run: Path, tmp_path: Path
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run", without=LATER)
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    slices = {slice.key: f"{slice.start}-{slice.stop}" for slice in pool.pool_plan(job).slices()}

    driver = subprocess.Popen(
        [sys.executable, str(TESTS / "chaos" / "driver.py"), str(root)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 180
        while len(committed(root, "score", job)) < 3:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < until, "nothing was scored"
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    settled = -1  # its workers end a moment later and may commit until then
    while settled != (settled := len(flow.reads(job)) + len(committed(root, "score", job))):
        time.sleep(2)

    there = committed(root, "embed", job)  # those without scores are scored without a read
    before = flow.reads(job)
    assert 3 <= len(there) < len(slices), "killed too late to show anything"
    flow.SharedRay.start()
    conduct.run_all(job, "score")
    again = flow.reads(job)[len(before) :]
    assert not set(again) & {slices[key] for key in there}
    assert sorted(again) == sorted({*slices.values()} - {slices[key] for key in there})

    for stage in ("embed", "score"):
        undisturbed = next(tiny_run.glob(f"{stage}/g*/manifest.json"))
        resumed = next(root.glob(f"{stage}/g*/manifest.json"))
        assert resumed.read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("stage", ["embed", "score"])
def test_committed__counts_the_slices_of_a_finished_stage(tiny_run: Path, stage: str) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    assert committed(tiny_run, stage, job) == {s.key for s in pool.pool_plan(job).slices()}
