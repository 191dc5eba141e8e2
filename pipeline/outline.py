"""Whether faces fit a network, said before a run: the network is laid out, nothing is computed.

Cost: a second per network, and the seconds that importing timm takes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from pipeline.errors import ConfigError, ModelError
from pipeline.masked import patch_side
from pipeline.models import ModelConfig, create


def outline(config: ModelConfig) -> tuple[nn.Module, int]:
    """A network without memory for its weights, and the number of its tokens for one face.

    Networks that were laid out once are remembered; leave them as they are.

    Raises:
        ModelError: as :func:`pipeline.models.create`, or faces of `size` pixels do not fit.
    """
    plain = {"weights": None, "pretraining_data": None}
    return _laid_out(config.model_copy(update=plain).model_dump_json())


@lru_cache(maxsize=32)
def _laid_out(network: str) -> tuple[nn.Module, int]:
    config = ModelConfig.model_validate_json(network)
    with torch.device("meta"):
        model = create(config, ("", "")).eval()
        try:
            tokens, _, _ = model.tokens(torch.empty(1, config.channels, config.size, config.size))
        except (AssertionError, RuntimeError, ValueError) as err:
            why = " ".join(str(err).split())
            raise ModelError(f"{config.name}: faces of {config.size} px do not fit: {why}") from err
    return model.net, tokens.shape[1]


def require_patches(config: ModelConfig, ratio: float) -> None:
    """Refuse what a masked reconstruction would stumble over in its first step.

    Args:
        config: of the encoder.
        ratio: share of the patches that is hidden, (0, 1).

    Raises:
        ModelError: as :func:`outline`.
        ConfigError: no vision transformer; a face is no square of its patches; none is hidden.
    """
    net, tokens = outline(config)
    side, size = patch_side(net), config.size
    patches = (size // side) ** 2
    if size % side or tokens - int(net.num_prefix_tokens) != patches:  # type: ignore[arg-type]
        raise ConfigError(
            f"pretrain.model: {config.name} sees patches of {side} px, and faces of {size} px are "
            "not made of them"
        )
    if not int(ratio * patches):
        raise ConfigError(f"pretrain.mask_ratio: {ratio} of {patches} patches hides none")
