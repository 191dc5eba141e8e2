"""Which pool faces a person is asked for: acquisition functions on what the run has stored.

Nothing is computed anew: embeddings, calibrated probabilities and logits come from the packs of
embed and score, the labeled faces from the teacher's bank and their out-of-fold predictions.

Memory: a byte per pool face; of the faces that the function looks at 2 D bytes of embedding
(float16) and 4 K of probabilities. Functions that read embeddings take a sample of `candidates`,
drawn before anything is loaded: 100,000 faces of 1,280 numbers are 256 MB.
Cost: five passes over narrow columns of packs, and one over the embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.acquisition.functions import ACQUISITIONS, READS
from pipeline.acquisition.interface import Pool, Rows, sampled
from pipeline.artifacts import Teacher, load_teacher
from pipeline.config import Config, nearest
from pipeline.errors import ConfigError, LedgerError
from pipeline.job import Job
from pipeline.mining import check_bytes
from pipeline.ordered import in_order
from pipeline.plan import Slice
from pipeline.pool import ledger, pool_plan
from pipeline.rounds import QUERIES
from pipeline.schema import OK, READ, label_codes, matrix
from pipeline.sources.reader import fetch
from pipeline.tables import read_table
from pipeline.training import runs

FACES = READ.append(pa.field("source", pa.string(), nullable=False))
"""READ rows with the recipe's name of their source."""
READERS = 8
"""Slices that are read side by side; on S3 a read is mostly waiting."""


class AskConfig(Config):
    """How a person's next faces are chosen."""

    budget: int = Field(default=200, ge=1)  # faces of a round; fewer where fewer are left
    acquisition: str = "badge"  # a name of acquisition.functions.ACQUISITIONS
    candidates: int = Field(default=100_000, ge=1)  # looked at by functions that read embeddings

    @field_validator("acquisition")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ACQUISITIONS:
            raise ValueError(f"no acquisition function{nearest(name, list(ACQUISITIONS))}")
        if "boundary" in READS[name]:
            raise ValueError(f"{name} needs gradients of every face, which no stage stores")
        return name


def choose(job: Job, config: AskConfig, closed: Collection[str], seed: int) -> pa.Table:
    """QUERIES rows of the faces to ask for, in the order chosen.

    Left out: quarantined faces, twins of test and validation faces, all but one of a duplicate
    group, and the `closed` faces with their duplicates.

    Args:
        job: a run whose pool is scored and compared with twins.
        config: function and budget.
        closed: ids that are not asked for (again).
        seed: of the candidates and of what the function draws.

    Raises:
        ConfigError: nothing is left to ask for.
    """
    rng = np.random.default_rng(seed)
    rows = _askable(job, closed)
    if not len(rows):
        raise ConfigError("annotate: no face of the pool is left to ask for")
    function = ACQUISITIONS[config.acquisition]
    budget = min(config.budget, len(rows))
    if embedded := "embeddings" in READS[config.acquisition]:
        rows = sampled(rows, max(config.candidates, budget), rng)
    teacher_at = job.run.artifact("teach").dir
    teacher = load_teacher(teacher_at / runs.TEACHER)
    known = read_table(teacher_at / runs.FOLDS_FILE)
    pool = _embedded(job, rows, teacher, known) if embedded else _scored(job, config, rows, teacher)
    labeled = int(pool.labeled.sum())  # they come first
    return _queries(job, rows[function(pool, budget, rng) - labeled], config.acquisition)


def faces_of(job: Job, ids: Collection[str]) -> pa.Table:
    """FACES rows of pool faces, their bytes fetched from the sources; in the order of the pool.

    Several slices are read side by side; one without such a face is not opened. Faces that the pool
    no longer has, such as removed ones, are left out.

    Raises:
        LedgerError: a face's bytes are not those that were surveyed.
        SourceError: a source changed or is gone.
    """
    wanted = pa.array(sorted(ids), pa.string())

    def asked() -> Iterator[tuple[Slice, pa.Table]]:
        columns = ["id", "position", "sha256"]
        for slice, table in ledger(job, "survey").tables(pool_plan(job), columns):
            own = table.filter(pc.is_in(table["id"], value_set=wanted)).sort_by("position")
            if own.num_rows:
                yield slice, own

    def fetched(one: tuple[Slice, pa.Table]) -> pa.Table:
        slice, own = one
        read = fetch(slice, own["position"].to_pylist(), job.sources)
        check_bytes(slice, own, read)
        return read.append_column(FACES.field("source"), pa.repeat(slice.source, own.num_rows))

    return pa.concat_tables([FACES.empty_table(), *in_order(fetched, asked(), READERS)])


