"""Faces in zip files: one, a numbered pattern, or all .zip files below a folder; disk or S3.

The directory of each file is read once, into an index; a member is read by its range of bytes. No
member makes a worker hold more than a picture may have: what says that it is larger is not read,
and inflating stops where the directory says that it ends.

Cost: planning holds one zip file's directory in memory, about half a kilobyte per member.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import RecordError, SourceError
from pipeline.images import MAX_BYTES, Color, Crop
from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.sources.extents import Extent, root_of
from pipeline.sources.index import Entry, read_faces, slices
from pipeline.sources.rows import folder_group, is_hidden, member_tail
from pipeline.storage import Location

ENCRYPTED = 0x1
LOCAL = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of name and extra field
SIGNATURE = b"PK\x03\x04"
MOST_HEADER = LOCAL.size + 2 * 0xFFFF


class ZipPool(Config):
    """A pool of image files in zip files."""

    kind: Literal["zip"] = "zip"
    name: str | None = None
    path: str  # file, folder, or name-{000..146}.zip
    group_from: Literal["parent"] | None = None  # parent: members of one folder are one group
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, index: Location) -> Iterator[Extent]:
        """Extents of at most `faces` members; writes where they lie to `index`.

        Raises:
            SourceError: no such path, no zip file below it, a file that is none, or no image.
        """
        yield from slices(self.path, [".zip"], self._scan, [self.group_from], index, faces)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        An encrypted, damaged or too large member is a row with a reason.

        Raises:
            SourceError: the zip file changed since it was planned.
        """
        return read_faces(root_of(self.path), extent, positions, _unpack)

    def _scan(self, at: Location, path: str, mark: str) -> Iterator[Entry]:
        seen: set[str] = set()
        members, behind = _directory(at)
        starts = [member.header_offset for member in members]
        for member, stop in zip(members, [*starts[1:], behind], strict=True):
            name = member.filename
            if not name.lower().endswith(IMAGE_SUFFIXES) or is_hidden(name):
                continue
            reason = _refused(member)
            most = min(stop - member.header_offset, MOST_HEADER + member.compress_size)
            yield Entry(
                path,
                mark,
                0 if reason else max(most, 0),
                member_tail(name, member.header_offset, seen),
                member.header_offset,
                0 if reason else member.file_size,
                member.CRC,
                folder_group(f"{path}/{name}") if self.group_from else None,
                reason,
            )


def _directory(at: Location) -> tuple[list[zipfile.ZipInfo], int]:
    """Members in the order in which they lie, and the byte behind the last one."""
    try:
        with at.open() as file, zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            return members, archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as err:
        raise SourceError(f"{at}: expected a zip file: {err}") from err


def _refused(member: zipfile.ZipInfo) -> str | None:
    stored = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if member.flag_bits & ENCRYPTED or not stored:
        return "unsupported"
    return "too_large" if max(member.file_size, member.compress_size) > MAX_BYTES else None


def _unpack(at: Location, entry: Entry, data: bytes) -> tuple[bytes, str | None]:
    del at
    if len(data) < LOCAL.size or not data.startswith(SIGNATURE):
        raise RecordError("unreadable", "no member begins here")
    assert entry.unpacked is not None
    _, method, name, extra = LOCAL.unpack_from(data)
    body = data[LOCAL.size + name + extra :]
    if method == zipfile.ZIP_STORED:
        image = body[: entry.unpacked]
    else:
        try:
            image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, entry.unpacked + 1)
        except zlib.error as err:
            raise RecordError("unreadable", str(err)) from err
    if len(image) > entry.unpacked:
        raise RecordError("too_large", f"inflates to more than the stated {entry.unpacked:,} bytes")
    if len(image) < entry.unpacked:
        raise RecordError("truncated", f"{len(image):,} of {entry.unpacked:,} bytes")
    if zlib.crc32(image) != entry.crc:
        raise RecordError("unreadable", "its checksum is another one")
    return image, entry.group
