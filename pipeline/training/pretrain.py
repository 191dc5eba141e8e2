"""What `launch` runs to pre-train: pack the pool once per node, train, look, keep the backbone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from pipeline.artifacts import is_complete, read_meta, save_model, saved_digest
from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.schema import OK, label_names_of
from pipeline.sources.reader import PoolSource, fetch
from pipeline.storage import Location, location
from pipeline.streaming import StreamConfig
from pipeline.training.distilled import grid
from pipeline.training.faces import Faces, Row
from pipeline.training.handed import Handed, JoinedFaces, cut_rows, open_labeled, store
from pipeline.training.loop import Hook, Objective, Step, Worker
from pipeline.training.pretraining import Masked, PretrainConfig, train_backbone
from pipeline.training.runs import HISTORY_FILE, PREVIEWS, shown
from pipeline.training.streamed import Reading, StreamedFaces, cut

BACKBONE = "backbone"
NONE_LEFT = "pretrain: no face of the pool is left to learn from"
PROBES_FILE = "probes.json"
"""Beside the history: what was seen of labeled faces on the way, step by step."""
SHOWN = 8
"""Faces of a picture of reconstructions."""


class PretrainJob(Config):
    """Settings of :func:`pretrain`."""

    handed: Handed
    pretrain: PretrainConfig
    plan: str
    survey: str
    """Ledger of survey; that of guard is `handed.guard`."""
    sources: dict[str, PoolSource] = Field(default_factory=dict)
    stream: StreamConfig = StreamConfig()
    out: str
    checkpoints: str
    seed: int


def pretrain(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train a backbone on the pool faces that decode and are no twin of a test face; save it."""
    job = PretrainJob.model_validate(settings)
    out = location(job.out) / BACKBONE
    if is_complete(out):
        return {**read_meta(out), "sha256": saved_digest(out)}
    config = job.pretrain
    faces = stream_pool(job, worker) if config.read == "streamed" else open_pool(job)
    labeled, rows = open_labeled(job.handed, config.model)
    worker = replace(worker, checkpoint=job.checkpoints)
    with shown("pretrain", config.steps, worker) as hooks, ExitStack() as stack:
        if isinstance(faces, StreamedFaces):
            stack.callback(faces.close)
        made = train_backbone(
            config,
            faces,
            label_names_of(rows.schema),
            worker,
            seed=job.seed,
            labeled=labeled,
            hooks=[*hooks, _previewer(job, faces)],
        )
    fitted = made.fitted
    facts: dict[str, Any] = {
        "method": config.method,
        "faces": len(faces),
        "passes": fitted.passes,
        "seconds": fitted.seconds,
        "first_loss": fitted.history[0]["loss"],
        "last_loss": fitted.history[-1]["loss"],
    }
    if made.probes:
        facts |= {"first_knn": made.probes[0]["knn"], "last_knn": made.probes[-1]["knn"]}
    if worker.rank == 0:
        at = location(job.out)
        (at / HISTORY_FILE).write_json(fitted.history)
        (at / PROBES_FILE).write_json(made.probes)
        facts["sha256"] = save_model(made.model, out, facts)
    worker.barrier()
    return facts


def open_pool(job: PretrainJob) -> JoinedFaces:
    """The pool's faces at the network's size, packed on this node, sources one behind the other.

    A pack is named by which faces of which files it holds, so one that a node made before faces
    were forgotten, or before another guard, is not taken for this one.

    Raises:
        SourceError: none is left, or a shard changed since it was planned.
    """
    counts: Counter[str] = Counter()
    held = {name: hashlib.sha256() for name in job.sources}
    for slice, positions in _kept(job):
        counts[slice.source] += len(positions)
        held[slice.source].update(f"{slice.shard} {slice.fingerprint} {len(positions)}\n".encode())
        held[slice.source].update(np.asarray(positions, np.int64).tobytes())
    parts = []
    for name, count in counts.items():
        if count:
            crop, color = job.handed.views[name]
            key = held[name].hexdigest()[:12]
            rows = _images(job, name)
            parts.append(
                store(rows, count, f"pool-{key}", crop, color, job.handed, job.pretrain.model)
            )
    if not parts:
        raise SourceError(NONE_LEFT)
    return JoinedFaces(parts)


def stream_pool(job: PretrainJob, worker: Worker) -> StreamedFaces:
    """This worker's share of the pool's faces at the network's size, read while it trains.

    Raises:
        SourceError: none is left.
        ConfigError: as :class:`pipeline.training.streamed.StreamedFaces`.
    """
    config = job.pretrain
    chunks = cut(_kept(job), config.model)
    if not chunks:
        raise SourceError(NONE_LEFT)
    return StreamedFaces(
        chunks,
        Reading(job.sources, job.handed.views, config.model),
        steps=config.steps,
        batch=config.batch,
        seed=job.seed,
        rank=worker.rank,
        world=worker.world,
        stream=job.stream,
    )


def _kept(job: PretrainJob) -> Iterator[tuple[Slice, pa.Array]]:
    """Every slice and the positions of its faces that may be learned from."""
    assert job.handed.guard is not None
    plan = Plan(location(job.plan))
    surveyed = Ledger(location(job.survey)).tables(plan, ["id", "position", "status"])
    guarded = Ledger(location(job.handed.guard)).tables(plan, ["id", "twin_of"])
    for (slice, faces), (_, twins) in zip(surveyed, guarded, strict=True):
        if not faces["id"].equals(twins["id"]):
            raise SourceError(f"slice {slice.key}: faces of survey and guard differ")
        good = pc.and_(pc.equal(faces["status"], OK), pc.is_null(twins["twin_of"]))
        positions = faces["position"].filter(good)
        yield slice, positions.take(pc.sort_indices(positions))


def _images(job: PretrainJob, source: str) -> Iterator[Row]:
    for slice, positions in _kept(job):
        if slice.source == source and len(positions):
            yield from cut_rows(fetch(slice, positions.to_pylist(), job.sources))


def _previewer(job: PretrainJob, faces: Faces) -> Hook:
    """Keeps a picture of reconstructions, as often as the labeled faces are looked at."""
    folder: Location = location(job.out) / PREVIEWS
    every = job.pretrain.probe_every
    looked_at = torch.from_numpy(faces.take(np.arange(min(SHOWN, len(faces)))))

    def keep(objective: Objective, at: Step) -> None:
        done = at.number + 1
        if at.worker.rank or every is None or not isinstance(objective, Masked):
            return
        if done == at.steps or done % every == 0:
            picture = objective.picture(looked_at, at)
            (folder / f"step-{done:06d}.png").write_bytes(grid(picture, 3))

    return keep
