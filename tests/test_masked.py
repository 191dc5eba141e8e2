"""Proves masked autoencoding against loops, and that hidden patches are never seen."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.masked import (
    Decoder,
    draw_hidden,
    encode_visible,
    patch_side,
    patchify,
    reconstruction_loss,
    sine_positions,
    unpatchify,
    visible_positions,
)
from pipeline.models import ModelConfig, create

VIT = ModelConfig(
    name="vit_tiny_patch16_224",
    args={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    size=16,
    dropout=0.0,
)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return create(VIT, ("a", "b")).net.eval()


def test_patchify__rows_of_patches_and_back() -> None:
    x = torch.rand(2, 3, 12, 12)
    patches = patchify(x, 4)
    assert patches.shape == (2, 9, 48)
    for number in range(9):
        top, left = 4 * (number // 3), 4 * (number % 3)
        cut = x[:, :, top : top + 4, left : left + 4]
        assert torch.equal(patches[:, number], cut.reshape(2, -1))
    assert torch.equal(unpatchify(patches, 4, 3), x)


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.7])
def test_draw_hidden__as_many_of_every_face_and_all_alike(ratio: float) -> None:
    torch.manual_seed(1)
    hidden = draw_hidden(4000, 16, ratio, torch.device("cpu"))
    assert (hidden.sum(1) == int(ratio * 16)).all()
    share = int(ratio * 16) / 16
    spread = 5 * math.sqrt(share * (1 - share) / 4000)
    assert (hidden.float().mean(0) - share).abs().max() < spread
    visible = visible_positions(hidden)
    for row in range(20):
        assert visible[row].tolist() == (~hidden[row]).nonzero().squeeze(1).tolist()


def test_encode_visible__all_visible_is_the_plain_network(net: torch.nn.Module) -> None:
    x = torch.rand(3, 1, 16, 16)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(encode_visible(net, x, everything), net.forward_features(x))


def test_encode_visible__what_is_hidden_changes_nothing(net: torch.nn.Module) -> None:
    torch.manual_seed(2)
    x, hidden = torch.rand(3, 1, 16, 16), draw_hidden(3, 16, 0.75, torch.device("cpu"))
    visible = visible_positions(hidden)
    patches = patchify(x, 4)
    other = unpatchify(torch.where(hidden[:, :, None], 9.0, patches), 4, 1)
    seen = encode_visible(net, x, visible)
    assert seen.shape == (3, 1 + 4, 24)
    assert torch.equal(seen, encode_visible(net, other, visible))
    # A face whose visible patches lie elsewhere is another one: positions go with the patches.
    moved = encode_visible(net, x, (visible + 1).clamp(max=15))
    assert not torch.allclose(seen[:, 0], moved[:, 0])


def test_decoder__tokens_go_back_to_their_places() -> None:
    torch.manual_seed(3)
    decoder = Decoder(24, 16, 16, width=8, depth=1, heads=2).eval()
    decoder.blocks, decoder.norm, decoder.head = (torch.nn.Identity() for _ in range(3))
    hidden = draw_hidden(2, 16, 0.5, torch.device("cpu"))
    visible = visible_positions(hidden)
    encoded = torch.rand(2, 1 + 8, 24)
    got = decoder(encoded, visible) - sine_positions(16, 8)
    for face in range(2):
        seen = dict(zip(visible[face].tolist(), decoder.embed(encoded[face, 1:]), strict=True))
        for place in range(16):
            expected = seen.get(place, decoder.mask[0, 0])
            torch.testing.assert_close(got[face, place], expected)


def test_sine_positions__of_row_and_column() -> None:
    found = sine_positions(9, 8)
    for place in range(9):
        row, column = divmod(place, 3)
        rates = [1.0, 10_000**-0.5]
        expected = [
            f(at * rate) for at in (row, column) for f in (math.sin, math.cos) for rate in rates
        ]
        assert found[place].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_reconstruction_loss__by_loops(normalize: bool) -> None:
    torch.manual_seed(4)
    predicted, patches = torch.rand(3, 6, 5), torch.rand(3, 6, 5)
    hidden = draw_hidden(3, 6, 0.5, torch.device("cpu"))
    got = reconstruction_loss(predicted, patches, hidden, normalize=normalize)
    for face in range(3):
        errors = []
        for place in range(6):
            if hidden[face, place]:
                target = patches[face, place].double()
                if normalize:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append(((predicted[face, place].double() - target) ** 2).mean())
        assert got[face].item() == pytest.approx(float(sum(errors) / len(errors)), rel=1e-5)


def test_patch_side__other_networks_are_refused(net: torch.nn.Module) -> None:
    assert patch_side(net) == 4
    with pytest.raises(ConfigError, match=r"vision transformers, .* got CompactResNet"):
        patch_side(create(ModelConfig(size=16), ("a", "b")).net)
    with pytest.raises(ConfigError, match="width 10 is no multiple of 4"):
        Decoder(24, 16, 16, width=10, depth=1, heads=2)
