"""Drawn faces with raters' votes and identities; nothing is read from anywhere.

Faces [0, count) are `train` and the next `test_count` are `test`: one number is one face in every
run. A pool drawn with another `draw_seed` shares neither faces nor people with them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import synthetic
from pipeline.ambiguity import NOT_EMOTIONS, RULES, Rule
from pipeline.config import Config
from pipeline.labeled.records import Records, records_table
from pipeline.schema import EMOTIONS


class SyntheticSet(Config):
    """A labeled set of drawn faces."""

    kind: Literal["synthetic"] = "synthetic"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    count: int = Field(default=4000, ge=1)
    test_count: int = Field(default=1000, ge=0)
    size: int = Field(default=48, ge=16)  # pixels of a side
    draw_seed: int = 0
    raters: int = Field(default=10, ge=2)
    rule: Rule = "majority"  # from votes to a label; faces without one can still be mined

    def records(self, name: str) -> Records:
        """Draw the set: about 2,000 faces per second."""
        indices = np.arange(self.count + self.test_count)
        known = synthetic.facts(self.draw_seed, indices, self.raters)
        votes = np.pad(known.votes, ((0, 0), (0, NOT_EMOTIONS)))
        codes, soft = RULES[self.rule](votes)
        faces = synthetic.draw(self.draw_seed, indices, self.size)
        table = records_table(
            [f"{name}/{shard_name(self.draw_seed)}#{i}" for i in indices],
            ["train"] * self.count + ["test"] * self.test_count,
            [EMOTIONS[code] if code >= 0 else None for code in codes],
            [synthetic.encode(face) for face in faces],
            soft=soft,
            groups=people(self.draw_seed, known.identity),
        )
        return Records(table, EMOTIONS, {})


def shard_name(draw_seed: int) -> str:
    """What stands for a file name in the ids of drawn faces."""
    return f"seed{draw_seed}"


def people(draw_seed: int, identity: np.ndarray) -> pa.Array:
    """Group ids of drawn faces: identity 5 of one seed is not identity 5 of another."""
    return pa.array([f"{shard_name(draw_seed)}-{person}" for person in identity], pa.string())
