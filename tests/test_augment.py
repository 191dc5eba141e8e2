"""Proves that views stay within their ranges, depend on the generator alone, and cover them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.augment import (
    GEOMETRY,
    STRONG,
    VIEWS,
    WEAK,
    Strength,
    augment,
    geometry,
    move_boxes,
    plain,
)

STILL = Strength(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)


def only(**ranges: float) -> Strength:
    return Strength(**{**STILL.__dict__, **ranges})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(count: int, side: int = 48) -> Tensor:
    """Gray levels that grow by 2 per column, none along rows."""
    return (60 + 2 * torch.arange(side)).to(torch.uint8).expand(count, 1, side, side)


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Growth per column and per row in the middle of each face, in steps of the ramp."""
    middle = x[:, 0, 18:30, 18:30] * 255 / 2
    return middle.diff(dim=2).mean((1, 2)), middle.diff(dim=1).mean((1, 2))


@pytest.mark.parametrize("name", VIEWS)
def test_views__shape_range_and_generator(name: str) -> None:
    pixels = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=generator())
    first = VIEWS[name](pixels, 32, generator(1))
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, VIEWS[name](pixels, 32, generator(1)))
    assert torch.equal(first, VIEWS[name](pixels, 32, generator(2))) == (name == "plain")


def test_plain__divides_only() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(plain(pixels, 16, generator()), pixels / 255)


