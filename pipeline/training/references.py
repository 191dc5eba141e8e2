"""What a teacher knows of the labeled faces: prototypes, a bank of neighbors, out-of-fold scores.

The pool is compared by all members at once. Out of fold, a labeled face is compared by the one
member that has not seen it, with that member's own prototypes and bank: the member's part of the
stored embeddings is enough for that, so it costs no forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts import Teacher
from pipeline.models import FaceModel
from pipeline.schema import OK, embeddings_schema, label_codes, matrix
from pipeline.scoring import ScoreConfig, score_table
from pipeline.similarity import Neighbors, prototypes, unit
from pipeline.training.data import LabeledFaces
from pipeline.training.teacher import TeacherFit

BATCH = 256

FOLDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("fold", pa.int32(), nullable=False),  # the member that has not seen the face
        pa.field("logits", pa.list_(pa.float32()), nullable=False),  # that member's, not calibrated
    ]
)
"""Out-of-fold predictions of the labeled faces, in the order of the teacher's bank."""


def build_teacher(
    fit: TeacherFit,
    data: LabeledFaces,
    ids: Sequence[str],
    label_names: Sequence[str],
    *,
    sub_prototypes: int,
    seed: int,
) -> tuple[Teacher, pa.Table]:
    """The ensemble with prototypes and bank, and a FOLDS table.

    Args:
        fit: cross-fitted members.
        data: the labeled faces they were fitted on.
        ids: of those faces.
        label_names: what their codes index.
        sub_prototypes: per class.
        seed: of k-means.
    """
    bare = _teacher(fit.members, label_names, fit.temperature)
    device = next(bare.members[0].parameters()).device
    parts = []
    for start in range(0, len(data), BATCH):
        index = np.arange(start, min(start + BATCH, len(data)))
        parts.append(bare.represent(torch.from_numpy(data.faces.take(index)).to(device))[0])
    embedding = torch.cat(parts).cpu().numpy()
    correct = fit.logits.argmax(1) == data.labels
    folds = pa.Table.from_arrays(
        [
            pa.array(list(ids)),
            pa.array([label_names[code] for code in data.labels]),
            pa.array(fit.fold.astype(np.int32)),
            pa.array(list(fit.logits.astype(np.float32))),
        ],
        schema=FOLDS,
    )
    known = _Known(embedding, data.labels, ids, correct)
    teacher = _teacher(fit.members, label_names, fit.temperature, known, sub_prototypes, seed)
    return teacher, folds


def out_of_fold_scores(
    teacher: Teacher, folds: pa.Table, score: ScoreConfig, *, sub_prototypes: int, seed: int
) -> pa.Table:
    """Score rows (`scores_schema` plus `label`) of the labeled faces, in the order of the bank."""
    logits = matrix(folds["logits"], len(teacher.label_names))
    ids = np.array(folds["id"].to_pylist(), dtype=object)
    order, tables = [], []
    for one in members_alone(teacher, folds, sub_prototypes=sub_prototypes, seed=seed):
        held = np.flatnonzero(one.unseen)
        tables.append(one.scores(ids[held], one.labeled[held], logits[held], score))
        order.append(held)
    scores = pa.concat_tables(tables).take(np.argsort(np.concatenate(order)))
    return scores.append_column("label", folds["label"])


@dataclass(frozen=True)
class Alone:
    """One member of a teacher and nothing that it has not seen."""

    number: int
    teacher: Teacher
    """The member with its own prototypes and bank, of the faces that it was trained on."""
    labeled: np.ndarray
    """Unit embeddings (N, d) float32 of all labeled faces, in the order of the whole bank."""
    unseen: np.ndarray
    """Which of them (N,) it was not trained on."""
    columns: slice
    """Its part of an embedding of all members."""

    def part(self, embedding: np.ndarray) -> np.ndarray:
        """Its own unit embeddings (n, d) of faces that all members represent as (n, D)."""
        return unit(embedding[:, self.columns].astype(np.float32))

    def scores(
        self, ids: np.ndarray, embedding: np.ndarray, logits: np.ndarray, score: ScoreConfig
    ) -> pa.Table:
        """Score rows of faces by this member alone.

        Args:
            ids: (n,) of the faces.
            embedding: (n, d) its own, see :meth:`part`.
            logits: (n, K) its own, not calibrated.
            score: how faces are compared.
        """
        near = Neighbors(self.teacher.bank.numpy(), self.teacher.bank_ids)
        rows = _embeddings(ids, embedding, logits)
        return score_table(rows, self.teacher, near, score.neighbors, score.neighbor_tau)


def members_alone(
    teacher: Teacher, folds: pa.Table, *, sub_prototypes: int, seed: int
) -> Iterator[Alone]:
    """Each member of a cross-fitted teacher by itself; `folds` is its FOLDS table."""
    names = teacher.label_names
    fold = folds["fold"].to_numpy()
    labels = label_codes(folds["label"].to_pylist(), names)
    logits = matrix(folds["logits"], len(names))
    correct = logits.argmax(1) == labels
    ids = np.array(folds["id"].to_pylist(), dtype=object)
    bank = teacher.bank.numpy() * np.float32(len(teacher.members) ** 0.5)
    widths = np.cumsum([0, *(member.embed_dim for member in teacher.members)])
    for number, member in enumerate(teacher.members):
        columns = slice(int(widths[number]), int(widths[number + 1]))
        part, seen = bank[:, columns], np.flatnonzero(fold != number)
        known = _Known(part[seen], labels[seen], ids[seen].tolist(), correct[seen])
        alone = _teacher([member], names, teacher.temperature, known, sub_prototypes, seed)
        yield Alone(number, alone, part, fold == number, columns)


@dataclass(frozen=True)
class _Known:
    """Labeled faces as some members represent them."""

    embedding: np.ndarray
    labels: np.ndarray
    ids: Sequence[str]
    correct: np.ndarray


def _teacher(
    members: Sequence[FaceModel],
    names: Sequence[str],
    temperature: float,
    known: _Known | None = None,
    per_class: int = 1,
    seed: int = 0,
) -> Teacher:
    """A teacher that knows the given faces; without any, only to represent faces with."""
    if known is None:
        none, codes = torch.empty(0), torch.empty(0, dtype=torch.int64)
        return Teacher(list(members), tuple(names), temperature, none, codes, none, codes, ())
    vectors, owners = prototypes(
        known.embedding, known.labels, known.correct, len(names), per_class, seed
    )
    return Teacher(
        list(members),
        tuple(names),
        temperature,
        torch.from_numpy(vectors),
        torch.from_numpy(owners),
        torch.from_numpy(np.ascontiguousarray(known.embedding)),
        torch.from_numpy(known.labels),
        tuple(known.ids),
    )


def _embeddings(ids: np.ndarray, embedding: np.ndarray, logits: np.ndarray) -> pa.Table:
    """An embeddings table of good faces and one member."""
    schema = embeddings_schema(embedding.shape[1], 1, logits.shape[1])
    count = len(ids)
    columns = [pa.array(list(ids)), pa.repeat(OK, count), pa.nulls(count, pa.string())]
    for name, values in (("embedding", embedding), ("logits", logits)):
        kind = schema.field(name).type
        flat = pa.array(values.astype(kind.value_type.to_pandas_dtype()).ravel())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, kind.list_size))
    return pa.Table.from_arrays(columns, schema=schema)