def _askable(job: Job, closed: Collection[str]) -> Rows:
    """Rows (U,) of the pool that may be asked for, ascending."""
    plan, gone = pool_plan(job), pa.array(sorted(closed), pa.string())
    streams = zip(
        ledger(job, "score").tables(plan, ["id", "status"]),
        ledger(job, "survey").tables(plan, ["id", "status"]),
        ledger(job, "twins").tables(plan, ["id", "twin_of", "duplicate_group"]),
        strict=True,
    )
    found: list[Rows] = []
    first, alone = 0, dict[str, int]()  # the face that stands for its duplicate group, by group
    answered: set[str] = set()  # groups
    for (slice, scores), (_, faces), (_, twins) in streams:
        if not (scores["id"].equals(faces["id"]) and scores["id"].equals(twins["id"])):
            raise LedgerError(f"slice {slice.key}: faces of score, survey and twins differ")
        group, named = twins["duplicate_group"], pc.is_in(twins["id"], value_set=gone)
        stands = pc.equal(group, twins["id"])
        good = pc.and_(pc.equal(scores["status"], OK), pc.equal(faces["status"], OK))
        good = pc.and_(good, pc.and_(pc.is_null(twins["twin_of"]), pc.invert(named)))
        good = pc.and_(good, pc.or_(pc.is_null(group), pc.fill_null(stands, False)))
        rows = np.flatnonzero(good.to_numpy())
        for row in rows[pc.is_valid(group).to_numpy()[rows]].tolist():
            alone[group[row].as_py()] = first + row
        answered.update(group.filter(named).drop_null().to_pylist())
        found.append(rows + first)
        first += len(good)
    closed_rows = np.array([alone[name] for name in answered & alone.keys()], np.int64)
    return np.setdiff1d(np.concatenate(found or [np.zeros(0, np.int64)]), closed_rows)


def _embedded(job: Job, rows: Rows, teacher: Teacher, known: pa.Table) -> Pool:
    """The labeled faces, then the rows: embeddings, probabilities, labels of the first."""
    bank, names = teacher.bank.numpy(), teacher.label_names
    count, total = len(bank), len(bank) + len(rows)
    embeddings = np.empty((total, bank.shape[1]), np.float16)
    embeddings[:count] = bank
    _gather(job, "embed", "embedding", rows, embeddings[count:])
    probs = np.empty((total, len(names)), np.float32)
    logits = matrix(known["logits"], len(names))
    probs[:count] = teacher.member_probs(torch.from_numpy(logits)).numpy()
    _gather(job, "score", "probs", rows, probs[count:])
    labels = np.full(total, -1, np.int64)
    labels[:count] = label_codes(known["label"].to_pylist(), names)
    return Pool(labels >= 0, embeddings, probs, labels=labels)


def _scored(job: Job, config: AskConfig, rows: Rows, teacher: Teacher) -> Pool:
    """The rows alone: probabilities, or those of every member where the function reads them."""
    members, classes = len(teacher.members), len(teacher.label_names)
    unlabeled = np.zeros(len(rows), np.bool_)
    if "passes" not in READS[config.acquisition]:
        probs = np.empty((len(rows), classes), np.float32)
        _gather(job, "score", "probs", rows, probs)
        return Pool(unlabeled, probs=probs)
    logits = np.empty((len(rows), members * classes), np.float32)
    _gather(job, "embed", "logits", rows, logits)
    each = teacher.member_probs(torch.from_numpy(logits).view(-1, members, classes))
    return Pool(unlabeled, passes=each.transpose(0, 1).numpy())


def _gather(job: Job, stage: str, column: str, rows: Rows, out: NDArray[np.floating]) -> None:
    """Fill `out` (U, W) with a list column of the rows, a row group in memory at a time."""
    for at, _, here, table in _at_rows(job, stage, [column], rows):
        lists = table[column].combine_chunks().take(pa.array(here))
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        out[at : at + len(here)] = flat.reshape(len(here), -1)


def _at_rows(
    job: Job, stage: str, columns: Sequence[str], rows: Rows
) -> Iterator[tuple[int, Slice, Rows, pa.Table]]:
    """Of slices that hold rows: how many rows came before, the slice, where in it, its table."""
    first = 0
    for slice, table in ledger(job, stage).tables(pool_plan(job), columns):
        start, stop = np.searchsorted(rows, (first, first + table.num_rows)).tolist()
        if start < stop:
            yield start, slice, rows[start:stop] - first, table
        first += table.num_rows


def _queries(job: Job, chosen: Rows, acquisition: str) -> pa.Table:
    """QUERIES rows in the order chosen."""
    rows = np.sort(chosen)
    scored = ["id", "pseudo_label", "confidence", "margin"]
    known = pa.concat_tables(
        table.take(pa.array(here)) for _, _, here, table in _at_rows(job, "score", scored, rows)
    )
    parts = []
    for _, slice, here, table in _at_rows(job, "survey", ["position"], rows):
        place = table.take(pa.array(here))
        for name, value in (("source", slice.source), ("shard", slice.shard)):
            place = place.append_column(name, pa.repeat(value, len(here)))
        parts.append(place)
    for name in ("position", "source", "shard"):
        known = known.append_column(name, pa.concat_tables(parts)[name])
    known = known.take(pa.array(np.searchsorted(rows, chosen)))
    known = known.append_column("rank", pa.array(np.arange(1, len(rows) + 1), pa.int32()))
    known = known.append_column("acquisition", pa.repeat(acquisition, len(rows)))
    return known.select(QUERIES.names).cast(QUERIES)
