"""The one training loop: an objective says what is trained and how, `fit` does the rest.

What for: teacher, student, control, semi-supervised and distilled runs differ in what they show the
network and in the loss, never in how steps, averages, checkpoints and workers are handled. There
is no wrapper around the network: one flat all-reduce after backward lets a loss run any number of
forwards, leave parameters out, or learn pixels. Two workers compute what one would on the same
global batch, except that BatchNorm has SyncBatchNorm on GPUs and local statistics on CPUs, and
that random views and dropout are drawn per worker.
Cost besides forward and backward: see optimizer.py and checkpoint.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import IdentityError, RunError
from pipeline.training import checkpoint
from pipeline.training.data import Batch, Batches, Stream, seed_of
from pipeline.training.optimizer import Schedule, Trainee, under
from pipeline.training.worker import Worker, distributed, local, precision, prepare_cpu

__all__ = [
    "FORWARD",
    "Fitted",
    "Hook",
    "Loss",
    "Objective",
    "Schedule",
    "Step",
    "Worker",
    "distributed",
    "fit",
    "local",
    "precision",
    "prepare_cpu",
]

FORWARD = 1 / 3
"""Image passes of one forward; forward and backward together are 1."""
LOG_EVERY = 50
"""Steps between two rows of the history; reading a loss makes a GPU wait."""

SAVE_EVERY = 60.0
"""Seconds after which a checkpoint is saved at the next row of the history."""
SAVE_SHARE = 20


@dataclass
class Step:
    """Where a run stands; handed to the objective and to hooks."""

    number: int
    """Steps done before this one."""
    steps: int
    seed: int
    worker: Worker
    averaged: nn.ModuleDict
    """The average of the weights, in evaluation mode; the weights themselves without one."""
    passes: float = 0.0
    """Image passes so far, over all workers."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Means of the logs since the row before, every LOG_EVERY steps."""

    def count_forward(self, images: int) -> None:
        """Count images (over all workers) that were only passed forward."""
        self.passes += images * FORWARD


@dataclass(frozen=True)
class Loss:
    """What a step's loss is on this worker's part of the batch."""

    sum: Tensor
    """Scalar; the gradient is that of its sum over workers divided by the sum of `count`."""
    trained: float
    """Images passed forward and backward."""
    forward: int = 0
    """Images only passed forward."""
    count: float = 1.0
    """1 if `sum` is a mean already: batches are shared evenly."""
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further scalars for the history."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What `update` needs, without graph."""


class Objective(Protocol):
    """One method of training; where it says no more, nothing but weights moves."""

    def modules(self) -> nn.ModuleDict:
        """What is trained, averaged and saved; called once."""
        ...

    def streams(self) -> Sequence[Stream]:
        """What the next step draws its batches from; called in every step."""
        ...

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """The loss of a step; batches by stream name."""
        ...

    def update(self, loss: Loss, at: Step) -> None:
        """Move thresholds, targets and the like, after the step."""
        return

    def state(self) -> dict[str, Tensor]:
        """Everything that `update` moves."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        return


Hook = Callable[[Objective, Step], None]
"""Called after every step."""


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    averaged: nn.ModuleDict
    """The average of the weights, in evaluation mode; the last weights without one."""
    passes: float
    """Image passes: forward and backward 1, forward alone 1/3; over all workers."""
    history: list[dict[str, float]]
    seconds: float
    """Over all processes that took part one after another."""


def fit(
    objective: Objective,
    schedule: Schedule,
    worker: Worker,
    *,
    seed: int,
    trained: bool = False,
    hooks: Sequence[Hook] = (),
) -> Fitted:
    """Train to the last step, from the newest checkpoint if the worker has one.

    Interrupted and continued in the same number of workers, float32 gives the same weights to the
    last bit. torch's global generator is put back afterwards.

    Args:
        objective: what to train; its modules are trained in place.
        schedule: how long and how fast.
        worker: where.
        seed: of batches, views and dropout.
        trained: the modules start from weights that are trained, heads included, which the average
            of the weights is not to forget.
        hooks: called after every step.

    Raises:
        IdentityError: the checkpoint is of another schedule, seed or network.
        RunError: the loss is not a number, or workers do not see the same checkpoints.
    """
    trainee = Trainee(objective.modules(), schedule, worker, trained=trained)
    at = Step(0, schedule.steps, seed, worker, trainee.averaged)
    before = _restore(trainee, objective, schedule, at)
    devices = [worker.device] if worker.device.type == "cuda" else []
    started = time.monotonic()
    sums: dict[str, Tensor] = {}
    saves = _Saves()
    with (
        torch.random.fork_rng(devices),
        Batches(seed, worker.rank, worker.world, worker.device) as batches,
    ):
        while at.number < schedule.steps:
            torch.manual_seed(seed_of(seed, "step", at.number, worker.rank))
            done = at.number + 1
            batch = batches.at(objective.streams(), at.number, last=done == schedule.steps)
            trainee.modules.train()
            with worker.autocast():
                loss = objective.loss(batch, at)
            norm = trainee.step(loss.sum, loss.count, at.number)
            at.passes += worker.world * (loss.trained + loss.forward * FORWARD)
            objective.update(loss, at)
            mean = loss.sum.detach() / loss.count
            for name, value in {"loss": mean, "gradient": norm, **loss.logs}.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
            saving = done == schedule.steps or done % worker.checkpoint_every == 0
            if saving or done % LOG_EVERY == 0:
                at.history.append(_row(sums, at, schedule))
                sums = {}
                saving = saving or saves.are_due(worker)
            if saving and worker.checkpoint is not None:
                seconds = before + time.monotonic() - started
                with saves:
                    _save(worker.checkpoint, trainee, objective, schedule, at, seconds)
            for hook in hooks:
                hook(objective, at)
            at.number = done
    seconds = before + time.monotonic() - started
    return Fitted(trainee.averaged.eval(), at.passes, at.history, seconds)


class _Saves:
    """When a checkpoint is due between those at fixed steps: a minute after the last one.

    Where saving takes long, later, so that it takes at most one part in `SAVE_SHARE` of the time.
    """

    def __init__(self) -> None:
        self._last, self._took = time.monotonic(), 0.0

    def are_due(self, worker: Worker) -> bool:
        """Whether to save now, by the first worker's clock; all workers ask at the same steps."""
        late = time.monotonic() - self._last > max(SAVE_EVERY, SAVE_SHARE * self._took)
        said = torch.tensor([float(late and worker.rank == 0)], device=worker.device)
        return bool(worker.all_reduce(said).item() > 0)

    def __enter__(self) -> None:
        self._last = time.monotonic()

    def __exit__(self, *failed: object) -> None:
        now = time.monotonic()
        self._last, self._took = now, now - self._last


