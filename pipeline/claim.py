"""One driver at a time on a run, or on each of its parts; a dead driver's place is taken.

    drivers/1of1/000001.json   who took the run for the first time, and a count that keeps rising
    drivers/1of1/000002.json   who took it next, after the first was done or dead

A place is taken by creating the next number exclusively, so exactly one of many succeeds, on disk
and on S3. A driver of this machine is alive if its process is; one of another machine if its count
rises while we watch: no clocks are compared. Correctness never hangs on it (the ledger's commits
are exclusive and late attempts lose); this saves two drivers from doing the same work, and two
trainings from writing the same checkpoints. A driver that could not write for longer than `WATCH`
seconds may have been taken for dead: it looks, and stops where another has taken its place.

Cost: one small file, written again every `BEAT` seconds; a store that does not answer delays an
end by `WATCH` seconds. A driver of another machine that died is
replaced after `WATCH` seconds, one of this machine at once.
"""

from __future__ import annotations

import _thread
import json
import logging
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, OmniferError, RunError
from pipeline.storage import Location, to_json

_LOG = logging.getLogger(__name__)

DRIVERS = "drivers"
"""Folder of the claims in a run."""
BEAT = 10.0
WATCH = 35.0
"""Longer than three beats: a write may be slow."""
_SILENT = "claim: %s has not answered for %g s; waiting for it"


@dataclass(frozen=True)
class Part:
    """Slices whose number leaves `index` - 1 when divided by `count`: part `index` of `count`."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """As it stands in file names: "2of4"."""
        return f"{self.index}of{self.count}"

    @staticmethod
    def parse(text: str) -> Part:
        """The part that "2/4" names.

        Raises:
            ConfigError: not of the form i/n with 1 <= i <= n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = Part(*map(int, match.groups())) if match else Part(0)
        if not 1 <= part.index <= part.count:
            raise ConfigError(f"--part: {text!r}, expected i/n with 1 <= i <= n, such as 2/4")
        return part

    def owns(self, number: int) -> bool:
        """Whether the slice with this number belongs to the part."""
        return number % self.count == self.index - 1

    def overlaps(self, other: Part) -> bool:
        """Whether some slice belongs to both."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


WHOLE = Part()


@contextmanager
def claimed(run: Location, part: Part) -> Iterator[None]:
    """Hold a part of a run while the block runs.

    Raises:
        RunError: a living driver holds it, or a part that overlaps; with host, process and start.
    """
    home = run / DRIVERS
    at, mine = _take(home / part.name, part)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(at, mine, done), daemon=True, name="claim")
    beating.start()
    try:
        for other in home.children():
            held = Part(*map(int, other.name.split("of")))
            if held != part and held.overlaps(part) and (who := _living(_newest(other))):
                raise _taken(held, who)
        yield
    finally:
        done.set()
        leaving = threading.Thread(
            target=_leave, args=(at, mine, beating), daemon=True, name="claim"
        )
        leaving.start()
        leaving.join(WATCH)
        if leaving.is_alive():
            _LOG.warning("claim: %s does not answer; others wait until it is seen as dead", at)


def _take(folder: Location, part: Part) -> tuple[Location, dict[str, Any]]:
    while True:
        newest = _newest(folder)
        if newest is not None and (who := _living(newest)):
            raise _taken(part, who)
        number = 1 + (int(newest.name.removesuffix(".json")) if newest is not None else 0)
        mine = {**_self(), "beat": 0}
        at = folder / f"{number:06d}.json"
        if at.create(to_json(mine)) or _wrote(at, mine):
            return at, mine


def _wrote(at: Location, mine: dict[str, Any]) -> bool:
    """Whether it is ours after all: the answer of a store was lost, and the call repeated."""
    there = json.loads(at.find_bytes() or b"{}")
    return bool(there.get("token") == mine["token"])


def _leave(at: Location, mine: dict[str, Any], beating: threading.Thread) -> None:
    """Give the claim back, after the last beat: that must not come later."""
    beating.join()
    try:
        if (newest := _newest(at.parent)) is None or newest == at:
            at.write_json({**mine, "beat": None})
    except (OSError, OmniferError) as error:
        _LOG.warning("claim: not given back (%s); others wait until it is seen as dead", error)


def _beat(at: Location, mine: dict[str, Any], done: threading.Event) -> None:
    count, last = 0, time.monotonic()
    while not done.wait(BEAT):
        count += 1
        late = threading.Timer(WATCH, _LOG.warning, [_SILENT, at, WATCH])
        late.daemon = True
        late.start()
        try:
            at.write_json({**mine, "beat": count})
            newest = _newest(at.parent) if time.monotonic() - last > WATCH else at
            last = time.monotonic()
        except (OSError, OmniferError) as error:  # one that is missed must not end all that follow
            _LOG.warning("claim: heartbeat failed (%s); trying again", error)
            continue
        finally:
            late.cancel()
        if newest != at and not done.is_set():
            _LOG.error("claim: %s: another driver took this run for dead and goes on; stopping", at)
            _thread.interrupt_main()
            return


def _living(at: Location | None) -> dict[str, Any] | None:
    """What a claim says of its driver, if that is alive."""
    if at is None:
        return None
    who: dict[str, Any] = at.read_json()
    if who["beat"] is None:
        return None
    if who["machine"] == _machine():
        return who if _started(who["pid"]) == who["started"] else None
    until = time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(WATCH / 20)
        now = at.read_json()["beat"]
        if now is None:
            return None
        if now != who["beat"]:
            return who
    return None


def _taken(part: Part, who: dict[str, Any]) -> RunError:
    return RunError(
        f"{'this run' if part == WHOLE else f'part {part} of this run'} is being worked on by "
        f"process {who['pid']} on {who['host']}, since {who['time']}; wait for it or stop it"
    )


def _newest(folder: Location) -> Location | None:
    return max(folder.children(), key=lambda child: child.name, default=None)


def _self() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """This boot of this machine, or of this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _started(pid: int) -> str | None:
    """When a process started, in its kernel's ticks; None if there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    # The name in the second field may hold blanks and parentheses: count from its end.
    state, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]
