"""Faces in RecordIO (.rec), the format of MXNet and InsightFace; disk or S3.

Which records are faces is told by the .idx file beside and by the record with key 0, wherever it
lies: if that has labels and no body, it is InsightFace's header and keys 1 to N are faces, the rest
identity records; otherwise every key is a face. An .idx that is missing, unreadable or incomplete
is not used: then the heads of all records are read, and those with labels and no body are no faces.
A face's id is its offset, so it is the same either way.

Cost: planning reads the .idx and a handful of records; without a good .idx, one pass over the
heads of all records (on S3 over the whole file).

Source: formats as dmlc-core's recordio.h and MXNet's recordio.py write them. Labels are float32:
from 2^24 on they are rounded, so they are no groups there.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from pipeline.config import Config
from pipeline.errors import RecordError, SourceError
from pipeline.images import MAX_BYTES, Color, Crop
from pipeline.sources.extents import Extent, root_of, shards
from pipeline.sources.index import Entry, read_faces, slices
from pipeline.sources.rows import opaque
from pipeline.storage import Location

logger = logging.getLogger(__name__)

MAGIC_WORD = 0xCED7230A
MAGIC = struct.pack("<I", MAGIC_WORD)
OLD_MAGIC = struct.pack("<I", 0x3ED7230A)  # of early dmlc-core, which packs lengths otherwise
PART = struct.Struct("<4sI")  # magic; kind of part (3 bits) and length (29 bits)
WHOLE, FIRST, MIDDLE, LAST = range(4)
HEADER = struct.Struct("<IfQQ")  # number of labels if they follow, else 0; label; two ids
EXACT = 2**24  # float32 holds every integer below
CHUNK = 1 << 20

Read = Callable[[int, int], bytes]
"""Bytes [start, stop) of the file; fewer where it ends."""


class RecordIOPool(Config):
    """A pool of images in .rec files."""

    kind: Literal["recordio"] = "recordio"
    name: str | None = None
    path: str  # file, folder, or name-{00..13}.rec
    group_from: Literal["label"] | None = "label"  # InsightFace's label is the person's number
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, index: Location) -> Iterator[Extent]:
        """Extents of at most `faces` records; writes where they lie to `index`.

        Raises:
            SourceError: no such path, no .rec file below it, a file that is none, or no face.
        """
        beside = [_index_of(at) for at in shards(self.path, [".rec"])]
        stamps = [at.stamp() if at.exists() else None for at in beside]
        yield from slices(self.path, [".rec"], _scan, stamps, index, faces)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        An index entry that leads to no record is a row with a reason.

        Raises:
            SourceError: the .rec file changed since it was planned.
        """
        return read_faces(root_of(self.path), extent, positions, self._load)

    def _load(self, at: Location, entry: Entry, data: bytes) -> tuple[bytes, str | None]:
        def read(start: int, stop: int) -> bytes:
            inside = data[start - entry.offset : stop - entry.offset]
            return inside if len(inside) == stop - start else at.read_range(start, stop)

        label, _, body = _parsed(read_record(read, entry.offset))
        if not body:
            raise RecordError("empty", "a record without an image")
        named = self.group_from and label.is_integer() and 0 <= label < EXACT
        return body, opaque(f"{entry.path}#{int(label)}") if named else None


def read_record(read: Read, offset: int) -> bytes:
    """The record at `offset`, its parts joined.

    Raises:
        RecordError: unreadable (no record begins there), truncated or too_large.
    """
    pieces = []
    for start, stop in _parts(read, offset):
        pieces.append(read(start, stop))
        if len(pieces[-1]) < stop - start:
            raise RecordError("truncated", f"record at byte {offset:,}")
    return MAGIC.join(pieces)  # what the writer left out where it split


def _parts(read: Read, offset: int) -> Iterator[tuple[int, int]]:
    """First byte and end of the data of each part of the record at `offset`."""
    at, kinds = offset, (WHOLE, FIRST)
    while True:
        head = read(at, at + PART.size)
        if len(head) < PART.size:
            raise RecordError("truncated", f"record at byte {offset:,}")
        magic, word = PART.unpack(head)
        kind, length = word >> 29, word & (1 << 29) - 1
        if magic != MAGIC or kind not in kinds:
            raise RecordError("unreadable", f"no record at byte {at:,}")
        start, stop = at + PART.size, at + PART.size + length
        if stop - offset > MAX_BYTES:
            raise RecordError("too_large", f"record at byte {offset:,}")
        yield start, stop
        if kind in (WHOLE, LAST):
            return
        at, kinds = stop + -length % 4, (MIDDLE, LAST)


def _parsed(record: bytes) -> tuple[float, bool, bytes]:
    """First label, whether an array of labels is there, and the body."""
    if len(record) < HEADER.size:
        raise RecordError("unreadable", f"{len(record)} bytes, less than a header")
    count, label, _, _ = HEADER.unpack_from(record)
    if not count:
        return label, False, record[HEADER.size :]
    begin = HEADER.size + 4 * count
    if begin > len(record):
        raise RecordError("unreadable", f"{count:,} labels in {len(record):,} bytes")
    return struct.unpack_from("<f", record, HEADER.size)[0], True, record[begin:]


# -- planning -------------------------------------------------------------------------------------


