"""Proves gradient matching against explicit loops, finite differences, and sharing by classes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distillers.nets import NAMES, descend, faces, finite_difference, learned, network, place, value
from pipeline.distillers.gradient import Gradient, distance
from pipeline.distillers.learned import Real


def method(**changed: object) -> Gradient:
    settings = {"augment": False, "outer": 3, "inner": 2, "batch": None, "rate": 0.05, **changed}
    return Gradient(network, **settings)  # type: ignore[arg-type]


def real(each: int = 4) -> Real:
    where = {code: slice(code * each, (code + 1) * each) for code in range(len(NAMES))}
    labels = torch.arange(len(NAMES)).repeat_interleave(each)
    return Real(faces(each * len(NAMES), 5), labels, where)


def pulls(images: Tensor, code: int) -> list[Tensor]:
    """The gradient of the network that is drawn first, by plain backward."""
    net = network(place().seed)
    F.cross_entropy(net(images), torch.full((len(images),), code)).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_distance__is_one_minus_cosine_per_output_unit() -> None:
    a, b = [torch.randn(3, 2, 2, 2), torch.randn(3)], [torch.randn(3, 2, 2, 2), torch.randn(3)]
    expected = 0.0
    for u, v in zip(a[0], b[0], strict=True):
        dot = sum(float(x * y) for x, y in zip(u.flatten(), v.flatten(), strict=True))
        size = math.sqrt(float((u**2).sum()) * float((v**2).sum()))
        expected += 1 - dot / size
    assert distance(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert distance(a, a).item() == pytest.approx(0, abs=1e-5)


def test_loss__is_the_sum_over_classes_written_out() -> None:
    made, seen = learned(2), real()
    expected = sum(
        float(distance(pulls(seen.of(c), c), pulls(made.pixels.detach()[2 * c : 2 * c + 2], c)))
        for c in range(len(NAMES))
    )
    part = method().loss(made, seen, place())
    assert value(part.sum) / part.count == pytest.approx(expected, rel=1e-9)


def test_loss__its_gradient_is_that_of_finite_differences() -> None:
    made, seen = learned(1), real()
    own = method(augment=True)
    own.loss(made, seen, place()).sum.backward()
    assert made.pixels.grad is not None
    for at in ((0, 0, 3, 4), (2, 0, 5, 1)):
        slow = finite_difference(lambda: own.loss(made, seen, place()).sum, made.pixels, at, 1e-6)
        assert float(made.pixels.grad[at]) == pytest.approx(slow, rel=1e-4, abs=1e-8)


def test_loss__two_workers_have_the_sum_of_one() -> None:
    made, seen = learned(2), real()
    whole = method().loss(made, seen, place())
    parts = [method().loss(made, seen, place(rank=rank, world=2)) for rank in range(2)]
    assert sum(part.count for part in parts) == pytest.approx(whole.count)
    assert sum(value(p.sum) for p in parts) == pytest.approx(value(whole.sum), rel=1e-9)
    assert sum(part.passes for part in parts) == pytest.approx(whole.passes)


def test_loss__a_worker_without_classes_has_a_loss_of_nothing() -> None:
    made = learned(1)
    part = method().loss(made, real(), place(rank=3, world=4))
    part.sum.backward()
    assert value(part.sum) == 0
    assert made.pixels.grad is not None
    assert float(made.pixels.grad.abs().sum()) == 0


def test_update__trains_the_network_as_plain_descent_does() -> None:
    made, own = learned(1), method()
    own.loss(made, real(), place())
    own.update(made, place())
    net = network(place().seed)
    targets = torch.eye(len(NAMES), dtype=torch.float64)
    descend(net, made.pixels.detach(), targets, steps=2, rate=0.05)
    for name, parameter in net.named_parameters():
        assert torch.allclose(own.state()[name], parameter, atol=1e-10)


def test_update__draws_another_network_after_so_many_steps() -> None:
    made, own = learned(1), method(outer=2)
    first = own.loss(made, real(), place(0)).sum
    own.update(made, place(0))
    assert own.state()
    own.update(made, place(1))
    assert not own.state()
    again = method(outer=2)
    again.loss(made, real(), place(2))
    assert not torch.allclose(own.loss(made, real(), place(2)).sum, first)


def test_loss__another_seed_draws_another_network() -> None:
    made, seen = learned(1), real()
    one, two = (method().loss(made, seen, replace(place(), seed=seed)) for seed in (7, 8))
    assert value(one.sum) != pytest.approx(value(two.sum), rel=1e-3)


def test_state__continues_where_it_was() -> None:
    made, own, other = learned(1), method(), method()
    own.loss(made, real(), place())
    own.update(made, place())
    other.load(own.state())
    one, two = (m.loss(made, real(), place(1)).sum for m in (own, other))
    assert value(one) == value(two)
