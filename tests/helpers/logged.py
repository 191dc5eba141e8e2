"""Pools that log what is read of them.

Ray's workers import this file to read, so it imports no torch: half of what a worker would take to
start.
"""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.sources.extents import Extent
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.synthetic import SyntheticPool


class LoggedSynthetic(SyntheticPool):
    """Drawn faces; every read of a whole slice is a line in a log."""

    log: str

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        _note(self.log, extent, positions)
        return super().read(extent, positions)


class LoggedParquet(ParquetPool):
    """Faces in Parquet; every read of a whole slice is a line in a log."""

    log: str

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        _note(self.log, extent, positions)
        return super().read(extent, positions)


def _note(log: str, extent: Extent, positions: Sequence[int] | None) -> None:
    if positions is None:
        with open(log, "a") as file:  # one short line: appended whole, whoever else writes
            file.write(f"{extent.start}-{extent.stop}\n")
