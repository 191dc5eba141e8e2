"""Proves every loss and weight against a closed form or torch's own."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.losses import (
    ALONE,
    Gather,
    align_distribution,
    consistency,
    contrastive,
    cross_entropy,
    fairness,
    fit_temperature,
    kl_divergence,
    logit_adjustment,
    negative_learning,
    nll,
    queued_contrastive,
    softmatch_weight,
)


def logits(rows: int = 6, classes: int = 4) -> torch.Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy__is_torchs_for_codes_and_probabilities(smoothing: float) -> None:
    x, codes = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    soft = torch.softmax(logits().flip(0), 1)
    for target in (codes, soft):
        expected = F.cross_entropy(x, target, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(cross_entropy(x, target, smoothing=smoothing), expected)
    one_hot = F.one_hot(codes, 4)
    torch.testing.assert_close(cross_entropy(x, one_hot), cross_entropy(x, codes))


def test_kl_divergence__two_classes_by_hand() -> None:
    q, x = torch.tensor([[0.9, 0.1], [1.0, 0.0]]), torch.zeros(2, 2)
    by_hand = [0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), math.log(2)]
    assert kl_divergence(q, x).tolist() == pytest.approx(by_hand)


def test_kl_divergence__zero_at_the_target_and_only_there() -> None:
    x = logits()
    torch.testing.assert_close(
        kl_divergence(torch.softmax(x, 1), x), torch.zeros(6), atol=1e-5, rtol=0
    )
    assert (kl_divergence(torch.softmax(x / 2, 1), x) > 1e-3).all()


def test_softmatch_weight__flank_by_hand() -> None:
    weight = softmatch_weight(torch.tensor([0.9, 0.8, 0.6]), torch.tensor(0.8), torch.tensor(0.04))
    # standard deviation 0.2 / 2: 0.6 lies two of them below the mean
    assert weight.tolist() == pytest.approx([1.0, 1.0, math.exp(-2.0)])


def test_align_distribution__full_power_reaches_the_prior() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    aligned = align_distribution(probs, torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4]))
    # 0.5 * 0.5 against 0.5 * 1.75
    assert aligned[0].tolist() == pytest.approx([0.25 / 1.125, 0.875 / 1.125])
    same = align_distribution(probs, torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4]), 0.0)
    torch.testing.assert_close(same, probs)


def test_logit_adjustment__log_shares_and_no_infinity() -> None:
    added = logit_adjustment(torch.tensor([6, 2, 0]), 2.0)
    assert added.tolist() == pytest.approx([2 * math.log(n / 9) for n in (6, 2, 1)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_fit_temperature__finds_what_the_logits_were_multiplied_by(temperature: float) -> None:
    probs = torch.softmax(logits(200), 1).double().numpy()
    scaled = temperature * np.log(probs)
    assert fit_temperature(scaled, probs) == pytest.approx(temperature, rel=1e-3)


def test_fit_temperature__no_grid_point_is_better() -> None:
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(300, 5)), rng.integers(0, 5, 300)
    x[np.arange(300), codes] += 1.0
    best = nll(x, codes, fit_temperature(x, codes))
    assert all(best <= nll(x, codes, t) + 1e-9 for t in np.geomspace(0.05, 20, 400))
    assert nll(x, codes) == pytest.approx(
        F.cross_entropy(torch.from_numpy(x), torch.from_numpy(codes)).item()
    )


# -- faces below the threshold --------------------------------------------------------------------


def in_workers(world: int, work: Callable[[Gather], Any]) -> list[Any]:
    """Answers of workers in threads that add up their tensors at a barrier."""
    meet, given = threading.Barrier(world, timeout=60), [torch.empty(0)] * world
    answers: dict[int, Any] = {}

    def one(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            given[rank] = tensor.detach().clone()
            meet.wait()
            total = torch.stack(given).sum(0)
            meet.wait()
            return tensor.copy_(total)  # in the memory it was given, as torch.distributed does

        answers[rank] = work(Gather(reduce, rank, world))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(world)]


def test_consistency__two_classes_by_hand() -> None:
    first, second = torch.tensor([[0.9, 0.1]] * 2).log(), torch.tensor([[0.6, 0.4]] * 2).log()
    below = torch.tensor([True, False])
    there = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    back = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    found = consistency(first, second, below).tolist()
    assert found == pytest.approx([(there + back) / 2, 0])


def test_consistency__alike_from_both_sides_and_zero_for_equal_views() -> None:
    x, y, below = logits(), logits().flip(0), torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(consistency(x, y, below), consistency(y, x, below))
    assert consistency(x, x, below).tolist() == [0] * 6
    x, y = x.requires_grad_(), y.requires_grad_()
    consistency(x, y, below).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_negative_learning__by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]] * 4)
    teacher = torch.tensor([[0.9, 0.06, 0.04], [0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [0, 1, 0]])
    below = torch.tensor([True, True, True, False])
    found = negative_learning(p.log(), teacher, below, 0.05)
    assert found.tolist() == pytest.approx([-math.log(0.8), -math.log(0.7 * 0.8), 0, 0])
    # a cut is the first value that is not ruled out
    cut = teacher[0, 1].item()
    assert negative_learning(p.log(), teacher, below, cut)[0].item() == pytest.approx(
        -math.log(0.8)
    )


def test_negative_learning__has_a_gradient_where_the_network_is_sure_and_wrong() -> None:
    x = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    loss = negative_learning(x, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([True]))
    # -log(1 - p_0) = 40 - log 2; 1 - p_0 itself is 0 in float32
    assert loss.item() == pytest.approx(40 - math.log(2), rel=1e-6)
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([1.0, -0.5, -0.5], abs=1e-5)


def test_negative_learning__one_class_rules_nothing_out() -> None:
    x = torch.zeros(2, 1, requires_grad=True)
    loss = negative_learning(x, torch.ones(2, 1), torch.tensor([True, False]))
    assert loss.tolist() == [0, 0]


def plain_nt_xent(
    first: torch.Tensor, second: torch.Tensor, below: list[bool], temperature: float
) -> list[float]:
    views = [(i, v.double() / v.double().norm()) for x in (first, second) for i, v in enumerate(x)]
    kept = [n for n, (face, _) in enumerate(views) if below[face]]
    loss = [0.0] * len(below)
    for n in kept:
        face, view = views[n]
        exps = {m: math.exp(float(view @ views[m][1]) / temperature) for m in kept if m != n}
        other = next(m for m in exps if views[m][0] == face)
        loss[face] -= math.log(exps[other] / sum(exps.values())) / 2
    return loss


@pytest.mark.parametrize("below", [[True] * 6, [True, False, True, True, False, False]])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrastive__equals_loops(below: list[bool], temperature: float) -> None:
    x, y = logits(6, 5), logits(6, 5).flip(0) + logits(6, 5)
    found = contrastive(x, y, torch.tensor(below), temperature)
    assert found.tolist() == pytest.approx(plain_nt_xent(x, y, below, temperature), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive(x, y, torch.tensor(below), temperature), found)


@pytest.mark.parametrize("count", [0, 1])
def test_contrastive__nobody_to_tell_apart_is_zero_with_a_gradient_of_zero(count: int) -> None:
    x, y = logits().requires_grad_(), logits().flip(0)
    loss = contrastive(x, y, torch.arange(6) < count)
    assert loss.tolist() == [0] * 6
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() == 0


def test_contrastive__several_workers_compute_value_and_gradient_of_one() -> None:
    x, y = logits(8, 5), logits(8, 5).flip(0) + logits(8, 5)
    below = torch.tensor([True, False, True, True, True, True, False, True])
    whole = x.clone().requires_grad_()
    loss = contrastive(whole, y, below)
    loss.mean().backward()

    def work(gather: Gather) -> tuple[torch.Tensor, torch.Tensor]:
        own = x.chunk(4)[gather.rank].clone().requires_grad_()
        part = contrastive(own, y.chunk(4)[gather.rank], below.chunk(4)[gather.rank], 0.07, gather)
        part.mean().backward()
        assert own.grad is not None
        return part.detach(), own.grad / gather.world  # the loop's mean over workers

    answers = in_workers(4, work)
    torch.testing.assert_close(torch.cat([value for value, _ in answers]), loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in answers]), whole.grad)
    alone = contrastive(x[:2], y[:2], below[:2])
    assert alone[0] == 0 < answers[0][0][0]  # with others' faces, the one has negatives


def test_queued_contrastive__equals_loops() -> None:
    x, y, queue = logits(4, 5), logits(4, 5).flip(0), F.normalize(logits(7, 5), dim=1)
    found = queued_contrastive(x, y.requires_grad_(), queue, 0.3)
    expected = []
    for face, key in zip(F.normalize(x, dim=1), F.normalize(y.detach(), dim=1), strict=True):
        own = math.exp(float(face @ key) / 0.3)
        expected.append(
            -math.log(own / (own + sum(math.exp(float(face @ q) / 0.3) for q in queue)))
        )
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad  # keys are told nothing
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(queued_contrastive(x, y, queue, 0.3), found)


# -- fairness -------------------------------------------------------------------------------------


def test_fairness__by_hand() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.0, 0.0, 1.0]])
    shares, histogram = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.3, 0.1])
    chosen = torch.tensor([True, True, True, False])
    a = [0.5 / 0.6, 0.3 / 0.3, 0.2 / 0.1]
    # of three faces two are given to the first class and one to the second
    b = [(0.6 + 0.8 + 0.2) / 3 / (2 / 3), (0.3 + 0.1 + 0.7) / 3 / (1 / 3)]
    expected = sum(p / sum(a) * math.log(q / sum(b)) for p, q in zip(a, b, strict=False))
    found = fairness((probs + 1e-9).log(), chosen, shares, histogram)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_fairness__nothing_chosen_is_zero_with_a_gradient_of_zero() -> None:
    x = logits().requires_grad_()
    uniform = torch.full((4,), 0.25)
    loss = fairness(x, torch.zeros(6, dtype=torch.bool), uniform, uniform)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.abs().sum() == 0


def test_fairness__a_class_that_was_never_given_has_no_part() -> None:
    x, all_of = logits(), torch.ones(6, dtype=torch.bool)
    shares, histogram = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.5, 0.3, 0.2, 0.0])
    assert torch.isfinite(fairness(x, all_of, shares, histogram))


def test_fairness__several_workers_compute_value_and_gradient_of_one() -> None:
    x, chosen = logits(8), torch.tensor([True, False, True, True, True, True, False, True])
    shares, histogram = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.2, 0.2])
    whole = x.clone().requires_grad_()
    loss = fairness(whole, chosen, shares, histogram)
    loss.backward()

    def work(gather: Gather) -> tuple[torch.Tensor, torch.Tensor]:
        own = x.chunk(4)[gather.rank].clone().requires_grad_()
        part = fairness(own, chosen.chunk(4)[gather.rank], shares, histogram, gather)
        part.backward()
        assert own.grad is not None
        return part.detach(), own.grad / gather.world

    answers = in_workers(4, work)
    for value, _ in answers:
        torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in answers]), whole.grad)


def test_gather__joins_rows_in_order_of_rank_and_leaves_ones_own_alone() -> None:
    rows = torch.arange(12).reshape(6, 2)
    answers = in_workers(3, lambda gather: gather(rows[2 * gather.rank : 2 * gather.rank + 2]))
    assert all(torch.equal(joined, rows) for joined in answers)
    assert ALONE(rows) is rows
