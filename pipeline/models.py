"""Face networks: one wrapper around two own networks and everything timm has.

What for: every stage sees the same `FaceModel`: pixels in [0, 1] in, embedding and logits out,
class names and normalization inside. Cost at 48 px gray: compact_resnet 1.2 M parameters and 36 M
multiply-adds per face, convnet (width 128, depth 3) 0.3 M and 109 M.
Source: compact_resnet: basic blocks of He et al., Deep Residual Learning (arXiv 1512.03385); with
widths [64, 128, 256, 512], stem [3, 1] and blocks 2 it is the ResNet-18 that CIFAR is learned with.
convnet: the ConvNet of Zhao, Mopuri, Bilen, Dataset Condensation (arXiv 2006.05929, 4.1).
Departs: compact_resnet standardizes each image first, because lighting says nothing about an
expression, and has no pooling behind its stem, because 48 px leave nothing to waste. Its
last BatchNorm scales start at 1, not at 0 as arXiv 1706.02677, 5.1 has them: they move by the
learning rate per step, so that zeros keep short runs from using their blocks (FERPlus 10 %, 120
steps of 128, seed 0, 3,199 development faces: 57.3 % against 43.0 %).
convnet may drop features before its classifier; the literature's setting is dropout 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.errors import ModelError

PRETRAINED = "pretrained"
"""Initial weights: the backbone of the run's own stage pretrain."""
TIMM = "timm"
"""Initial weights: those the library downloads."""


class ModelConfig(Config):
    """Which network; stored beside its weights and enough to build it again."""

    name: str = "compact_resnet"
    """compact_resnet, convnet, or any of timm's whose classifier is one linear layer (82 of the 98
    families of timm 1.0)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the network: widths, stem (kernel, stride) and blocks (a width's) of
    compact_resnet, width and depth of convnet."""
    size: int = Field(default=48, ge=8)
    """Side of the square input, pixels."""
    color: Literal["gray", "rgb"] = "gray"
    dropout: float = Field(default=0.3, ge=0, lt=1)
    weights: str | None = None
    """Initial weights: `timm` (the library downloads them), `pretrained` (this run's own), or a
    file that weights.py reads."""
    pretraining_data: str | None = None
    """What those weights have seen; printed on every protocol card."""

    @model_validator(mode="after")
    def _weights_name_their_data(self) -> ModelConfig:
        if self.weights not in (None, PRETRAINED) and self.pretraining_data is None:
            raise ValueError("weights need pretraining_data: the faces or images they were made of")
        if self.weights == TIMM and self.name in NETWORKS:
            raise ValueError(_no_weights(self.name))
        return self

    def same_network(self, other: ModelConfig) -> bool:
        """Whether weights of one fit the other, its classifier apart."""
        fields = ("name", "args", "size", "color")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    @property
    def channels(self) -> int:
        """1 for gray, 3 for rgb."""
        return 1 if self.color == "gray" else 3


