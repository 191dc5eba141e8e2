"""Training functions that `launch` runs, in this process or on Ray Train workers.

Each takes JSON-able settings and a worker, trains, and leaves its models in the stage's folder; the
first worker writes. A model that is complete there is not trained again, and an interrupted one
continues from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field

from pipeline.artifacts import (
    CROP,
    is_complete,
    load_teacher,
    read_meta,
    save_model,
    save_teacher,
    saved_digest,
)
from pipeline.config import Config, nearest
from pipeline.models import FaceModel
from pipeline.progress import meter
from pipeline.schema import label_names_of, matrix
from pipeline.storage import location
from pipeline.tables import read_table, write_table
from pipeline.training.data import MinedFaces
from pipeline.training.distilled import load_distilled
from pipeline.training.faces import ArrayFaces
from pipeline.training.handed import Handed, open_labeled, open_mined, share_of
from pipeline.training.loop import Hook, Objective, Step, Worker
from pipeline.training.references import build_teacher
from pipeline.training.student import StudentConfig
from pipeline.training.studying import train_student
from pipeline.training.supervised import SupervisedConfig, Trained, train_supervised
from pipeline.training.teacher import TeachConfig, cross_fit
from pipeline.training.watching import GUESSES, watcher

FOLDS_FILE = "folds.parquet"
TEACHER = "teacher"
HISTORY_FILE = "history.json"
"""Rows of a training's history, beside what it made."""
TRAIN = (
    "pretrain",
    "teach",
    "distill",
    "student",
    "student_share",
    "control_a",
    "control_b",
    "tuned",
)
"""Stages whose training may have workers of its own."""
PREVIEWS = "previews"
"""Folder of pictures that a training keeps on its way."""


def _trains(stage: str) -> str:
    if stage not in TRAIN:
        raise ValueError(f"stage {stage!r} trains nothing{nearest(stage, list(TRAIN))}")
    return stage


Trains = Annotated[str, AfterValidator(_trains)]


