"""Faces written in a format, whole or damaged, and what became of them when they were read back."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.images import Crop
from pipeline.survey import describe

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """A face as it was written or read.

    Attributes:
        id: of the reader, without the source's name.
        image: encoded bytes, or None.
        label: emotion by name, of labeled faces.
        role: train, validation or test, of labeled faces.
        group: who is together; names do not count.
        box: x0 y0 x1 y1.
        reason: why the face is bad, read or decoded; None for a good one.
    """

    id: str
    image: bytes | None
    label: str | None = None
    role: str | None = None
    group: str | None = None
    box: Box | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Case:
    """One shape or damage of a format.

    Attributes:
        name: "whole", or what was done to it.
        write: writes to a folder; the reader's configuration and the rows that must come back.
        refused: what the one line of the refusal must hold; None where rows must come back.
        prefix: only the first of the rows come back, and behind them one or two of reason
            `truncated`: the face that is cut, and what stands for all that is lost.
    """

    name: str
    write: Callable[[Path], tuple[dict[str, Any], list[Row]]]
    refused: str | None = None
    prefix: bool = False


Read = Callable[[Mapping[str, Any], Path], list[Row]]
"""Configuration and a folder to work in -> rows; UserError where it refuses."""


def outcome(case: Case, read: Read, folder: Path) -> dict[str, Any]:
    """Counts of a case, JSON-able, and `faults`: in what it did not end as it must."""
    config, wanted = case.write(folder / "data")
    counts: dict[str, Any] = {"written": len(wanted), "read": 0, "equal": 0, "reasons": {}}
    try:
        rows = read(config, folder / "work")
    except UserError as err:
        return counts | {"refused": 1, "faults": _refusal(str(err), case.refused, folder)}
    counts |= {
        "read": len(rows),
        "equal": sum(a == b for a, b in zip(_grouped(rows), _grouped(wanted), strict=False)),
        "reasons": dict(Counter(row.reason for row in rows if row.reason is not None)),
    }
    if case.refused is not None:
        return counts | {"refused": 0, "faults": [f"read, expected {case.refused!r}"]}
    if case.prefix:
        whole = next((i for i, row in enumerate(rows) if row.reason), len(rows))
        broken = [row.reason for row in rows[whole:]]
        faults = [] if broken in (["truncated"], ["truncated"] * 2) else [f"ends in {broken}"]
        if not 0 < whole < len(wanted):
            faults.append(f"{whole} whole rows of {len(wanted)}")
        left = wanted[:whole]
        if whole and rows[whole - 1].group is None:  # told by what stands behind it, and is lost
            left = [*left[:-1], replace(left[-1], group=None)]
        return counts | {"refused": 0, "faults": faults + _unlike(rows[:whole], left)}
    return counts | {"refused": 0, "faults": _unlike(rows, wanted)}


def _refusal(said: str, wanted: str | None, folder: Path) -> list[str]:
    said = said.replace(str(folder), "")
    if wanted is None:
        return [f"refused: {said}"]
    faults = [] if wanted in said else [f"refused by {said!r}, expected {wanted!r}"]
    return faults + (["more than one line"] if "\n" in said else [])


def _unlike(rows: Sequence[Row], wanted: Sequence[Row]) -> list[str]:
    if len(rows) != len(wanted):
        return [f"{len(rows)} rows, expected {len(wanted)}"]
    pairs = zip(_grouped(rows), _grouped(wanted), strict=True)
    differ = [(found, row) for found, row in pairs if found != row]
    return [f"{len(differ)} rows differ; first: {_differ(*differ[0])}"] if differ else []


def _differ(found: Row, wanted: Row) -> str:
    fields = [name for name in vars(found) if getattr(found, name) != getattr(wanted, name)]
    shown = {
        name: "other bytes"
        if name == "image"
        else f"{getattr(found, name)!r}, not {getattr(wanted, name)!r}"
        for name in fields
    }
    return f"{wanted.id}: {shown}"


def _grouped(rows: Sequence[Row]) -> list[Row]:
    """The rows with their groups numbered as they come, and digests for images."""
    numbers: dict[str, str] = {}
    return [
        replace(
            row,
            image=None if row.image is None else hashlib.sha256(row.image).digest(),
            group=None if row.group is None else numbers.setdefault(row.group, str(len(numbers))),
        )
        for row in rows
    ]


def decoded(table: pa.Table) -> list[str | None]:
    """Reasons of READ rows, decoded as survey decodes them."""
    reasons: list[str | None] = describe(table, Crop(), "gray", threads=2)["reason"].to_pylist()
    return reasons


# -- damage ---------------------------------------------------------------------------------------


def cut(at: Path, size: int) -> None:
    """Keep the first `size` bytes; a negative size counts from the end."""
    at.write_bytes(at.read_bytes()[:size])


def overwrite(at: Path, offset: int, data: bytes) -> None:
    """Other bytes in the same place."""
    content = bytearray(at.read_bytes())
    content[offset : offset + len(data)] = data
    at.write_bytes(content)


def flip(at: Path, offset: int, bit: int = 0) -> None:
    """One bit."""
    overwrite(at, offset, bytes([at.read_bytes()[offset] ^ (1 << bit)]))
