"""Drawn faces as a pool of any size: no disk, no download, drawn anew at every read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import synthetic
from pipeline.config import Config, digest
from pipeline.images import Color, Crop
from pipeline.labeled.synthetic import people, shard_name
from pipeline.schema import BOX, EMOTIONS, LANDMARKS, READ, TRUTH
from pipeline.sources.extents import Extent, Part, cut, require_fingerprint


class SyntheticPool(Config):
    """A pool of drawn faces."""

    kind: Literal["synthetic"] = "synthetic"
    name: str | None = None
    count: int = Field(default=20_000, ge=1)
    size: int = Field(default=48, ge=16)  # pixels of a side
    draw_seed: int = 1  # another one than the labeled set's, or the pool holds its faces
    crop: Crop = Crop()
    color: Color = "gray"

    def slices(self, faces: int) -> Iterator[Extent]:
        """Extents of at most `faces` faces."""
        for start, stop in cut([Part(self.count, 0)], faces):
            shard = f"synthetic/{shard_name(self.draw_seed)}"
            yield Extent(shard, start, stop, self._fingerprint(), stop - start)

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent, or only those at `positions`; ids lack the source's name.

        Raises:
            SourceError: the recipe draws other faces than were planned.
        """
        require_fingerprint(extent, self._fingerprint())
        indices = np.arange(extent.start, extent.stop)
        if positions is not None:
            indices = np.sort(np.asarray(positions, dtype=np.int64))
        faces = synthetic.draw(self.draw_seed, indices, self.size)
        identity = synthetic.facts(self.draw_seed, indices, raters=2).identity
        return pa.table(
            [
                pa.array([f"{shard_name(self.draw_seed)}#{i}" for i in indices], pa.string()),
                pa.array(indices, pa.int64()),
                people(self.draw_seed, identity),
                pa.array([synthetic.encode(face) for face in faces], pa.large_binary()),
                pa.nulls(len(indices), BOX),
                pa.nulls(len(indices), LANDMARKS),
                pa.nulls(len(indices), pa.string()),
                pa.nulls(len(indices), pa.string()),
            ],
            schema=READ,
        )

    def truth(self, extent: Extent) -> pa.Table:
        """TRUTH rows of an extent; ids lack the source's name."""
        indices = np.arange(extent.start, extent.stop)
        codes = synthetic.facts(self.draw_seed, indices, raters=2).label
        ids = [f"{shard_name(self.draw_seed)}#{i}" for i in indices]
        return pa.table([ids, [EMOTIONS[code] for code in codes]], schema=TRUTH)

    def _fingerprint(self) -> str:
        return digest([self.draw_seed, self.size])[:32]