class FaceModel(nn.Module):
    """A network with its normalization, its class names and an embedding of width `embed_dim`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        label_names: Sequence[str],
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.config = config
        self.label_names = tuple(label_names)
        self.net = net
        self.embed_dim = classifier_of(net).in_features
        self.started: dict[str, Any] | None = None
        """What became of the weights file it started from; kept in its folder's config.json."""
        # Derived from the config, so not part of the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of faces (B, C, S, S) float in [0, 1]."""
        return self.features(x)[1]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (B, D), not of unit length, and logits (B, K) of faces (B, C, S, S) in [0, 1].

        Raises:
            ModelError: the faces have another number of channels or another size.
        """
        return self._head(self._body(x))

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, W), embedding and logits of faces, as :meth:`features`.

        A transformer's tokens, its prefix tokens included; of a convolutional network the places
        of its last feature map.
        """
        seen = self._body(x)
        tokens = seen
        if seen.dim() == 4:
            # timm says so where a map has its channels last.
            last = str(getattr(self.net, "output_fmt", "NCHW")) == "NHWC"
            tokens = seen.flatten(1, 2) if last else seen.flatten(2).transpose(1, 2)
        return tokens, *self._head(seen)

    def _body(self, x: Tensor) -> Tensor:
        expected = (self.config.channels, self.config.size, self.config.size)
        if tuple(x.shape[1:]) != expected:
            raise ModelError(
                f"{self.config.name}: faces of shape {tuple(x.shape[1:])}, expected {expected}"
            )
        net: Any = self.net
        seen: Tensor = net.forward_features((x - self.mean) / self.std)
        if not isinstance(seen, Tensor):
            raise ModelError(f"{self.config.name}: gives {type(seen).__name__}s of features")
        return seen

    def _head(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.net
        embedding: Tensor = net.forward_head(seen, pre_logits=True)
        return embedding, classifier_of(self.net)(embedding)


class CompactResNet(nn.Module):
    """A small residual network for faces of 32 to 64 px: a few basic blocks per width.

    Args:
        stem: kernel and stride of the first convolution.
        blocks: of every width; the first one halves the side, but for the first width.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        widths: Sequence[int] = (32, 64, 128, 256),
        stem: tuple[int, int] = (5, 2),
        blocks: int = 1,
    ) -> None:
        super().__init__()
        (kernel, stride), first = stem, widths[0]
        padding = kernel // 2
        self.conv_stem = nn.Conv2d(in_chans, first, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        after = [width for width in widths for _ in range(blocks)]
        before = [first, *after[:-1]]
        strides = [2 if i and i % blocks == 0 else 1 for i in range(len(after))]
        self.blocks = nn.Sequential(*map(_BasicBlock, before, after, strides))
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, D, s, s) of normalized faces (B, C, S, S)."""
        x = _standardize(x)
        out: Tensor = self.blocks(F.relu(self.bn1(self.conv_stem(x)), inplace=True))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, D), or logits (B, K), of a feature map."""
        x = self.dropout(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Linear:
        """The last layer."""
        return self.fc


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _Conv3x3(before, after, stride)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _Conv3x3(after, after, 1)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = (
            nn.Identity()
            if before == after and stride == 1
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out, inplace=True)


class _Conv3x3(nn.Conv2d):
    """A 3x3 convolution whose weight gradient is a matrix product where that is faster.

    oneDNN's bfloat16 weight gradient of a layer with many channels on few pixels takes 3 to 8 times
    as long as one matrix product over nine shifted copies of the input (256 to 256 channels, 3x3
    pixels, batch 128: 19 ms against 4 ms on two threads, 42 against 7 on one), and stalls when
    its threads have to share their cores. The network trains a fifth faster this way.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(before, after, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.in_channels < 128
            or x.device.type != "cpu"
            or not torch.is_grad_enabled()
            or not torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        kind = torch.get_autocast_dtype("cpu")
        out: Tensor = _Conv3x3Function.apply(x.to(kind), self.weight.to(kind), self.stride[0])
        return out


class _Conv3x3Function(torch.autograd.Function):
    """conv2d(x, w, padding 1); its backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        return F.conv2d(x, w, stride=stride, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        step = ctx.stride
        grad_x = torch.ops.aten.convolution_backward(
            grad, x, w, None, [step] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        height, width = grad.shape[-2:]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # B, H, W, I
        shifted = [
            padded[:, i : i + step * (height - 1) + 1 : step, j : j + step * (width - 1) + 1 : step]
            for i in range(3)
            for j in range(3)
        ]
        columns = torch.cat(shifted, -1).reshape(-1, 9 * w.shape[1])
        rows = grad.permute(0, 2, 3, 1).reshape(-1, w.shape[0])
        grad_w = (rows.t() @ columns).view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2)
        return grad_x, grad_w, None


class ConvNet(nn.Module):
    """The data set distillation literature's network: (conv, instance norm, ReLU, pool) x depth."""

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        size: int,
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                nn.Conv2d(in_chans if i == 0 else width, width, 3, padding=1),
                # GroupNorm with as many groups is the same, and 3.6 times as slow where it counts:
                # bfloat16, channels last, one core (width 32: 244 to 255 img/s, 900 to 933).
                nn.InstanceNorm2d(width, affine=True),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.blocks = nn.Sequential(*layers)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(width * (size >> depth) ** 2, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, W, s, s) of normalized faces (B, C, S, S)."""
        out: Tensor = self.blocks(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Flattened features (B, D), or logits (B, K), of a feature map."""
        x = self.dropout(x.flatten(1))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Linear:
        """The last layer."""
        return self.fc


def create(config: ModelConfig, label_names: Sequence[str]) -> FaceModel:
    """A network with random weights drawn from torch's global generator; `weights` is not read.

    Raises:
        ModelError: no such network, arguments it does not take, or an unusual head.
    """
    if config.name in NETWORKS:
        return FaceModel(config, label_names, _own(config, len(label_names)), (0.5,), (0.25,))
    net, mean, std = _timm(config, len(label_names), pretrained=False)
    return FaceModel(config, label_names, net, mean, std)


def load_timm_weights(model: FaceModel) -> None:
    """Copy timm's own pre-trained weights, the first layer adapted to gray; may download.

    The classifier keeps its random start.

    Raises:
        ModelError: the network is not one of timm's.
    """
    if model.config.name in NETWORKS:
        raise ModelError(_no_weights(model.config.name))
    donor, _, _ = _timm(model.config, len(model.label_names), pretrained=True)
    head = classifier_of(model.net).state_dict()
    start = {key: value.clone() for key, value in head.items()}
    model.net.load_state_dict(donor.state_dict())
    classifier_of(model.net).load_state_dict(start)


def classifier_of(net: nn.Module) -> nn.Linear:
    """The last layer of a network; ModelError where it is not one linear layer."""
    layer = net.get_classifier()  # type: ignore[operator]
    if not isinstance(layer, nn.Linear):
        has = f"{type(net).__name__}: the classifier is a {type(layer).__name__}"
        raise ModelError(f"{has}, expected one Linear")
    return layer


def _standardize(x: Tensor) -> Tensor:
    """Each image (B, C, H, W) to mean 0 and standard deviation 1 over all its values."""
    std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
    return (x - mean) / (std + 1e-3)  # a blank image must not become noise


NETWORKS: Mapping[str, type[nn.Module]] = {"compact_resnet": CompactResNet, "convnet": ConvNet}


def _no_weights(name: str) -> str:
    return f"weights: timm has no {name}; name a weights file instead"


def _own(config: ModelConfig, num_classes: int) -> nn.Module:
    sized = {"size": config.size} if config.name == "convnet" else {}
    try:
        return NETWORKS[config.name](
            num_classes, config.channels, config.dropout, **sized, **config.args
        )
    except (TypeError, ValueError) as err:
        raise ModelError(f"{config.name}: args {config.args} do not fit: {err}") from err


def _timm(
    config: ModelConfig, num_classes: int, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    import timm  # seconds, and only some runs need it

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, [*NETWORKS, *timm.list_models()], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        own = ", ".join(NETWORKS)
        raise ModelError(f"no network {config.name!r}, expected {own} or one of timm's{hint}")
    # A download fails with errors of these kinds, too, and then the arguments are not at fault.
    misfits = (TypeError,) if pretrained else (TypeError, ValueError, AssertionError)
    try:
        net: nn.Module = timm.create_model(
            config.name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=config.channels,
            drop_rate=config.dropout,
            **config.args,
        )
    except misfits as err:
        raise ModelError(f"{config.name}: args {config.args} do not fit: {err}") from err
    facts: Any = net.pretrained_cfg
    mean, std = tuple(facts.get("mean", (0.5,) * 3)), tuple(facts.get("std", (0.25,) * 3))
    if config.channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return net, mean, std
