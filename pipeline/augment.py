"""Random views of a batch of faces: plain, weak and strong.

What for: one affine resampling and a few pointwise operations per batch, on the device the pixels
are on, so that 48 px faces cost far less than the network. Every random number comes from the
generator that is passed in: the same generator state gives the same view, and from the same state
its geometry can be had alone, for boxes to go the way of the pixels. Cost on one core: about
0.10 ms (weak) and 0.14 ms (strong) per gray 48 px face.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

View = Callable[[Tensor, int, torch.Generator], Tensor]
"""(uint8 (B, C, H, W), S, generator) -> float32 (B, C, S, S) in [0, 1]."""

Geometry = Callable[[int, torch.Generator], Tensor]
"""(B, generator) -> the maps (B, 2, 3) of the view of B faces from that state of the generator."""

Augmentation = Literal["plain", "weak", "strong"]


@dataclass(frozen=True)
class Strength:
    """Ranges that the parameters of each face are drawn from, uniformly and on both sides of 0."""

    rotation: float
    """Degrees."""
    scale: float
    """Share of the size."""
    shift: float
    """Share of the side."""
    shear: float
    """Tangent of the shear angle."""
    gamma: float
    """Logarithm of the exponent."""
    contrast: float
    """Share of the contrast."""
    brightness: float
    """Added, in units of the full range."""
    noise: float
    """Largest standard deviation of added Gaussian noise, in units of the full range."""
    erases: int
    """Rectangles that may be erased."""
    erase_probability: float
    """Of each rectangle."""


WEAK = Strength(12.0, 0.12, 0.09, 0.0, 0.25, 0.25, 0.1, 0.0, 1, 0.4)
STRONG = Strength(20.0, 0.20, 0.15, 0.15, 0.5, 0.5, 0.2, 0.08, 2, 0.7)


def plain(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Faces (B, C, H, W) uint8 as float32 (B, C, S, S) in [0, 1]; nothing is drawn."""
    x = pixels.float().div_(255)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x


