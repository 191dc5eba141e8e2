"""Proves that networks are laid out without weights, and that faces that do not fit are refused."""

from __future__ import annotations

import pytest
from helpers.toy import BATCHNORM, CONVNET, RESNET, VIT

from pipeline.errors import ConfigError, ModelError
from pipeline.models import ModelConfig, create
from pipeline.outline import outline, require_patches

PLAIN = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def vit(size: int, **args: object) -> ModelConfig:
    return ModelConfig(name="vit_tiny_patch16_224", size=size, args={**PLAIN, **args})


@pytest.mark.parametrize("config", [CONVNET, RESNET, VIT, BATCHNORM], ids=lambda c: c.name)
def test_outline__is_the_network_without_memory(config: ModelConfig) -> None:
    net, tokens = outline(config)
    made = create(config, ("a", "b"))
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in made.net.state_dict().items()
    }
    assert all(p.is_meta for p in net.parameters())
    assert outline(config.model_copy(update={"weights": "pretrained"}))[0] is net  # remembered
    faces = made.mean.new_zeros(1, config.channels, config.size, config.size)
    assert tokens == made.eval().tokens(faces)[0].shape[1]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_outline__faces_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="faces of 48 px do not fit: Input height"):
        outline(vit(48))
    with pytest.raises(ModelError, match="convnet: faces of 8 px do not fit: "):
        outline(ModelConfig(name="convnet", args={"width": 4, "depth": 4}, size=8))


def test_require_patches__a_square_of_them() -> None:
    require_patches(vit(48, img_size=48, patch_size=6), 0.75)
    require_patches(vit(48, patch_size=8, dynamic_img_size=True), 0.75)
    with pytest.raises(ConfigError, match="sees patches of 8 px, and faces of 44 px are not made"):
        require_patches(vit(44, img_size=44, patch_size=8), 0.75)
    with pytest.raises(ConfigError, match=r"patches of 8 x 4 pixels, expected squares"):
        require_patches(vit(16, img_size=16, patch_size=(8, 4)), 0.75)


@pytest.mark.parametrize(("ratio", "fits"), [(0.24, False), (0.25, True), (0.99, True)])
def test_require_patches__one_is_hidden_at_least(ratio: float, fits: bool) -> None:
    config = vit(16, img_size=16, patch_size=8)
    if fits:
        require_patches(config, ratio)
    else:
        with pytest.raises(ConfigError, match=r"0\.24 of 4 patches hides none"):
            require_patches(config, ratio)
