"""Faces as files below a folder; disk or S3.

The folder is listed once, into an index file beside the plan (relative path and stamp, one row per
file); a slice is a range of its rows. So millions of files cost one listing and a few bytes each,
and what was planned cannot shift when a file is added later.

Cost: one stat per file to plan and one to read; on S3 these are requests, which makes single files
the wrong container for a large pool there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.schema import READ
from pipeline.sources.extents import Extent, Part, cut, require_fingerprint
from pipeline.sources.parquet import read_rows
from pipeline.storage import Location, location

INDEX = pa.schema([("path", pa.string()), ("stamp", pa.string())])
INDEX_ROWS = 8192  # of a row group: a slice decodes one or two of them
REQUESTS = 16  # S3 objects in flight per reader


class FolderPool(Config):
    """A pool of image files."""

    kind: Literal["folder"] = "folder"
    name: str | None = None
    path: str
    group_from: Literal["parent"] | None = None  # parent: files of one folder are one group
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int, index: Location) -> Iterator[Extent]:
        """Extents of at most `faces` files; writes the list of files to `index`.

        Raises:
            SourceError: no such folder, or no image in it.
        """
        root = location(self.path)
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder")
        paths, stamps, parts = [], [], []
        for file in root.files(IMAGE_SUFFIXES):
            paths.append(file.uri.removeprefix(root.uri + "/"))
            stamps.append(file.stamp())
            parts.append(Part(1, file.size()))
        if not paths:
            raise SourceError(f"{root}: no image in it ({' '.join(IMAGE_SUFFIXES)})")
        with index.replacing() as sink, pq.ParquetWriter(sink, INDEX) as writer:
            writer.write_table(pa.table([paths, stamps], schema=INDEX), row_group_size=INDEX_ROWS)
        for start, stop in cut(parts, faces):
            mark = _fingerprint(paths[start:stop], stamps[start:stop])
            yield Extent(index.uri, start, stop, mark, stop - start)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        A file that is there but cannot be read is a row with reason `unreadable`.

        Raises:
            SourceError: a file changed or vanished since it was planned.
        """
        root = location(self.path)
        index = Location(extent.shard)
        rows, table = read_rows(index, INDEX.names, extent, None)
        paths, stamps = table["path"].to_pylist(), table["stamp"].to_pylist()
        require_fingerprint(extent, _fingerprint(paths, stamps))
        asked = rows.tolist() if positions is None else sorted(positions)
        wanted = [int(position) - extent.start for position in asked]
        files = [(root / paths[i], stamps[i]) for i in wanted]
        if root.is_local:
            images = [_load(*file) for file in files]
        else:
            with ThreadPoolExecutor(REQUESTS) as pool:
                images = list(pool.map(lambda file: _load(*file), files))
        reasons = ["unreadable" if image is None else None for image in images]
        return pa.table(
            [
                pa.array([paths[i] for i in wanted], pa.string()),
                pa.array([extent.start + i for i in wanted], pa.int64()),
                pa.array([self._group(paths[i]) for i in wanted], pa.string()),
                pa.array(images, pa.large_binary()),
                pa.nulls(len(files), READ.field("box").type),
                pa.array(reasons, pa.string()),
            ],
            schema=READ,
        )

    def _group(self, path: str) -> str | None:
        """Hashed, because folders are often named after the person in the pictures."""
        if self.group_from is None:
            return None
        return hashlib.sha256(path.rpartition("/")[0].encode()).hexdigest()[:16]


def _load(file: Location, stamp: str) -> bytes | None:
    if file.stamp() != stamp:
        raise SourceError(f"{file}: changed since it was planned; plan again with --fresh")
    try:
        return file.read_bytes()
    except (OSError, SourceError):
        return None


def _fingerprint(paths: Sequence[str], stamps: Sequence[str]) -> str:
    lines = "\n".join(f"{path}\t{stamp}" for path, stamp in zip(paths, stamps, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]