def weak(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Flip, small affine, gamma, contrast and brightness, one rectangle erased (p 0.4)."""
    return augment(pixels, size, generator, WEAK)


def strong(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """As weak but about twice as far, with shear, noise and two rectangles (p 0.7 each)."""
    return augment(pixels, size, generator, STRONG)


VIEWS: Mapping[Augmentation, View] = {"plain": plain, "weak": weak, "strong": strong}


def augment(pixels: Tensor, size: int, generator: torch.Generator, by: Strength) -> Tensor:
    """A random view of each face.

    Args:
        pixels: uint8 (B, C, H, W), on any device.
        size: side S of the result, pixels.
        generator: source of all random numbers, on any device.
        by: the ranges.

    Returns:
        float32 (B, C, S, S) in [0, 1] on the device of the pixels.
    """
    batch = len(pixels)
    drawn = _draw(batch, generator, by).to(pixels.device)
    x = pixels.float().div_(255)
    grid = F.affine_grid(_inverse_maps(drawn[:, :6], by), [batch, x.shape[1], size, size], False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    x = _jitter(x, drawn[:, 6:10], by)
    if by.noise > 0:
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
        x = x + noise * (by.noise * drawn[:, 9]).view(-1, 1, 1, 1)
    for i in range(by.erases):
        x = _erase(x, drawn[:, 10 + 5 * i : 15 + 5 * i], by.erase_probability)
    return x.clamp_(0, 1)


def geometry(batch: int, generator: torch.Generator, by: Strength | None) -> Tensor:
    """The maps of a view, without the view.

    Args:
        batch: number of faces B.
        generator: in the state that :func:`augment` is given it in; it draws the same numbers.
        by: the ranges; None for a plain view, which draws nothing.

    Returns:
        (B, 2, 3) float32 from places in the view to places in the face, both in [-1, 1] from the
        outer edge of the first pixel to that of the last, on the device of the generator.
    """
    if by is None:
        return torch.eye(2, 3, device=generator.device).expand(batch, 2, 3)
    return _inverse_maps(_draw(batch, generator, by)[:, :6], by)


GEOMETRY: Mapping[Augmentation, Geometry] = {
    "plain": functools.partial(geometry, by=None),
    "weak": functools.partial(geometry, by=WEAK),
    "strong": functools.partial(geometry, by=STRONG),
}
"""Of each of the VIEWS."""


def move_boxes(boxes: Tensor, maps: Tensor) -> Tensor:
    """Where boxes come to lie in a view: the upright box around their moved corners.

    A box that is turned by an angle t grows by up to cos t + sin t on each side.

    Args:
        boxes: x0 y0 x1 y1 (B, 4) in shares of the face's side.
        maps: (B, 2, 3) of the view, see :func:`geometry`.

    Returns:
        (B, 4) in shares of the view's side; parts may lie outside [0, 1].
    """
    corners = 2 * boxes.float() - 1
    x = corners[:, [0, 2, 0, 2]] - maps[:, 0, 2:]
    y = corners[:, [1, 1, 3, 3]] - maps[:, 1, 2:]
    # Cramer's rule and no matrix product: under autocast that would be rounded to 8 bits.
    (a, b), (c, d) = (maps[:, row, :2].unsqueeze(2).unbind(1) for row in (0, 1))
    area = a * d - b * c
    x, y = (d * x - b * y) / area, (a * y - c * x) / area
    hull = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)
    return (hull + 1) / 2


def _draw(batch: int, generator: torch.Generator, by: Strength) -> Tensor:
    """(B, 10 + 5 * erases) in [0, 1): every number of a view but its noise."""
    return torch.rand(batch, 10 + 5 * by.erases, generator=generator, device=generator.device)


def _inverse_maps(drawn: Tensor, by: Strength) -> Tensor:
    """Maps (B, 2, 3) from output to input coordinates, both in [-1, 1]; drawn (B, 6) in [0, 1)."""
    flip = torch.where(drawn[:, 0] < 0.5, -1.0, 1.0)
    angle, scale, shear, right, down = (2 * drawn[:, 1:] - 1).unbind(1)
    angle = angle * math.radians(by.rotation)
    zoom = torch.exp(scale * math.log1p(by.scale))
    cos, sin, shear = torch.cos(angle) * zoom, torch.sin(angle) * zoom, shear * by.shear
    # A share of the side is twice as much in coordinates that run from -1 to 1.
    rows = [
        torch.stack([flip * cos, flip * (cos * shear - sin), 2 * by.shift * right], 1),
        torch.stack([sin, sin * shear + cos, 2 * by.shift * down], 1),
    ]
    return torch.stack(rows, 1)


def _jitter(x: Tensor, drawn: Tensor, by: Strength) -> Tensor:
    """Gamma, then contrast around the mean and brightness; drawn (B, 4) in [0, 1), last unused."""
    gamma, contrast, brightness = (2 * drawn[:, :3] - 1).view(-1, 3, 1, 1, 1).unbind(1)
    x = x.clamp(min=1e-6).pow(torch.exp(gamma * by.gamma))
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (1 + contrast * by.contrast) + mean + brightness * by.brightness


def _erase(x: Tensor, drawn: Tensor, probability: float) -> Tensor:
    """Fill a rectangle of sides 0.1 to 0.4 of the face with one gray, in a share of the faces."""
    chance, height, width, top, left = drawn.unbind(1)
    height, width = 0.1 + 0.3 * height, 0.1 + 0.3 * width
    ticks = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    rows = _inside(ticks, top * (1 - height), height)[:, None, :, None]
    columns = _inside(ticks, left * (1 - width), width)[:, None, None, :]
    hit = (chance < probability)[:, None, None, None]
    # Given that the face is hit, chance / probability is uniform again: it serves as the gray.
    gray = (chance / probability)[:, None, None, None]
    return torch.where(rows & columns & hit, gray, x)


def _inside(ticks: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """(B, S) bool: which of the S ticks in [0, 1] lie in [start, start + length)."""
    return (ticks >= start[:, None]) & (ticks < (start + length)[:, None])
