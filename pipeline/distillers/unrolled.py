"""Unrolled optimization: synthetic images on which a new network learns to do well on real faces.

What for: the objective is what one wants of a distilled set, not a proxy. With no `window` the
gradient runs through all training steps, the first form of data set distillation and the one the
omni-supervised paper builds on; with one, training stops at a random step and the gradient runs
through the last `window` steps only, which is cheaper and does not explode. Cost per step and
network: the steps outside the window are plain training; those inside keep their graph.
Source: Wang et al., Dataset Distillation (arXiv 1811.10959), algorithm 1, random initialization;
Feng et al., Embarrassingly Simple Dataset Distillation (arXiv 2311.07025), random truncated window.
Departs: one learned rate for all inner steps instead of one for each; plain gradient descent inside
instead of Adam; every inner step may see the whole set; mean over several networks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    logits_of,
    seeds,
    trained,
    weights_of,
)
from pipeline.distillers.siamese import siamese


class Unrolled(Distiller):
    """Back-propagation through training. Workers divide the inner networks."""

    shares: Shares = "networks"

    def __init__(
        self,
        network: Network,
        *,
        augment: bool,
        networks: int,
        steps: int,
        window: int | None,
        batch: int | None,
    ) -> None:
        """How far inner training goes.

        Args:
            network: what is trained inside.
            augment: a random view of the set in every inner step.
            networks: per step, over all workers together.
            steps: of inner training, at most.
            window: steps at its end that the gradient runs through; None: all, and always `steps`.
            batch: images of an inner step; None for all.
        """
        self._network, self._augment, self._networks = network, augment, networks
        self._steps, self._window, self._batch = steps, window, batch

    def loss(self, learned: Learned, real: Real, at: Place) -> Part:
        """Cross entropy of the real faces under networks that were trained on the set."""
        total, passes = learned.pixels.sum() * 0, 0.0
        own = at.own(self._networks)
        for number in own:
            loss, cost = self._one(learned, real, seeds(at.seed, self._networks)[number])
            total, passes = total + loss, passes + cost
        return Part(total, float(len(own)), passes)

    def _one(self, learned: Learned, real: Real, seed: int) -> tuple[Tensor, float]:
        start, stop = self.span(seed)
        drawn = seeds(seed, 2 + stop)
        net = self._network(drawn[0]).to(learned.pixels.device)
        weights, passes = weights_of(net), 0.0
        for number in range(stop):
            in_graph = number >= start
            images, targets = learned.inner(
                draw(len(learned.pixels), self._batch, number, drawn[1])
            )
            if self._augment:
                images = siamese(images, drawn[2 + number])
            rate = learned.rate()
            if not in_graph:
                images, targets, rate = images.detach(), targets.detach(), rate.detach()
            weights = trained(net, weights, images, targets, rate, in_graph=in_graph)
            passes += len(images) * (IN_GRAPH if in_graph else 1)
        loss = F.cross_entropy(logits_of(net, weights, real.images), real.labels)
        return loss, passes + len(real.images)

    def span(self, seed: int) -> tuple[int, int]:
        """First step inside the graph, and where training stops, of the network of a seed."""
        if self._window is None:
            return 0, self._steps
        generator = torch.Generator().manual_seed(seed % 2**63)
        stop = int(torch.randint(self._window, self._steps + 1, (), generator=generator))
        return stop - self._window, stop
