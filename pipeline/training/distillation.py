"""What `launch` runs for a distilled set: experts, the set itself, models tuned on it.

Like runs.py: JSON-able settings and a worker in, small facts out; what is complete is not made
again, what was interrupted continues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from pipeline.artifacts import (
    CROP,
    Teacher,
    is_complete,
    load_teacher,
    read_meta,
    save_model,
    saved_digest,
)
from pipeline.config import Config
from pipeline.progress import console
from pipeline.schema import label_names_of
from pipeline.storage import Location, location
from pipeline.training.data import LabeledFaces, seed_of
from pipeline.training.distill import CHUNK, Distilled, Judge, embed
from pipeline.training.distill import distill as distill_faces
from pipeline.training.distill_cost import cost_of, refuse_too_large
from pipeline.training.distilled import grid, load_distilled, provenance, save_distilled
from pipeline.training.distilling import DistillConfig, Distilling
from pipeline.training.experts import expert as train_expert
from pipeline.training.experts import file_of, load_experts, save_expert
from pipeline.training.faces import ArrayFaces, Faces
from pipeline.training.handed import Handed, JoinedFaces, open_labeled, open_mined
from pipeline.training.loop import Hook, Objective, Step, Worker
from pipeline.training.runs import HISTORY_FILE, PREVIEWS, TEACHER, shown
from pipeline.training.supervised import SupervisedConfig, train_supervised


class TuneConfig(Config):
    """How the teacher's members go on learning from the distilled set."""

    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=64, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    soft: bool = True
    """Whether the targets are the set's soft labels, else its classes."""


class DistillJob(Config):
    """Settings of :func:`distill`."""

    handed: Handed
    distill: DistillConfig
    teacher: str
    experts: str | None
    """Folder of the experts, for the method that follows them."""
    out: str
    checkpoints: str
    seed: int


class ExpertJob(Config):
    """Settings of :func:`expert`."""

    handed: Handed
    distill: DistillConfig
    number: int
    out: str
    seed: int


class TuneJob(Config):
    """Settings of :func:`tune`."""

    tune: TuneConfig
    distilled: str
    teacher: str
    out: str
    checkpoints: str
    seed: int


