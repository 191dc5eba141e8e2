"""Proves what learned sets share: targets, inner batches, seeds."""

from __future__ import annotations

import pytest
import torch

from distillers.nets import NAMES, learned, network, place
from pipeline.distillers.learned import draw, gradient, seeds, trained, weights_of


def test_learned__starts_with_the_targets_and_the_rate_it_is_given() -> None:
    made = learned(2, rate=0.03, learn_targets=True)
    expected = 0.8 * torch.eye(len(NAMES)).repeat_interleave(2, 0) + 0.2 / len(NAMES)
    assert torch.allclose(made.targets(), expected.double(), atol=1e-6)
    assert float(made.rate().detach()) == pytest.approx(0.03)
    assert made.ipc == 2
    assert len(list(learned(2).parameters())) == 1


def test_draw__shuffles_every_epoch_and_shows_each_image_once_in_it() -> None:
    first = [draw(6, 2, number, 3) for number in range(3)]
    second = [draw(6, 2, number, 3) for number in range(3, 6)]
    assert sorted(torch.cat(first).tolist()) == list(range(6))  # type: ignore[arg-type]
    assert sorted(torch.cat(second).tolist()) == list(range(6))  # type: ignore[arg-type]
    assert torch.cat(first).tolist() != torch.cat(second).tolist()  # type: ignore[arg-type]
    assert draw(6, 6, 0, 3) is None
    assert draw(6, None, 0, 3) is None


def test_seeds__are_the_same_for_the_same_seed_and_differ_else() -> None:
    assert seeds(5, 3) == seeds(5, 3)
    assert len({*seeds(5, 50), *seeds(6, 50)}) == 100
    assert seeds(5, 2) == seeds(5, 4)[:2]


def test_own__workers_divide_everything() -> None:
    shares = [list(place(rank=rank, world=3).own(8)) for rank in range(3)]
    assert sorted(one for share in shares for one in share) == list(range(8))


def test_trained__outside_the_graph_keeps_no_graph() -> None:
    net, made = network(1), learned(1, rate=0.1)
    weights = weights_of(net)
    images, targets = made.inner()
    moved = trained(net, weights, images, targets, 0.1, in_graph=False)
    assert not any(value.requires_grad for value in moved.values())
    assert not any(value.requires_grad for value in weights.values())
    kept = gradient(net, weights, images, targets, in_graph=True)
    assert all(value.requires_grad for value in kept)
