"""Proves unrolled optimization against training written out, finite differences and windows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distillers.nets import (
    CONFIG,
    NAMES,
    descend,
    faces,
    finite_difference,
    learned,
    network,
    place,
    value,
)
from pipeline.distillers.learned import Real, seeds, weights_of
from pipeline.distillers.unrolled import Unrolled
from pipeline.errors import ModelError
from pipeline.models import FaceModel, create

REAL = Real(faces(6, 5), torch.arange(6) % len(NAMES))


def method(**changed: object) -> Unrolled:
    settings = {
        "augment": False,
        "networks": 1,
        "steps": 3,
        "window": None,
        "batch": None,
        **changed,
    }
    return Unrolled(network, **settings)  # type: ignore[arg-type]


def trained_by_hand(seed: int, steps: int, rate: float) -> FaceModel:
    made, net = learned(1), network(seeds(seed, 1)[0])
    return descend(net, made.pixels.detach(), made.targets(), steps, rate)


def test_loss__is_that_of_a_network_trained_on_the_set() -> None:
    at = place()
    part = method().loss(learned(1, rate=0.1), REAL, at)
    net = trained_by_hand(seeds(at.seed, 1)[0], 3, 0.1)
    expected = F.cross_entropy(net(REAL.images), REAL.labels)
    assert value(part.sum) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("augment", [False, True])
def test_loss__its_gradient_is_that_of_finite_differences(augment: bool) -> None:
    made = learned(1, rate=0.1, learn_targets=True)
    own = method(augment=augment)
    own.loss(made, REAL, place()).sum.backward()
    for parameter, at in (
        (made.pixels, (1, 0, 3, 4)),
        (made.logits, (0, 2)),
        (made.log_rate, ()),
    ):
        assert parameter is not None
        assert parameter.grad is not None
        slow = finite_difference(lambda: own.loss(made, REAL, place()).sum, parameter, at, 1e-5)
        assert float(parameter.grad[at]) == pytest.approx(slow, rel=1e-4, abs=1e-9)


def test_loss__a_window_gives_the_gradient_of_the_last_steps_alone() -> None:
    made = learned(1, rate=0.1)
    own = method(steps=4, window=2)
    at = place()
    seed = seeds(at.seed, 1)[0]
    start, stop = own.span(seed)
    assert stop - start == 2
    own.loss(made, REAL, at).sum.backward()
    # Written out: the network as it is at the window's start is a constant.
    rate = float(made.rate().detach())
    net = trained_by_hand(seed, start, rate)
    weights, pixels = weights_of(net), made.pixels.detach().clone().requires_grad_()
    for _ in range(2):
        leaves = {k: v if v.requires_grad else v.requires_grad_() for k, v in weights.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, leaves, (pixels,)), made.targets())
        steps = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        weights = {k: v - rate * g for (k, v), g in zip(weights.items(), steps, strict=True)}
    F.cross_entropy(
        torch.func.functional_call(net, weights, (REAL.images,)), REAL.labels
    ).backward()
    assert made.pixels.grad is not None
    assert torch.allclose(made.pixels.grad, pixels.grad, rtol=1e-6, atol=1e-12)


def test_span__ends_anywhere_between_the_window_and_the_last_step() -> None:
    own = method(steps=7, window=3)
    spans = {own.span(seed) for seed in range(200)}
    assert spans == {(stop - 3, stop) for stop in range(3, 8)}
    assert method().span(5) == (0, 3)


def test_loss__two_workers_have_the_sum_of_one() -> None:
    made = learned(1, rate=0.1)
    whole = method(networks=4).loss(made, REAL, place())
    parts = [method(networks=4).loss(made, REAL, place(rank=r, world=2)) for r in range(2)]
    assert whole.count == sum(part.count for part in parts) == 4
    assert sum(value(p.sum) for p in parts) == pytest.approx(value(whole.sum), rel=1e-9)


def test_loss__a_network_with_running_statistics_is_refused() -> None:
    config = CONFIG.model_copy(update={"name": "compact_resnet", "args": {"widths": [8, 8]}})

    def with_batch_norm(seed: int) -> FaceModel:
        return create(config, NAMES).double()

    own = Unrolled(with_batch_norm, augment=False, networks=1, steps=1, window=None, batch=None)
    with pytest.raises(ModelError, match="keeps running statistics"):
        own.loss(learned(1, rate=0.1), REAL, place())
