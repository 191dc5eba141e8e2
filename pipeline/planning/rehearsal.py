"""How fast this machine trains what a recipe trains: twenty steps of each, on invented pixels.

The loop, the loss, the views and the networks are the recipe's own; faces and labels are random, so
nothing is read and nothing is learned. Cost: some seconds per kind of training, at most
`BUDGET` seconds beyond the first steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.models import ModelConfig
from pipeline.recipe import Recipe
from pipeline.training.data import LabeledFaces, MinedFaces
from pipeline.training.distill import distill
from pipeline.training.distill_cost import blank_expert, cost_of
from pipeline.training.faces import ArrayFaces
from pipeline.training.loop import Hook, Objective, Step, Worker
from pipeline.training.pretraining import train_backbone
from pipeline.training.student import control
from pipeline.training.studying import train_student
from pipeline.training.supervised import train_supervised
from pipeline.training.worker import local, precision, prepare_cpu

STEPS = 20
WARM = 3  # the first steps pay for memory and for kernels that are chosen at run time
LEAST = 3  # steps that are timed, whatever they take
BUDGET = 20.0  # seconds per kind of training
FACES = 512


@dataclass(frozen=True)
class Rehearsed:
    """Timed steps of one kind of training."""

    passes: float
    """Image passes of a step."""
    seconds: tuple[float, ...]
    """Of each timed step."""

    @property
    def rate(self) -> float:
        """Image passes per second."""
        return self.passes * len(self.seconds) / sum(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest rate of a quarter of the steps."""
        quarters = [q for q in np.array_split(np.array(self.seconds), 4) if len(q)]
        rates = [self.passes * len(q) / q.sum() for q in quarters]
        return float(min(rates)), float(max(rates))


class _Enough(Exception):
    """Thrown out of a training by its hook: what was to be timed is timed."""


def rehearse(recipe: Recipe, classes: Sequence[str], *, steps: int = STEPS) -> dict[str, Rehearsed]:
    """Time steps of the recipe's backbone, teacher, distilled set, student and control.

    torch's threads are as before when it returns.

    Args:
        recipe: says what is trained, with how many threads, in which precision.
        classes: names of the classes.
        steps: that are timed, unless they take more than `BUDGET` seconds.
    """
    threads = torch.get_num_threads()
    device = "cuda" if recipe.train.use_gpu and torch.cuda.is_available() else "cpu"
    workers = recipe.train.threads or (1 if recipe.train.workers else None)
    prepare_cpu(workers)
    worker = local(device, precision(recipe.train.bf16, device))
    try:
        return {
            name: Rehearsed(passes, tuple(_timed(train, steps)))
            for name, (passes, train) in _trainings(recipe, tuple(classes), worker, steps).items()
        }
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


Training = Callable[[Sequence[Hook]], object]


def _trainings(
    recipe: Recipe, classes: tuple[str, ...], worker: Worker, steps: int
) -> Mapping[str, tuple[float, Training]]:
    """Image passes of a step, and a training of a few steps, by name."""
    shortened = {"steps": WARM + steps + 1}
    teach = recipe.teach.model_copy(update={**shortened, "model": _blank(recipe.teach.model)})
    student = recipe.student.model_copy(
        update={
            **shortened,
            "model": _blank(recipe.student.model),
            "rescore_at": (),
            "kd": None,
            "warm_start": False,
            "source_share": {},
        }
    )
    own = control(student, own=recipe.control)
    labeled = _labeled(student.model, len(classes))
    mined = _mined(student.model, len(classes))
    batch = student.step_images

    def supervise(hooks: Sequence[Hook]) -> object:
        faces = _labeled(teach.model, len(classes))
        return train_supervised(teach, faces, classes, worker, seed=0, hooks=hooks)

    found: dict[str, tuple[float, Training]] = {
        "teach": (teach.step_images, supervise),
        "student": (
            batch,
            lambda hooks: train_student(
                student, labeled, mined, classes, worker, seed=0, hooks=hooks
            ),
        ),
        "control": (
            own.batch,
            lambda hooks: train_supervised(own, labeled, classes, worker, seed=0, hooks=hooks),
        ),
    }
    if recipe.pretrain is not None:
        pretrain = recipe.pretrain.model_copy(
            update={**shortened, "model": _blank(recipe.pretrain.model)}
        )

        def learn_faces(hooks: Sequence[Hook]) -> object:
            faces = _labeled(pretrain.model, len(classes)).faces
            return train_backbone(pretrain, faces, classes, worker, seed=0, hooks=hooks)

        found["pretrain"] = (pretrain.step_images, learn_faces)
    if recipe.distill is not None and recipe.distill.learned:
        config = recipe.distill.model_copy(update={**shortened, "net": _blank(recipe.distill.net)})
        real = _labeled(config.net, len(classes))
        experts = [blank_expert(config, classes)] if config.method == "trajectory" else []
        each = cost_of(config, classes, FACES).passes / config.steps

        def match(hooks: Sequence[Hook]) -> object:
            return distill(
                config,
                real.faces,
                real.labels,
                classes,
                worker,
                seed=0,
                experts=experts,
                hooks=hooks,
            )

        found["distill"] = (each, match)
    return found


def _timed(train: Training, steps: int) -> list[float]:
    """Seconds of each step after the first few."""
    marks: list[float] = []

    def mark(objective: Objective, at: Step) -> None:
        if at.worker.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        timed = len(marks) - WARM
        if timed >= steps or (timed > LEAST and marks[-1] - marks[0] > BUDGET):
            raise _Enough

    with contextlib.suppress(_Enough):
        train([mark])
    return np.diff(marks[WARM - 1 :][: steps + 1]).tolist()


def _blank(model: ModelConfig) -> ModelConfig:
    """The same network with random weights: nothing is fetched."""
    return model.model_copy(update={"weights": None})


def _pixels(model: ModelConfig, seed: int) -> ArrayFaces:
    shape = (FACES, model.channels, model.size, model.size)
    return ArrayFaces(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def _labeled(model: ModelConfig, classes: int) -> LabeledFaces:
    return LabeledFaces(_pixels(model, 0), np.arange(FACES) % classes)


def _mined(model: ModelConfig, classes: int) -> MinedFaces:
    soft = np.random.default_rng(2).dirichlet(np.ones(classes), FACES)
    return MinedFaces(_pixels(model, 1), soft, np.ones(FACES), ["pool"] * FACES)
