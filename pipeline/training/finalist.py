"""One training of a search's finalist: the student's network, taught by the faces a point keeps.

As with logistic heads (spaces.py), each teacher member stands alone: it labels the pool faces, the
point decides among them by that member's scores, and the student is judged on the labeled faces
that the member has not seen. So no judged face's label reaches the student, be it through a
teacher. Cost: a whole training of the student's length per finalist and member.

Departs from the student that the run will train: a draw of the pool, the same number of faces of
each pseudo-label and all weighing alike, in place of the mined set; half of the labeled faces,
less a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.artifacts import load_teacher
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import FaceModel
from pipeline.schema import label_names_of
from pipeline.storage import location
from pipeline.training import runs
from pipeline.training.data import LabeledFaces, MinedFaces, seed_of
from pipeline.training.faces import ChosenFaces
from pipeline.training.handed import Handed, JoinedFaces, open_labeled, pack_rows
from pipeline.training.loop import FORWARD, Worker
from pipeline.training.student import StudentConfig
from pipeline.training.studying import train_student
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised


class Outcome(Config):
    """How often one training's network is right, in and outside the half that the search sees."""

    right: int = Field(ge=0)
    judged: int = Field(ge=0)
    right_held: int = Field(ge=0)
    judged_held: int = Field(ge=0)
    passes: float


@dataclass(frozen=True)
class Contest:
    """What all finalists are trained with; N labeled faces, P drawn ones, M members, F finalists.

    Travels to the workers through the object store.
    """

    handed: Handed
    student: StudentConfig
    alone: SupervisedConfig
    """The training on labels alone that finalists are compared with."""
    teacher: str
    """Folder of the teacher."""
    seed: int
    ids: Sequence[str]
    """Of the labeled faces, in the order of the bank."""
    fold: np.ndarray
    """The member (N,) that has not seen each labeled face."""
    taught: np.ndarray
    """Which labeled faces (N,) the search may see."""
    faces: pa.Table
    """The drawn faces: id, source, image, box, landmarks; those of one source together."""
    soft: np.ndarray
    """Calibrated probabilities (M, P, K) of the drawn faces, by each member alone."""
    kept: np.ndarray
    """Which drawn faces (F, M, P) a finalist keeps by each member's scores."""


def contest(made: Contest, finalist: int | None, member: int, worker: Worker) -> Outcome:
    """Train a finalist on a member's space and judge it.

    Args:
        made: what all are trained with.
        finalist: row of `made.kept`; None: the labels alone.
        member: of the teacher; the faces it has not seen are the judges.
        worker: where.

    Raises:
        RunError: the labeled faces are not those of the teacher.
    """
    config = made.student
    data, rows = open_labeled(made.handed, config.model)
    names = label_names_of(rows.schema)
    if rows["id"].to_pylist() != list(made.ids):
        raise RunError("search: the labeled faces are not those that the teacher was taught with")
    seed = seed_of(made.seed, "finalist", member)  # alike for all finalists: they are compared
    known = np.flatnonzero(made.taught & (made.fold != member))
    labeled = LabeledFaces(ChosenFaces(data.faces, known), data.labels[known])
    keep = (
        np.zeros(0, np.int64) if finalist is None else np.flatnonzero(made.kept[finalist, member])
    )
    if len(keep):
        trained = train_student(
            config,
            labeled,
            _mined(made, keep, member),
            names,
            worker,
            seed=seed,
            start=_start(made, member) if config.warm_start else None,
        )
    else:
        trained = train_supervised(made.alone, labeled, names, worker, seed=seed)
    judges = np.flatnonzero(made.fold == member)
    said = predict_logits(trained.model, data.faces, worker, rows=judges).argmax(1)
    right, seen = said == data.labels[judges], made.taught[judges]
    return Outcome(
        right=int(right[seen].sum()),
        judged=int(seen.sum()),
        right_held=int(right[~seen].sum()),
        judged_held=int((~seen).sum()),
        passes=trained.fitted.passes + 2 * len(judges) * FORWARD,
    )


def _start(made: Contest, member: int) -> FaceModel:
    return load_teacher(location(made.teacher) / runs.TEACHER).members[member]


def _mined(made: Contest, keep: np.ndarray, member: int) -> MinedFaces:
    """The drawn faces that are kept, as a student learns from them."""
    parts = []
    for name, (crop, color) in made.handed.views.items():
        own = made.faces.filter(pc.equal(made.faces["source"], name))
        if own.num_rows:
            parts.append(pack_rows(own, "drawn", crop, color, made.handed, made.student.model))
    source, ids = (made.faces[name].to_pylist() for name in ("source", "id"))
    return MinedFaces(
        ChosenFaces(JoinedFaces(parts), keep),
        made.soft[member, keep],
        np.ones(len(keep), np.float32),
        [source[row] for row in keep],
        [ids[row] for row in keep],
    )
