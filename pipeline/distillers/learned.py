"""What all learned distillers share: the set being learned, a step's place, training in a graph.

What for: a method is a loss on the set; the loop that lowers it, its checkpoints and workers are
the same for all (training/distill.py). Work is shared in one of three ways: `faces` (every worker
sees a part of the real ones), `classes` (every worker matches some of the classes) or `networks`
(every worker trains some of the inner networks). Either way the sum over workers of losses and of
`count` is what one worker has, so 1, 2 and 4 workers learn the same images up to rounding.
Cost: a training step inside the graph keeps its activations and its gradient's until the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.errors import ModelError
from pipeline.models import FaceModel
from pipeline.schema import AllReduce

Shares = Literal["faces", "classes", "networks"]
"""What the workers divide among themselves."""

Network = Callable[[int], FaceModel]
"""Seed -> a network with random weights, the same for the same seed."""

Weights = dict[str, Tensor]
"""A network's parameters by name."""

IN_GRAPH = 3.0
"""Image passes of an image in a training step that is differentiated: twice itself for the
backward through forward and backward."""


class Learned(nn.Module):
    """Images, their targets and the learning rate they are trained with, while they are learned."""

    def __init__(
        self, images: Tensor, targets: Tensor, *, rate: float | None, learn_targets: bool
    ) -> None:
        """Start from real faces.

        Args:
            images: (K * ipc, C, S, S) float in [0, 1], class after class.
            targets: probabilities (K * ipc, K).
            rate: learning rate of inner networks to start from; None: nothing is trained inside.
            learn_targets: whether the probabilities are learned, as logits.
        """
        super().__init__()
        self.classes = targets.shape[1]
        self.pixels = nn.Parameter(images.clone())
        self.register_buffer("fixed", targets.float(), persistent=False)
        self.logits = self.log_rate = None
        if learn_targets:
            self.logits = nn.Parameter(targets.float().clamp(min=1e-3).log())
        if rate is not None:
            self.log_rate = nn.Parameter(torch.tensor(float(rate)).log())

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.pixels) // self.classes

    def targets(self) -> Tensor:
        """Probabilities (K * ipc, K)."""
        fixed: Tensor = self.fixed  # type: ignore[assignment]
        return fixed if self.logits is None else torch.softmax(self.logits, 1)

    def rate(self) -> Tensor:
        """Learning rate of inner networks, scalar."""
        assert self.log_rate is not None
        return self.log_rate.exp()

    def inner(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and probabilities of an inner step, all or some."""
        if index is None:
            return self.pixels, self.targets()
        return self.pixels[index], self.targets()[index]


@dataclass(frozen=True)
class Place:
    """One step of one worker."""

    number: int
    """Steps done before this one."""
    steps: int
    """Of the whole run."""
    seed: int
    rank: int
    world: int
    reduce: AllReduce
    """Sum over workers."""

    def own(self, count: int) -> range:
        """Which of `count` things are this worker's."""
        return range(self.rank, count, self.world)


@dataclass(frozen=True)
class Real:
    """Real faces of a step."""

    images: Tensor
    """(B, C, S, S) float in [0, 1]."""
    labels: Tensor
    """Class codes (B,)."""
    where: Mapping[int, slice] = field(default_factory=dict)
    """Each class's faces, where they lie class after class."""

    def of(self, code: int) -> Tensor:
        """Faces of a class."""
        return self.images[self.where[code]]


@dataclass(frozen=True)
class Part:
    """A worker's part of a step's loss."""

    sum: Tensor
    """Scalar; with `count` summed over workers, the loss is sum / count."""
    count: float
    passes: float
    """Image passes of this worker: forward and backward 1, forward alone 1/3, see IN_GRAPH."""


class Distiller(Protocol):
    """A method that learns a set; where it says no more, nothing in it moves."""

    shares: Shares

    def loss(self, learned: Learned, real: Real, at: Place) -> Part:
        """The loss of a step, with a graph to everything in `learned`."""
        ...

    def update(self, learned: Learned, at: Place) -> float:
        """Move the inner state after a step; returns the image passes that took."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """What `update` moves."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        return


# -- training inside a graph ----------------------------------------------------------------------


def weights_of(net: FaceModel) -> Weights:
    """The parameters of a network, detached, ready to be moved and differentiated.

    Raises:
        ModelError: the network keeps running statistics, which no gradient reaches.
    """
    for name, module in net.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ModelError(
                f"{net.config.name}: {name} keeps running statistics, which training inside a "
                "gradient cannot move; choose a network with instance, group or layer norm"
            )
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def logits_of(net: FaceModel, weights: Weights, images: Tensor) -> Tensor:
    """Logits (B, K), at least float32, of a network with other weights."""
    logits: Tensor = functional_call(net, weights, (images,))
    return logits if logits.dtype == torch.float64 else logits.float()


def gradient(
    net: FaceModel, weights: Weights, images: Tensor, targets: Tensor, *, in_graph: bool
) -> list[Tensor]:
    """Gradient of the mean cross entropy by the weights, in their order.

    Args:
        net: the network.
        weights: its weights; part of a graph where an earlier step was.
        images: (B, C, S, S).
        targets: probabilities (B, K) or class codes (B,).
        in_graph: whether the gradient can be differentiated again.
    """
    leaves = {
        name: value if value.requires_grad else value.detach().requires_grad_()
        for name, value in weights.items()
    }
    loss = F.cross_entropy(logits_of(net, leaves, images), targets)
    return list(torch.autograd.grad(loss, list(leaves.values()), create_graph=in_graph))


def trained(
    net: FaceModel,
    weights: Weights,
    images: Tensor,
    targets: Tensor,
    rate: Tensor | float,
    *,
    in_graph: bool,
) -> Weights:
    """Weights after one step of plain gradient descent; part of the graph if asked for."""
    steps = gradient(net, weights, images, targets, in_graph=in_graph)
    moved = {
        name: value - rate * step
        for (name, value), step in zip(weights.items(), steps, strict=True)
    }
    return moved if in_graph else {name: value.detach() for name, value in moved.items()}


def flat(weights: Weights) -> Tensor:
    """All weights in one vector (P,)."""
    return torch.cat([value.reshape(-1) for value in weights.values()])


def unflat(vector: Tensor, like: Weights) -> Weights:
    """Inverse of :func:`flat`."""
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {
        name: part.view(value.shape)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def draw(count: int, batch: int | None, number: int, seed: int) -> Tensor | None:
    """Positions of an inner step's images: shuffled, each once per epoch; None for all."""
    if batch is None or batch >= count:
        return None
    per_epoch = count // batch
    epoch, place = divmod(number, per_epoch)
    generator = torch.Generator().manual_seed((seed + 7919 * epoch) % 2**63)
    return torch.randperm(count, generator=generator)[place * batch : (place + 1) * batch]


def seeds(seed: int, count: int) -> Sequence[int]:
    """Further seeds from one."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    found: list[int] = torch.randint(2**62, (count,), generator=generator).tolist()
    return found
