"""Per-class cuts of adaptive rules on a scored pool, where nothing trains: the rules at rest.

What for: select and search get the cuts that a rule of adaptive.py would have come to, had it seen
the whole pool at once and the labeled faces out of fold. The formulas are the rules' own; only what
they are fed is counted here, in whole numbers that parts of a pool add up to in any order.
Cost: one pass over K probabilities per face; memory: 3 K + 2 numbers.
Source: see adaptive.py.
Departs: there are no running means, no epochs (ada_cm and dtm stand at the end of their ramp) and
no alignment, which would rename faces that are scored already. ada_cm, dtm and adamatch read the
labeled faces out of fold. softmatch cuts nothing: it is `select.weights`. Trap: of a class that the
pool is never sure of, flexmatch keeps every face.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.adaptive import Rule, rule
from pipeline.config import Config, unread
from pipeline.errors import RunError
from pipeline.schema import OK, label_codes, matrix, require_columns
from pipeline.threshold_config import READ, ThresholdConfig

COLUMNS = ("status", "probs")
"""What is read of a score table."""

STEPS = 1 << 24
"""Probabilities are summed in multiples of 1 / STEPS, about as fine as float32 has them."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class AdaptiveConfig(Config):
    """Which rule; the defaults are those of training, see threshold_config.ThresholdConfig."""

    rule: Literal["fixed", "ada_cm", "dtm", "flexmatch", "freematch", "adamatch"] = "dtm"
    tau: float = Field(default=0.95, gt=0, le=1)
    beta: float = Field(default=0.97, gt=0, le=1)
    floor: float | None = Field(default=0.8, ge=0, le=1)

    @model_validator(mode="after")
    def _are_of_the_rule(self) -> AdaptiveConfig:
        others = {"tau", "beta", "floor"} - set(READ[self.rule])
        if (name := unread(self, sorted(others))) is not None:
            raise ValueError(f"{name}: {self.rule} has no use for it")
        return self

    @property
    def at_rest(self) -> ThresholdConfig:
        """The rule without memory and alignment."""
        return ThresholdConfig(momentum=0.0, align=None, **self.model_dump())


@dataclass(frozen=True)
class Seen:
    """A scored pool as rules see it."""

    faces: int
    given: Ints  # (K,) faces by their most probable class
    sure: Ints  # (K,) those of them whose confidence reaches tau
    confidence: int  # sum of confidences, in STEPS
    probs: Ints  # (K,) sum of probabilities, in STEPS

    @classmethod
    def of(cls, probs: Floats, tau: float) -> Seen:
        """Probabilities (n, K), rows sum to 1."""
        classes = probs.shape[1]
        label, confidence = probs.argmax(1), probs.max(1, initial=0)
        return cls(
            len(probs),
            np.bincount(label, minlength=classes),
            np.bincount(label[confidence >= np.float32(tau)], minlength=classes),
            int(_steps(confidence).sum()),
            _steps(probs).sum(0),
        )

    def __add__(self, other: Seen) -> Seen:
        """Both parts."""
        return Seen(
            self.faces + other.faces,
            self.given + other.given,
            self.sure + other.sure,
            self.confidence + other.confidence,
            self.probs + other.probs,
        )


def _steps(values: Floats) -> Ints:
    return np.rint(values.astype(np.float64) * STEPS).astype(np.int64)


def look(pool: Iterable[pa.Table], classes: int, tau: float) -> Seen:
    """The pool's good faces; chunks hold :data:`COLUMNS`."""
    seen = Seen.of(np.zeros((0, classes), np.float32), tau)
    for table in pool:
        seen = seen + Seen.of(probs_of(table.filter(pc.equal(table["status"], OK)), classes), tau)
    return seen


def probs_of(table: pa.Table, classes: int) -> Floats:
    """Probabilities (N, K) of score rows; SourceError where the table has none."""
    require_columns(table.column_names, ("probs",), "scores")
    return matrix(table["probs"], classes)


def settled(config: AdaptiveConfig, pool: Seen, probs: Floats, labels: Ints) -> Rule:
    """The rule as it stands after the whole pool and the labeled faces.

    Args:
        config: which.
        pool: see :func:`look`; made with `config.tau`.
        probs: (N, K) of labeled faces, out of fold.
        labels: (N,) their codes.

    Raises:
        RunError: the rule looks at the pool, and no face of it is scored.
    """
    made = rule(config.at_rest, probs.shape[1], 0)
    labeled = torch.from_numpy(np.ascontiguousarray(probs))
    faces = pool.faces
    if config.rule in ("flexmatch", "freematch") and not faces:
        raise RunError(f"{config.rule}: the pool has no scored face to set cuts by")
    if config.rule == "flexmatch":
        counts = torch.tensor([*pool.sure.tolist(), pool.faces - int(pool.sure.sum())])
        made.load({**made.state(), "counts": counts})
    elif config.rule == "freematch":
        shares = torch.from_numpy(pool.probs / (faces * STEPS)).float()
        given = torch.from_numpy(pool.given / faces).float()
        level = torch.tensor(pool.confidence / (faces * STEPS)).float()
        made.load({"level": level, "shares": shares, "histogram": given})
    else:  # these look at labeled faces alone
        made.observe(labeled, labeled, torch.zeros(len(labels), dtype=torch.int64))
    made.epoch(math.inf, labeled, torch.from_numpy(labels))
    return made


def adaptive_cuts(
    config: AdaptiveConfig, pool: Seen, points: pa.Table, names: tuple[str, ...]
) -> dict[str, float]:
    """Cut of each class, [0, 1], from the pool and out-of-fold score rows with `label`."""
    labels = label_codes(points["label"].to_pylist(), names)
    cuts = settled(config, pool, probs_of(points, len(names)), labels).cuts()
    return dict(zip(names, cuts.tolist(), strict=True))
