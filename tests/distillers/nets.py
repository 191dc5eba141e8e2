"""Tiny networks and sets for the distillers' tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillers.learned import Learned, Place
from pipeline.models import FaceModel, ModelConfig, create

NAMES = ("neutral", "happiness", "anger")
CONFIG = ModelConfig(name="convnet", args={"width": 4, "depth": 2}, size=8, color="gray", dropout=0)


def alone(tensor: Tensor) -> Tensor:
    """Sum over one worker."""
    return tensor


def network(seed: int) -> FaceModel:
    """A small network in double precision, so that finite differences mean something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**31)
        return create(CONFIG, NAMES).double()


def faces(count: int, seed: int) -> Tensor:
    """Noise (count, 1, 8, 8) in [0.2, 0.8], away from the ends."""
    drawn = torch.rand(
        count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return 0.2 + 0.6 * drawn


def learned(ipc: int, *, rate: float | None = None, learn_targets: bool = False) -> Learned:
    """A set of noise, in double precision."""
    codes = torch.arange(len(NAMES)).repeat_interleave(ipc)
    targets = torch.nn.functional.one_hot(codes, len(NAMES)).double()
    if learn_targets:
        targets = 0.8 * targets + 0.2 / len(NAMES)
    made = Learned(faces(len(codes), 99), targets, rate=rate, learn_targets=learn_targets)
    return made.double()


def place(number: int = 0, *, rank: int = 0, world: int = 1, steps: int = 10) -> Place:
    """A step; every step has a seed of its own."""
    return Place(number, steps, 1000 + number, rank, world, alone)


def finite_difference(loss: object, parameter: Tensor, at: Sequence[int], eps: float) -> float:
    """Central difference of a function without arguments by one entry of a parameter."""
    assert callable(loss)
    values = parameter.data
    kept = values[tuple(at)].item()
    found = []
    for moved in (kept + eps, kept - eps):
        values[tuple(at)] = moved
        found.append(float(loss().detach()))
    values[tuple(at)] = kept
    return (found[0] - found[1]) / (2 * eps)


def value(tensor: Tensor) -> float:
    """A scalar without its graph."""
    return float(tensor.detach())


def descend(net: FaceModel, images: Tensor, targets: Tensor, steps: int, rate: float) -> FaceModel:
    """Plain gradient descent on one batch, written out; moves the network and returns it."""
    for _ in range(steps):
        net.zero_grad()
        F.cross_entropy(net(images), targets).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter -= rate * parameter.grad
    return net
