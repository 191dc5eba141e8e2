"""Opens any pool source: cuts all of them into slices, reads one slice, fetches some faces again.

Removed faces do not appear in what `read_slice` returns. A slice's key says what its faces are:
where a removal list changes that, the key gets a suffix, and every stage sees a new slice; all
other slices keep their key, and what was scored stays scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.errors import SourceError
from pipeline.plan import GROUP, Slice
from pipeline.sources.extents import Extent
from pipeline.sources.folder import FolderPool
from pipeline.sources.lance import LancePool
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.recordio import RecordIOPool
from pipeline.sources.removals import Removals
from pipeline.sources.rest import RestPool
from pipeline.sources.synthetic import SyntheticPool
from pipeline.sources.tsv import MsCelebPool
from pipeline.sources.webdataset import WebDatasetPool
from pipeline.sources.zipped import ZipPool
from pipeline.storage import Location

PoolSource = Annotated[
    SyntheticPool
    | FolderPool
    | ParquetPool
    | LancePool
    | WebDatasetPool
    | RecordIOPool
    | MsCelebPool
    | ZipPool
    | RestPool,
    Field(discriminator="kind"),
]
"""An item of the recipe's `pool`."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier plan knows, so that a changed removal list renames few slices.

    Attributes:
        removals: the list that was in force.
        digest: of that plan.
        planned: of a base key such as "s0000123", the slice as it was planned then; None if it was
            not.
        faces: of a key, the columns id, sha256 and group of the faces that it yielded; None if
            nothing is committed under it.
    """

    removals: Removals
    digest: str
    planned: Callable[[str], Slice | None]
    faces: Callable[[str], pa.Table | None]


def plan_slices(
    sources: Mapping[str, PoolSource],
    slice_faces: int,
    plan: Location,
    *,
    rest: Location | None = None,
) -> Iterator[Slice]:
    """Cut all sources into slices, in the order of the recipe, under their base keys.

    Args:
        sources: by the recipe's name.
        slice_faces: faces per slice, at most.
        plan: folder of the plan; sources that need an index of their faces store it here.
        rest: the stored LABELED table, for a source of kind `rest`.

    Raises:
        SourceError: what is wrong with which path, file or column.
    """
    number = 0
    for name, source in sources.items():
        for extent in extents_of(name, source, slice_faces, plan, rest):
            yield Slice(
                key=f"s{number:07d}",
                group=number // GROUP,
                source=name,
                shard=extent.shard,
                start=extent.start,
                stop=extent.stop,
                fingerprint=extent.fingerprint,
                faces=extent.faces,
            )
            number += 1


def keyed(base: Slice, removals: Removals, earlier: Earlier | None) -> Slice:
    """A planned slice under the key it had, or under a new one if it yields other faces now.

    A slice that no earlier plan surveyed, or surveyed with other bytes in it, keeps its base key.
    One that the earlier plan renamed, and that was never committed under that name, does not fall
    back to its base key unless the list says what that key holds: so the same list gives the same
    plan, wherever a survey was killed and whatever another driver has committed meanwhile.

    Args:
        base: as :func:`plan_slices` made it.
        removals: the removal list in force.
        earlier: the plan before, of the same sources.
    """
    before = earlier.planned(base.key) if earlier is not None else None
    if earlier is None or before is None:
        return base
    if replace(before, key=base.key, shard=base.shard) != base:
        return base
    faces = earlier.faces(before.key)
    if faces is None and before.key == base.key:
        return base
    if faces is not None and _yields(base, faces, removals, earlier.removals):
        return replace(base, key=before.key)
    first = earlier.faces(base.key) if before.key != base.key else None
    if first is not None and _yields(base, first, removals, None):
        return base
    return replace(base, key=f"{base.key}.r{removals.digest[:8]}")


def _yields(base: Slice, faces: pa.Table, removals: Removals, under: Removals | None) -> bool:
    """Whether a slice yields these faces, stored under the list `under`, None for an unknown one.

    Faces that a list took out may have to come back, unless all of the list is still in force.
    """
    whole = base.faces is not None and len(faces) >= base.faces
    kept_out = whole or (under is not None and removals.covers(under))
    return kept_out and not removals.hits(faces).any()


def read_slice(
    slice: Slice, sources: Mapping[str, PoolSource], removals: Removals | None = None
) -> pa.Table:
    """READ rows of a slice, without removed faces, in the order of the source.

    Raises:
        SourceError: no such source, or the shard changed since it was planned.
    """
    table = _read(slice, sources, None)
    if not removals:
        return table
    return table.filter(pa.array(~removals.hits(table)))


class SliceReader:
    """Reads slices where they are used, so that no pixel crosses the object store."""

    def __init__(self, sources: Mapping[str, PoolSource], removals: Removals) -> None:
        self._sources, self._removals = sources, removals

    def __call__(self, slice: Slice, _: pa.Table) -> pa.Table:
        """As :func:`read_slice`; the table that comes in is empty."""
        return read_slice(slice, self._sources, self._removals)


def fetch(slice: Slice, positions: Sequence[int], sources: Mapping[str, PoolSource]) -> pa.Table:
    """READ rows of the faces at `positions` of a slice, sorted by position.

    Raises:
        SourceError: as :func:`read_slice`, or a position outside the slice.
    """
    outside = [position for position in positions if not slice.start <= position < slice.stop]
    if outside:
        raise SourceError(
            f"slice {slice.key} of {slice.shard}: position {outside[0]} asked for; "
            f"it holds {slice.start}-{slice.stop - 1}"
        )
    return _read(slice, sources, positions)


def _read(
    slice: Slice, sources: Mapping[str, PoolSource], positions: Sequence[int] | None
) -> pa.Table:
    if slice.source not in sources:
        raise SourceError(
            f"slice {slice.key}: source {slice.source!r} is not in the recipe; "
            f"found: {', '.join(sources)}"
        )
    source = sources[slice.source]
    table = source.read(extent_of(slice), positions)
    if isinstance(source, RestPool):  # labeled faces keep the id that the hidden truth knows
        return table
    ids = pc.binary_join_element_wise(f"{slice.source}/", table["id"], "")
    return table.set_column(0, table.schema.field("id"), ids)


def extent_of(slice: Slice) -> Extent:
    """What a source calls the slice."""
    return Extent(slice.shard, slice.start, slice.stop, slice.fingerprint, slice.faces)


def extents_of(
    name: str, source: PoolSource, faces: int, plan: Location, rest: Location | None = None
) -> Iterator[Extent]:
    """Extents of one source; arguments and errors as of :func:`plan_slices`."""
    if isinstance(source, FolderPool | RecordIOPool | WebDatasetPool | ZipPool):
        return source.slices(faces, plan / f"{name}.index.parquet")
    if isinstance(source, RestPool):
        if rest is None:
            raise SourceError(f"pool source {name!r}: kind 'rest' needs a stored labeled set")
        return source.slices(faces, rest)
    return source.slices(faces)
