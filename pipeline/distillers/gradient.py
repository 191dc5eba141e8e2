"""Gradient matching: synthetic images that pull a network where the real faces pull it.

What for: stronger than matching embeddings at one image per class, and still without unrolling.
Cost per step: forward and backward of the real faces, forward, backward and the backward through
both of the synthetic ones; between steps the network is trained on the synthetic set.
Source: Zhao, Mopuri, Bilen, Dataset Condensation with Gradient Matching (arXiv 2006.05929), eq. 7
for the objective, eq. 10 and appendix for the distance: per layer and output unit 1 - cosine;
siamese views: arXiv 2102.08259.
Departs: biases and norms count nothing, as in the released code and not in the text; the inner
network is trained on the soft targets of the set, without momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    Weights,
    draw,
    gradient,
    seeds,
    trained,
    weights_of,
)
from pipeline.distillers.siamese import siamese
from pipeline.models import FaceModel


class Gradient(Distiller):
    """Gradient matching. Workers divide the classes."""

    shares: Shares = "classes"

    def __init__(
        self,
        network: Network,
        *,
        augment: bool,
        outer: int,
        inner: int,
        batch: int | None,
        rate: float,
    ) -> None:
        """How the network moves on.

        Args:
            network: what the gradients are of.
            augment: siamese views.
            outer: steps until a new network is drawn.
            inner: training steps of the network on the synthetic set between two steps.
            batch: images of an inner step; None for all.
            rate: learning rate of those.
        """
        self._network, self._augment = network, augment
        self._outer, self._inner, self._batch, self._rate = outer, inner, batch, rate
        self._net: FaceModel | None = None
        self._weights: Weights | None = None

    def loss(self, learned: Learned, real: Real, at: Place) -> Part:
        """Distance of the gradients of this worker's classes, summed over classes."""
        net, weights = self._current(learned, at)
        images, targets = learned.inner()
        views = seeds(at.seed, learned.classes)
        total = learned.pixels.sum() * 0  # a worker without classes has a graph too
        passes = 0.0
        for code in at.own(learned.classes):
            faces, here = real.of(code), slice(code * learned.ipc, (code + 1) * learned.ipc)
            own, labels = images[here], real.labels.new_full((len(faces),), code)
            if self._augment:
                faces, own = siamese(faces, views[code]), siamese(own, views[code])
            pull = gradient(net, weights, faces, labels, in_graph=False)
            total = total + distance(
                pull, gradient(net, weights, own, targets[here], in_graph=True)
            )
            passes += len(faces) + IN_GRAPH * len(own)
        return Part(total, 1 / at.world, passes)

    def update(self, learned: Learned, at: Place) -> float:
        """Train the network on the set as it is now, or draw another one."""
        if (at.number + 1) % self._outer == 0:
            self._weights = None
            return 0.0
        net, weights = self._current(learned, at)
        passes = 0.0
        views = seeds(at.seed + 1, self._inner)
        for number in range(self._inner):
            index = draw(len(learned.pixels), self._batch, number, at.seed)
            with torch.no_grad():
                images, targets = learned.inner(index)
                if self._augment:
                    images = siamese(images, views[number])
            weights = trained(net, weights, images, targets, self._rate, in_graph=False)
            passes += len(images)
        self._weights = weights
        return passes / at.world  # every worker trains the same one

    def state(self) -> dict[str, Tensor]:
        """The network's weights, between two drawings."""
        return {} if self._weights is None else dict(self._weights)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._weights = dict(state) or None

    def _current(self, learned: Learned, at: Place) -> tuple[FaceModel, Weights]:
        device = learned.pixels.device
        if self._net is None:
            self._net = self._network(0).to(device)
        if self._weights is None:
            # Nowhere but at the multiples of `outer`, also after a restart: see `update`, `state`.
            self._weights = weights_of(self._network(at.seed).to(device))
        self._weights = {name: value.to(device) for name, value in self._weights.items()}
        return self._net, self._weights


def distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Sum over layers and output units of 1 - cosine of two gradients; vectors count nothing."""
    parts = [
        (1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-8)).sum()
        for a, b in zip(real, synthetic, strict=True)
        if a.ndim > 1
    ]
    return torch.stack(parts).sum()
