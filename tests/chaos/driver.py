"""A driver to be killed: continues the run folder it is given up to score, with slow reads.

    python tests/chaos/driver.py FOLDER [SETTING ...]

It imports what tests import: PYTHONPATH=tests.
"""

import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from helpers import flow

from pipeline import conduct
from pipeline.sources.extents import Extent
from pipeline.sources.reader import PoolSource


class SlowSynthetic(flow.LoggedSynthetic):
    """Leaves time to be killed between two slices."""

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        time.sleep(0.5)
        return super().read(extent, positions)


class SlowJob(flow.LoggedJob):
    """A job whose sources are slow."""

    @cached_property
    def sources(self) -> dict[str, PoolSource]:
        log = str(flow.log_of(self.run))
        sources = self.recipe.sources().items()
        return {name: SlowSynthetic(**source.model_dump(), log=log) for name, source in sources}


def main(root: str, *sets: str) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED, *sets), Path(root))
    conduct.run_all(SlowJob(job.recipe, job.run, job.tracker), "score")


if __name__ == "__main__":
    main(*sys.argv[1:])