def distill(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Distill the labeled and the mined faces together; the teacher gives soft labels."""
    job = DistillJob.model_validate(settings)
    faces, labels, ids, sources, names = real_faces(job.handed, job.distill)
    expected = cost_of(job.distill, names, len(labels), worker.world)
    refuse_too_large(job.distill, expected, worker)
    if worker.rank == 0:
        console.print(f"distill: expected {expected}", markup=False, soft_wrap=True)
    teacher = load_teacher(location(job.teacher) / TEACHER).to(worker.device)
    experts = []
    if job.experts is not None:
        experts = load_experts(location(job.experts), job.distill.experts.count)
    worker = replace(worker, checkpoint=job.checkpoints)
    judge = judge_of(teacher, worker.device)
    with shown("distill", job.distill.steps, worker) as hooks:
        made = distill_faces(
            job.distill,
            faces,
            labels,
            names,
            worker,
            seed=job.seed,
            judge=judge,
            experts=experts,
            hooks=[*hooks, _previewer(job, len(names))],
        )
    facts: dict[str, Any] = {
        "method": job.distill.method,
        "ipc": job.distill.ipc,
        "size": made.images.shape[-1],
        "faces": len(labels),
        "passes": made.passes,
        "training_seconds": made.seconds,
    }
    if made.history:
        facts |= {
            **({"first_loss": made.history[0]["loss"]} if len(made.history) > 1 else {}),
            "last_loss": made.history[-1]["loss"],
            "expected_passes": expected.passes,
            "expected_mb": expected.peak_mb,
        }
    if worker.rank == 0:
        known = provenance(
            made, ids, sources, embed(judge, faces, job.distill.net.size), judge(made.images)[0]
        )
        said = {**facts, "teacher": teacher.sha256[:12]}
        (location(job.out) / HISTORY_FILE).write_json(made.history)
        facts["sha256"] = save_distilled(location(job.out), made, known, said)
    worker.barrier()
    return facts


def judge_of(teacher: Teacher, device: torch.device) -> Judge:
    """A teacher as distillation asks it."""

    def judge(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embeddings, probs = [], []
        for start in range(0, len(images), CHUNK):
            pixels = torch.from_numpy(images[start : start + CHUNK]).to(device)
            embedding, logits = teacher.represent(pixels, flip=False)
            embeddings.append(embedding.cpu().numpy())
            probs.append(teacher.probs(logits).cpu().numpy())
        return np.concatenate(embeddings), np.concatenate(probs)

    return judge


def expert(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train one expert and keep it."""
    job = ExpertJob.model_validate(settings)
    at, own = location(job.out), job.distill.experts
    faces, labels, _, _, names = real_faces(job.handed, job.distill)
    if not file_of(at, job.number).exists():
        seed = seed_of(job.seed, "expert", job.number)
        weights = train_expert(job.distill, faces, labels, names, worker, seed=seed)
        save_expert(at, job.number, weights)
    sha256 = hashlib.sha256(file_of(at, job.number).read_bytes()).hexdigest()
    return {"sha256": sha256, "passes": own.passes(len(faces)) / own.count}


def tune(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train every member of the teacher on from the distilled set; norms keep their statistics."""
    job = TuneJob.model_validate(settings)
    at = location(job.teacher) / TEACHER
    teacher, crop = load_teacher(at), {k: v for k, v in read_meta(at).items() if k == CROP}
    made = load_distilled(location(job.distilled))
    passes = seconds = 0.0
    digests = []
    for number, member in enumerate(teacher.members):
        out = location(job.out) / str(number)
        if not is_complete(out):
            config = SupervisedConfig(
                model=member.config,
                steps=job.tune.steps,
                batch=job.tune.batch,
                lr=job.tune.lr,
                smoothing=0.0,
                ema=None,
            )
            own = replace(worker, checkpoint=f"{job.checkpoints}/{number}")
            with shown(f"tune {number + 1}", config.steps, worker) as hooks:
                trained = train_supervised(
                    config,
                    faces_of(made, soft=job.tune.soft),
                    made.label_names,
                    own,
                    seed=seed_of(job.seed, "tune", number),
                    start=member,
                    hooks=hooks,
                )
            facts = {"passes": trained.fitted.passes, "seconds": trained.fitted.seconds}
            if worker.rank == 0:
                kept = {"temperature": teacher.temperature, **crop}
                save_model(trained.model, out, {**facts, **kept})
            worker.barrier()
        kept = read_meta(out)
        passes, seconds = passes + kept["passes"], seconds + kept["seconds"]
        digests.append(saved_digest(out))
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"passes": passes, "seconds": seconds, "sha256": whole}


def faces_of(made: Distilled, *, soft: bool) -> LabeledFaces:
    """A distilled set as training takes it."""
    return LabeledFaces(ArrayFaces(made.images), made.labels, made.soft if soft else None)


def real_faces(
    handed: Handed, config: DistillConfig
) -> tuple[Faces, np.ndarray, list[str], list[str], tuple[str, ...]]:
    """Labeled and mined faces: pixels, codes, ids, sources, class names."""
    labeled, rows = open_labeled(handed, config.net)
    mined = open_mined(handed, config.net)
    faces = JoinedFaces([labeled.faces, mined.faces])
    labels = np.concatenate([labeled.labels, mined.soft.argmax(1)])
    ids = [*rows["id"].to_pylist(), *mined.ids]
    sources = ["labeled"] * rows.num_rows + list(mined.source)
    return faces, labels, ids, sources, label_names_of(rows.schema)


def _previewer(job: DistillJob, classes: int) -> Hook:
    """Keeps a picture of the set on its way, every so many steps."""
    folder: Location = location(job.out) / PREVIEWS
    every = job.distill.preview_every

    def keep(objective: Objective, at: Step) -> None:
        done = at.number + 1
        if at.worker.rank == 0 and every is not None and done % every == 0:
            assert isinstance(objective, Distilling)
            pixels = objective.learned.pixels.detach().cpu().contiguous()
            images = pixels.mul(255).round().to(torch.uint8).numpy()
            (folder / f"step-{done:06d}.png").write_bytes(grid(images, classes))

    return keep
