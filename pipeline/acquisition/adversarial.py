"""Faces near a decision boundary, by the smallest step that changes the model's answer.

:func:`boundary` measures the step, batch by batch, where the model is (any device); its answers are
the column `boundary` of a pool, which :func:`deepfool` ranks.

Cost: DeepFool linearizes the model around each face and steps until the face has crossed, at most
`iterations` times. A step is 2 forward and K backward passes (to the pixels, not to the weights) of
the faces that have not crossed: with 8 classes as much as 14 plain forward passes of a small
convolutional network on one core, and most faces take two steps or more. It is by far the dearest
column to make; score a sample of the pool. Memory: one forward pass's activations and K + 4 copies
of the batch.

Source: Ducoffe and Precioso, Adversarial Active Learning for Deep Networks: a Margin Based Approach
(arXiv 1802.09841); DeepFool: Moosavi-Dezfooli et al. (arXiv 1511.04599), algorithm 2.
Departs: a batch at once. Ranked by the length of the step instead of its square: the same order.
A face whose logits do not depend on its pixels is infinitely far.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.acquisition.interface import Pool, Rows, lowest, required, unlabeled_rows

ITERATIONS = 50
OVERSHOOT = 0.02
_BEYOND = 1e-4  # added to each step's length, or rounding leaves it on the boundary


def deepfool(pool: Pool, budget: int, rng: np.random.Generator) -> Rows:
    """The faces nearest to a decision boundary. Ties: lowest row. Reads boundary."""
    rows = unlabeled_rows(pool, budget)
    needs = "boundary (N,), distances by adversarial.boundary"
    return lowest(required(pool.boundary, "deepfool", needs)[rows], rows, budget)


def boundary(
    model: Callable[[Tensor], Tensor],
    faces: Tensor,
    *,
    iterations: int = ITERATIONS,
    overshoot: float = OVERSHOOT,
) -> NDArray[np.float64]:
    """Length (B,) of DeepFool's step over the nearest decision boundary.

    Args:
        model: faces (B, ...) to logits (B, K), differentiable, each face by itself: in evaluation
            mode, since batch normalization in training mode mixes the faces of a batch.
        faces: (B, ...) as the model takes them, floating.
        iterations: steps after which a face that has not crossed keeps the length reached.
        overshoot: the step is lengthened by this share when the crossing is tried.

    Returns:
        float64, in units of the input; infinite where the logits do not depend on the face.
    """
    start = faces.detach()
    step = torch.zeros_like(start)
    own = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    stuck = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    active = torch.arange(len(start), device=start.device)
    for turn in range(iterations):
        x = start[active] + (1 + overshoot) * step[active]
        if turn:  # a forward pass alone is cheaper than slopes of faces that have crossed
            with torch.no_grad():
                here = model(x).argmax(1) == own[active]
            active, x = active[here], x[here]
        if not len(active):
            break
        x.requires_grad_()
        with torch.enable_grad():
            logits = model(x)
            slopes = _slopes(logits, x)
        logits = logits.detach()
        if not turn:
            own = logits.argmax(1)
        move = _move(logits, slopes, own[active])
        free = move.flatten(1).isfinite().all(1)
        stuck[active[~free]] = True
        active = active[free]
        step[active] += move[free]
    length = step.flatten(1).double().norm(dim=1)
    length[stuck] = torch.inf
    return length.cpu().numpy()


def _slopes(logits: Tensor, x: Tensor) -> Tensor:
    """Gradients (K, B, ...) of every logit with respect to its face."""
    classes = logits.shape[1]
    return torch.stack(
        [
            torch.autograd.grad(logits[:, k].sum(), x, retain_graph=k + 1 < classes)[0]
            for k in range(classes)
        ]
    )


def _move(logits: Tensor, slopes: Tensor, own: Tensor) -> Tensor:
    """Step (B, ...) to the nearest boundary of the linearized model; not finite: there is none."""
    at = torch.arange(len(own), device=own.device)
    w = slopes - slopes[own, at]
    norm = w.flatten(2).norm(dim=2).T  # (B, K)
    gap = (logits - logits[at, own][:, None]).abs()
    distance = torch.where(norm > 0, gap / norm, torch.inf)
    distance[at, own] = torch.inf
    length, nearest = distance.min(1)
    scale = (length + _BEYOND) / norm[at, nearest]
    return scale.reshape(-1, *[1] * (w.dim() - 2)) * w[nearest, at]
