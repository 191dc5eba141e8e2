"""Trajectory matching: training on the synthetic set leads where training on real faces led.

What for: the strongest classic method; early trajectories teach small sets, late ones large sets.
Experts, networks trained on the real faces whose weights are kept after every epoch, are made once
and serve any number of images per class. Cost per step and pair: `steps` training steps inside the
graph; the real faces are not looked at again. An expert keeps (epochs + 1) x parameters x 4 bytes.
Source: Cazenave et al., Dataset Distillation by Matching Training Trajectories (arXiv 2203.11932),
eq. 2; the range of epochs that grows and learned soft targets: Guo et al., DATM (arXiv 2310.05773),
sections 4.2 and 4.3.
Departs: the range grows linearly to its end over the first half of the steps and always starts at
the untrained network: there is no lower bound T-, which sets of many images per class gain from;
targets start as they are given, the teacher's or the class, instead of from an expert's logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.distillers.learned import (
    IN_GRAPH,
    Distiller,
    Learned,
    Network,
    Part,
    Place,
    Real,
    Shares,
    draw,
    flat,
    seeds,
    trained,
    unflat,
    weights_of,
)
from pipeline.distillers.siamese import siamese
from pipeline.models import FaceModel


class Trajectory(Distiller):
    """Trajectory matching. Workers divide the pairs of start and end."""

    shares: Shares = "networks"

    def __init__(
        self,
        network: Network,
        experts: Sequence[Tensor],
        *,
        augment: bool,
        pairs: int,
        steps: int,
        ahead: int,
        latest: tuple[int, int],
        batch: int | None,
    ) -> None:
        """What is matched.

        Args:
            network: the experts' architecture.
            experts: each the weights (E + 1, P) of one training, epoch by epoch.
            augment: a random view of the set in every inner step.
            pairs: of start and end per step, over all workers together.
            steps: of training on the set, to be as far as the expert is.
            ahead: epochs from start to end of the expert.
            latest: the last epoch that a start is drawn from, at the first step and from half of
                the steps on.
            batch: images of an inner step; None for all.
        """
        self._network, self._experts = network, experts
        self._augment, self._pairs, self._steps = augment, pairs, steps
        self._ahead, self._latest, self._batch = ahead, latest, batch
        self._net: FaceModel | None = None

    def loss(self, learned: Learned, real: Real, at: Place) -> Part:
        """Squared distance to where the expert went, in units of how far it went."""
        total, passes = learned.pixels.sum() * 0, 0.0
        own = at.own(self._pairs)
        last = self.latest(at)
        for number in own:
            loss, cost = self._one(learned, seeds(at.seed, self._pairs)[number], last)
            total, passes = total + loss, passes + cost
        return Part(total, float(len(own)), passes)

    def _one(self, learned: Learned, seed: int, last: int) -> tuple[Tensor, float]:
        device = learned.pixels.device
        if self._net is None:
            self._net = self._network(0).to(device)
        drawn = seeds(seed, 3 + self._steps)
        expert = self._experts[drawn[0] % len(self._experts)]
        first = drawn[1] % (last + 1)
        start, end = expert[first].to(device), expert[first + self._ahead].to(device)
        weights, passes = unflat(start, weights_of(self._net)), 0.0
        for number in range(self._steps):
            images, targets = learned.inner(
                draw(len(learned.pixels), self._batch, number, drawn[2])
            )
            if self._augment:
                images = siamese(images, drawn[3 + number])
            weights = trained(self._net, weights, images, targets, learned.rate(), in_graph=True)
            passes += IN_GRAPH * len(images)
        return (flat(weights) - end).square().sum() / (start - end).square().sum(), passes

    def latest(self, at: Place) -> int:
        """The last epoch that a start is drawn from in a step."""
        low, high = self._latest
        grown = min(1.0, 2 * at.number / max(at.steps, 1))
        return round(low + (high - low) * grown)


def train_expert(
    net: FaceModel, epochs: Iterable[Iterable[tuple[Tensor, Tensor]]], rate: float
) -> Tensor:
    """Train a network by plain gradient descent and keep its weights after every epoch.

    Args:
        net: with random weights; not changed.
        epochs: faces (B, C, S, S) in [0, 1] and class codes (B,), batch by batch, epoch by epoch.
        rate: learning rate.

    Returns:
        (E + 1, P) float32 on the CPU, the start first.
    """
    weights = weights_of(net)
    kept = [flat(weights).cpu()]
    for epoch in epochs:
        for faces, labels in epoch:
            weights = trained(net, weights, faces, labels, rate, in_graph=False)
        kept.append(flat(weights).cpu())
    return torch.stack(kept)
