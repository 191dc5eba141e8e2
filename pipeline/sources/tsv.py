"""MS-Celeb-1M as tab-separated lines: one file, or all .tsv files below a folder; disk or S3.

Seven columns (Freebase id, search rank, image url, page url, face id, rectangle, face data) or the
six of its development set (Freebase id, name, image url, face id, rectangle, face data), told apart
line by line; no header; the last two are base64. A slice is a range of bytes, a line belongs to
the slice in which it begins, and planning reads only the head of each file. How many faces a slice
holds is known when it is read.

The Freebase id serves as a group, hashed, and nothing else of a line is kept. The rectangle is not
read: it is relative to the photograph that the face was cut from, which is not in the file.
"""

from __future__ import annotations

import binascii
import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import RecordError, SourceError
from pipeline.images import MAX_BYTES, Color, Crop
from pipeline.sources.extents import (
    SLICE_BYTES,
    Extent,
    fingerprint,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.sources.rows import Face, opaque, read_table
from pipeline.storage import Location

logger = logging.getLogger(__name__)

COLUMNS = (6, 7)
PROBE = 1 << 20  # bytes of a file's head that tell the usual length of a line
MAX_LINE = MAX_BYTES * 4 // 3 + (64 << 10)
STEP = 64 << 10  # bytes of the first read beyond a slice, doubled until its last line ends


class MsCelebPool(Config):
    """A pool of base64 images, one per line."""

    kind: Literal["msceleb_tsv"] = "msceleb_tsv"
    name: str | None = None
    path: str  # file, folder, or name-{00..13}.tsv
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int) -> Iterator[Extent]:
        """Extents of about `faces` lines, estimated from the head of each file.

        Raises:
            SourceError: no such path, no .tsv file below it, or a file without a line of 6 or 7
                columns in its head.
        """
        files = shards(self.path, [".tsv"])
        empty = True
        for at in files:
            mark, size = fingerprint(at), at.size()
            if not size:
                continue
            empty = False
            most = min(faces * _line_bytes(at), SLICE_BYTES)
            pieces = -(-size // most)
            for i in range(pieces):
                yield Extent(at.uri, size * i // pieces, size * (i + 1) // pieces, mark, None)
        if empty:
            raise SourceError(f"{self.path}: {len(files)} files without a line")

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of the lines that begin in an extent, or only of those at `positions`.

        A position is the offset of the line; a broken line is a row with a reason.

        Raises:
            SourceError: the file changed since it was planned.
        """
        at = Location(extent.shard)
        require_fingerprint(extent, fingerprint(at))
        start, stop = extent.start, extent.stop
        if positions is not None:
            start, stop = min(positions, default=0), max(positions, default=-1) + 1
        wanted = None if positions is None else set(positions)
        name = name_below(root_of(self.path), at)
        table = read_table(
            _face(name, offset, line)
            for offset, line in _lines(at, start, stop)
            if wanted is None or offset in wanted
        )
        require_fingerprint(extent, fingerprint(at))  # a file replaced meanwhile would be a mixture
        return table


def _line_bytes(at: Location) -> int:
    """Mean length of the lines in the head of a file."""
    head = at.read_range(0, PROBE)
    whole = head[: head.rfind(b"\n") + 1] or head
    lines = [line for line in whole.splitlines() if line.strip()]
    counts = {line.count(b"\t") + 1 for line in lines}
    if not counts.intersection(COLUMNS):
        found = ", ".join(str(count) for count in sorted(counts)) or "none"
        raise SourceError(
            f"{at}: expected lines of 6 or 7 columns with tabs between; found: {found}"
        )
    return -(-len(whole) // len(lines))


def _lines(at: Location, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that begins in [start, stop); blank lines are none."""
    base = max(start - 1, 0)  # the byte before says whether a line begins at `start`
    text = at.read_range(base, stop)
    begin = text.find(b"\n") + 1 if start else 0
    if start and not begin:
        return  # all of it lies inside one line
    while begin < len(text):
        end = text.find(b"\n", begin)
        line = text[begin:] + _rest(at, stop) if end < 0 else text[begin:end]
        if line.strip():
            yield base + begin, line.removesuffix(b"\r")
        begin = len(text) if end < 0 else end + 1


def _rest(at: Location, offset: int) -> bytes:
    """The end of a line that goes on at `offset`; a line too long to be a face breaks off."""
    rest, step = b"", STEP
    while len(rest) <= MAX_LINE:
        more = at.read_range(offset, offset + step)
        line, newline, _ = more.partition(b"\n")
        rest += line
        if newline or len(more) < step:
            break
        offset, step = offset + step, 2 * step
    return rest


def _face(name: str, offset: int, line: bytes) -> Face:
    columns = line.split(b"\t")
    id, group = f"{name}#{offset}", None
    try:
        if len(columns) not in COLUMNS:
            raise RecordError("unreadable", f"expected 6 or 7 columns, got {len(columns)}")
        group = opaque(columns[0].decode(errors="replace"))
        return Face(id, offset, group, _image(columns[-1]))
    except RecordError as err:
        logger.debug("%s byte %d: %s", name, offset, err)
        said = f"byte {offset:,}: {err.detail}"
        return Face(id, offset, group, reason=err.reason, detail=said)


def _image(data: bytes) -> bytes:
    if not data:
        raise RecordError("empty", "no face data")
    if len(data) > MAX_BYTES * 4 // 3:
        raise RecordError("too_large", f"{len(data):,} bytes of base64")
    if len(data) % 4:
        raise RecordError("truncated", "base64 ended early")
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as err:
        raise RecordError("unreadable", f"base64: {err}") from err
