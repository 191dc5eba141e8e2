"""Distribution matching: synthetic images whose mean embedding is that of the real faces.

What for: no inner training loop and no second-order gradients, so it is the cheapest learned
distiller. Cost per step: one forward of the real faces, one forward and backward of the synthetic
ones, through a network that is drawn anew.
Source: Zhao, Bilen, Dataset Condensation with Distribution Matching (arXiv 2110.04181), eq. 5: the
sum over classes of || mean psi(A(real)) - mean psi(A(synthetic)) ||^2 for random networks psi and
one random transformation A for both sides.
Departs: A is the one of siamese.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.distillers.learned import (
    Distiller,
    Learned,
    Network,
    Part,
    Place,
    Real,
    Shares,
    seeds,
)
from pipeline.distillers.siamese import siamese
from pipeline.models import FaceModel
from pipeline.schema import AllReduce


class Distribution(Distiller):
    """Distribution matching."""

    shares: Shares = "faces"

    def __init__(self, network: Network, *, augment: bool) -> None:
        self._network, self._augment = network, augment

    def loss(self, learned: Learned, real: Real, at: Place) -> Part:
        """Distance of the classes' mean embeddings under a network that is drawn for this step."""
        drawn = seeds(at.seed, 1 + learned.classes)
        net = self._network(drawn[0]).to(learned.pixels.device)
        net.eval().requires_grad_(False)
        classes = [real.of(code) for code in range(learned.classes)]
        views = drawn[1:] if self._augment else None
        loss = matching_loss(net, classes, learned.pixels, at.reduce, views)
        # All workers compute the same loss and forward all synthetic images.
        return Part(loss, 1.0, len(learned.pixels) / at.world + len(real.images) / 3)


def matching_loss(
    net: FaceModel,
    real: Sequence[Tensor],
    synthetic: Tensor,
    reduce: AllReduce,
    seeds: Sequence[int] | None,
) -> Tensor:
    """Squared distance of the classes' mean embeddings, summed over classes.

    Every worker sees all synthetic images and its part of the real ones; the real means are those
    over all workers, so all workers compute the same loss and gradient.

    Args:
        net: the embedding, in evaluation mode; frozen.
        real: for each of the K classes this worker's faces (B, C, S, S), float in [0, 1].
        synthetic: (K * ipc, C, S, S), class after class; gets the gradient.
        reduce: sum over workers.
        seeds: of each class's transformation (K,), the same on every worker; None: as they are.

    Returns:
        Scalar, at least float32, at least 0.
    """
    sums = []
    with torch.no_grad():
        for code, faces in enumerate(real):  # class by class: the embedding maps are large
            seen = faces if seeds is None else siamese(faces, seeds[code])
            embedding = _embedded(net, seen)
            sums.append(torch.cat([embedding.sum(0), embedding.new_tensor([float(len(faces))])]))
        total = reduce(torch.stack(sums))
    means = total[:, :-1] / total[:, -1:]
    parts = synthetic.chunk(len(real))
    if seeds is not None:
        parts = tuple(siamese(part, seed) for part, seed in zip(parts, seeds, strict=True))
    embedding = _embedded(net, torch.cat(parts))
    learned = embedding.view(len(real), -1, embedding.shape[1]).mean(1)
    return (means - learned).square().sum()


def _embedded(net: FaceModel, faces: Tensor) -> Tensor:
    """Embeddings (B, D), at least float32."""
    embedding: Tensor = net.features(faces)[0]
    return embedding if embedding.dtype == torch.float64 else embedding.float()
