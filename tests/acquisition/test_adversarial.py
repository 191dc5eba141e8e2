"""Proves DeepFool's steps against closed forms: hyperplanes, a sphere, a face without a slope."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.acquisition.adversarial import boundary, deepfool

from .pools import blobs


@pytest.fixture
def faces() -> Tensor:
    return torch.randn(30, 2, 3, 2, generator=torch.Generator().manual_seed(0))


def linear(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


def test_boundary__of_a_linear_model_is_the_distance_to_the_nearest_hyperplane(
    faces: Tensor,
) -> None:
    model = linear()
    weight, bias = (part.detach().double() for part in model[1].parameters())
    expected = []
    for face in faces.flatten(1).double():
        logits = weight @ face + bias
        own = int(logits.argmax())
        others = [k for k in range(4) if k != own]
        gaps = [(logits[own] - logits[k]) / (weight[own] - weight[k]).norm() for k in others]
        expected.append(float(min(gaps)))
    # the step goes 1e-4 beyond
    np.testing.assert_allclose(boundary(model, faces), np.array(expected) + 1e-4, rtol=1e-4)


def test_boundary__of_a_sphere_is_reached_by_newtons_steps() -> None:
    def inside(x: Tensor) -> Tensor:
        return torch.stack([1 - x.square().sum(1), torch.zeros(len(x), dtype=x.dtype)], dim=1)

    direction = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = torch.tensor([0.2, 0.5, 0.9, 1.3, 4.0], dtype=torch.float64)
    found = boundary(inside, nn.functional.normalize(direction, dim=1) * radius[:, None])
    r = radius.numpy()
    # From inside the first step, (1 - r^2) / 2r, lands outside.
    np.testing.assert_allclose(found[:3], ((1 - r**2) / (2 * r) + 1e-4)[:3])
    # From outside the steps stay outside, but for 1e-4 each, until 1.02 times them have crossed.
    assert (found[3:] >= (r - 1)[3:] / 1.02).all()
    assert (found[3:] <= (r - 1)[3:] + 1e-3).all()


def test_boundary__of_a_batch_is_that_of_each_face_alone(faces: Tensor) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    together = boundary(model, faces)
    alone = [boundary(model, faces[i : i + 1])[0] for i in range(len(faces))]
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    assert all(weight.grad is None for weight in model.parameters())
    assert not faces.requires_grad
    with torch.no_grad():
        np.testing.assert_array_equal(boundary(model, faces), together)


def test_boundary__nothing_to_follow_is_infinitely_far(faces: Tensor) -> None:
    def dead(x: Tensor) -> Tensor:
        first = x.flatten(1)[:, :1]
        return torch.cat([torch.relu(first) + 1, torch.zeros_like(first)], dim=1)

    faces[:5, 0, 0, 0] = -1.0
    faces[5:, 0, 0, 0] = 0.5
    # relu's slope leads down to its kink, where 1 is still above 0 and no slope is left
    assert np.isinf(boundary(dead, faces)).all()
    assert np.isinf(boundary(dead, faces[:5])).all()


def test_boundary__stops_after_the_iterations() -> None:
    calls = []

    def far(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.stack([torch.exp(x[:, 0]), torch.zeros(len(x))], dim=1)

    found = boundary(far, torch.zeros(2, 1), iterations=4)
    assert len(calls) == 1 + 3 * 2  # slopes, then a look and slopes again
    assert found == pytest.approx([4 * (1 + 1e-4)] * 2, rel=0.05)


def test_deepfool__takes_the_nearest_first() -> None:
    pool = blobs()
    distance = np.random.default_rng(0).permutation(60).astype(float)
    distance[:3] = np.inf
    chosen = deepfool(replace(pool, boundary=distance), 52, np.random.default_rng(0))
    open_rows = np.flatnonzero(~pool.labeled)
    assert chosen.tolist() == sorted(open_rows.tolist(), key=lambda row: (distance[row], row))
