"""What a distillation will take, counted before it runs: memory of the graph, image passes.

What for: a gradient through training holds every step inside it; a set that does not fit should say
so in a second and not after an hour. Cost: a few losses of the method on tensors without storage,
0.1 to 3 s on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.distillers.learned import Real, flat, weights_of
from pipeline.errors import ConfigError
from pipeline.training.distill import CANDIDATES, CROPS
from pipeline.training.distilling import DistillConfig, Distilling, objective_of
from pipeline.training.faces import ArrayFaces, machine_memory
from pipeline.training.loop import Step, Worker, local
from pipeline.training.supervised import new_model

SHARE = 0.6  # of the memory that graphs and experts may take
TRACED = 4  # steps whose passes are averaged


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    graph_mb: float
    """Tensors that a step's backward needs on one worker, MB."""
    passes: float
    """Image passes of learning the set, over all workers."""
    expert_passes: float
    """Image passes of the experts, all together."""
    expert_mb: float
    """Their weights, which every worker holds in the host's memory."""
    judged: float = 0.0
    """Faces and images that the teacher looks at, at most, over all workers: to choose the first
    ones, for soft labels, and every real face once for what the images look like."""

    @property
    def peak_mb(self) -> float:
        """What the process grows by, MB: the backward's own tensors double the graph.

        Measured peaks were 1.7 to 2.2 times the graph (convnet of width 32, 80 images of 48 px).
        """
        return 2 * self.graph_mb

    def __str__(self) -> str:
        """One line for a person."""
        said = [f"the teacher sees {self.judged:,.0f} images"]
        if self.passes:
            said.insert(0, f"{self.passes:,.0f} image passes, {self.peak_mb:,.0f} MB per worker")
        if self.expert_mb:
            said.append(f"{self.expert_mb:,.0f} MB of experts")
        return ", ".join(said)


def cost_of(
    config: DistillConfig, label_names: Sequence[str], faces: int, workers: int = 1
) -> Cost:
    """Count a distillation of so many real faces.

    Args:
        config: how the set is learned; a chosen set costs the teacher's looks alone.
        label_names: K class names.
        faces: real faces, labeled and mined.
        workers: that share a step; `graph_mb` is of the one that has the most to do.
    """
    judged = looks(config, len(label_names), faces, workers)
    if not config.learned:
        return Cost(0.0, 0.0, 0.0, 0.0, judged)
    expert_passes = expert_mb = 0.0
    experts: list[Tensor] = []
    if config.method == "trajectory":
        own = config.experts
        expert_passes = own.passes(faces)
        experts = [blank_expert(config, label_names)]
        expert_mb = own.count * experts[0].numel() * 4 / 1e6
    objective = _blank(config, label_names, experts)
    meta = Distilling(
        objective.distiller, objective.learned.to("meta"), objective.streams(), local("meta")
    )
    held, passes = 0.0, []
    for number in range(min(TRACED, config.steps)):
        mb, took = _trace(meta, config, len(label_names), number, 1)
        if workers > 1:
            mb, _ = _trace(meta, config, len(label_names), number, workers)
        held = max(held, mb)
        passes.append(took)
    again = 0.0
    if config.method == "gradient":  # the network's own training between steps
        total = config.ipc * len(label_names)
        images = min(config.inner.batch or total, total)
        again = config.inner.steps * images * (1 - 1 / config.inner.outer)
    learning = config.steps * (float(np.mean(passes)) + again)
    return Cost(held, learning, expert_passes, expert_mb, judged)


def looks(config: DistillConfig, classes: int, faces: int, workers: int = 1) -> float:
    """Faces the teacher looks at: for provenance on the first worker, for a start on every one."""
    images = classes * config.ipc
    method = config.start if config.learned else config.method
    start = 0 if method == "random" else faces
    if method == "crops":
        start = CROPS * min(faces, classes * max(CANDIDATES, config.ipc))
    return float(faces + images + workers * (start + images))


