"""Labeled and pool faces in the space of each teacher member, for heads that are judged honestly.

Embeddings of cross-fit members lie in different spaces, and a member knows the labeled faces that
it was trained on by heart. So each member stands alone: its space, its scores of the pool, its
pseudo-labels, and only labeled faces that it has not seen are judged there. Every labeled face has
one such member, so each is judged once. The ensemble would not do: all its members but one have
seen the face, and their pseudo-labels of faces like it would carry its label back.

    trained the member, seen half     -> teach the head, beside the pool faces that a point keeps
    unseen by the member, seen half   -> are judged in the search
    unseen by the member, other half  -> are judged after it, by the same heads

Departs from what select does: a member is surer of itself than the ensemble is, so a point keeps
another share of the pool here. Utilization is counted on the ensemble's scores, as select will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.artifacts import Teacher
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.heads import fit_head, named
from pipeline.policy import Mask, OperatingPoint, Rows, passes, rows_of
from pipeline.schema import matrix
from pipeline.scoring import ScoreConfig
from pipeline.training.references import members_alone

Codes = NDArray[np.int64]
Head = NDArray[np.float64]


class HeadConfig(Config):
    """The multinomial logistic head that judges a point."""

    class_faces: int = Field(default=500, ge=1)  # pool faces drawn per pseudo-label, once
    l2: float = Field(default=0.01, ge=0)  # see heads.fit_head
    mined_weight: float = Field(default=2.0, gt=0)  # most that the selected weigh; the labeled: 1


class FinalistsConfig(Config):
    """Whole trainings that choose among the best points; see :mod:`pipeline.finalists`."""

    count: int = Field(default=4, ge=2)  # points that differ, the search's best first
    steps: int | None = Field(default=None, ge=1)  # of each training; None: the student's


@dataclass(frozen=True)
class Drawn:
    """Pool faces that were drawn, as all members of the teacher represent them."""

    ids: NDArray[np.object_]  # (P,)
    embedding: NDArray[np.float32]  # (P, D)
    logits: NDArray[np.float32]  # (P, M, K), not calibrated
    stands_for: NDArray[np.float64]  # (P,) faces of the pool, at least 1


@dataclass(frozen=True)
class Space:
    """All faces as one member sees them."""

    labeled: NDArray[np.float32]  # (N, d)
    unseen: Mask  # (N,) labeled faces that the member was not trained on
    pool: NDArray[np.float32]  # (P, d)
    rows: Rows  # of the pool faces, by this member alone
    stands_for: NDArray[np.float64]  # (P,)
    soft: NDArray[np.float32]  # (P, K) its calibrated probabilities of the pool faces


@dataclass(frozen=True)
class Study:
    """What heads are taught and judged with."""

    spaces: Sequence[Space]
    labels: Codes  # (N,)
    taught: Mask  # (N,) labeled faces that may teach
    starts: Sequence[Head]  # (K, d + 1) per space, of the labels alone
    config: HeadConfig


def spaces_of(
    teacher: Teacher,
    folds: pa.Table,
    drawn: Drawn,
    score: ScoreConfig,
    *,
    sub_prototypes: int,
    seed: int,
) -> list[Space]:
    """One space per member, labeled faces in the order of the teacher's bank."""
    found = []
    for one in members_alone(teacher, folds, sub_prototypes=sub_prototypes, seed=seed):
        own = one.part(drawn.embedding)
        scores = one.scores(drawn.ids, own, drawn.logits[:, one.number], score)
        rows = rows_of(scores, teacher.label_names)
        soft = matrix(scores["probs"], len(teacher.label_names))
        found.append(Space(one.labeled, one.unseen, own, rows, drawn.stands_for, soft))
    return found


def study(
    spaces: Sequence[Space], labels: Codes, taught: Mask, classes: int, config: HeadConfig
) -> Study:
    """Fit the heads of the labels alone, from which all others start.

    Raises:
        RunError: no labeled face may teach in one of the spaces.
    """
    starts = []
    for space in spaces:
        known = taught & ~space.unseen
        if not known.any():
            raise RunError("search: a member has no face to teach a head with; too few groups")
        even = np.ones(int(known.sum()))
        starts.append(fit_head(space.labeled[known], labels[known], even, classes, config.l2))
    return Study(spaces, labels, taught, starts, config)


def heads(point: OperatingPoint, made: Study) -> list[Head]:
    """The head of each space, of labeled faces and of the pool faces that a point keeps there."""
    found = []
    for space, start in zip(made.spaces, made.starts, strict=True):
        kept = passes(space.rows, point)
        if not kept.any():
            found.append(start)
            continue
        known = made.taught & ~space.unseen
        weight = space.stands_for[kept]
        most = made.config.mined_weight * float(known.sum())
        weight *= min(1.0, most / weight.sum())
        found.append(
            fit_head(
                np.concatenate([space.labeled[known], space.pool[kept]]),
                np.concatenate([made.labels[known], space.rows.predicted[kept]]),
                np.concatenate([np.ones(int(known.sum())), weight]),
                len(start),
                made.config.l2,
                start,
            )
        )
    return found


def said(found: Sequence[Head], made: Study) -> Codes:
    """Class (N,) that each labeled face is given by the head of the one space that never saw it."""
    codes = np.full(len(made.labels), -1, np.int64)
    for space, head in zip(made.spaces, found, strict=True):
        codes[space.unseen] = named(head, space.labeled[space.unseen])
    return codes
