"""Masked autoencoding of faces: hide patches, encode the rest, reconstruct what was hidden.

What for: a vision transformer learns faces without labels; only the encoder is kept. Pure torch.
Cost: the encoder sees 1 - ratio of the patches, the decoder all of them at its own width.
Source: He et al., arXiv 2111.06377, section 3: random patches hidden per face, a light decoder over
visible and mask tokens, mean squared error on hidden patches; SSFER arXiv 2410.17622, stage 1.
Departs: the encoder is timm's and keeps its learned positions, so that it fine-tunes as any other;
the decoder's are the fixed sines and cosines of the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError


def patchify(images: Tensor, side: int) -> Tensor:
    """Patches (B, N, C * side^2), row after row, of images (B, C, S, S); `side` divides S."""
    batch, channels, height, width = images.shape
    rows, columns = height // side, width // side
    cut = images.reshape(batch, channels, rows, side, columns, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * side * side)


def unpatchify(patches: Tensor, side: int, channels: int) -> Tensor:
    """Inverse of `patchify` for square images."""
    batch, count, _ = patches.shape
    rows = round(count**0.5)
    cut = patches.reshape(batch, rows, rows, channels, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * side, rows * side)


def draw_hidden(batch: int, patches: int, ratio: float, device: torch.device) -> Tensor:
    """Which patches (B, N) bool are hidden: floor(ratio * N) of each face, at random.

    Drawn from torch's global generator, every face by itself.
    """
    order = torch.rand(batch, patches).argsort(1)
    hidden = torch.zeros(batch, patches, dtype=torch.bool)
    hidden.scatter_(1, order[:, : int(ratio * patches)], True)
    return hidden.to(device)


def visible_positions(hidden: Tensor) -> Tensor:
    """Positions (B, V) of the patches that are not hidden, ascending; hidden (B, N) bool."""
    # A stable sort of False before True leaves the visible ones in front, in order.
    count = int((~hidden[0]).sum())
    return hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def encode_visible(net: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """Tokens (B, P + V, D) of the P prefix tokens and of the visible patches, after the last norm.

    Args:
        net: timm's VisionTransformer.
        x: normalized faces (B, C, S, S).
        visible: positions (B, V).
    """
    vit: Any = net
    tokens = vit._pos_embed(vit.patch_embed(x))
    prefix = vit.num_prefix_tokens
    kept = visible[:, :, None].expand(-1, -1, tokens.shape[2])
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, kept)], 1)
    encoded: Tensor = vit.norm(vit.blocks(vit.norm_pre(tokens)))
    return encoded


def patch_side(net: nn.Module) -> int:
    """Side of a transformer's patches, pixels.

    Raises:
        ConfigError: the network is no vision transformer of timm's with square patches.
    """
    from timm.models.vision_transformer import VisionTransformer  # seconds

    if not isinstance(net, VisionTransformer):
        raise ConfigError(
            f"pretrain: mae hides patches and needs one of timm's vision transformers, such as "
            f"vit_tiny_patch16_224; got {type(net).__name__}"
        )
    height, width = net.patch_embed.patch_size
    if height != width:
        raise ConfigError(f"pretrain: patches of {height} x {width} pixels, expected squares")
    return int(height)


class Decoder(nn.Module):
    """Visible tokens -> pixels of all patches."""

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        patches: int,
        pixels: int,
        *,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        """A transformer of its own.

        Args:
            embed_dim: of the encoder.
            patches: N of a face, a square number.
            pixels: values of a patch, C * side^2.
            width: of the decoder's tokens; a multiple of 4 and of `heads`.
            depth: blocks.
            heads: of each block.

        Raises:
            ConfigError: the width cannot be divided.
        """
        super().__init__()
        if width % 4 or width % heads:
            raise ConfigError(f"pretrain.decoder: width {width} is no multiple of 4 and of {heads}")
        from timm.models.vision_transformer import Block

        self.embed = nn.Linear(embed_dim, width)
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, pixels)
        self.register_buffer("positions", sine_positions(patches, width), persistent=False)
        nn.init.normal_(self.mask, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Predicted patches (B, N, C * side^2).

        Args:
            encoded: prefix and visible tokens (B, P + V, D).
            visible: positions (B, V).
        """
        count = visible.shape[1]
        tokens = self.embed(encoded)
        prefix, seen = tokens[:, :-count], tokens[:, -count:]
        batch, width = len(tokens), tokens.shape[2]
        every = self.mask.to(tokens.dtype).expand(batch, len(self.positions), width)
        every = every.scatter(1, visible[:, :, None].expand(-1, -1, width), seen)
        every = every + self.positions.to(tokens.dtype)
        out = self.norm(self.blocks(torch.cat([prefix, every], 1)))
        predicted: Tensor = self.head(out[:, prefix.shape[1] :])
        return predicted


def sine_positions(patches: int, width: int) -> Tensor:
    """Positions (N, width) of a square grid: half the width for the row, half for the column."""
    side = round(patches**0.5)
    rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return torch.cat([rows, columns], 2).reshape(patches, width).float()


def reconstruction_loss(
    predicted: Tensor, patches: Tensor, hidden: Tensor, *, normalize: bool
) -> Tensor:
    """Mean squared error of the hidden patches of each face (B,) float32 (arXiv 2111.06377, 3).

    Args:
        predicted: (B, N, P).
        patches: the true ones (B, N, P).
        hidden: (B, N) bool, at least one per face.
        normalize: compare with patches brought to mean 0 and variance 1 each, as the paper does by
            default and SSFER does not.
    """
    target = patches.float()
    if normalize:
        var, mean = torch.var_mean(target, 2, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (predicted.float() - target).square().mean(2)
    return (error * hidden).sum(1) / hidden.sum(1)
