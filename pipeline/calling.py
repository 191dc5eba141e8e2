"""Calls to a server that may be gone: how long one asks in vain, and what waits to be told.

What could not be told is a line of JSON in a file of this process, below a folder that all
processes of a run share; whoever comes next adopts what the dead left. A run on S3 has its file
written when a stage ends, since objects cannot grow.

Cost: a line per record while the server is gone; else nothing.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from pipeline.errors import OmniferError
from pipeline.storage import Location

_LOG = logging.getLogger(__name__)
Record = dict[str, Any]

PATIENCE = 5.0
"""Seconds that calls in vain may take in all; from then on nobody asks."""
PAUSE, LONGEST = 30.0, 600.0
"""Seconds between two calls in vain, at first and at most."""


class Patience:
    """Says when to call again a server that did not answer. Owns a clock, nothing else."""

    def __init__(self) -> None:
        self.lost = False
        self._spent = 0.0
        self._pause = PAUSE
        self._next = 0.0

    def failed(self, seconds: float) -> None:
        """A call took so long in vain."""
        self.lost = True
        self._spent += seconds
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST)

    def worked(self) -> None:
        """A call was answered."""
        self.lost, self._pause = False, PAUSE

    def may_call(self) -> bool:
        """Whether to call now."""
        return not self.lost or (self._spent < PATIENCE and time.monotonic() >= self._next)


class Waiting:
    """Records that wait, oldest first: in memory, and in a file should this process die.

    Args:
        folder: made when the first record waits.
        part: whose records alone are adopted; "" for all.
    """

    def __init__(self, folder: Location, part: str = "") -> None:
        self._lead = f"{part}-" if part else ""
        self._own = folder / f"{self._lead}{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._adopted: list[Location] | None = None
        self.records: list[Record] = []

    def adopt(self) -> Self:
        """Take over, once, what the dead left; whoever calls must be the only one at work."""
        if self._adopted is None:
            there = [file for file in self.place.children() if file.name.startswith(self._lead)]
            self._adopted = [file for file in there if file != self._own]
            left = [_parsed(file.find_bytes() or b"") for file in self._adopted]
            self.records = [*itertools.chain(*left), *self.records]
        return self

    @property
    def place(self) -> Location:
        """Where they lie."""
        return self._own.parent

    def add(self, record: Record) -> None:
        """Let a record wait; where no file can be written, in memory alone."""
        self.records.append(record)
        try:
            if self._own.is_local:
                self.place.mkdir()
                with open(self._own.uri, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            elif "end" in record:
                self._own.write_text("".join(json.dumps(each) + "\n" for each in self.records))
        except (OSError, OmniferError) as error:
            _LOG.warning("tracking: %s: %s", self.place, error)

    def clear(self) -> None:
        """All were told."""
        if self.records or self._adopted:
            for file in (self._own, *(self._adopted or ())):
                file.remove()
            if self._own.is_local and not self.place.children():
                self.place.remove_tree()
            self._adopted = []
        self.records = []


def _parsed(data: bytes) -> list[Record]:
    """Records of a file, less a last line that a kill has torn."""
    lines = data.decode(errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for one call; what the person has set stays as it is."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def loggers_kept() -> Iterator[None]:
    """Undo what making a database does to loggers: its migrations disable all that exist."""
    known = {
        name: found.disabled
        for name, found in logging.Logger.manager.loggerDict.items()
        if isinstance(found, logging.Logger)
    }
    try:
        yield
    finally:
        for name, disabled in known.items():
            logging.getLogger(name).disabled = disabled


def public(text: str) -> str:
    """The text with user, password and query removed from every URI in it."""
    without_user = re.sub(r"://\S*@", "://", text)
    return re.sub(r"(://[^\s?]*)\?[^\s)\"']*", r"\1", without_user)
