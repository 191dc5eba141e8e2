"""Proves trajectory matching against training written out, and experts against plain descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillers.nets import NAMES, descend, faces, finite_difference, learned, network, place, value
from pipeline.distillers.learned import Real, flat, seeds, unflat, weights_of
from pipeline.distillers.trajectory import Trajectory, train_expert

NOTHING = Real(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
BATCH = (faces(6, 5), torch.arange(6) % len(NAMES))


def expert(epochs: int = 5) -> Tensor:
    return train_expert(network(7), [[BATCH, BATCH]] * epochs, 0.1)


def method(experts: list[Tensor], **changed: object) -> Trajectory:
    settings = {
        "augment": False,
        "pairs": 1,
        "steps": 2,
        "ahead": 2,
        "latest": (1, 3),
        "batch": None,
        **changed,
    }
    return Trajectory(network, experts, **settings)  # type: ignore[arg-type]


def test_train_expert__keeps_the_weights_after_every_epoch() -> None:
    kept, net = expert(2), network(7)
    assert torch.equal(kept[0], flat(weights_of(net)))
    for epoch in (1, 2):
        descend(net, *BATCH, steps=2, rate=0.1)
        assert torch.allclose(kept[epoch], flat(weights_of(net)), atol=1e-10)


def test_loss__is_the_formula_with_training_written_out() -> None:
    course, made, at = expert(), learned(1, rate=0.05), place()
    found = float(method([course]).loss(made, NOTHING, at).sum.detach())
    drawn = seeds(seeds(at.seed, 1)[0], 5)
    first = drawn[1] % 2  # latest[0] + 1 epochs to start from
    net = network(0)
    with torch.no_grad():
        for name, value in unflat(course[first], weights_of(net)).items():
            net.get_parameter(name).copy_(value)
    descend(net, made.pixels.detach(), made.targets(), steps=2, rate=0.05)
    gap = sum(
        float((a - b) ** 2) for a, b in zip(flat(weights_of(net)), course[first + 2], strict=True)
    )
    way = float((course[first] - course[first + 2]).square().sum())
    assert found == pytest.approx(gap / way, rel=1e-8)


def test_loss__its_gradient_is_that_of_finite_differences() -> None:
    course, made = expert(), learned(1, rate=0.05, learn_targets=True)
    own = method([course], augment=True)
    own.loss(made, NOTHING, place()).sum.backward()
    for parameter, at in (
        (made.pixels, (1, 0, 3, 4)),
        (made.logits, (0, 2)),
        (made.log_rate, ()),
    ):
        assert parameter is not None
        assert parameter.grad is not None
        slow = finite_difference(lambda: own.loss(made, NOTHING, place()).sum, parameter, at, 1e-5)
        assert float(parameter.grad[at]) == pytest.approx(slow, rel=1e-4, abs=1e-9)


def test_loss__the_experts_own_faces_lead_where_the_expert_went() -> None:
    course = expert()
    made = learned(2, rate=0.1)
    with torch.no_grad():
        made.pixels.copy_(BATCH[0][torch.argsort(BATCH[1], stable=True)])
    # Two epochs of two batches each are four steps on the same six faces.
    part = method([course], steps=4, ahead=2).loss(made, NOTHING, place())
    assert value(part.sum) < 1e-12


def test_loss__two_workers_have_the_sum_of_one() -> None:
    course, made = expert(), learned(1, rate=0.05)
    whole = method([course], pairs=4).loss(made, NOTHING, place())
    parts = [
        method([course], pairs=4).loss(made, NOTHING, place(rank=r, world=2)) for r in range(2)
    ]
    assert whole.count == sum(part.count for part in parts) == 4
    assert sum(value(p.sum) for p in parts) == pytest.approx(value(whole.sum), rel=1e-9)


def test_latest__grows_over_the_first_half_of_the_steps() -> None:
    own = method([expert()])
    assert [own.latest(place(n, steps=8)) for n in (0, 2, 4, 7)] == [1, 2, 3, 3]


def test_flat__and_back() -> None:
    weights = weights_of(network(3))
    again = unflat(flat(weights), weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
