"""An index of faces, for sources whose faces are found only by a look at all of them.

One row per face, in Parquet beside the plan: which file, which bytes. It is written once, a row
group in memory at a time, and another one is made only when the files or the settings changed. Its
name tells which files it lists, so the old one stays: a slice is a range of its rows, and what was
planned can neither shift nor vanish when a file is added later and the pool is planned again.

Cost: a million faces take about 8 MB on disk and 8 s of one core to plan; reading a slice decodes
one or two row groups and reads the faces' bytes in as few requests as their gaps allow.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import digest
from pipeline.errors import RecordError, SourceError
from pipeline.packs import content_digest, row_ranges
from pipeline.parquet import Reader, table_writer
from pipeline.sources.extents import (
    SLICE_BYTES,
    Extent,
    Part,
    cut,
    fingerprint,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.sources.inflating import Unpacked, is_packed, unpacked
from pipeline.sources.rows import Face, read_table
from pipeline.storage import Location
from pipeline.tables import open_stored

logger = logging.getLogger(__name__)

INDEX = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("mark", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("tail", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("unpacked", pa.int64()),
        pa.field("crc", pa.int64()),
        pa.field("group", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
INDEX_ROWS = 8192  # of a row group
SUFFIX = ".index.parquet"
GAP = 64 << 10  # bytes that are cheaper to read along than to ask around
RUN = SLICE_BYTES // 4  # bytes of one read, unless a single face holds more
REQUESTS = 16  # S3 requests in flight per reader


class Entry(NamedTuple):
    """Where a face lies; a row of INDEX.

    Attributes:
        path: its file, below the source's root.
        mark: what told that file from a changed one when the index was made.
        size: bytes to read.
        tail: what the face's id adds to the path.
        offset: first byte to read.
        unpacked: bytes after inflating, where the format says so.
        crc: CRC-32 of these, where the format says so.
        group: opaque, where it is known before the face is read.
        reason: why there is no image, where that is known already.
    """

    path: str
    mark: str
    size: int
    tail: str = ""
    offset: int = 0
    unpacked: int | None = None
    crc: int | None = None
    group: str | None = None
    reason: str | None = None

    @property
    def id(self) -> str:
        """The face's id without the source's name."""
        return self.path + self.tail


Scan = Callable[[Location, str, str], Iterator[Entry]]
"""(file, its path below the root, its fingerprint) -> its faces, by rising offset."""

Load = Callable[[Location, Entry, bytes], tuple[bytes, str | None]]
"""(file, entry, the bytes read for it) -> image and group; RecordError where there is no image."""

Run = list[tuple[int, Entry]]
"""Rows and entries that are read at once."""

A = TypeVar("A")
B = TypeVar("B")


def slices(
    path: str, suffixes: Sequence[str], scan: Scan, settings: Any, index: Location, faces: int
) -> Iterator[Extent]:
    """Extents of at most `faces` faces of container files; makes the index where it must.

    Args:
        path: as :func:`pipeline.sources.extents.shards` takes it.
        suffixes: of the container files in a folder.
        scan: lists the faces of one file.
        settings: JSON-able; what else the index depends on.
        index: where the index is stored, SOURCE.index.parquet; a digest is put before the suffix.
        faces: faces per extent.

    Raises:
        SourceError: a file that is missing or is not what it claims to be, or no face in any.
    """
    files = [(at, fingerprint(at)) for at in shards(path, suffixes)]
    made_of = digest([str(INDEX), settings, [[at.uri, mark] for at, mark in files]])
    if _made_of(index) != made_of:  # named without a digest by earlier versions
        index = named(index, made_of)
    if _made_of(index) != made_of:
        root = root_of(path)
        entries = (e for at, mark in files for e in scan(at, name_below(root, at), mark))
        build(index, entries, f"{path}: no image in it ({len(files)} files)", made_of)
    yield from extents(index, faces)


def named(index: Location, digest: str) -> Location:
    """SOURCE.<8 hex>.index.parquet beside SOURCE.index.parquet."""
    return index.parent / f"{index.name.removesuffix(SUFFIX)}.{digest[:8]}{SUFFIX}"


def source_of(index: Location) -> str:
    """The source that an index, told by its name, is of."""
    return re.sub(r"\.[0-9a-f]{8}$", "", index.name.removesuffix(SUFFIX))


def build(at: Location, entries: Iterable[Entry], if_none: str, made_of: str = "") -> None:
    """Write an index; SourceError `if_none`, and nothing written, where there is no entry."""
    rest = _some(entries, if_none)
    with at.replacing() as sink:
        _write(sink, rest, made_of)


def keep(index: Location, entries: Iterable[Entry], if_none: str) -> Location:
    """Write an index under the name of its content, unless it is there; errors as :func:`build`.

    Args:
        index: SOURCE.index.parquet; one of this name, as earlier versions wrote it, is used where
            it holds the same.
        entries: in order.
        if_none: what to say where there is none.
    """
    rest = _some(entries, if_none)
    index.parent.mkdir()
    # On a run's own disk: a temporary folder may lie in memory.
    with tempfile.TemporaryFile(dir=index.parent.uri if index.is_local else None) as made:
        held = _write(made, rest)
        if index.exists() and _held(index) == held:
            return index
        at = named(index, held)
        if not at.exists():
            made.seek(0)
            with at.replacing() as sink:
                shutil.copyfileobj(made, sink, 1 << 20)
    return at


def _some(entries: Iterable[Entry], if_none: str) -> Iterator[Entry]:
    rest = iter(entries)
    first = next(rest, None)
    if first is None:
        raise SourceError(if_none)
    return itertools.chain([first], rest)


def _write(sink: IO[bytes], entries: Iterator[Entry], made_of: str = "") -> str:
    """Write the file, a row group in memory at a time; digest of what it holds."""
    schema = INDEX.with_metadata({b"made_of": made_of.encode()})
    held = []
    with table_writer(sink, schema) as writer:
        while batch := list(itertools.islice(entries, INDEX_ROWS)):
            columns = [list(column) for column in zip(*batch, strict=True)]
            table = pa.table(columns, schema=schema)
            writer.write_table(table)
            held.append(content_digest(table))
    return digest(held)


def _held(index: Location) -> str:
    with open_stored(index) as file:
        groups = range(len(file.bounds) - 1)
        return digest([content_digest(file.read(row_group=group)) for group in groups])


def extents(index: Location, faces: int) -> Iterator[Extent]:
    """Ranges of an index, by faces and bytes; a few row groups in memory at a time."""
    with open_stored(index) as narrow, open_stored(index) as wide:
        ranges, asked = itertools.tee(cut(_parts(narrow), faces))
        for (start, stop), table in zip(ranges, row_ranges(wide, asked), strict=True):
            yield Extent(index.uri, start, stop, _mark(table), stop - start)


def read_entries(extent: Extent, positions: Sequence[int] | None) -> tuple[list[int], list[Entry]]:
    """Positions and entries of an extent, or only those at `positions`, sorted.

    Raises:
        SourceError: no index, or another one than was planned.
    """
    with open_stored(Location(extent.shard)) as file:
        table = next(row_ranges(file, [(extent.start, extent.stop)]))
    require_fingerprint(extent, _mark(table))
    wanted = list(range(extent.start, extent.stop)) if positions is None else sorted(positions)
    chosen = table.take(pa.array([row - extent.start for row in wanted], pa.int64()))
    columns = [chosen[name].to_pylist() for name in INDEX.names]
    return wanted, [Entry(*row) for row in zip(*columns, strict=True)]


def read_faces(
    root: Location, extent: Extent, positions: Sequence[int] | None, load: Load
) -> pa.Table:
    """READ rows of an extent of an index of container files.

    Raises:
        SourceError: as :func:`read_entries`, or a container changed since it was planned.
    """
    rows, entries = read_entries(extent, positions)
    runs = list(_runs(zip(rows, entries, strict=True)))
    plain = [run for run in runs if not is_packed(run[0][1].path)]

    def check() -> None:
        for path, mark in dict.fromkeys((entry.path, entry.mark) for entry in entries):
            require_unchanged(root / path, fingerprint(root / path), mark)

    check()

    def read(run: Run, file: Unpacked | None = None) -> list[Face]:
        first, last = run[0][1], run[-1][1]
        at = root / first.path
        ranged = at.read_range if file is None else file.range
        data = ranged(first.offset, last.offset + last.size)
        return [_face(at, row, entry, _cut_out(data, first, entry), load) for row, entry in run]

    found = list(itertools.chain.from_iterable(read_each(read, plain, root.is_local)))
    if len(plain) < len(runs):
        packed = itertools.groupby(
            (run for run in runs if is_packed(run[0][1].path)),
            key=lambda run: (run[0][1].path, run[0][1].mark),
        )
        for (path, mark), of_file in packed:
            first = next(of_file)
            with unpacked(root / path, mark, first[0][1].offset) as file:
                for run in itertools.chain([first], of_file):
                    found += read(run, file)
        found.sort(key=lambda face: face.position)
    check()  # a file replaced meanwhile would be a mixture
    return read_table(found)


def read_each(read: Callable[[A], B], items: Sequence[A], is_local: bool) -> list[B]:
    """`read` of each item, in order; on S3 some at a time."""
    if is_local:
        return [read(item) for item in items]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(read, items))


def require_unchanged(at: Location, now: str, planned: str) -> None:
    """Raise SourceError if a file is not the one that was planned."""
    if now != planned:
        raise SourceError(f"{at}: changed since it was planned; plan again with --fresh")


def _runs(rows: Iterable[tuple[int, Entry]]) -> Iterator[Run]:
    """Entries that are cheapest read together: of one file, near each other, at most RUN bytes."""
    run: Run = []
    for row, entry in rows:
        if run:
            first, last = run[0][1], run[-1][1]
            far = entry.offset > last.offset + last.size + GAP
            if entry.path != first.path or far or entry.offset + entry.size > first.offset + RUN:
                yield run
                run = []
        run.append((row, entry))
    if run:
        yield run


def _face(at: Location, row: int, entry: Entry, data: bytes, load: Load) -> Face:
    where = f"byte {entry.offset:,}"
    if entry.reason is not None:
        said = f"{where}, when the file was listed"
        return Face(entry.id, row, entry.group, reason=entry.reason, detail=said)
    try:
        image, group = load(at, entry, data)
    except RecordError as err:
        logger.debug("%s: %s", entry.id, err)
        said = f"{where}: {err.detail}"
        return Face(entry.id, row, entry.group, reason=err.reason, detail=said)
    return Face(entry.id, row, group, image)


def _cut_out(data: bytes, first: Entry, entry: Entry) -> bytes:
    start = entry.offset - first.offset
    return data[start : start + entry.size]


def _parts(file: Reader) -> Iterator[Part]:
    """Every face with its bytes as a worker will hold them."""
    for group in range(len(file.bounds) - 1):
        table = file.read(["size", "unpacked"], row_group=group)
        for size in pc.coalesce(table["unpacked"], table["size"]).to_pylist():
            yield Part(1, size)


def _mark(table: pa.Table) -> str:
    return content_digest(table)[:32]


def _made_of(index: Location) -> str | None:
    """What an index was made of; None where there is none."""
    if not index.exists():
        return None
    try:
        with open_stored(index) as file:
            return (file.schema.metadata or {}).get(b"made_of", b"").decode()
    except SourceError:
        return None
