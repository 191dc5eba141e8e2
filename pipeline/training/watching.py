"""What an online student says of some mined faces on its way, kept for those who may judge it.

Nothing here knows the truth, and nothing here trains: with every row of the history the student is
asked which label a few hundred faces would get now, and how much it would count. The report, which
may open the hidden truth, compares. Cost: a forward of these faces every LOG_EVERY steps, under a
fiftieth of the training; not counted in its image passes, as no look at a training is.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.storage import Location
from pipeline.tables import write_table
from pipeline.training.data import MinedFaces
from pipeline.training.loop import Hook, Objective, Step
from pipeline.training.semi import SemiStudent

GUESSES = "guesses"
"""Folder beside the history: one table of `id`, `label` and `weight` per row of it."""
WATCHED = 512
"""Faces, evenly over the mined set."""


def guesses_at(folder: Location, step: int) -> Location:
    """Where the guesses after a step are kept."""
    return folder / f"step-{step:06d}.parquet"


def watcher(mined: MinedFaces, label_names: tuple[str, ...], folder: Location) -> Hook:
    """A hook that keeps an online student's guesses; other objectives it leaves alone.

    Args:
        mined: with ids.
        label_names: what the student's codes index.
        folder: where to.
    """
    count = min(WATCHED, len(mined))
    rows = np.unique(np.linspace(0, len(mined) - 1, count).astype(np.int64))
    names = np.array(label_names, dtype=object)

    def keep(objective: Objective, at: Step) -> None:
        done = at.number + 1
        if not isinstance(objective, SemiStudent) or not at.history:
            return
        if at.history[-1]["step"] != done:
            return
        codes, weights = objective.guess(rows, at)  # every worker looks at its part
        if at.worker.rank == 0:
            said = {
                "id": [mined.ids[row] for row in rows],
                "label": pa.array(names[codes], pa.string()),
                "weight": pa.array(weights, pa.float32()),
            }
            write_table(guesses_at(folder, done), pa.table(said))

    return keep
