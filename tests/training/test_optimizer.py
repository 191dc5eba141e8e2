"""Proves the schedule, the average and the treatment of gradients against closed forms."""

import math

import pytest
import torch
from torch import nn

from pipeline.training.optimizer import Schedule, Trainee
from pipeline.training.worker import local

WORKER = local(dtype=torch.float32)


def trainee(*, trained: bool = False, **settings: float | str | None) -> Trainee:
    torch.manual_seed(0)
    modules = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    schedule = Schedule.model_validate({"clip": None, **settings})
    return Trainee(modules, schedule, WORKER, trained=trained)


def loss_of(one: Trainee) -> torch.Tensor:
    used: torch.Tensor = one.modules["used"](torch.ones(4, 3)).square().sum()
    return used


def test_rate__rises_linearly_then_falls_as_one_cosine() -> None:
    schedule = Schedule(steps=110, lr=2.0, warmup=10 / 110)
    assert [schedule.rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert schedule.rate(10) == pytest.approx(2.0)
    assert schedule.rate(60) == pytest.approx(1.0)
    assert schedule.rate(109) == pytest.approx(1 + math.cos(math.pi * 0.99))
    assert Schedule(steps=1, warmup=0.0).rate(0) == pytest.approx(2e-3)


def test_step__a_count_divides_the_gradient() -> None:
    whole, parts = trainee(), trainee()
    norm = whole.step(loss_of(whole), 1.0, 0)
    assert parts.step(loss_of(parts), 4.0, 0) == pytest.approx(norm / 4)


def test_step__clips_to_the_largest_norm() -> None:
    one = trainee(clip=0.5)
    before = one.step(loss_of(one), 1.0, 0)
    after = torch.stack([p.grad.norm() for p in one.parameters]).norm()
    assert before > 0.5
    assert after == pytest.approx(0.5, rel=1e-3)


def test_step__only_weights_decay() -> None:
    one = trainee(lr=0.1, warmup=0.0, weight_decay=0.5)
    start = [p.detach().clone() for p in one.modules["unused"].parameters()]
    one.step(loss_of(one), 1.0, 0)
    weight, bias = one.modules["unused"].parameters()
    torch.testing.assert_close(weight.detach(), start[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(bias.detach(), start[1])


def test_step__sgd_moves_by_what_it_remembers_of_the_gradients() -> None:
    decay, memory = 0.5, 0.8
    one = trainee(
        optimizer="sgd", momentum=memory, lr=0.1, warmup=0.0, steps=4, weight_decay=decay, ema=None
    )
    weight, bias = one.modules["used"].parameters()
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for number in range(3):
        before = [p.detach().clone() for p in (weight, bias)]
        one.step(loss_of(one), 1.0, number)
        # The loss is 4 * sum((W 1 + b)^2): every entry of a row of W has the gradient of its bias.
        slope = 8 * (before[0].sum(1) + before[1])
        rate = 0.1 * (1 + math.cos(math.pi * number / 4)) / 2
        moved[0] = memory * moved[0] + slope[:, None] + decay * before[0]
        moved[1] = memory * moved[1] + slope
        torch.testing.assert_close(weight.detach(), before[0] - rate * moved[0])
        torch.testing.assert_close(bias.detach(), before[1] - rate * moved[1])


def test_step__the_average_follows_with_a_ramp() -> None:
    one = trainee(ema=0.5, lr=0.1, warmup=0.0, steps=40)
    expected = one.modules["used"].weight.detach().clone()
    for number in range(12):
        one.step(loss_of(one), 1.0, number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * one.modules["used"].weight.detach()
    torch.testing.assert_close(one.averaged["used"].weight, expected)
    assert not one.averaged["used"].weight.requires_grad


def test_step__the_average_of_trained_weights_has_no_ramp() -> None:
    decay, steps = 0.9, 6
    one = trainee(trained=True, ema=decay, lr=0.1, warmup=0.0, steps=40)
    seen = [one.modules["used"].weight.detach().clone()]
    for number in range(steps):
        one.step(loss_of(one), 1.0, number)
        seen.append(one.modules["used"].weight.detach().clone())
    # d^n w_0 + (1 - d) sum_t d^(n - t) w_t
    shares = [decay**steps, *((1 - decay) * decay ** (steps - t) for t in range(1, steps + 1))]
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(one.averaged["used"].weight, expected)


def test_trainee__without_average_the_weights_are_it() -> None:
    one = trainee(ema=None)
    assert one.averaged is one.modules


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}]
)
def test_tensors__load_continues_exactly(settings: dict[str, float | str]) -> None:
    one, other = trainee(**settings), trainee(**settings)
    for number in range(3):
        one.step(loss_of(one), 1.0, number)
    other.load({name: value.clone() for name, value in one.tensors().items()})
    for t in (one, other):
        t.step(loss_of(t), 1.0, 3)
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
