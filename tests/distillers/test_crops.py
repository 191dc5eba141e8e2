"""Proves that the best crop of the best faces is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.distillers.crops import SMALLEST, best_crops


def brightness(images: Tensor) -> Tensor:
    """A teacher of two classes: dark, bright."""
    bright = images.mean((1, 2, 3)).clamp(0.01, 0.99)
    return torch.stack([1 - bright, bright], 1)


def test_best_crops__the_most_convincing_faces_come_first() -> None:
    levels = torch.tensor([0.2, 0.9, 0.5, 0.7])
    faces = levels[:, None, None, None].expand(4, 1, 8, 8).clone()
    for code, expected in ((1, [1, 3]), (0, [0, 2])):
        images, order = best_crops(
            faces, code, brightness, count=2, crops=3, generator=torch.Generator()
        )
        assert order.tolist() == expected
        assert torch.allclose(images, faces[order], atol=1e-6)


def test_best_crops__a_better_crop_replaces_the_whole_face() -> None:
    face = torch.zeros(1, 1, 16, 16)
    face[..., 4:12, 4:12] = 1.0  # cutting the dark border makes it brighter
    generator = torch.Generator().manual_seed(0)
    images, _ = best_crops(face, 1, brightness, count=1, crops=8, generator=generator)
    assert images.mean() > face.mean() + 0.05
    assert images.mean() <= face.mean() / SMALLEST**2 + 1e-6
    whole, _ = best_crops(face, 1, brightness, count=1, crops=1, generator=generator)
    assert torch.equal(whole, face)
