"""Faces in Lance: one dataset, a numbered pattern of them, or all below a folder; disk or S3.

A Lance dataset is a folder of fragments under numbered, immutable versions. A slice is a range of
its rows, cut at fragments, of the version that was planned: rows that are added later change
nothing. Reading one reads the wanted rows of the wanted columns and nothing else of its fragment.

Needs the extra `omnifer[lance]` (pylance: 85 MB to fetch, 217 MB on disk), imported at first use.

Cost: planning opens each dataset and lists its fragments; a read opens it again, one small request
or file more than the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.records import image_bytes
from pipeline.schema import require_columns
from pipeline.sources.extents import (
    Extent,
    Part,
    cut,
    is_pattern,
    name_below,
    require_fingerprint,
    root_of,
    shards,
)
from pipeline.sources.rows import Columns, column_table
from pipeline.storage import Location, location

SUFFIX = ".lance"
VERSIONS = "_versions"
BROKEN = (OSError, ValueError, RuntimeError, pa.ArrowException)
"""What pylance raises; its messages go on for lines."""


class LancePool(Config):
    """A pool in Lance datasets."""

    kind: Literal["lance"] = "lance"
    name: str | None = None
    path: str  # dataset, name-{00..13}.lance, or a folder of datasets
    version: int | None = Field(default=None, ge=1)  # of the dataset; None: the newest when planned
    image_column: str = "image"  # binary, or struct<bytes, path> as Hugging Face datasets write it
    group_column: str | None = None  # opaque; serves splitting and capping only
    box_column: str | None = None  # x0 y0 x1 y1 in pixels
    landmarks_column: str | None = None  # ten numbers, see pipeline.schema.LANDMARKS
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int) -> Iterator[Extent]:
        """Extents of at most `faces` rows; reads the manifests.

        Raises:
            SourceError: pylance is not installed; no dataset there, a broken one, no such version,
                a missing column, or no row.
        """
        sets = datasets(self.path)
        total = 0
        for at in sets:
            data = _open(at, self.version)
            require_columns(data.schema.names, self._columns().named, at.uri)
            field = data.schema.field(self.image_column)
            image_bytes(pa.chunked_array([], field.type), f"{at} column {self.image_column}")
            mark = _fingerprint(data)
            for start, stop in cut(_parts(data), faces):
                total += stop - start
                yield Extent(at.uri, start, stop, mark, stop - start)
        if not total:
            raise SourceError(f"{self.path}: {len(sets)} Lance datasets without a row")

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        Raises:
            SourceError: the planned version is gone or another one, or the dataset is broken.
        """
        at = Location(extent.shard)
        data = _open(at, int(extent.fingerprint.partition("-")[0]))
        require_fingerprint(extent, _fingerprint(data))
        rows = np.arange(extent.start, extent.stop)
        if positions is not None:
            rows = np.sort(np.asarray(positions, np.int64))
        try:
            table = data.take(rows, columns=self._columns().named)
        except BROKEN as err:
            raise _broken(at, err) from err
        shard = name_below(_root(self.path), at)
        return column_table(shard, rows, table, self._columns(), at.uri)

    def _columns(self) -> Columns:
        return Columns(self.image_column, self.group_column, self.box_column, self.landmarks_column)


def is_dataset(at: Location) -> bool:
    """Whether a folder is a Lance dataset."""
    return (at / VERSIONS).is_dir()


def datasets(path: str) -> list[Location]:
    """The datasets that a path means.

    Raises:
        SourceError: none, or numbers that fall.
    """
    if is_pattern(path):
        return shards(path, ())
    at = location(path)
    if is_dataset(at):
        return [at]
    found = [child for child in at.children() if child.name.endswith(SUFFIX) and is_dataset(child)]
    if not found:
        raise SourceError(f"{at}: expected a Lance dataset (a folder that holds {VERSIONS})")
    return found


def schema_of(at: Location) -> pa.Schema:
    """Columns of a dataset's newest version; SourceError as of :meth:`LancePool.slices`."""
    return _open(at, None).schema


def _root(path: str) -> Location:
    """What ids are relative to: a dataset is a folder, and its name belongs into them."""
    if is_pattern(path):
        return root_of(path)
    at = location(path)
    return at.parent if is_dataset(at) else at


def _open(at: Location, version: int | None) -> Any:
    try:
        import lance
    except ImportError as err:
        raise SourceError(
            f"{at}: Lance needs pylance, which is not installed; expected the extra omnifer[lance]"
        ) from err
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:")
    options = {"allow_http": "true"} if plain and not at.is_local else None
    try:
        return lance.dataset(at.uri, version=version, storage_options=options)
    except BROKEN as err:
        raise _broken(at, err) from err


def _broken(at: Location, err: BaseException) -> SourceError:
    said = str(err).splitlines()[0].partition(", /")[0]  # less the place in pylance's source
    return SourceError(f"{at}: broken Lance dataset, or no such version: {said[:200]}")


def _fingerprint(data: Any) -> str:
    """Version and digest of the manifest: data files are named at random and never rewritten."""
    fragments = [fragment.metadata.to_json() for fragment in data.get_fragments()]
    text = json.dumps([str(data.schema), fragments], sort_keys=True)
    return f"{data.version}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _parts(data: Any) -> Iterator[Part]:
    """Fragments, with the bytes of all their columns."""
    for fragment in data.get_fragments():
        size = sum(file.file_size_bytes or 0 for file in fragment.metadata.files)
        yield Part(fragment.count_rows(), size)
