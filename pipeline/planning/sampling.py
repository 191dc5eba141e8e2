"""The pool as `omnifer plan` sees it: how many faces and slices, and a few of these to probe.

Sources are cut as a run would cut them, in a temporary folder, and nothing is kept. Where that
would mean opening very many containers, or asking a store about every file of a folder, some of
them stand for all; the numbers are extrapolated then, and it is said so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.errors import SourceError
from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.plan import GROUP, Plan, Slice
from pipeline.planning.forecast import choose
from pipeline.sources.extents import name_below, shards
from pipeline.sources.folder import FolderPool
from pipeline.sources.index import Entry, build, extents
from pipeline.sources.inflating import PACKED
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import PoolSource, plan_slices
from pipeline.sources.recordio import RecordIOPool
from pipeline.sources.rest import RestPool
from pipeline.sources.tsv import MsCelebPool
from pipeline.sources.webdataset import PLAIN, WebDatasetPool
from pipeline.sources.zipped import ZipPool
from pipeline.storage import Location, location

MOST_FILES = 32
"""Containers of a source that are opened; of more, this many stand for all."""
MOST_LISTED = 20_000
"""Files of a folder that are asked for their size; of more, some stretches stand for all."""
STRETCHES = 16


@dataclass(frozen=True)
class Sampled:
    """A source: what was planned of it, and what that says of all of it."""

    slices: int
    """Of the whole source."""
    faces: float | None
    """Of the whole source; None where only reading tells."""
    seconds: float
    """That planning took, and a run's planning would take where it is longer."""
    said: str
    """For the honest lines."""


@dataclass(frozen=True)
class Pool:
    """The pool in numbers, and the slices that were planned."""

    plan: Plan
    sources: Mapping[str, PoolSource]
    """By the name that slices carry."""
    owner: Mapping[str, str]
    """The recipe's source of each of these."""
    sampled: Mapping[str, Sampled]
    """By the recipe's source."""
    rows: Mapping[str, float] = field(default_factory=dict)
    """Mean faces per probed slice, of sources that do not know theirs."""

    def faces(self, name: str) -> float:
        """Faces of a source, counted or estimated from the probed slices."""
        known = self.sampled[name].faces
        return self.sampled[name].slices * self.rows.get(name, 0.0) if known is None else known

    @property
    def count(self) -> float:
        """Faces of the pool."""
        return sum(self.faces(name) for name in self.sampled)

    @property
    def slices(self) -> int:
        """Slices of the pool."""
        return sum(one.slices for one in self.sampled.values())

    @property
    def seconds(self) -> float:
        """A run's planning."""
        return sum(one.seconds for one in self.sampled.values())

    def with_rows(self, rows: Mapping[str, Sequence[int]]) -> Pool:
        """The same, knowing the faces of the probed slices by the recipe's source."""
        return replace(self, rows={name: float(np.mean(n)) for name, n in rows.items() if n})


def plan_pool(
    sources: Mapping[str, PoolSource],
    slice_faces: int,
    work: Location,
    *,
    rest: Location | None,
    seed: int,
) -> Pool:
    """Cut the sources into slices, or some files of very large ones.

    Args:
        sources: by the recipe's name.
        slice_faces: as in the recipe.
        work: a temporary folder; the plan and the indexes go there.
        rest: the LABELED table for a source of kind `rest`.
        seed: of the choice of files.

    Raises:
        SourceError: as the sources themselves.
    """
    rng = np.random.default_rng(seed)
    opened: dict[str, PoolSource] = {}
    owner: dict[str, str] = {}
    found: list[Slice] = []
    sampled: dict[str, Sampled] = {}
    for name, source in sources.items():
        began = time.perf_counter()
        parts, share, said = _parts(name, source, rng)
        if isinstance(source, FolderPool):
            cut, share, said = _folder(name, source, slice_faces, work, rng)
        else:
            cut = list(plan_slices(parts, slice_faces, work, rest=rest))
        seconds = time.perf_counter() - began
        opened |= parts
        owner |= dict.fromkeys(parts, name)
        found += cut
        known = [slice.faces for slice in cut]
        total = None if None in known else sum(n for n in known if n is not None) / share
        if isinstance(source, RestPool):
            said = "counted in the labeled set"
        slices = max(1, round(len(cut) / share))
        sampled[name] = Sampled(slices, total, seconds / share, said)
    plan = Plan.write(work / "plan.parquet", _numbered(found))
    return Pool(plan, opened, owner, sampled)


