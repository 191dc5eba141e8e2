"""Proves that a siamese view is one transformation of a batch, and that seeds decide which."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.distillers.siamese import siamese


def faces(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_siamese__one_transformation_for_all_faces_of_a_batch() -> None:
    x = faces(3, 0)
    together = siamese(x, 5)
    assert torch.allclose(together, torch.cat([siamese(face[None], 5) for face in x]), atol=1e-6)
    assert not torch.allclose(together, siamese(x, 6))
    assert not torch.allclose(together, x)


def test_siamese__about_half_of_the_seeds_mirror() -> None:
    ramp = torch.linspace(0, 1, 12).expand(1, 1, 12, 12)
    rising = [
        bool(y[..., -1].mean() > y[..., 0].mean()) for y in (siamese(ramp, s) for s in range(60))
    ]
    assert 15 < sum(rising) < 45
