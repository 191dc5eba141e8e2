"""Mixed images of two faces each, and how far to trust them: mixup and FaceMix.

What for: with few labels a network learns more from mixed pairs, but where one face lies beside the
other the mixture shows no face at all. FaceMix keeps the two real faces in the loss with a weight
of 1 - IoU of their boxes: well aligned pairs are learned from the mixture alone. Pure torch.
Cost: FaceMix passes two images per face, mixup one; the boxes of 128 faces, moved through their
views and compared, take one core 0.5 ms.
Source: FaceMix: SSFER, arXiv 2410.17622, the supervised stage's loss
    L = mean_i [CE(f(x_mix), y_mix) + (1 - IoU_i) (CE(f(x_i), y_i) + CE(f(x_j), y_j))].
    mixup: arXiv 1710.09412, section 2.
Departs: real faces and boxes are those before mixing; the released code mixes the batch in place
and passes, and looks for boxes in, mixed images only. The partner is drawn at random, not the
mirrored place in the batch, so a face may be its own partner and batches may be odd. Smoothing is
of the mixed image's targets alone, as in the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses import cross_entropy


def draw_mix(batch: int, alpha: float) -> tuple[Tensor, float]:
    """Partners (B,) int64 of a batch, a permutation, and the share lam in [0, 1] of the face.

    Both from torch's global generator on the CPU. One lam ~ Beta(alpha, alpha) for the whole batch,
    as in the released code.
    """
    order = torch.randperm(batch)
    share = torch.full((), alpha)
    return order, float(torch.distributions.Beta(share, share).sample())


def mix(x: Tensor, order: Tensor, lam: float) -> Tensor:
    """Each face mixed with its partner: lam * x_i + (1 - lam) * x_j, j = order[i].

    Args:
        x: (B, ...), stays as it is.
        order: the partner of each face (B,).
        lam: share of the face, [0, 1].

    Returns:
        A new tensor of the shape of x.
    """
    return lam * x + (1 - lam) * x[order]


def iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of pairs of boxes, of what lies in the picture.

    Args:
        boxes_a: x0 y0 x1 y1 (B, 4) in shares of the side, cut to [0, 1] here.
        boxes_b: (B, 4), the same.

    Returns:
        (B,) float32 in [0, 1]; 0 where both are out of the picture.
    """
    a, b = boxes_a.float().clamp(0, 1), boxes_b.float().clamp(0, 1)
    shared = _area(torch.cat([a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])], 1))
    union = _area(a) + _area(b) - shared
    return shared / union.clamp(min=1e-12)


def mixup_loss(
    mixed: Tensor, targets: Tensor, order: Tensor, lam: float, *, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of each mixed image against both faces' targets, nats.

    Args:
        mixed: logits (B, K) of the mixed images.
        targets: of the faces, class codes (B,) or probabilities (B, K).
        order: the partner of each face (B,).
        lam: share of the face, 1 - lam that of its partner.
        smoothing: share of the target given to all classes alike, [0, 1).

    Returns:
        (B,) float32.
    """
    own = cross_entropy(mixed, targets, smoothing=smoothing)
    other = cross_entropy(mixed, targets[order], smoothing=smoothing)
    return lam * own + (1 - lam) * other


def facemix_loss(
    mixed: Tensor,
    real: Tensor,
    targets: Tensor,
    order: Tensor,
    lam: float,
    overlap: Tensor,
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """FaceMix loss of each pair, nats: CE_mix + (1 - IoU) * (CE_i + CE_j).

    Args:
        mixed: logits (B, K) of the mixed images.
        real: logits (B, K) of the faces.
        targets: of the faces, class codes (B,) or probabilities (B, K).
        order: the partner of each face (B,).
        lam: share of the face, 1 - lam that of its partner.
        overlap: IoU (B,) of the two faces' boxes, [0, 1]; takes no gradient.
        smoothing: of the mixed images' targets, [0, 1); the faces' are as they are.

    Returns:
        (B,) float32.
    """
    alone = cross_entropy(real, targets)
    virtual = mixup_loss(mixed, targets, order, lam, smoothing=smoothing)
    return virtual + (1 - overlap.detach()) * (alone + alone[order])


def _area(boxes: Tensor) -> Tensor:
    """(B,); 0 for a box whose end lies before its start."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
