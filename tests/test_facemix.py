"""Proves FaceMix against hand computation, its IoU against a count of cells, and mixing pure."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.facemix import draw_mix, facemix_loss, iou, mix, mixup_loss

LAM = 0.25
ORDER = torch.tensor([1, 0])
LABELS = torch.tensor([0, 1])
MIXED = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # p 1/4 3/4 and 4/5 1/5
REAL = torch.tensor([[0.0, 0.0], [0.0, math.log(7)]])  # p 1/2 1/2 and 1/8 7/8


def nats(p: float) -> float:
    return -math.log(p)


def random_boxes(count: int, seed: int) -> Tensor:
    """Corners on a grid of tenths from -0.3 to 1.3, some boxes out of the picture."""
    ends = torch.randint(-3, 14, (count, 2, 2), generator=torch.Generator().manual_seed(seed))
    low, high = ends.amin(1), ends.amax(1) + 1
    return torch.cat([low, high], 1) / 10


def cells(box: Tensor) -> set[tuple[int, int]]:
    """The tenths of the picture that a box covers."""
    x0, y0, x1, y1 = (round(10 * float(v)) for v in box)
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1) if 0 <= x < 10 and 0 <= y < 10}


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_facemix_loss__by_hand(overlap: float) -> None:
    virtual = [
        LAM * nats(1 / 4) + (1 - LAM) * nats(3 / 4),
        LAM * nats(1 / 5) + (1 - LAM) * nats(4 / 5),
    ]
    both = nats(1 / 2) + nats(7 / 8)
    found = facemix_loss(MIXED, REAL, LABELS, ORDER, LAM, torch.full((2,), overlap))
    assert found.tolist() == pytest.approx([v + (1 - overlap) * both for v in virtual])


def test_facemix_loss__soft_targets_and_bfloat16() -> None:
    soft = torch.eye(2)[LABELS]
    expected = facemix_loss(MIXED, REAL, LABELS, ORDER, LAM, torch.tensor([0.2, 0.7]))
    found = facemix_loss(MIXED, REAL, soft, ORDER, LAM, torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(found, expected)
    rounded = (MIXED.bfloat16(), REAL.bfloat16())
    assert facemix_loss(*rounded, soft, ORDER, LAM, torch.zeros(2)).dtype == torch.float32


def test_facemix_loss__smooths_the_mixed_targets_alone() -> None:
    apart = torch.zeros(2)
    smooth = facemix_loss(MIXED, REAL, LABELS, ORDER, LAM, apart, smoothing=0.1)
    plain = facemix_loss(MIXED, REAL, LABELS, ORDER, LAM, apart)
    mixed = mixup_loss(MIXED, LABELS, ORDER, LAM, smoothing=0.1)
    torch.testing.assert_close(smooth - plain, mixed - mixup_loss(MIXED, LABELS, ORDER, LAM))
    target = 0.9 * (LAM * torch.eye(2) + (1 - LAM) * torch.eye(2)[ORDER]) + 0.1 / 2
    torch.testing.assert_close(mixed, torch.nn.functional.cross_entropy(
        MIXED, target, reduction="none"))  # fmt: skip


def test_facemix_loss__where_all_overlap_faces_get_no_gradient() -> None:
    mixed, real = MIXED.clone().requires_grad_(), REAL.clone().requires_grad_()
    facemix_loss(mixed, real, LABELS, ORDER, LAM, torch.tensor([1.0, 1.0])).sum().backward()
    assert mixed.grad.abs().max() > 0
    assert real.grad.abs().max() == 0


def test_mix__a_new_tensor_of_both_faces() -> None:
    x = torch.rand(5, 1, 3, 3).contiguous(memory_format=torch.channels_last)
    before, order = x.clone(), torch.tensor([3, 1, 0, 4, 2])
    mixed = mix(x, order, LAM)
    assert torch.equal(x, before)
    torch.testing.assert_close(mixed[0], LAM * x[0] + (1 - LAM) * x[3])
    torch.testing.assert_close(mixed[1], x[1])
    assert torch.equal(mix(x, order, 1.0), x)


def test_iou__counts_cells() -> None:
    a, b = random_boxes(300, 0), random_boxes(300, 1)
    expected = []
    for one, other in zip(a, b, strict=True):
        first, second = cells(one), cells(other)
        union = len(first | second)
        expected.append(len(first & second) / union if union else 0.0)
    assert 0 in expected
    assert max(expected) > 0.5
    assert iou(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(iou(a, b), iou(b, a))


def test_iou__half_one_and_none() -> None:
    whole, left, right = (
        torch.tensor([box]) for box in ([0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1])
    )
    assert [float(iou(whole, other)) for other in (whole, left)] == [1, 0.5]
    assert float(iou(left, right)) == 0
    assert float(iou(whole + 1, whole + 1)) == 0


def test_draw_mix__a_permutation_and_a_beta_share_of_the_global_generator() -> None:
    torch.manual_seed(3)
    drawn = [draw_mix(7, 0.5) for _ in range(400)]
    torch.manual_seed(3)
    order, lam = draw_mix(7, 0.5)
    assert torch.equal(order, drawn[0][0])
    assert lam == drawn[0][1]
    assert all(sorted(order.tolist()) == list(range(7)) for order, _ in drawn)
    shares = torch.tensor([lam for _, lam in drawn])
    assert shares.mean() == pytest.approx(0.5, abs=0.06)
    assert shares.var() == pytest.approx(1 / 8, abs=0.02)  # of Beta(a, a): 1 / (8 a + 4)
