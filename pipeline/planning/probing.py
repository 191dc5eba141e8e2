"""What a face costs on this machine: a few slices taken through every step of the passes.

One process, no Ray, and the very functions that the actors call. What is written goes to ledgers in
a temporary folder on the same storage as the run, and is removed. A slice is cut short where a step
would take long: `FACES` faces at most are decoded, and forwards stop after `FORWARD_SECONDS`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline import guard, sealing
from pipeline.artifacts import Teacher
from pipeline.embedding import Decoder, EmbedConfig, Forward, spread
from pipeline.images import Color, Crop
from pipeline.ledger import Ledger
from pipeline.models import create
from pipeline.plan import Plan, Slice
from pipeline.planning.forecast import Spent
from pipeline.recipe import Recipe
from pipeline.schema import OK, QUARANTINED, embeddings_schema
from pipeline.scoring import score_table
from pipeline.similarity import Neighbors, unit
from pipeline.sources.reader import PoolSource, read_slice
from pipeline.storage import Location
from pipeline.survey import describe

FACES = 2048
FORWARD_SECONDS = 4.0
WARM_FACES = 32
STAGES = ("survey", "embed", "score")
PUTS = ("put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload")
"""Requests at the price of a PUT; listings are not counted, there are few per thousand slices."""


@dataclass(frozen=True)
class Requests:
    """S3 requests, by price."""

    puts: float = 0.0
    gets: float = 0.0


@dataclass(frozen=True)
class Probe:
    """One slice: what each step took per face, and what it stored and asked of S3 in all."""

    key: str
    source: str
    faces: int
    quarantined: int
    read_bytes: int
    spent: Mapping[str, Spent]
    requests: Mapping[str, Requests]
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes by stage."""


@dataclass(frozen=True)
class Sealed:
    """Packing and sealing, per slice: seconds of the driver and requests."""

    seconds: float
    requests: Requests


