"""Markdown of RESULTS.md: tables, the state of a grid's cells, verdicts of gates."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.bench.harness import (
    RESULTS,
    Bench,
    Record,
    Records,
    is_current,
    load,
    state_of,
    verdict_of,
)

NAMED = 12  # open cells that are named; more are counted


def section(bench: Bench, title: str, body: Callable[[Records], list[str]]) -> list[str]:
    """A heading, what is missing, the body of the records that hold, the gates."""
    states, records = current(bench)
    head = [f"## {bench.name}: {title}", "", measured_by(bench.name), "", *said(states)]
    return [*head, *body(records), *gates(bench, records)]


def measured_by(bench: str, options: str = "") -> str:
    """The command that measures."""
    return f"Measured by `python -m tests.bench.{bench}{options}`."


def current(bench: Bench) -> tuple[dict[str, str], Records]:
    """State of every cell of a grid, and the records that hold."""
    options = _defaults(bench)
    at = RESULTS / bench.folder(options)
    states: dict[str, str] = {}
    records: dict[str, Record] = {}
    for cell in bench.cells(options):
        record = load(at, cell.name)
        states[cell.name] = state_of(cell, record)
        if record is not None and is_current(cell, record):
            records[cell.name] = record
    return states, records


def attempts(folder: str) -> dict[str, dict[str, Record]]:
    """Records of a folder by attempt, each by its cell's name without the attempt's."""
    found: dict[str, dict[str, Record]] = {}
    for at in sorted((RESULTS / folder).glob("*.json")):
        record = load(at.parent, at.stem)
        attempt, _, cell = at.stem.partition("-")
        if record is not None:
            found.setdefault(attempt, {})[cell] = record
    return found


def said(states: Mapping[str, str]) -> list[str]:
    """How many cells are finished, and which are not."""
    open_cells = [f"{name} {state}" for name, state in states.items() if state != "done"]
    done = len(states) - len(open_cells)
    done_of = f"{done} of {len(states)} cells are finished"
    if len(open_cells) > NAMED:
        kinds = [state for state in states.values() if state != "done"]
        open_cells = [f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))]
    return [f"{done_of}; {', '.join(open_cells)}." if open_cells else f"{done_of}.", ""]


def gates(bench: Bench, records: Records) -> list[str]:
    """A line per gate."""
    lines = []
    for gate in bench.gates:
        verdict, faults = verdict_of(gate, records)
        why = f": {'; '.join(faults)}" if faults else ""
        lines.append(f"- gate, {gate.tag}: {gate.name}: {verdict}{why}")
    return [*lines, ""]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def spread(values: Sequence[float]) -> str:
    """Percent over seeds, n=1 marked."""
    percent = 100 * np.asarray(values)
    if len(percent) == 1:
        return f"{percent[0]:.2f} (n=1)"
    mean, deviation = percent.mean(), percent.std(ddof=1)
    return f"{mean:.2f} +- {deviation:.2f} ({percent.min():.2f} to {percent.max():.2f})"


def seconds(values: Sequence[float]) -> str:
    """Median, smallest and largest."""
    return f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _defaults(bench: Bench) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    if bench.arguments is not None:
        bench.arguments(parser)
    options = parser.parse_args([])
    options.quick = False
    return options
