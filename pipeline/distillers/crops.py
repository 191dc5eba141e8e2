"""The most convincing crops of real faces, as judged by a teacher.

What for: no optimization at all, and on large photos the strongest set of its kind when trained
with soft labels. Cost: `crops` forwards of the teacher per candidate face.
Source: Sun et al., On the Diversity and Realism of Distilled Dataset, RDED (arXiv 2312.03526),
section 4: of several crops of a face keep the one with the least cross entropy, of the faces those
whose crop has the least.
Departs: one crop fills an image; RDED tiles four, and four half faces are no aligned face. Crops
keep at least `SMALLEST` of the side, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 0.75  # share of the side that a crop keeps at least

Judge = Callable[[Tensor], Tensor]
"""A teacher: images (B, C, S, S) float in [0, 1] -> probabilities (B, K)."""


def best_crops(
    faces: Tensor, code: int, judge: Judge, *, count: int, crops: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The `count` best crops of a class's faces, at most one of each.

    Args:
        faces: (N, C, S, S) float in [0, 1], all of one class.
        code: that class.
        judge: the teacher.
        count: crops wanted, at most N.
        crops: tried per face; the whole face is the first of them.
        generator: of the crops.

    Returns:
        images (count, C, S, S) float in [0, 1], best first, and their faces' positions (count,).
    """
    best, cost = faces, _cost(judge, faces, code)
    for _ in range(1, crops):
        seen = _crop(faces, generator)
        own = _cost(judge, seen, code)
        better = own < cost
        best = torch.where(better[:, None, None, None], seen, best)
        cost = torch.where(better, own, cost)
    order = torch.argsort(cost, stable=True)[:count]
    return best[order], order


def _cost(judge: Judge, images: Tensor, code: int) -> Tensor:
    """Cross entropy (N,) of a class under the teacher."""
    return -judge(images)[:, code].clamp(min=1e-12).log()


def _crop(faces: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of each face, enlarged to the whole."""
    drawn = torch.rand(len(faces), 3, generator=generator).to(faces.device)
    side = SMALLEST + (1 - SMALLEST) * drawn[:, 0]
    shift = (2 * drawn[:, 1:] - 1) * (1 - side)[:, None]
    maps = faces.new_zeros(len(faces), 2, 3)
    maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = side, side, shift
    grid = F.affine_grid(maps, list(faces.shape), align_corners=False)
    return F.grid_sample(faces, grid, mode="bilinear", padding_mode="border", align_corners=False)
