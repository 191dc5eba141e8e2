"""Extents: what a source can seek to, before the plan numbers them; files and their fingerprints.

A fingerprint is sha256 over size, mtime (or ETag), and the first and last 64 KiB: it tells a
changed file from the planned one at the price of two small reads per file and process.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.storage import Location, location

SLICE_BYTES = 64 << 20
"""Encoded bytes that one extent holds at most, unless a single part holds more."""

ENDS = 64 << 10

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Extent:
    """Faces [start, stop) of a shard, counted as the source counts; never parted again."""

    shard: str
    start: int
    stop: int
    fingerprint: str
    faces: int | None  # None where only reading tells


@dataclass(frozen=True)
class Part:
    """Consecutive faces that are cheapest read together: a row group, or one file."""

    faces: int
    size: int  # encoded bytes


def cut(parts: Iterable[Part], faces: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `faces` faces and about SLICE_BYTES.

    Whole parts are gathered until the next would not fit; a part that does not fit alone is cut
    evenly, so no range holds pieces of two parts.
    """
    start = stop = held = 0
    for part in parts:
        pieces = max(-(-part.faces // faces), min(part.faces, -(-part.size // SLICE_BYTES)))
        if stop > start and (stop - start + part.faces > faces or held + part.size > SLICE_BYTES):
            yield start, stop
            start, held = stop, 0
        if pieces > 1:
            for i in range(pieces):
                yield start + part.faces * i // pieces, start + part.faces * (i + 1) // pieces
            start = stop = start + part.faces
        else:
            stop, held = stop + part.faces, held + part.size
    if stop > start:
        yield start, stop


def is_pattern(path: str) -> bool:
    """Whether a path is a numbered pattern, see :func:`shards`."""
    return _NUMBERS.search(path) is not None


def shards(path: str, suffixes: Sequence[str]) -> list[Location]:
    """The files that a source's path means.

    One file; all files below a folder whose name ends in one of `suffixes`; or a numbered pattern
    such as `faces-{000..146}.tar`.

    Raises:
        SourceError: no such file in a folder, or numbers that fall.
    """
    if is_pattern(path):
        return [location(name) for name in _numbered(path)]
    at = location(path)
    if not at.is_dir():
        return [at]
    files = list(at.files(suffixes))
    if not files:
        raise SourceError(f"{at}: no {' or '.join(suffixes)} file in this folder")
    return files


@functools.lru_cache(maxsize=64)
def root_of(path: str) -> Location:
    """The folder that the names of a path's files are relative to; asks the disk once."""
    pattern = _NUMBERS.search(path)
    if pattern:
        folder, slash, _ = path[: pattern.start()].rpartition("/")
        return location(folder + slash or ".")
    at = location(path)
    return at if at.is_dir() else at.parent


def name_below(root: Location, at: Location) -> str:
    """Path of a file relative to its source's root."""
    return at.uri.removeprefix(root.uri).lstrip("/")


def _numbered(path: str) -> Iterator[str]:
    found = _NUMBERS.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    if int(last) < int(first):
        raise SourceError(f"{path}: {found.group()} falls; expected {{first..last}}")
    for number in range(int(first), int(last) + 1):
        yield from _numbered(f"{path[: found.start()]}{number:0{len(first)}}{path[found.end() :]}")


def fingerprint(at: Location) -> str:
    """Changes when the file does; 32 hex digits."""
    stamp = at.stamp()
    return hashlib.sha256(f"{stamp}:{_ends(at, stamp)}".encode()).hexdigest()[:32]


def content_fingerprint(at: Location) -> str:
    """The same without mtime: equal for two files that a run wrote with equal content."""
    return _ends(at, at.stamp())


def require_fingerprint(extent: Extent, now: str) -> None:
    """Raise SourceError if the shard is not what was planned."""
    if now != extent.fingerprint:
        raise SourceError(
            f"{extent.shard}: changed since it was planned "
            f"(fingerprint {extent.fingerprint[:8]}, now {now[:8]}); plan again with --fresh"
        )


@functools.lru_cache(maxsize=4096)
def _ends(at: Location, stamp: str) -> str:
    """Of size and both ends; `stamp` makes the cache forget a file that changed."""
    del stamp
    size = at.size()
    ends = at.read_range(0, ENDS), at.read_range(max(size - ENDS, 0), size)
    return hashlib.sha256(b"%d:" % size + b"".join(ends)).hexdigest()[:32]
