"""What a person sees while something long runs: a bar on a terminal, plain lines elsewhere.

A log file gets one line every few seconds, never control characters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)
LINE_SECONDS = 5.0


class Meter:
    """Counts units of one piece of work; `note` is a short live remark (loss, yield)."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.note = ""
        self.started = time.monotonic()
        self._last = self.started

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units and show it."""
        self.done += amount
        self.note = note or self.note
        self.show()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """One plain line: what, how much, how fast, how long still."""
        ahead, total = "", ""
        if self.total is not None:
            total = f"/{self.total:,}"
            if 0 < self.done < self.total:
                ahead = f", {(self.total - self.done) / self.rate:.0f} s left"
        note = f", {self.note}" if self.note else ""
        return f"{self.what}: {self.done:,}{total} {self.unit}, {self.rate:,.0f}/s{ahead}{note}"

    def show(self) -> None:
        """Print the line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            console.print(self.line(), markup=False, soft_wrap=True)


class _Bar(Meter):
    """The same on a terminal."""

    def __init__(self, what: str, total: int | None, unit: str, bars: Progress) -> None:
        super().__init__(what, total, unit)
        self._bars = bars
        self._task = bars.add_task(what, total=total, note="")

    def show(self) -> None:
        note = f"{self.rate:,.0f} {self.unit}/s  {self.note}"
        self._bars.update(self._task, completed=self.done, note=note)


@contextmanager
def meter(what: str, total: int | None, unit: str = "faces") -> Iterator[Meter]:
    """A meter for work of `total` units, None if nobody knows; ends with one plain line."""
    if not console.is_terminal:
        plain = Meter(what, total, unit)
        yield plain
        console.print(plain.line(), markup=False, soft_wrap=True)
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = _Bar(what, total, unit, bars)
        yield bar
    console.print(bar.line(), markup=False, soft_wrap=True)
