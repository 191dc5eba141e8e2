"""Losses per face, weights of pseudo-labels, alignment of class shares, calibration.

What for: the terms every training objective is put together from. All return one value per face,
so that the caller decides what the mean runs over (`fairness`, which is about a batch, returns one
value), and compute in float32 whatever comes in.
Source: label smoothing: arXiv 1512.00567, section 7. SoftMatch weight: arXiv 2301.10921, the
truncated Gaussian. Distribution alignment: arXiv 1911.09785, section 3.1. Logit adjustment: arXiv
2007.07314, eq. 10. Temperature scaling: arXiv 1706.04599, section 4.2. Complementary labels: arXiv
1908.07387, and for faces below a dynamic threshold arXiv 2601.05556. NT-Xent: arXiv 2002.05709,
eq. 1; on the faces below the threshold alone: Ada-CM, arXiv 2203.12341. InfoNCE with a queue: MoCo,
arXiv 1911.05722, eq. 1. Fairness: FreeMatch, arXiv 2205.07246, section 4.2.
Departs: alignment takes a power, because a prior estimated from a biased teacher deserves half the
trust; SoftMatch's standard deviation is divided by `width` (2), as its released code does and its
text does not; complementary labels are all the classes that the teacher rules out instead of one
drawn at random; classes that no face of the batch is given to are left out of the fairness term,
where they are a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.schema import AllReduce

_GOLDEN = (math.sqrt(5) - 1) / 2


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each face, nats.

    Args:
        logits: (B, K).
        targets: class codes (B,) of an integer type, or probabilities (B, K).
        smoothing: share of the target given to all classes alike, [0, 1).

    Returns:
        (B,) float32.
    """
    wanted = targets if targets.dim() == 1 else targets.float()
    return F.cross_entropy(logits.float(), wanted, reduction="none", label_smoothing=smoothing)


def kl_divergence(targets: Tensor, logits: Tensor) -> Tensor:
    """KL(q || softmax(logits)) of each face, nats.

    Args:
        targets: probabilities q (B, K); zeros are allowed.
        logits: (B, K).

    Returns:
        (B,) float32, at least 0.
    """
    q = targets.float()
    return (torch.xlogy(q, q) - q * F.log_softmax(logits.float(), 1)).sum(1)


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


# -- faces below the threshold --------------------------------------------------------------------


def consistency(first: Tensor, second: Tensor, below: Tensor) -> Tensor:
    """How far apart a network's answers to two views of a face are; both views learn.

    Args:
        first: logits (B, K) of one strong view.
        second: logits (B, K) of the other.
        below: (B,) bool, the face is below its threshold; others have loss 0.

    Returns:
        (B,) float32, at least 0: the mean of KL(p || q) and KL(q || p), nats.
    """
    log_p, log_q = F.log_softmax(first.float(), 1), F.log_softmax(second.float(), 1)
    # KL(p || q) + KL(q || p) = sum of (p - q) * (log p - log q)
    return below * ((log_p.exp() - log_q.exp()) * (log_p - log_q) / 2).sum(1)


def negative_learning(logits: Tensor, teacher: Tensor, below: Tensor, cut: float = 0.05) -> Tensor:
    """-log(1 - p_c), summed over the classes c that the teacher rules out, nats.

    Args:
        logits: (B, K) of the view that learns.
        teacher: probabilities (B, K) of the weak view.
        below: (B,) bool, the face is below its threshold; others have loss 0.
        cut: a class with a smaller teacher's probability is ruled out, (0, 1].

    Returns:
        (B,) float32, at least 0; 0 for a face of which no class is ruled out.
    """
    z = logits.float()
    # log(1 - p_c) from the other classes' logits: 1 - p would be 0 where the network is sure.
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    others = z[:, None].masked_fill(itself, -torch.inf).logsumexp(2)
    log_rest = others - z.logsumexp(1, keepdim=True)
    return below * -log_rest.masked_fill(teacher >= cut, 0).sum(1)


def contrastive(
    first: Tensor,
    second: Tensor,
    below: Tensor,
    temperature: float = 0.07,
    gather: Gather | None = None,
) -> Tensor:
    """NT-Xent: each view picks out the other view of its face among those of other faces, nats.

    Only faces below the threshold are told apart; one alone has loss 0. Cost: similarities of all
    views of the batch with each other, over all workers where `gather` is given.

    Args:
        first: features (B, D) of one view; made unit length here.
        second: features (B, D) of the other.
        below: (B,) bool, the face is below its threshold; others have loss 0 and are nobody's
            negatives.
        temperature: cosines are divided by it, above 0.
        gather: takes the other workers' faces as negatives too; None: those of this worker alone.

    Returns:
        (B,) float32, at least 0: mean over the face's two views.
    """
    gather = gather or ALONE
    x, y = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    size, joined = len(x), gather(torch.stack([x, y], 1))
    views = torch.cat([joined[:, 0], joined[:, 1]])
    asked = gather(below.float()).bool().repeat(2)
    own = torch.arange(size, device=x.device) + gather.rank * size
    loss = x.new_zeros(size)
    for view, itself, other in ((x, own, own + len(joined)), (y, own + len(joined), own)):
        with torch.autocast(x.device.type, enabled=False):  # it would multiply in bfloat16
            cosines = view @ views.T / temperature
        rows = torch.arange(size, device=x.device)
        out = ~asked.expand(size, -1).clone()
        out[rows, itself], out[rows, other] = True, False
        loss = loss - F.log_softmax(cosines.masked_fill(out, -torch.inf), 1)[rows, other] / 2
    return below * loss


