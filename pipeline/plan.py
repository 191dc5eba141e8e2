"""The slices of a pass, fixed in one file before it starts.

Cost: opening reads the footer; asking for a few slices decodes one row group of `CHUNK` slices.
Writing and walking hold one row group at a time: a million slices take no more memory than ten
thousand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config import digest as digest_of
from pipeline.errors import LedgerError, SourceError
from pipeline.packs import content_digest, row_ranges
from pipeline.parquet import Writer
from pipeline.storage import Location
from pipeline.tables import open_stored

GROUP = 1024
"""Slices of a group: those with the same `number // GROUP`, whatever else is in the plan."""

CHUNK = 8 * GROUP
"""Slices of a row group of the file: whole groups where no number is missing."""

_KEY = re.compile(r"s(\d{7,})(\.r[0-9a-f]{8})?")

_SLICE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("faces", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Slice:
    """A unit of work, of retry and of commit: what a source can seek to.

    Attributes:
        key: "s0000123", the running number in the plan; plus ".r<8 hex>" where a removal list
            changes what the slice yields.
        group: number // GROUP.
        source: the recipe's name of the source.
        shard: uri of what is read.
        start: first record, byte or index, as the source counts.
        stop: the end, not included.
        fingerprint: of the shard when it was planned.
        faces: how many, where the source knows without reading.
    """

    key: str
    group: int
    source: str
    shard: str
    start: int
    stop: int
    fingerprint: str
    faces: int | None


class Plan:
    """All slices of a pass, fixed in a file before it starts; opening reads the footer only.

    Attributes:
        digest: of the slices in their order.
        faces: how many; None where a source knows only when it reads.

    Raises:
        SourceError: no file at `at`, or it is no plan.
    """

    def __init__(self, at: Location) -> None:
        self.at = at
        with open_stored(at) as file:
            self._length = file.bounds[-1]
            metadata = file.schema.metadata or {}
        if b"digest" not in metadata:
            raise SourceError(f"{at}: a Parquet file, but not a plan of slices")
        self.digest: str = metadata[b"digest"].decode()
        faces = metadata[b"faces"]
        self.faces = int(faces) if faces else None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Slice]:
        for first in range(0, len(self), CHUNK):
            yield from self.slices(first, first + CHUNK)

    @staticmethod
    def write(at: Location, slices: Iterable[Slice]) -> Plan:
        """Write the plan file.

        Raises:
            LedgerError: keys that do not rise, or a group that is not the key's.
        """
        digests: list[str] = []
        faces: int | None = 0
        rest = _checked(slices, at)
        with at.replacing() as sink, Writer(sink, _SLICE) as writer:
            while chunk := list(itertools.islice(rest, CHUNK)):
                columns = {name: [getattr(s, name) for s in chunk] for name in _SLICE.names}
                table = pa.table(columns, schema=_SLICE)
                writer.write(table)
                digests.append(content_digest(table))
                counts = [s.faces for s in chunk if s.faces is not None]
                faces = None if faces is None or len(counts) < len(chunk) else faces + sum(counts)
            said = "" if faces is None else str(faces)
            writer.annotate({b"digest": digest_of(digests).encode(), b"faces": said.encode()})
        return Plan(at)

    def slices(self, first: int = 0, last: int | None = None) -> list[Slice]:
        """Slices [first, last) by place in the plan; all by default."""
        stop = len(self) if last is None else min(last, len(self))
        with open_stored(self.at) as file:
            table = next(row_ranges(file, [(first, max(first, stop))]))
        return [Slice(**row) for row in table.to_pylist()]

    def groups(self) -> Iterator[list[Slice]]:
        """The slices of each group in turn."""
        for _, slices in itertools.groupby(self, key=lambda s: s.group):
            yield list(slices)


def _checked(slices: Iterable[Slice], at: Location) -> Iterator[Slice]:
    before = -1
    for s in slices:
        number = number_of(s.key)
        if number <= before:
            raise LedgerError(f"{at}: slice number {number} follows {before}; they must rise")
        if s.group != number // GROUP:
            raise LedgerError(f"{at}: {s.key} is in group {number // GROUP}, not {s.group}")
        before = number
        yield s


def number_of(key: str) -> int:
    """Running number of "s0000123" or "s0000123.r9f8e7d6c"."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise LedgerError(f"slice key {key!r}; expected s<7 or more digits>, perhaps .r<8 hex>")
    return int(match.group(1))
