"""What a training step does after the loss: gradients, the optimizer, the average of the weights.

Cost: about 3 ms per step for 1.2 M parameters on one core; five times the weights in memory.
Source: AdamW arXiv 1711.05101; one cosine with warm-up arXiv 1608.03983 and 1706.02677; average of
weights arXiv 1703.01780, with the ramp (1 + t) / (10 + t) of TensorFlow's moving averages where a
training starts from random weights. One that starts from trained weights has no ramp, for its
average would forget them within a few steps.
Departs: running statistics of BatchNorm are averaged like the weights they belong to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config, unread
from pipeline.training.worker import Worker

Beta = Annotated[float, Field(ge=0, lt=1)]


class Schedule(Config):
    """Steps, optimizer and average of a run."""

    steps: int = Field(default=1000, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    """Highest learning rate; a warm-up leads to it, one cosine from it to 0."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of weights; biases, norms and other vectors are left alone."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Of adamw."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd, which adds the decay to the gradient."""
    clip: float | None = Field(default=5.0, gt=0)
    """Largest norm of the gradient; None: not clipped."""
    ema: float | None = Field(default=0.998, gt=0, lt=1)
    """Decay of the average of the weights, which is what is kept; None: the last weights are. From
    random weights it rises to this as (1 + t) / (10 + t)."""

    @model_validator(mode="after")
    def _settings_of_the_optimizer(self) -> Self:
        other = "momentum" if self.optimizer == "adamw" else "betas"
        if unread(self, [other]):
            raise ValueError(f"{other}: {self.optimizer} reads none; drop it")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (1 + math.cos(math.pi * (step - rising) / (self.steps - rising))) / 2


class Trainee:
    """The modules of an objective, trained in place, with their optimizer and their average.

    `trained`: they are trained already, heads included; their average starts as good as they are.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        schedule: Schedule,
        worker: Worker,
        *,
        trained: bool = False,
    ) -> None:
        self.schedule, self.worker, self._trained = schedule, worker, trained
        modules.to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules: nn.ModuleDict = _synchronized(modules) if worker.world > 1 else modules
        learned = [p for p in self.modules.parameters() if p.requires_grad]
        self.parameters = learned
        _copy_from_first(learned, worker)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if p.ndim > 1]},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = _optimizer(groups, schedule)
        self.averaged = self.modules
        if schedule.ema is not None:
            self.averaged = copy.deepcopy(self.modules).requires_grad_(False).eval()

    def step(self, loss: Tensor, count: float, number: int) -> Tensor:
        """Backward, sum over workers, clip, optimizer, average; returns the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(number)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._share_gradients(count)
        limit = math.inf if self.schedule.clip is None else self.schedule.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        if self.schedule.ema is not None:
            # A young average must forget a random start: the decay grows with the steps.
            young = 1.0 if self._trained else (1 + number) / (10 + number)
            self._average(min(self.schedule.ema, young))
        return norm

    def _share_gradients(self, count: float) -> None:
        # A parameter without gradient here may have one elsewhere: all workers send all.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.worker.world == 1:
            if count != 1:
                torch._foreach_div_(gradients, count)
            return
        own = torch.tensor([count], dtype=torch.float32, device=self.worker.device)
        flat = self.worker.all_reduce(torch.cat([*(g.reshape(-1) for g in gradients), own]))
        for gradient, part in zip(gradients, _unflatten(flat / flat[-1], gradients), strict=True):
            gradient.copy_(part)

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        new, old = self.modules.state_dict(), self.averaged.state_dict()
        floats = [name for name in new if new[name].is_floating_point()]
        torch._foreach_lerp_([old[n] for n in floats], [new[n] for n in floats], 1 - decay)
        for name in new.keys() - floats:
            old[name].copy_(new[name])

    def tensors(self) -> dict[str, Tensor]:
        """Weights, average and optimizer, by name."""
        named = {f"modules/{name}": value for name, value in self.modules.state_dict().items()}
        if self.averaged is not self.modules:
            average = self.averaged.state_dict()
            named |= {f"averaged/{name}": value for name, value in average.items()}
        for i, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                named[f"optimizer/{i}/{name}"] = value
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.modules.load_state_dict(under("modules/", tensors))
        if self.averaged is not self.modules:
            self.averaged.load_state_dict(under("averaged/", tensors))
        for i, parameter in enumerate(self.parameters):
            kept = under(f"optimizer/{i}/", tensors)
            # The moments take the layout of their parameter: the fused step needs it.
            self.optimizer.state[parameter] = {
                name: torch.empty_like(parameter).copy_(value)
                if value.shape == parameter.shape and value.ndim
                else value.to(parameter.device)
                for name, value in kept.items()
            }


def _optimizer(groups: list[dict[str, Any]], schedule: Schedule) -> torch.optim.Optimizer:
    rate, decay = schedule.lr, schedule.weight_decay
    if schedule.optimizer == "sgd":
        momentum = schedule.momentum
        return torch.optim.SGD(groups, rate, momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, rate, schedule.betas, weight_decay=decay, fused=True)


def _synchronized(modules: nn.ModuleDict) -> nn.ModuleDict:
    """The modules with SyncBatchNorm on GPUs; it refuses CPU tensors."""
    if next(modules.parameters()).device.type != "cuda":
        return modules
    # torch's own conversion would drop the activation inside timm's BatchNormAct2d.
    from timm.layers import convert_sync_batchnorm

    converted: nn.ModuleDict = convert_sync_batchnorm(modules)
    return converted


@torch.no_grad()
def _copy_from_first(parameters: Sequence[Tensor], worker: Worker) -> None:
    if worker.world == 1:
        return
    keep = 1.0 if worker.rank == 0 else 0.0
    flat = worker.all_reduce(torch.cat([p.reshape(-1) * keep for p in parameters]))
    for parameter, part in zip(parameters, _unflatten(flat, parameters), strict=True):
        parameter.copy_(part)


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> Iterable[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    parts = torch.split(flat[: sum(sizes)], sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
