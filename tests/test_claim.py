"""Proves that one driver works on a part of a run, and that a dead one's place is taken."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest
from helpers.s3 import s3_bucket

from pipeline import claim, posix
from pipeline.claim import WHOLE, Part, claimed
from pipeline.errors import ConfigError, RunError
from pipeline.storage import Location, location

HOLD = """
import sys, time
from pipeline.claim import Part, claimed
from pipeline.storage import location
with claimed(location(sys.argv[1]), Part(1, 2)):
    print("held", flush=True)
    time.sleep(60)
"""


def records(run: Location, part: str) -> list[dict]:
    return [child.read_json() for child in (run / "drivers" / part).children()]


def test_claimed__an_answer_that_was_lost_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Location.create

    def lossy(at: Location, data: bytes) -> bool:
        return create(at, data) and create(at, data)  # as a client that repeats its request

    monkeypatch.setattr(Location, "create", lossy)
    with claimed(location(tmp_path), WHOLE):
        (held,) = records(location(tmp_path), "1of1")
        assert held["pid"] == os.getpid()
        with (
            pytest.raises(RunError, match="is being worked on by"),
            claimed(location(tmp_path), WHOLE),
        ):
            pass


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0"])
def test_parse__refuses_what_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match="expected i/n with 1 <= i <= n"):
        Part.parse(text)


def test_part__every_slice_has_one_owner() -> None:
    parts = [Part.parse(f"{i}/3") for i in (1, 2, 3)]
    for number in range(20):
        assert [part.owns(number) for part in parts].count(True) == 1


def test_overlaps__as_counted() -> None:
    parts = [Part(i, n) for n in range(1, 5) for i in range(1, n + 1)]
    for a in parts:
        for b in parts:
            common = any(a.owns(k) and b.owns(k) for k in range(12))
            assert a.overlaps(b) == common


def test_claimed__a_living_driver_is_named_and_a_killed_one_replaced(tmp_path: Path) -> None:
    run = location(tmp_path)
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "held\n"
    taken = f"is being worked on by process {driver.pid} on "
    with pytest.raises(RunError, match=f"part 1/2 of this run {taken}"), claimed(run, Part(1, 2)):
        pass
    with pytest.raises(RunError, match=f"part 1/2 of this run {taken}"), claimed(run, WHOLE):
        pass
    with claimed(run, Part(2, 2)):
        pass
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    with claimed(run, Part(1, 2)):
        assert [r["pid"] for r in records(run, "1of2")] == [driver.pid, os.getpid()]
    assert [r["beat"] for r in records(run, "1of2")] == [0, None]
    with claimed(run, WHOLE):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_claimed__another_machine_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(claim, "WATCH", 0.6)
    run = location(tmp_path)
    at = run / "drivers" / "1of1" / "000001.json"
    theirs = {"host": "far", "machine": "far 1", "pid": 7, "started": "1", "time": "t", "beat": 3}
    at.write_json(theirs)
    stop = threading.Event()

    def beat() -> None:
        count = 3
        while alive and not stop.wait(0.1):
            count += 1
            at.write_json({**theirs, "beat": count})

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        if alive:
            with pytest.raises(RunError, match="by process 7 on far"), claimed(run, WHOLE):
                pass
        else:
            with claimed(run, WHOLE):
                assert len(records(run, "1of1")) == 2
    finally:
        stop.set()
        beating.join()


def race(run: Location) -> list[bool]:
    """Whether each of eight threads got the run; who did holds it until all have tried."""
    tried = threading.Barrier(8)

    def attempt(_: int) -> bool:
        try:
            with claimed(run, WHOLE):
                tried.wait(60)
                return True
        except RunError:
            tried.wait(60)
            return False

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(attempt, range(8)))


def test_claimed__one_of_eight_wins(tmp_path: Path) -> None:
    assert race(location(tmp_path)).count(True) == 1


def test_claimed__one_of_eight_wins_on_s3() -> None:
    with s3_bucket() as root:
        assert race(root).count(True) == 1


def test_claimed__beats_while_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.02)
    run = location(tmp_path)
    with claimed(run, WHOLE):
        until = time.monotonic() + 20
        while records(run, "1of1")[0]["beat"] < 3:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_claimed__goes_on_beating_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.02)
    run, replacing, failed = location(tmp_path), posix.replacing, threading.Event()

    def fails_once(path: str) -> AbstractContextManager[IO[bytes]]:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return replacing(path)

    monkeypatch.setattr(posix, "replacing", fails_once)
    with claimed(run, WHOLE):
        until = time.monotonic() + 20
        while records(run, "1of1")[0]["beat"] < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert "heartbeat failed" in caplog.text
    assert "Input/output error" in caplog.text


@pytest.fixture
def stalled() -> Iterator[tuple[Location, threading.Event]]:
    """A store whose requests wait while the event is not set."""
    answers = threading.Event()
    answers.set()
    with s3_bucket(lambda method, path: answers.wait(30) and None) as root:
        yield root, answers
        answers.set()
        for thread in threading.enumerate():  # or it would write into the next test's store
            if thread.name == "claim":
                thread.join(60)


def test_claimed__a_store_that_does_not_answer_delays_no_end(
    stalled: tuple[Location, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.1)
    monkeypatch.setattr(claim, "WATCH", 1.0)
    run, answers = stalled
    with claimed(run, WHOLE):
        answers.clear()
        time.sleep(2)
        assert "has not answered for 1 s; waiting for it" in caplog.text
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "does not answer; others wait until it is seen as dead" in caplog.text


@pytest.mark.parametrize("taken", [True, False])
def test_claimed__who_was_silent_for_long_stops_if_another_took_over(
    stalled: tuple[Location, threading.Event], monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.1)
    monkeypatch.setattr(claim, "WATCH", 1.0)
    run, answers = stalled
    other, stopped = run / "drivers" / "1of1" / "000002.json", False
    with claimed(run, WHOLE):
        try:
            if taken:
                other.write_json({**claim._self(), "machine": "another", "beat": 7})
            answers.clear()
            time.sleep(3)
            answers.set()
            time.sleep(5)
        except KeyboardInterrupt:
            stopped = True
    assert stopped is taken
    assert [record["beat"] for record in records(run, "1of1")][1:] == ([7] if taken else [])
    assert (records(run, "1of1")[0]["beat"] is None) is not taken


def test_claimed__is_given_back_after_an_error(tmp_path: Path) -> None:
    run = location(tmp_path)
    with pytest.raises(ValueError, match="inside"), claimed(run, WHOLE):
        raise ValueError("inside")
    assert json.loads((tmp_path / "drivers/1of1/000001.json").read_text())["beat"] is None