class Prober:
    """Takes slices through the steps; owns the teacher, the ledgers and the neighbors.

    Use it in the process that plans and nowhere else: it sets torch's threads.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, PoolSource],
        teacher: Teacher,
        known: guard.Reference | None,
        at: Location,
    ) -> None:
        """Prepare.

        Args:
            recipe: the settings.
            sources: pool sources by the name that slices carry.
            teacher: of the run, or one with random weights.
            known: test faces; None leaves guard out.
            at: temporary folder for the ledgers.
        """
        self._recipe, self._sources, self._teacher, self._known = recipe, sources, teacher, known
        config = embed_here(recipe.embed)
        seen = teacher.members[0].config
        self._decoder = Decoder(seen.color, seen.size, config.batch, config.decode_threads)
        self._forward = Forward(teacher, config)
        self._neighbors = Neighbors(teacher.bank.cpu().numpy(), teacher.bank_ids)
        self._ledgers = {name: Ledger(at / name) for name in STAGES}
        self._duplicates = guard.Duplicates(recipe.guard)
        self._done: list[Slice] = []
        self._warm = False

    def probe(self, slice: Slice) -> Probe:
        """Take one slice through every step; commits it to the temporary ledgers."""
        spent: dict[str, Spent] = {}
        requests: dict[str, Requests] = {}
        stored: dict[str, int] = {}

        with counted() as seen, clock() as took:
            table = read_slice(slice, self._sources)
        requests["read"] = seen.requests
        rows = table.num_rows
        spent["read"] = took.per(rows)
        source = self._sources[slice.source]
        few = table.slice(0, FACES)
        if not self._warm:
            self._one(few.slice(0, WARM_FACES), source.crop, source.color, {})
            self._warm = True
        faces, embedded, scores = self._one(few, source.crop, source.color, spent)
        bad = int(np.sum(faces["status"].to_numpy(zero_copy_only=False) == QUARANTINED))
        for stage, part in zip(STAGES, (faces, embedded, scores), strict=True):
            whole = _tiled(part, rows)
            ledger = self._ledgers[stage]
            with counted() as seen, clock() as took:
                _commit(ledger, stage, slice, whole)
            spent[f"{stage} write"] = took.per(rows)
            requests[stage] = seen.requests
            stored[stage] = _size(ledger, slice.key)
        self._done.append(slice)
        size = sum(len(image) for image in table["image"].to_pylist() if image is not None)
        return Probe(slice.key, slice.source, rows, bad, size, spent, requests, stored)

    def seal(self, work: Location) -> Sealed:
        """Pack and seal the probed slices of one ledger, as a stage does at its end."""
        plan = Plan.write(work / "probed.parquet", sorted(self._done, key=lambda s: s.key))
        ledger = Ledger(self._ledgers["embed"].at)
        with counted() as seen, clock() as took:
            sealing.seal(ledger, plan)
            sealing.sweep(ledger, plan)
            ledger.manifest(plan)
        count = len(plan)
        asked = Requests(seen.requests.puts / count, seen.requests.gets / count)
        return Sealed(took.seconds / count, asked)

    def _one(
        self, table: pa.Table, crop: Crop, color: Color, spent: dict[str, Spent]
    ) -> tuple[pa.Table, pa.Table, pa.Table]:
        """FACES, embeddings and scores of a READ table."""
        recipe, rows = self._recipe, table.num_rows
        with clock(recipe.survey.threads) as took:
            faces = describe(table, crop, color, threads=recipe.survey.threads)
        spent["survey"] = took.per(rows)
        if self._known is not None:
            with clock() as took:
                guard.find_twins(self._known, faces, recipe.guard)
                self._duplicates.add(faces)
            spent["guard"] = took.per(rows)
        with clock(recipe.embed.decode_threads) as took:
            batches = list(self._decoder.batches(table, crop, color))
        spent["decode"] = took.per(rows)
        spent["forward"] = self._forwards([pixels for pixels, _ in batches])
        reasons = [reason for _, found in batches for reason in found]
        embedded = self._embeddings(table["id"], reasons)
        with clock() as took:
            torch.set_num_threads(recipe.score.threads)
            scores = score_table(
                embedded,
                self._teacher,
                self._neighbors,
                recipe.score.neighbors,
                recipe.score.neighbor_tau,
            )
        torch.set_num_threads(recipe.embed.threads)
        spent["score"] = took.per(rows)
        return faces, embedded, scores

    def _forwards(self, batches: Sequence[np.ndarray]) -> Spent:
        """Cost of a face; micro-batches are padded, so a slice of few faces costs as much."""
        done = 0
        with clock(self._recipe.embed.threads) as took:
            for pixels in batches:
                embedding, _ = self._forward(pixels)
                embedding.cpu()
                done += len(pixels)
                if time.perf_counter() - took.began > FORWARD_SECONDS:
                    break
        return took.per(done)

    def _embeddings(self, ids: pa.ChunkedArray, reasons: Sequence[str | None]) -> pa.Table:
        """A table such as embed commits; its values are random and as hard to compress."""
        teacher = self._teacher
        schema = embeddings_schema(teacher.width, len(teacher.members), len(teacher.label_names))
        good = np.array([reason is None for reason in reasons], dtype=bool)
        rng = np.random.default_rng(0)
        columns = []
        for name in ("embedding", "logits"):
            kind = schema.field(name).type
            values = unit(rng.standard_normal((int(good.sum()), kind.list_size)))
            columns.append(spread(values, good, kind))
        status = [QUARANTINED if reason else OK for reason in reasons]
        return pa.Table.from_arrays(
            [ids, pa.array(status), pa.array(list(reasons), pa.string()), *columns], schema=schema
        )


def embed_here(config: EmbedConfig) -> EmbedConfig:
    """The same on the CPU where this machine has no GPU; the figures are then of another device."""
    if config.num_gpus > 0 and not torch.cuda.is_available():
        return config.model_copy(update={"num_gpus": 0.0})
    return config


def random_teacher(recipe: Recipe, classes: Sequence[str], bank: int) -> Teacher:
    """A teacher of the recipe's kind with random weights, and as many labeled faces as `bank`."""
    config = recipe.teach.model.model_copy(update={"weights": None})
    members = [create(config, classes).eval() for _ in range(recipe.teach.folds)]
    width = sum(member.embed_dim for member in members)
    rng = np.random.default_rng(0)

    def rows(count: int) -> torch.Tensor:
        return torch.from_numpy(unit(rng.standard_normal((count, width))))

    count, owners = max(1, bank), np.repeat(np.arange(len(classes)), recipe.teach.sub_prototypes)
    return Teacher(
        members=members,
        label_names=tuple(classes),
        temperature=1.0,
        prototypes=rows(len(owners)),
        prototype_labels=torch.from_numpy(owners),
        bank=rows(count),
        bank_labels=torch.from_numpy(rng.integers(0, len(classes), count)),
        bank_ids=tuple(f"labeled/{i}" for i in range(count)),
    )


