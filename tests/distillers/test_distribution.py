"""Proves the distribution matching loss against its formula, face by face, and over two workers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from distillers import nets
from distillers.nets import finite_difference, network
from pipeline.distillers.distribution import matching_loss
from pipeline.distillers.siamese import siamese
from pipeline.models import FaceModel, ModelConfig, create

NAMES = ("neutral", "happiness")


@pytest.fixture
def net() -> FaceModel:
    torch.manual_seed(0)
    config = ModelConfig(
        name="convnet", args={"width": 8, "depth": 2}, size=12, color="gray", dropout=0
    )
    return create(config, NAMES).eval().requires_grad_(False)


def faces(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def alone(tensor: Tensor) -> Tensor:
    return tensor


def by_hand(net: FaceModel, real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> float:
    total = 0.0
    for real_c, synthetic_c in zip(real, synthetic, strict=True):
        means = [
            sum(net.features(face[None])[0][0] for face in part) / len(part)
            for part in (real_c, synthetic_c)
        ]
        total += float(((means[0] - means[1]) ** 2).sum())
    return total


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_matching_loss__equal_sets_have_none(net: FaceModel, seeds: list[int] | None) -> None:
    real = [faces(4, 0), faces(4, 1)]
    assert matching_loss(net, real, torch.cat(real), alone, seeds).item() < 1e-9


def test_matching_loss__is_the_formula(net: FaceModel) -> None:
    real, synthetic = [faces(5, 0), faces(3, 1)], [faces(2, 2), faces(2, 3)]
    found = matching_loss(net, real, torch.cat(synthetic), alone, None)
    assert found.item() == pytest.approx(by_hand(net, real, synthetic), rel=1e-4)


def test_matching_loss__both_sides_see_one_transformation_per_class(net: FaceModel) -> None:
    real, synthetic = [faces(5, 0), faces(3, 1)], [faces(2, 2), faces(2, 3)]
    found = matching_loss(net, real, torch.cat(synthetic), alone, [7, 8])
    seen = [
        [siamese(x, seed) for x, seed in zip(s, (7, 8), strict=True)] for s in (real, synthetic)
    ]
    assert found.item() == pytest.approx(by_hand(net, *seen), rel=1e-4)


def test_matching_loss__its_gradient_is_that_of_finite_differences() -> None:
    net = network(0).eval().requires_grad_(False)
    synthetic = nets.faces(6, 3).requires_grad_()
    real = list(nets.faces(12, 4).chunk(len(nets.NAMES)))

    def loss() -> Tensor:
        return matching_loss(net, real, synthetic, alone, [7, 8, 9])

    found = loss()
    found.backward()
    assert found.dtype == torch.float64
    assert synthetic.grad is not None
    for at in ((0, 0, 3, 4), (5, 0, 6, 1)):
        slow = finite_difference(loss, synthetic, at, 1e-6)
        assert float(synthetic.grad[at]) == pytest.approx(slow, rel=1e-5, abs=1e-10)


def test_matching_loss__two_workers_are_one(net: FaceModel) -> None:
    real, synthetic = [faces(6, 0), faces(4, 1)], faces(4, 2).requires_grad_()
    whole = matching_loss(net, real, synthetic, alone, [7, 8])
    whole.backward()
    expected = synthetic.grad
    synthetic.grad = None
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    matching_loss(net, [x[::2] for x in real], synthetic, send, [7, 8])
    half = [x[1::2] for x in real]
    part = matching_loss(net, half, synthetic, lambda tensor: tensor + sent[0], [7, 8])
    part.backward()
    assert part.item() == pytest.approx(whole.item(), rel=1e-5)
    assert expected is not None
    assert torch.allclose(synthetic.grad, expected, atol=1e-7)
