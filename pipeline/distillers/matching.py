"""Distribution matching: synthetic images whose mean embedding is that of the real faces.

What for: no inner training loop and no second-order gradients, so it is the cheapest distiller that
beats random faces at few images per class. Cost per step: one forward of the real faces, one
forward and backward of the synthetic ones, through a network that is drawn anew.
Source: Zhao, Bilen, Dataset Condensation with Distribution Matching (arXiv 2110.04181), eq. 5: the
sum over classes of || mean psi(A(real)) - mean psi(A(synthetic)) ||^2 for random networks psi and
one random transformation A for both sides (siamese augmentation, arXiv 2102.08259, section 3).
Departs: A is one mild affine map with contrast and brightness instead of one operation picked from
a list, because an aligned face that is cut or turned far is no face.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models import FaceModel
from pipeline.schema import AllReduce

ROTATION = 15.0  # degrees
SCALE = 0.2  # share of the size
SHIFT = 0.1  # share of the side
CONTRAST = 0.4  # share of the contrast
BRIGHTNESS = 0.2  # units of the full range


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
        Scalar float32, at least 0.
    """
    sums = []
    with torch.no_grad():
        for code, faces in enumerate(real):  # class by class: the embedding maps are large
            seen = faces if seeds is None else siamese(faces, seeds[code])
            embedding = net.features(seen)[0].float()
            sums.append(torch.cat([embedding.sum(0), embedding.new_tensor([float(len(faces))])]))
        total = reduce(torch.stack(sums))
    means = total[:, :-1] / total[:, -1:]
    parts = synthetic.chunk(len(real))
    if seeds is not None:
        parts = tuple(siamese(part, seed) for part, seed in zip(parts, seeds, strict=True))
    embedding = net.features(torch.cat(parts))[0].float()
    learned = embedding.view(len(real), -1, embedding.shape[1]).mean(1)
    return (means - learned).square().sum()


def siamese(x: Tensor, seed: int) -> Tensor:
    """One random transformation for all faces of a batch; the same seed gives the same one.

    Flip, rotation, scale and shift, then contrast and brightness. Differentiable.

    Args:
        x: (B, C, S, S) float in [0, 1].
        seed: of the transformation.

    Returns:
        Shape of `x`; may leave [0, 1].
    """
    drawn = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    flip = -1.0 if drawn[0] < 0.5 else 1.0
    angle, zoom, right, down, contrast, brightness = (2 * value - 1 for value in drawn[1:])
    angle *= math.radians(ROTATION)
    zoom = math.exp(zoom * math.log1p(SCALE))
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    # A share of the side is twice as much in coordinates that run from -1 to 1.
    rows = [[flip * cos, -flip * sin, 2 * SHIFT * right], [sin, cos, 2 * SHIFT * down]]
    maps = torch.tensor(rows, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (1 + CONTRAST * contrast) + mean + BRIGHTNESS * brightness