class TrainConfig(Config):
    """Where training runs; decides nothing about what is trained."""

    workers: int = Field(default=0, ge=0)  # Ray Train workers; 0 trains in this process
    stage_workers: dict[Trains, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Other numbers for some stages."""
    use_gpu: bool = False
    bf16: bool | None = None  # autocast; None: where it is faster, see worker.precision
    threads: int | None = Field(default=None, ge=1)  # torch threads of a worker; None: all cores
    checkpoint_every: int = Field(default=500, ge=1)  # steps; every minute or so as well


class TeachJob(Config):
    """Settings of :func:`teach`."""

    handed: Handed
    teach: TeachConfig
    out: str
    checkpoints: str
    seed: int


class StudentJob(Config):
    """Settings of :func:`study`: the student, or a control of equal compute."""

    handed: Handed
    model: str  # student | student_share | control_a | control_b
    student: StudentConfig
    control: SupervisedConfig | None  # None: train the student
    teacher: str
    distilled: str | None = None
    """Folder of the distilled set, for a student that learns from it."""
    share: float | None = None
    """Of the mined faces, for a student that sees no others; None: all."""
    out: str
    checkpoints: str
    seed: int


def teach(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Cross-fit the teachers, attach what they know of the labeled faces, save them."""
    job = TeachJob.model_validate(settings)
    data, rows = open_labeled(
        job.handed,
        job.teach.model,
        boxes=job.teach.mix == "facemix",
        votes=job.teach.partial is not None and not job.teach.derives,
    )
    names = label_names_of(rows.schema)

    def worker_for(fold: int) -> Worker:
        return replace(worker, checkpoint=f"{job.checkpoints}/fold{fold}")

    with shown("teach", job.teach.steps * job.teach.trainings, worker) as hooks:
        fit = cross_fit(job.teach, data, names, worker_for, seed=job.seed, hooks=hooks)
    facts: dict[str, Any] = {
        "passes": fit.passes,
        "seconds": fit.seconds,
        "temperature": fit.temperature,
    }
    facts |= {f"out_of_fold_{name}": value for name, value in fit.metrics.items()}
    if fit.candidates is not None:
        facts["candidates"] = fit.candidates
    if worker.rank == 0:
        teacher, folds = build_teacher(
            fit,
            data,
            rows["id"].to_pylist(),
            names,
            sub_prototypes=job.teach.sub_prototypes,
            seed=job.seed,
        )
        out = location(job.out)
        write_table(out / FOLDS_FILE, folds)
        facts["sha256"] = save_teacher(teacher, out / TEACHER, facts | seen_as(job.handed))
        facts["weights_sha256"] = teacher.weights_sha256
    worker.barrier()
    return facts


def study(settings: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train the student or a control and save it."""
    job = StudentJob.model_validate(settings)
    out = location(job.out)
    if is_complete(out):
        facts = {name: value for name, value in read_meta(out).items() if name != CROP}
        return {**facts, "sha256": saved_digest(out)}
    data, rows = open_labeled(job.handed, job.student.model)
    names = label_names_of(rows.schema)
    worker = replace(worker, checkpoint=job.checkpoints)
    if job.control is None:
        start, kd = _from_teacher(job)
        mined = _beside(job)
        watch = [watcher(mined, names, out / GUESSES)] if len(mined.ids) else []
        with shown(job.model, job.student.steps, worker) as hooks:
            trained = train_student(
                job.student,
                data,
                mined,
                names,
                worker,
                seed=job.seed,
                start=start,
                kd_targets=kd,
                hooks=[*hooks, *watch],
            )
    else:
        with shown(job.model, job.control.steps, worker) as hooks:
            trained = train_supervised(job.control, data, names, worker, seed=job.seed, hooks=hooks)
    return _saved(trained, job, worker)


def seen_as(handed: Handed) -> dict[str, Any]:
    """What a model keeps of the faces it learned from: predict crops others the same way."""
    return {CROP: handed.crop.model_dump(mode="json", exclude_none=True)}


def _beside(job: StudentJob) -> MinedFaces:
    """What the student learns beside the labeled faces."""
    if job.distilled is None:
        mined = open_mined(job.handed, job.student.model)
        return mined if job.share is None else share_of(mined, job.share)
    made = load_distilled(location(job.distilled))
    count, targets = len(made.labels), made.soft
    if job.student.targets == "hard":  # the set's own classes; its soft labels may lead elsewhere
        targets = np.eye(len(made.label_names), dtype=np.float32)[made.labels]
    return MinedFaces(ArrayFaces(made.images), targets, np.ones(count), ["distilled"] * count)


def _from_teacher(job: StudentJob) -> tuple[FaceModel | None, np.ndarray | None]:
    """A member to start from and the labeled faces' out-of-fold probabilities, where asked for."""
    at = location(job.teacher)
    start = kd = None
    if job.student.warm_start or job.student.asks_out_of_fold:
        teacher = load_teacher(at / TEACHER)
        start = teacher.members[0]
        folds = read_table(at / FOLDS_FILE, ["logits"])
        logits = matrix(folds["logits"], len(teacher.label_names))
        kd = teacher.member_probs(torch.from_numpy(logits)).numpy()
    return start, kd


def _saved(trained: Trained, job: StudentJob, worker: Worker) -> dict[str, Any]:
    fitted, out = trained.fitted, location(job.out)
    facts: dict[str, Any] = {"passes": fitted.passes, "seconds": fitted.seconds}
    if worker.rank == 0:
        (out / HISTORY_FILE).write_json(fitted.history)
        facts["sha256"] = save_model(trained.model, out, facts | seen_as(job.handed))
    worker.barrier()
    return facts


@contextmanager
def shown(what: str, total: int, worker: Worker) -> Iterator[Sequence[Hook]]:
    """A hook that shows progress in steps, on the first worker."""
    if worker.rank:
        yield ()
        return
    with meter(what, total, "steps") as shown:

        def show(objective: Objective, at: Step) -> None:
            note = f"loss {at.history[-1]['loss']:.3f}" if at.history else ""
            shown.advance(1, note)

        yield (show,)
