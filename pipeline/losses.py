"""Losses per face, weights of pseudo-labels, alignment of class shares, calibration.

What for: the terms every training objective is put together from. All return one value per face,
so that the caller decides what the mean runs over, and compute in float32 whatever comes in.
Source: label smoothing: arXiv 1512.00567, section 7. Distillation with temperature: arXiv
1503.02531, section 2. SoftMatch weight: arXiv 2301.10921, the truncated Gaussian. Distribution
alignment: arXiv 1911.09785, section 3.1. Logit adjustment: arXiv 2007.07314, eq. 10. Temperature
scaling: arXiv 1706.04599, section 4.2.
Departs: alignment takes a power, because a prior estimated from a biased teacher deserves half the
trust; SoftMatch's standard deviation is divided by `width` (2), as its released code does and its
text does not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_GOLDEN = (math.sqrt(5) - 1) / 2


def cross_entropy(
    logits: Tensor, targets: Tensor, *, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of each face, nats.

    Args:
        logits: (B, K).
        targets: class codes (B,) of an integer type, or probabilities (B, K).
        weight: (B,) factors of the faces; None for 1.
        smoothing: share of the target given to all classes alike, [0, 1).

    Returns:
        (B,) float32.
    """
    log_probs = F.log_softmax(logits.float(), 1)
    if targets.dim() == 1:
        picked = -log_probs.gather(1, targets[:, None]).squeeze(1)
    else:
        picked = -(targets.float() * log_probs).sum(1)
    loss = (1 - smoothing) * picked - smoothing * log_probs.mean(1)
    return loss if weight is None else weight * loss


def kl_divergence(targets: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || softmax(logits / T)) * T^2 of each face, nats.

    The factor keeps the size of the gradient independent of T (arXiv 1503.02531).

    Args:
        targets: probabilities q (B, K), already at temperature T; zeros are allowed.
        logits: (B, K).
        temperature: T > 0.

    Returns:
        (B,) float32, at least 0.
    """
    q = targets.float()
    log_probs = F.log_softmax(logits.float() / temperature, 1)
    return (torch.xlogy(q, q) - q * log_probs).sum(1) * temperature**2


def softmatch_weight(confidence: Tensor, mean: Tensor, var: Tensor, width: float = 2.0) -> Tensor:
    """Weight in (0, 1] of pseudo-labels: 1 above the mean confidence, a Gaussian's flank below.

    Args:
        confidence: largest probability of each face, any shape, [0, 1].
        mean: its mean over the pool, scalar.
        var: its variance over the pool, scalar.
        width: the flank's standard deviation is sqrt(var) / width.

    Returns:
        Weights of the shape of `confidence`.
    """
    below = (mean - confidence).clamp(min=0)
    return torch.exp(-below.square() * width**2 / (2 * var.clamp(min=1e-12)))


def align_distribution(
    probs: Tensor, target_prior: Tensor, model_prior: Tensor, power: float = 1.0
) -> Tensor:
    """Probabilities times (target_prior / model_prior)^power, normalized again.

    Args:
        probs: (B, K), rows sum to 1.
        target_prior: (K,) the class shares that the pool is believed to have.
        model_prior: (K,) mean of the model's probabilities over the pool.
        power: 0 leaves them as they are, 1 aligns fully.

    Returns:
        (B, K), rows sum to 1.
    """
    aligned = probs * (target_prior / model_prior.clamp(min=1e-6)).pow(power)
    return aligned / aligned.sum(1, keepdim=True)


def logit_adjustment(class_counts: Tensor, strength: float) -> Tensor:
    """What to add to training logits so that rare classes get a larger margin.

    Args:
        class_counts: (K,) labeled faces per class; a class without any counts as one.
        strength: tau; 0 adds nothing, 1 makes the plain logits those of balanced classes.

    Returns:
        (K,) float32, strength * log prior.
    """
    counts = class_counts.float().clamp(min=1)
    return strength * torch.log(counts / counts.sum())


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log likelihood, nats, of (N, K) logits / T for codes (N,) or probs (N, K)."""
    scaled = torch.from_numpy(np.asarray(logits, np.float64)) / temperature
    log_probs = torch.log_softmax(scaled, 1).numpy()
    if targets.ndim == 1:
        return float(-log_probs[np.arange(len(targets)), targets].mean())
    return float(-(targets * log_probs).sum(1).mean())


def fit_temperature(
    logits: np.ndarray, targets: np.ndarray, low: float = 0.05, high: float = 20.0
) -> float:
    """The T in [low, high] with the least NLL of softmax(logits / T).

    Golden section on log T: the loss is convex in 1 / T, so it has one minimum there too.

    Args:
        logits: (N, K), of faces the model has not been trained on.
        targets: codes (N,) or probabilities (N, K).
        low: smallest answer.
        high: largest answer.

    Returns:
        T, to about 1e-5 relative.
    """
    left, right = math.log(low), math.log(high)
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_a, at_b = nll(logits, targets, math.exp(a)), nll(logits, targets, math.exp(b))
    while right - left > 1e-5:
        if at_a < at_b:
            right, b, at_b = b, a, at_a
            a = right - _GOLDEN * (right - left)
            at_a = nll(logits, targets, math.exp(a))
        else:
            left, a, at_a = a, b, at_b
            b = left + _GOLDEN * (right - left)
            at_b = nll(logits, targets, math.exp(b))
    return math.exp((left + right) / 2)