def test_augment__nothing_but_the_flip_gives_the_face_or_its_mirror() -> None:
    pixels = torch.randint(0, 256, (200, 1, 12, 12), dtype=torch.uint8, generator=generator())
    seen, x = augment(pixels, 12, generator(3), STILL), pixels / 255
    same = (seen - x).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (seen - x.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_augment__rotation_turns_a_ramp_by_at_most_its_range() -> None:
    across, down = slopes(augment(ramp(300), 48, generator(), only(rotation=20.0)))
    torch.testing.assert_close(torch.hypot(across, down), torch.ones(300), atol=0.02, rtol=0)
    angle = torch.rad2deg(torch.atan2(down, across.abs()))
    assert angle.abs().max() <= 20.3
    assert angle.min() < -17
    assert angle.max() > 17


def test_augment__scale_stretches_a_ramp_by_at_most_its_range() -> None:
    across, down = slopes(augment(ramp(300), 48, generator(), only(scale=0.2)))
    assert down.abs().max() < 1e-3
    assert across.abs().min() == pytest.approx(1 / 1.2, abs=0.01)
    assert across.abs().max() == pytest.approx(1.2, abs=0.01)


def test_augment__shear_slants_a_ramp_by_at_most_its_range() -> None:
    across, down = slopes(augment(ramp(300), 48, generator(), only(shear=0.15)))
    torch.testing.assert_close(across.abs(), torch.ones(300), atol=0.01, rtol=0)
    assert down.abs().max() == pytest.approx(0.15, abs=0.01)


def test_augment__shift_moves_a_ramp_by_at_most_its_share_of_the_side() -> None:
    seen = augment(ramp(300), 48, generator(), only(shift=0.1))[:, 0, 24, 23:25].mean(1)
    columns = (seen * 255 - 60) / 2 - 23.5
    assert columns.abs().max() == pytest.approx(0.1 * 48, abs=0.2)
    assert columns.abs().min() < 0.2


def test_augment__gamma_contrast_and_brightness_are_pointwise() -> None:
    pixels = torch.full((400, 1, 8, 8), 128, dtype=torch.uint8)
    level = 128 / 255
    dark = augment(pixels, 8, generator(), only(gamma=0.5))[:, 0, 0, 0]
    assert dark.min() == pytest.approx(level ** math.exp(0.5), abs=0.01)
    assert dark.max() == pytest.approx(level ** math.exp(-0.5), abs=0.01)
    light = augment(pixels, 8, generator(), only(brightness=0.2))[:, 0, 0, 0]
    assert light.min() == pytest.approx(level - 0.2, abs=0.01)
    assert light.max() == pytest.approx(level + 0.2, abs=0.01)
    across, _ = slopes(augment(ramp(300), 48, generator(), only(contrast=0.5)))
    assert across.abs().min() == pytest.approx(0.5, abs=0.02)
    assert across.abs().max() == pytest.approx(1.5, abs=0.02)


def test_augment__noise_is_at_most_its_standard_deviation() -> None:
    pixels = torch.full((200, 1, 32, 32), 128, dtype=torch.uint8)
    spread = augment(pixels, 32, generator(), only(noise=0.08)).std((1, 2, 3))
    assert spread.min() < 0.01
    assert spread.max() == pytest.approx(0.08, abs=0.006)


def test_augment__erases_one_gray_rectangle_in_its_share_of_faces() -> None:
    pixels = torch.zeros(1000, 1, 40, 40, dtype=torch.uint8)
    seen = augment(pixels, 40, generator(), only(erases=1, erase_probability=0.4))[:, 0]
    erased = seen > 2e-6
    hit = erased.any(2).any(1)
    assert 340 < hit.sum() < 460
    rows, columns = erased.any(2).sum(1)[hit], erased.any(1).sum(1)[hit]
    assert torch.equal(erased.sum((1, 2))[hit], rows * columns)
    assert rows.min() in (4, 5)
    assert columns.max() in (15, 16)
    grays = seen.amax((1, 2))[hit]
    assert grays.min() < 0.05 < 0.95 < grays.max()


def test_strong__goes_further_than_weak() -> None:
    assert STRONG.rotation > WEAK.rotation
    pixels = torch.randint(0, 256, (64, 1, 24, 24), dtype=torch.uint8, generator=generator())
    apart = {
        name: (VIEWS[name](pixels, 24, generator(5)) - pixels / 255).abs().mean()
        for name in ("weak", "strong")
    }
    assert apart["strong"] > apart["weak"] > 0


def bounds(bright: Tensor) -> Tensor:
    """x0 y0 x1 y1 (B, 4) of what is bright in (B, S, S), in pixels."""
    ends = []
    for one in bright:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        ends.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(ends).float()


def test_move_boxes__go_where_the_pixels_go() -> None:
    calm = replace(STRONG, erase_probability=0.0, noise=0.0, gamma=0.0, contrast=0.0, brightness=0)
    pixels = torch.zeros(60, 1, 200, 200, dtype=torch.uint8)
    pixels[:, :, 70:140, 60:110] = 255
    boxes = torch.tensor([[60, 70, 110, 140]]).expand(60, 4) / 200
    maps = geometry(60, generator(4), calm)
    seen = augment(pixels, 96, generator(4), calm)[:, 0]
    moved = 96 * move_boxes(boxes, maps)
    assert (moved - bounds(seen > 0.5)).abs().max() < 1
    assert (moved - 96 * boxes).abs().amax(1).min() > 1
    assert torch.equal(maps, GEOMETRY["strong"](60, generator(4)))


def test_geometry__of_weak_and_plain_views() -> None:
    pixels = torch.zeros(40, 1, 100, 100, dtype=torch.uint8)
    pixels[:, :, 30:60, 35:70] = 255
    boxes = torch.tensor([[0.35, 0.3, 0.7, 0.6]]).expand(40, 4)
    torch.testing.assert_close(move_boxes(boxes, GEOMETRY["plain"](40, generator())), boxes)
    whole = replace(WEAK, erase_probability=0.0)
    seen = augment(pixels, 50, generator(2), whole)[:, 0]
    level = (seen.amin((1, 2)) + seen.amax((1, 2))).view(-1, 1, 1) / 2
    moved = 50 * move_boxes(boxes, GEOMETRY["weak"](40, generator(2)))
    assert (moved - bounds(seen > level)).abs().max() < 1
