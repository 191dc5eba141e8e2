"""Faces as files below a folder; disk or S3.

The folder is listed once, into an index beside the plan (relative path, size and stamp, one row
per file), whose name holds a digest of the list. So millions of files cost one listing and a few
bytes each, and memory for one row group of the index.

Cost: one stat per file to plan and one to read; on S3 one request per thousand to plan and
two per file to read, which makes single files the wrong container for a large pool there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import RunError, SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.sources.extents import Extent, name_below
from pipeline.sources.index import (
    Entry,
    extents,
    keep,
    read_each,
    read_entries,
    require_unchanged,
)
from pipeline.sources.rows import Face, folder_group, read_table
from pipeline.storage import Location, location


class FolderPool(Config):
    """A pool of image files."""

    kind: Literal["folder"] = "folder"
    name: str | None = None
    path: str
    group_from: Literal["parent"] | None = None  # parent: files of one folder are one group
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, index: Location) -> Iterator[Extent]:
        """Extents of at most `faces` files; the list of files goes to `index`, see :func:`keep`.

        Raises:
            SourceError: no such folder, or no image in it.
        """
        root = location(self.path)
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder")
        files = root.listed(IMAGE_SUFFIXES)
        entries = (Entry(name_below(root, at), stamp, size) for at, stamp, size in files)
        at = keep(index, entries, f"{root}: no image in it ({' '.join(IMAGE_SUFFIXES)})")
        yield from extents(at, faces)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        A file that is there but cannot be read is a row with reason `unreadable`.

        Raises:
            SourceError: a file changed or vanished since it was planned.
        """
        root = location(self.path)
        rows, entries = read_entries(extent, positions)
        images = read_each(lambda e: _load(root / e.path, e.mark), entries, root.is_local)
        return read_table(
            Face(
                entry.path,
                row,
                folder_group(entry.path) if self.group_from else None,
                image if isinstance(image, bytes) else None,
                reason=None if isinstance(image, bytes) else "unreadable",
                detail=None if isinstance(image, bytes) else image,
            )
            for row, entry, image in zip(rows, entries, images, strict=True)
        )


def _load(file: Location, stamp: str) -> bytes | str:
    """The file's bytes, or why it has none."""
    require_unchanged(file, file.stamp(), stamp)
    try:
        return file.read_bytes()
    except (SourceError, RunError) as err:
        # A disk may fail on one file; a store that does not answer says nothing about the file.
        if file.is_local or isinstance(err.__cause__, PermissionError | FileNotFoundError):
            return type(err.__cause__ or err).__name__
        raise
