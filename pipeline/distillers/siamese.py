"""One random transformation for real and synthetic faces alike.

What for: matched through the same transformation, images learn what survives it. Cost: one affine
resampling of the batch.
Source: differentiable siamese augmentation, Zhao and Bilen (arXiv 2102.08259, section 3).
Departs: one mild affine map with contrast and brightness instead of one operation picked from a
list, because an aligned face that is cut or turned far is no face.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION = 15.0  # degrees
SCALE = 0.2  # share of the size
SHIFT = 0.1  # share of the side
CONTRAST = 0.4  # share of the contrast
BRIGHTNESS = 0.2  # units of the full range


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