def probed_slices(pool: Pool, probes: int, seed: int) -> list[Slice]:
    """Slices to probe, spread over the plan; every source of the recipe gets one at least."""
    rng = np.random.default_rng(seed)
    slices = pool.plan.slices()
    chosen = set(choose(len(slices), probes, rng.random(probes).tolist()))
    for name in pool.sampled:
        places = [i for i, slice in enumerate(slices) if pool.owner[slice.source] == name]
        if places and not chosen & set(places):
            chosen.add(int(rng.choice(places)))
    return [slices[i] for i in sorted(chosen)]


def _parts(
    name: str, source: PoolSource, rng: np.random.Generator
) -> tuple[dict[str, PoolSource], float, str]:
    """Sources to plan in place of one, the share of its files that they are, and what to say."""
    suffixes: Sequence[str]
    if isinstance(source, ParquetPool):
        suffixes = [".parquet"]
    elif isinstance(source, WebDatasetPool):
        suffixes = PLAIN + PACKED
    elif isinstance(source, MsCelebPool):
        suffixes = [".tsv"]
    elif isinstance(source, RecordIOPool):
        suffixes = [".rec"]
    elif isinstance(source, ZipPool):
        suffixes = [".zip"]
    else:
        return {name: source}, 1.0, "counted"
    files = shards(source.path, suffixes)
    if len(files) <= MOST_FILES:
        return {name: source}, 1.0, f"all {len(files)} files opened"
    drawn = np.sort(rng.choice(len(files), MOST_FILES, replace=False)).tolist()
    parts: dict[str, PoolSource] = {
        f"{name}~{i}": source.model_copy(update={"path": files[i].uri}) for i in drawn
    }
    share = MOST_FILES / len(files)
    return parts, share, f"{MOST_FILES} of {len(files):,} files opened, the rest extrapolated"


def _folder(
    name: str, source: FolderPool, faces: int, work: Location, rng: np.random.Generator
) -> tuple[list[Slice], float, str]:
    """Slices of a folder, or of some stretches of its files, and the share that these are."""
    root = location(source.path)
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    # S3 says size and state in the listing; a disk is asked file by file.
    listed = None if root.is_local else list(root.listed(IMAGE_SUFFIXES))
    files = list(root.files(IMAGE_SUFFIXES)) if listed is None else [at for at, *_ in listed]
    said = f"all {len(files):,} files listed"
    chosen = files
    if listed is None and len(files) > MOST_LISTED:
        stretch = MOST_LISTED // STRETCHES // 2
        starts = choose(len(files) - stretch, STRETCHES, rng.random(STRETCHES).tolist())
        places = sorted({i for start in starts for i in range(start, start + stretch)})
        chosen = [files[i] for i in places]
        said = f"{len(files):,} files listed, {len(chosen):,} of them asked for their size"
    index = work / f"{name}.index.parquet"
    about = listed or ((at, at.stamp(), at.size()) for at in chosen)
    entries = (Entry(name_below(root, at), stamp, size) for at, stamp, size in about)
    build(index, entries, f"{root}: no image in it ({' '.join(IMAGE_SUFFIXES)})")
    cut = [
        Slice("", 0, name, e.shard, e.start, e.stop, e.fingerprint, e.faces)
        for e in extents(index, faces)
    ]
    return cut, len(chosen) / len(files), said


def _numbered(slices: Sequence[Slice]) -> Iterator[Slice]:
    for number, slice in enumerate(slices):
        yield replace(slice, key=f"s{number:07d}", group=number // GROUP)