def queued_contrastive(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE: a view picks out its face's key among the keys of earlier faces, nats.

    Args:
        query: features (B, D); made unit length here.
        key: features (B, D) of the other view, without gradient; made unit length here.
        queue: unit keys (Q, D) of other faces.
        temperature: cosines are divided by it, above 0.

    Returns:
        (B,) float32, at least 0.
    """
    x, own = F.normalize(query.float(), dim=1), F.normalize(key.detach().float(), dim=1)
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in bfloat16
        others = x @ queue.T
    cosines = torch.cat([(x * own).sum(1, keepdim=True), others], 1)
    return -F.log_softmax(cosines / temperature, 1)[:, 0]


def fairness(
    logits: Tensor,
    chosen: Tensor,
    shares: Tensor,
    histogram: Tensor,
    gather: Gather | None = None,
) -> Tensor:
    """FreeMatch's fairness term: minus the cross entropy of the pool's classes and the batch's.

    sum over c of a_c log b_c, where a is `shares` over `histogram` and b is the batch's mean
    probability over the share of its faces that are given to c; both made to sum to 1. Trap: it has
    no lower bound, so its weight is small; FreeMatch's released code takes 0.01.

    Args:
        logits: (B, K) of the strong view.
        chosen: (B,) bool, the face is above its threshold; others do not count.
        shares: (K,) running mean of the pool's probabilities.
        histogram: (K,) running shares of the classes that the pool's faces are given to.
        gather: looks at the batch of all workers; each then has the same loss.

    Returns:
        Scalar float32, at most 0; 0 where no face is chosen.
    """
    gather = gather or ALONE
    probs = gather(torch.softmax(logits.float(), 1))
    counted = gather(chosen.float())[:, None]
    given = F.one_hot(probs.argmax(1), probs.shape[1]) * counted
    total = counted.sum().clamp(min=1)
    mean, own = (counted * probs).sum(0) / total, given.sum(0) / total
    there = own > 0
    a = torch.where(histogram > 0, shares / histogram, 0)
    b = torch.where(there, mean / torch.where(there, own, 1), 0)
    b = b / b.sum().clamp(min=1e-12)
    return (a / a.sum() * torch.where(there, b, 1).log()).sum()


# -- over workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gather:
    """Joins the rows of all workers, worker after worker; gradients go back to whose rows they are.

    A mean over joined rows is the same on every worker and its gradient, averaged over workers, is
    the one that a single worker with the whole batch computes. Cost: one sum over workers of the
    joined rows, and another one in backward where rows have a gradient.
    """

    reduce: AllReduce
    rank: int
    world: int

    def __call__(self, rows: Tensor) -> Tensor:
        """All workers' rows (world * B, ...) from one's own (B, ...); B is the same on all."""
        if self.world == 1:
            return rows
        joined: Tensor = _Joined.apply(rows, self)
        return joined


ALONE = Gather(lambda tensor: tensor, 0, 1)
"""Where there is one worker."""


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        parts = rows.new_zeros(gather.world, *rows.shape)
        parts[gather.rank] = rows
        joined: Tensor = gather.reduce(parts)
        return joined.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gather = ctx.gather
        # A sum over workers may reuse the memory it is given, and autograd's is not ours.
        total: Tensor = gather.reduce(grads[0].clone(memory_format=torch.contiguous_format))
        return total.chunk(gather.world)[gather.rank], None


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log likelihood, nats, of (N, K) logits / T for codes (N,) or probs (N, K)."""
    scaled = torch.from_numpy(np.asarray(logits, np.float64)) / temperature
    log_probs = torch.log_softmax(scaled, 1).numpy()
    if targets.ndim == 1:
        return float(-log_probs[np.arange(len(targets)), targets].mean())
    return float(-(targets * log_probs).sum(1).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The T in [0.05, 20] with the least NLL of softmax(logits / T).

    Golden section on log T: the loss is convex in 1 / T, so it has one minimum there too.

    Args:
        logits: (N, K), of faces the model has not been trained on.
        targets: codes (N,) or probabilities (N, K).

    Returns:
        T, to about 1e-5 relative.
    """
    left, right = math.log(0.05), math.log(20.0)
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