def _scan(at: Location, path: str, mark: str) -> Iterator[Entry]:
    """Entries of a .rec file, by the index beside it or by the heads of its records."""
    _require_recordio(at)
    size = at.size()
    with at.open() as file:
        read = _reader(file)
        idx = _index_of(at)
        try:
            offsets = _indexed(idx, read, size)
        except (RecordError, SourceError) as err:
            logger.warning("%s is not used, all of %s is looked through: %s", idx, at.name, err)
            for offset, stop, reason in _heads(read, size):
                held = 0 if reason else stop - offset
                yield Entry(path, mark, held, f"#{offset}", offset, reason=reason)
            return
    for offset, stop in offsets:
        yield Entry(path, mark, min(stop - offset, MAX_BYTES), f"#{offset}", offset)


def _require_recordio(at: Location) -> None:
    head = at.read_range(0, len(MAGIC))
    if head.startswith(b"\x80"):
        raise SourceError(f"{at}: a pickle, which is never opened: it can run any code; use .rec")
    if head == OLD_MAGIC:
        raise SourceError(f"{at}: RecordIO of an early dmlc-core (magic 3ed7230a); pack it anew")
    if head != MAGIC:
        raise SourceError(f"{at}: expected RecordIO (magic ced7230a), found {head[::-1].hex()!r}")


def _index_of(at: Location) -> Location:
    stem, dot, _ = at.uri.rpartition(".")
    return Location(f"{stem if dot else at.uri}.idx")


def _indexed(idx: Location, read: Read, size: int) -> list[tuple[int, int]]:
    """First byte and end of each face by the index, in the order of the file.

    Raises:
        RecordError, SourceError: the index cannot be used.
    """
    keys, offsets = _read_index(idx)
    order = np.argsort(offsets)
    keys, offsets = keys[order], offsets[order]
    if not len(keys) or offsets[0] < 0 or (np.diff(offsets) == 0).any():
        raise RecordError("unreadable", "two keys with one offset, or no key")
    if _measure(read, int(offsets[-1]), size)[0] != size:
        raise RecordError("unreadable", "its last entry is not the last record")
    if not (keys == 0).any():
        raise RecordError("unreadable", "no key 0, which tells what the others are")
    stops = np.append(offsets[1:], size)
    faces = _face_keys(keys, offsets, read)
    return list(zip(offsets[faces].tolist(), stops[faces].tolist(), strict=True))


def _read_index(idx: Location) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets (N,) int64 of an .idx file."""
    names = ["key", "offset"]
    as_read = pcsv.ReadOptions(column_names=names)
    kinds = pcsv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64()), null_values=[])
    try:
        with idx.open() as file:
            table = pcsv.read_csv(file, as_read, pcsv.ParseOptions(delimiter="\t"), kinds)
    except pa.ArrowInvalid as err:
        raise SourceError(f"{idx}: expected keys and offsets: {str(err).splitlines()[0]}") from err
    return table["key"].to_numpy(), table["offset"].to_numpy()


def _face_keys(keys: np.ndarray, offsets: np.ndarray, read: Read) -> np.ndarray:
    """Mask (N,) of the keys whose records are faces."""
    header = int(offsets[keys == 0][0])
    label, has_labels, body = _parsed(read_record(read, header))
    if body or not has_labels:
        return np.ones(len(keys), dtype=bool)  # as im2rec packs: no header record
    if not math.isfinite(label):
        raise RecordError("unreadable", f"its header counts {label} faces")
    doubt = max(1, np.spacing(np.float32(label)))  # from 2^24 on N + 1 may be rounded
    faces = (keys > 0) & (keys < label - doubt)
    for row in np.flatnonzero((keys > 0) & (np.abs(keys - label) <= doubt)):
        faces[row] = _measure(read, int(offsets[row]), None)[1]
    if label < EXACT and faces.sum() != label - 1:
        raise RecordError("unreadable", f"{faces.sum():,} faces of {label - 1:,.0f}")
    return faces


def _heads(read: Read, size: int) -> Iterator[tuple[int, int, str | None]]:
    """Of each face: first byte, end, and the reason if it is known to be broken."""
    offset = 0
    while offset < size:
        try:
            stop, is_face = _measure(read, offset, size)
        except RecordError as err:
            stop = _next_record(read, offset + 4, size)
            yield offset, stop, err.reason
        else:
            if is_face:
                yield offset, stop, None
        offset = stop


def _measure(read: Read, offset: int, size: int | None) -> tuple[int, bool]:
    """Where the record at `offset` ends, padding included, and whether it is a face.

    Only heads are read, but for a record in several parts.

    Raises:
        RecordError: as :func:`read_record`.
    """
    parts = list(_parts(read, offset))
    (start, stop), (_, end) = parts[0], parts[-1]
    if size is not None and end > size:
        raise RecordError("truncated", f"record at byte {offset:,}")
    behind = end + -(end - parts[-1][0]) % 4
    behind = behind if size is None else min(behind, size)
    if len(parts) > 1:
        _, has_labels, body = _parsed(read_record(read, offset))
        return behind, bool(body) or not has_labels
    count = int.from_bytes(read(start, start + 4), "little")
    return behind, not count or stop - start > HEADER.size + 4 * count


def _next_record(read: Read, offset: int, size: int) -> int:
    """Where the next record begins: no part of one holds the magic at a multiple of four."""
    offset += -offset % 4
    while offset < size:
        data = read(offset, offset + CHUNK + 4)
        words = np.frombuffer(data, "<u4", len(data) // 4)
        begins = (words[:-1] == MAGIC_WORD) & (words[1:] >> 29 <= FIRST)
        found = np.flatnonzero(begins)
        if len(found):
            return offset + 4 * int(found[0])
        offset += CHUNK
    return size


def _reader(file: IO[bytes]) -> Read:
    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    return read