def usable_cores(cores: int, seconds: float = 0.5) -> float:
    """Cores that as many busy threads really got: less where others work on this machine."""
    block = bytes(1 << 20)
    until = time.perf_counter() + seconds

    def burn(_: int) -> None:
        while time.perf_counter() < until:
            hashlib.sha256(block)  # lets go of the interpreter's lock

    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(burn, range(cores)))
    got = (time.process_time() - cpu) / (time.perf_counter() - began)
    return min(float(cores), got)


class _Took:
    """Wall and core-seconds of a block; what its threads waited for a core is taken out.

    Linux tells how long a thread was ready and not run. Without that a busy machine would look like
    a slow one, and other machines would be predicted from its neighbors' work.
    """

    def __init__(self, threads: int) -> None:
        self.began, self._cpu, self._threads = time.perf_counter(), time.process_time(), threads
        self._waits = _waits()
        self.seconds = self.cpu = 0.0

    def stop(self) -> None:
        wall = time.perf_counter() - self.began
        self.cpu = time.process_time() - self._cpu
        waited = sum(now - self._waits.get(tid, 0.0) for tid, now in _waits().items())
        least = self.cpu / self._threads
        self.seconds = min(wall, max(least, wall - waited / self._threads))

    def per(self, faces: int) -> Spent:
        """Cost of one of so many faces."""
        return Spent(self.seconds / max(1, faces), self.cpu / max(1, faces))


def _waits() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and waited; {} if nobody knows."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel counts not
            continue
    return found


@contextmanager
def clock(threads: int = 1) -> Iterator[_Took]:
    """Time a block whose work is spread over so many threads."""
    took = _Took(threads)
    try:
        yield took
    finally:
        took.stop()


class _Counter(logging.Filter):
    """Counts what s3fs logs of every request, and keeps it from being printed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Count a request; True for warnings and errors, which are shown."""
        if str(record.msg).startswith("CALL:") and isinstance(record.args, tuple) and record.args:
            self.seen[str(record.args[0])] += 1
        return record.levelno >= logging.WARNING

    @property
    def requests(self) -> Requests:
        """By price; what deletes is free."""
        puts = sum(self.seen[name] for name in PUTS)
        free = sum(n for name, n in self.seen.items() if name.startswith("delete"))
        return Requests(puts, sum(self.seen.values()) - puts - free)


@contextmanager
def counted() -> Iterator[_Counter]:
    """Count the S3 requests of this process while a block runs."""
    logger, counter = logging.getLogger("s3fs"), _Counter()
    level = logger.level
    logger.addFilter(counter)
    logger.setLevel(logging.DEBUG)
    try:
        yield counter
    finally:
        logger.setLevel(level)
        logger.removeFilter(counter)


def _commit(ledger: Ledger, stage: str, slice: Slice, table: pa.Table) -> None:
    """The ledger's work for a slice, request by request as the actor of a stage asks for it."""
    if stage == "embed":
        ledger.find(slice.key)
    if stage != "score":
        ledger.attempt(slice)
    ledger.commit(slice, table)
    if stage == "embed":
        ledger.read(slice.key)


def _size(ledger: Ledger, key: str) -> int:
    commit = ledger.find(key)
    parts = [] if commit is None else ledger.at.files((commit.file,))
    return sum(at.size() for at in parts)


def _tiled(table: pa.Table, rows: int) -> pa.Table:
    """As many rows as the slice has: the table over and over."""
    if not table.num_rows or table.num_rows == rows:
        return table
    return pa.concat_tables([table] * -(-rows // table.num_rows)).slice(0, rows).combine_chunks()
