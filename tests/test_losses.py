"""Proves every loss and weight against a closed form or torch's own."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.losses import (
    align_distribution,
    cross_entropy,
    fit_temperature,
    kl_divergence,
    logit_adjustment,
    nll,
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


def test_cross_entropy__weights_multiply_each_face() -> None:
    x, codes = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    weight = torch.arange(6.0)
    torch.testing.assert_close(
        cross_entropy(x, codes, weight=weight), weight * cross_entropy(x, codes)
    )


def test_kl_divergence__two_classes_by_hand() -> None:
    q, x = torch.tensor([[0.9, 0.1], [1.0, 0.0]]), torch.zeros(2, 2)
    by_hand = [0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), math.log(2)]
    assert kl_divergence(q, x).tolist() == pytest.approx(by_hand)


def test_kl_divergence__zero_at_the_target_and_only_there() -> None:
    x = logits()
    q = torch.softmax(x / 2, 1)
    torch.testing.assert_close(kl_divergence(q, x, 2.0), torch.zeros(6), atol=1e-5, rtol=0)
    assert (kl_divergence(q, x, 1.0) > 1e-3).all()


def test_kl_divergence__the_gradient_keeps_its_size_at_high_temperature() -> None:
    # arXiv 1503.02531: at high T the gradient is (z - v) / K for zero-mean logits z, v.
    x = (logits() - logits().mean(1, keepdim=True)).requires_grad_()
    v = x.detach().flip(0)
    kl_divergence(torch.softmax(v / 1000, 1), x, 1000.0).sum().backward()
    torch.testing.assert_close(x.grad, (x.detach() - v) / 4, atol=0.02, rtol=0)


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