def _row(sums: Mapping[str, Tensor], at: Step, schedule: Schedule) -> dict[str, float]:
    """A row of the history: means over workers and over the steps since the row before."""
    done = at.number + 1
    steps = done - (int(at.history[-1]["step"]) if at.history else 0)
    means = at.worker.all_reduce(torch.stack([*sums.values()])) / (steps * at.worker.world)
    named = dict(zip(sums, means.tolist(), strict=True))
    if not math.isfinite(named["loss"]):
        raise RunError(
            f"step {done}: loss is {named['loss']}, expected a number; try a lower lr than "
            f"{schedule.lr} or a smaller clip than {schedule.clip}"
        )
    rate = schedule.rate(at.number)
    return {"step": float(done), "passes": at.passes, "lr": rate, **named}


def _save(
    folder: checkpoint.Folder,
    trainee: Trainee,
    objective: Objective,
    schedule: Schedule,
    at: Step,
    seconds: float,
) -> None:
    done = at.number + 1
    if at.worker.rank == 0:
        tensors = trainee.tensors()
        tensors |= {f"objective/{name}": value for name, value in objective.state().items()}
        facts = {
            "step": done,
            "passes": at.passes,
            "history": at.history,
            "seconds": seconds,
            "identity": _identity(schedule, at),
        }
        checkpoint.save(folder, done, tensors, facts)
    at.worker.barrier()


def _identity(schedule: Schedule, at: Step) -> dict[str, Any]:
    return {**schedule.model_dump(mode="json"), "seed": at.seed}


def _restore(trainee: Trainee, objective: Objective, schedule: Schedule, at: Step) -> float:
    """Continue from the newest checkpoint; returns the seconds spent before it."""
    folder = at.worker.checkpoint
    found = None if folder is None else checkpoint.latest(folder)
    if found is not None:
        tensors, facts = found
        now = _identity(schedule, at)
        for name in now.keys() | facts["identity"].keys():
            was, value = facts["identity"].get(name), now.get(name)
            if was != value:
                raise IdentityError(f"{folder}: checkpoint was made with {name} {was}, not {value}")
        try:
            trainee.load(tensors)
        except RuntimeError as err:
            first = str(err).splitlines()[0]
            raise IdentityError(f"{folder}: checkpoint of another network: {first}") from err
        objective.load(under("objective/", tensors))
        at.number, at.passes, at.history = facts["step"], facts["passes"], facts["history"]
    steps = torch.tensor([float(at.number)], device=at.worker.device)
    if at.worker.all_reduce(steps.clone()).item() != at.worker.world * steps.item():
        raise RunError(f"{folder}: worker {at.worker.rank} resumes at {at.number}, others do not")
    return 0.0 if found is None else float(found[1]["seconds"])