def refuse_too_large(config: DistillConfig, found: Cost, worker: Worker) -> None:
    """ConfigError where this worker's graph, or the experts it follows, would not fit.

    The graph is on the worker's device: on a GPU beside nothing else, on a CPU beside the experts
    and all other workers. Experts are always in the host's memory.
    """
    host = SHARE * machine_memory() / 1e6 / worker.world
    beside, limit, on_gpu = found.expert_mb, host, worker.device.type == "cuda"
    if on_gpu:
        beside, limit = 0.0, SHARE * torch.cuda.mem_get_info(worker.device)[0] / 1e6
    limit = config.memory_mb or limit
    if found.peak_mb + beside > limit:
        experts = f" and its experts {beside:,.0f} MB" if beside else ""
        raise ConfigError(
            f"distill: a step of {config.method} needs about {found.peak_mb:,.0f} MB{experts}, and "
            f"{limit:,.0f} may be used; lower inner.steps, inner.window, inner.batch, ipc"
            f"{' or experts.count' if beside else ''}, or raise distill.memory_mb"
        )
    if on_gpu and found.expert_mb > host:
        raise ConfigError(
            f"distill: {config.experts.count} experts need {found.expert_mb:,.0f} MB in every "
            f"worker, and {host:,.0f} of the host's memory may be used; lower experts.count or "
            "experts.epochs"
        )


def blank_expert(config: DistillConfig, label_names: Sequence[str]) -> Tensor:
    """A course of weights (E + 1, P) that nothing was trained for."""
    weights = flat(weights_of(new_model(config.net, label_names, 0)))
    epochs = torch.arange(config.experts.epochs + 1, dtype=torch.float32)
    return weights + 1e-3 * epochs[:, None]


def _blank(
    config: DistillConfig, label_names: Sequence[str], experts: Sequence[Tensor]
) -> Distilling:
    """The objective on black images."""
    net, classes = config.net, len(label_names)
    black = np.zeros((classes * config.ipc, net.channels, net.size, net.size), np.uint8)
    targets = np.eye(classes, dtype=np.float32)[np.repeat(np.arange(classes), config.ipc)]
    faces = ArrayFaces(np.zeros((classes, net.channels, net.size, net.size), np.uint8))
    worker = local("cpu", torch.float32)
    return objective_of(
        config, faces, np.arange(classes), label_names, worker, black, targets, experts
    )


class _Held:
    """Bytes of the tensors that graphs hold; a graph that is dropped gives its own back."""

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._users: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> _Kept:
        """Called with every tensor that a graph saves."""
        return _Kept(self, tensor)

    def add(self, storage: int, size: int) -> None:
        """One more user of a storage."""
        users = self._users.get(storage, 0)
        self._users[storage] = users + 1
        self._now += 0 if users else size
        self.most = max(self.most, self._now)

    def drop(self, storage: int, size: int) -> None:
        """One user less."""
        self._users[storage] -= 1
        if self._users[storage] == 0:
            del self._users[storage]
            self._now -= size


class _Kept:
    """A saved tensor; it lives as long as its graph."""

    def __init__(self, held: _Held, tensor: Tensor) -> None:
        self.tensor, self._held = tensor, held
        storage = tensor.untyped_storage()
        self._storage, self._size = storage._cdata, storage.nbytes()
        held.add(self._storage, self._size)

    def __del__(self) -> None:
        self._held.drop(self._storage, self._size)


class _Sampled(torch.autograd.Function):
    """What grid_sample leaves behind, without sampling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, grid)
        return x.new_empty(*x.shape[:2], *grid.shape[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), None


class _Cheap(TorchFunctionMode):
    """Spares a trace on meta tensors most of its time.

    There torch composes grid_sample of a hundred small operations: four fifths of a trace.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.grid_sample and args[0].is_meta:
            return _Sampled.apply(args[0], args[1])
        return func(*args, **(kwargs or {}))


def _trace(
    objective: Distilling, config: DistillConfig, classes: int, number: int, workers: int
) -> tuple[float, float]:
    """MB that a step's backward needs on the first of so many workers, and its image passes."""
    held = _Held()
    net, each = config.net, config.batch
    if objective.distiller.shares == "faces":
        each = -(-each // workers)
    count = each if config.method == "unrolled" else each * classes
    count = 0 if config.method == "trajectory" else count
    real = Real(
        torch.empty(count, net.channels, net.size, net.size, device="meta"),
        torch.zeros(count, dtype=torch.long, device="meta"),
        {code: slice(code * each, (code + 1) * each) for code in range(classes)},
    )
    worker = replace(local("meta", torch.float32), world=workers)
    at = Step(number, config.steps, 0, worker, torch.nn.ModuleDict())
    with _Cheap(), torch.autograd.graph.saved_tensors_hooks(held.keep, lambda kept: kept.tensor):
        part = objective.distiller.loss(objective.learned, real, objective.place(at))
    return held.most / 1e6, part.passes
