"""Faces in WebDataset tars: one, a numbered pattern, or all tars below a folder; disk or S3.

Every image member is a face; members whose names agree up to the first dot of the file name, and
which lie side by side, are one sample and share the group that its .json names. Links are passed
over. A tar's headers are read once, into an index, and its members by their range of bytes; those
of a .tar.gz or .tgz by their range of the unpacked bytes, for which all before them are inflated.

A tar that breaks off, goes on with something that is no header, or lacks its end mark, ends in one
row `truncated` that stands for all that is lost.

Cost: planning seeks from header to header on disk; plain tars on S3 and compressed ones anywhere
are read once through. Each process that reads slices of a compressed tar inflates all of it, once
if they come in order. Plain tars cost neither: pictures do not get smaller by gzip.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import RecordError, SourceError
from pipeline.images import MAX_BYTES, Color, Crop
from pipeline.sources import inflating
from pipeline.sources.extents import Extent, root_of
from pipeline.sources.index import Entry, read_faces, slices
from pipeline.sources.inflating import PACKED, PIECE, Unpacked, is_packed
from pipeline.sources.rows import is_hidden, member_tail, opaque
from pipeline.storage import Location

logger = logging.getLogger(__name__)

PLAIN = (".tar",)
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_JSON = 1 << 20
NO_HEADER = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)
EMPTY = tarfile.EmptyHeaderError  # type: ignore[attr-defined]
BROKEN = (tarfile.TarError, ValueError, *inflating.BROKEN)


class WebDatasetPool(Config):
    """A pool of images in tars."""

    kind: Literal["webdataset"] = "webdataset"
    name: str | None = None
    path: str  # file, folder, or name-{000000..000146}.tar
    extension: str | None = None  # only members that end so behind their first dot: face.jpg
    group_field: str | None = None  # of the sample's .json; hashed
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, index: Location) -> Iterator[Extent]:
        """Extents of at most `faces` members; writes where they lie to `index`.

        Raises:
            SourceError: no such path, no tar below it, a file that is none, or no image in any.
        """
        settings = [self.extension, self.group_field]
        yield from slices(self.path, PLAIN + PACKED, self._scan, settings, index, faces)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        Raises:
            SourceError: a tar changed since it was planned.
        """
        return read_faces(root_of(self.path), extent, positions, _stored)

    def _scan(self, at: Location, path: str, mark: str) -> Iterator[Entry]:
        with _opened(at) as archive:
            for m in self._members(at, archive):
                yield Entry(path, mark, m.size, m.tail, m.offset, group=m.group, reason=m.reason)

    def _members(self, at: Location, archive: tarfile.TarFile) -> Iterator[_Member]:
        """Image members in order."""
        seen: set[str] = set()
        for _, headers in itertools.groupby(_headers(at, archive), _sample):
            members, group = [], None
            for header in headers:
                if header is None:
                    offset = archive.offset
                    members.append(_Member(f"@{offset}", offset, 0, "truncated"))
                elif not header.isreg() or is_hidden(header.name):
                    continue
                elif self._is_image(header.name):
                    tail = member_tail(header.name, header.offset_data, seen)
                    reason = _no_image(header)
                    size = 0 if reason else header.size
                    members.append(_Member(tail, header.offset_data, size, reason))
                elif self.group_field and _extension(header.name) == "json":
                    group = self._group(archive, header)
            for member in members:
                yield member._replace(group=group)

    def _is_image(self, name: str) -> bool:
        if self.extension is not None:
            return _extension(name) == self.extension.lower().lstrip(".")
        return name.lower().endswith(IMAGES)

    def _group(self, archive: tarfile.TarFile, header: tarfile.TarInfo) -> str | None:
        if header.size > MAX_JSON:
            return None
        try:
            value = json.loads(_extract(archive, header))[self.group_field]
        except (*BROKEN, KeyError, TypeError, RecursionError):
            return None
        return None if value is None else opaque(str(value))


class _Member(NamedTuple):
    """An image member, or what stands for all that is lost behind a break."""

    tail: str  # of the face's id
    offset: int  # of its data, in the unpacked archive
    size: int
    reason: str | None = None
    group: str | None = None


class _Header(tarfile.TarInfo):
    """A block that is no header, or none, is an error; tarfile takes it for the end.

    Members end at multiples of 512 bytes, and so do many cut files: one cut in twenty or thirty
    falls between two members. Only the zero block that ends an archive tells that it is whole.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except NO_HEADER as err:
            raise tarfile.ReadError(str(err)) from err
        except EMPTY as err:
            if not archive.offset:
                raise
            raise tarfile.ReadError("no end mark") from err


@contextlib.contextmanager
def _opened(at: Location) -> Iterator[tarfile.TarFile]:
    """A tar to walk through: from header to header, or piece by piece where it is compressed."""
    packed = is_packed(at.uri)
    mode: Literal["r:", "r|"] = "r|" if packed else "r:"
    with contextlib.closing(Unpacked(at) if packed else at.open()) as file:
        source: Any = file
        try:
            archive = tarfile.open(  # noqa: SIM115
                fileobj=source, mode=mode, tarinfo=_Header, errors="replace", bufsize=PIECE
            )
        except BROKEN as err:
            kind = "compressed tar" if packed else "plain tar"
            raise SourceError(f"{at}: expected a {kind}: {err}") from err
        yield archive


def _headers(at: Location, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo | None]:
    """Headers in order; a last None where the archive breaks off."""
    try:
        while (header := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
            yield header
    except BROKEN as err:
        logger.warning("%s: breaks off at byte %d: %s", at, archive.offset, err)
        yield None


def _sample(header: tarfile.TarInfo | None) -> str | None:
    if header is None:
        return None
    folder, slash, base = header.name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _no_image(header: tarfile.TarInfo) -> str | None:
    """Why a member is not read."""
    if header.issparse():
        return "unsupported"
    return "too_large" if header.size > MAX_BYTES else None


def _extract(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(header)
    assert file is not None, "not a regular member"
    return file.read()


def _stored(at: Location, entry: Entry, data: bytes) -> tuple[bytes, str | None]:
    del at
    if len(data) < entry.size:
        raise RecordError("truncated", f"{len(data):,} of {entry.size:,} bytes")
    return data, entry.group
