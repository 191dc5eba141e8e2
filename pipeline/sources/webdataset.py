"""Faces in WebDataset tars: one, a numbered pattern, or all tars below a folder; disk or S3.

Every image member is a face; members whose names agree up to the first dot of the file name, and
which lie side by side, are one sample and share the group that its .json names. Links are passed
over. A plain tar's headers are read once, into an index, and its members by their range of bytes.
A .tar.gz or .tgz cannot be read but from its start: the whole of it is one slice.

A tar that breaks off, goes on with something that is no header, or lacks its end mark, ends in one
row `truncated` that stands for all that is lost.

Cost: planning seeks from header to header on disk, and reads plain tars once through on S3.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import tarfile
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import RecordError, SourceError
from pipeline.images import MAX_BYTES, Color, Crop
from pipeline.sources.extents import (
    Extent,
    fingerprint,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.sources.index import Entry, read_faces, slices
from pipeline.sources.rows import Face, is_hidden, member_tail, opaque, read_table
from pipeline.storage import Location

logger = logging.getLogger(__name__)

PLAIN, PACKED = (".tar",), (".tar.gz", ".tgz")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_JSON = 1 << 20
PIECE = 128 << 10  # bytes that are inflated at a time
MAX_PACKED = 2 << 30  # bytes of images in a compressed tar
DEFLATE_MOST = 1032  # bytes that one byte of deflate can stand for
NO_HEADER = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)
EMPTY = tarfile.EmptyHeaderError  # type: ignore[attr-defined]
BROKEN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)


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
        """Extents of at most `faces` members, and one for each compressed tar.

        Writes where the members of plain tars lie to `index`.

        Raises:
            SourceError: no such path, no tar below it, a file that is none, one that is compressed
                and too large, or no image in the plain ones.
        """
        files = shards(self.path, PLAIN + PACKED)
        packed = [at for at in files if _is_packed(at.uri)]
        if len(packed) < len(files):
            settings = [self.extension, self.group_field]
            yield from slices(self.path, PLAIN, self._scan, settings, index, faces)
        for at in packed:
            if at.size() > MAX_PACKED:
                raise _too_large(at)
            yield Extent(at.uri, 0, DEFLATE_MOST * at.size(), fingerprint(at), None)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        Raises:
            SourceError: the tar changed since it was planned, or is compressed and too large.
        """
        root = root_of(self.path)
        if not _is_packed(extent.shard):
            return read_faces(root, extent, positions, _stored)
        at = Location(extent.shard)
        require_fingerprint(extent, fingerprint(at))
        wanted = None if positions is None else set(positions)
        with at.open() as file, gzip.GzipFile(fileobj=file) as unpacked:
            members = self._members(at, _opened(at, _Piecewise(unpacked), "r|"), wanted)
            table = read_table(_faces(at, name_below(root, at), members, wanted))
        require_fingerprint(extent, fingerprint(at))  # a file replaced meanwhile would be a mixture
        return table

    def _scan(self, at: Location, path: str, mark: str) -> Iterator[Entry]:
        with at.open() as file:
            for m in self._members(at, _opened(at, file, "r:"), set()):
                size, group, reason = 0 if m.reason else m.size, m.group, m.reason
                yield Entry(path, mark, size, m.tail, m.offset, group=group, reason=reason)

    def _members(
        self, at: Location, archive: tarfile.TarFile, wanted: Container[int] | None
    ) -> Iterator[_Member]:
        """Image members in order; those at `wanted` offsets, or all for None, with their bytes."""
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
                    is_wanted = wanted is None or header.offset_data in wanted
                    members.append(_member(archive, header, tail, is_wanted))
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
    image: bytes | None = None
    group: str | None = None


class _Piecewise:
    """Inflates as far as the file goes; a plain read would lose what comes before a break."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.read = file.read1


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


def _is_packed(uri: str) -> bool:
    return uri.lower().endswith(PACKED)


def _too_large(at: Location) -> SourceError:
    limit = MAX_PACKED >> 30
    return SourceError(
        f"{at}: more than {limit} GiB in a compressed tar, which is read whole; unpack it"
    )


def _opened(at: Location, file: Any, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    try:
        return tarfile.open(
            fileobj=file, mode=mode, tarinfo=_Header, errors="replace", bufsize=PIECE
        )
    except BROKEN as err:
        kind = "compressed tar" if _is_packed(at.uri) else "plain tar"
        raise SourceError(f"{at}: expected a {kind}: {err}") from err


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


def _member(
    archive: tarfile.TarFile, header: tarfile.TarInfo, tail: str, is_wanted: bool
) -> _Member:
    image, reason = None, None
    if header.issparse():
        reason = "unsupported"
    elif header.size > MAX_BYTES:
        reason = "too_large"
    elif is_wanted:
        try:
            image = _extract(archive, header)
        except BROKEN:
            reason = "truncated"
    return _Member(tail, header.offset_data, header.size, reason, image)


def _extract(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(header)
    assert file is not None, "not a regular member"
    return file.read()


def _stored(at: Location, entry: Entry, data: bytes) -> tuple[bytes, str | None]:
    if len(data) < entry.size:
        raise RecordError("truncated", f"{at}: {len(data):,} of {entry.size:,} bytes")
    return data, entry.group


def _faces(
    at: Location, name: str, members: Iterable[_Member], wanted: Container[int] | None
) -> Iterator[Face]:
    """Faces of a compressed tar, as long as they fit in memory."""
    held = 0
    for m in members:
        if wanted is None or m.offset in wanted:
            held += len(m.image or b"")
            if held > MAX_PACKED:
                raise _too_large(at)
            yield Face(name + m.tail, m.offset, m.group, m.image, reason=m.reason)
