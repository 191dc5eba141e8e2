"""Proves shapes, heads, normalization and the matrix-product weight gradient of the networks."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from pipeline import models
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models import ModelConfig, create

NAMES = ("neutral", "happiness", "sadness")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name: str = "compact_resnet") -> ModelConfig:
    args = {"compact_resnet": {"widths": [8, 16]}, "convnet": {"width": 8, "depth": 2}}
    return ModelConfig(name=name, args=args.get(name, {}), size=16, dropout=0.5)


def test_create__the_compact_resnet_of_the_measurements() -> None:
    model = create(ModelConfig(), tuple("abcdefgh"))
    assert sum(p.numel() for p in model.parameters()) == 1_228_392
    assert model.embed_dim == 256
    assert model(torch.rand(2, 1, 48, 48)).shape == (2, 8)


def test_create__the_resnet_18_of_cifar() -> None:
    args = {"widths": [64, 128, 256, 512], "stem": [3, 1], "blocks": 2}
    model = create(ModelConfig(color="rgb", size=32, args=args), tuple("abcdefghij"))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # its known size
    assert model.embed_dim == 512
    small = create(ModelConfig(size=16, args={**args, "widths": [8, 16]}), NAMES)
    assert small.net.forward_features(torch.rand(2, 1, 16, 16)).shape == (2, 16, 8, 8)


def test_create__the_stem_and_one_block_of_a_width_are_the_default() -> None:
    named = {"widths": [8, 16], "stem": [5, 2], "blocks": 1}
    torch.manual_seed(0)
    given = create(ModelConfig(size=16, args=named), NAMES).state_dict()
    torch.manual_seed(0)
    default = create(ModelConfig(size=16, args={"widths": [8, 16]}), NAMES).state_dict()
    assert list(given) == list(default)
    assert all(torch.equal(given[name], default[name]) for name in given)


def test_create__the_convnet_of_the_literature() -> None:
    model = create(ModelConfig(name="convnet", color="rgb", size=32), tuple("abcdefghij"))
    assert sum(p.numel() for p in model.parameters()) == 320_010  # its published size
    assert model.embed_dim == 2048


@pytest.mark.parametrize("name", ["compact_resnet", "convnet", "test_resnet", "test_efficientnet"])
def test_features__logits_are_the_classifier_of_the_embedding(name: str) -> None:
    model = create(tiny(name), NAMES).eval()
    x = torch.rand(2, 1, 16, 16)
    embedding, logits = model.features(x)
    assert embedding.shape == (2, model.embed_dim)
    assert torch.equal(logits, models.classifier_of(model.net)(embedding))
    net_logits = model.net((x - model.mean) / model.std) if name.startswith("test_") else model(x)
    torch.testing.assert_close(logits, net_logits)


def test_features__timm_normalizes_as_its_weights_expect() -> None:
    model = create(ModelConfig(name="lcnet_035", color="rgb", size=32), NAMES)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    gray = create(ModelConfig(name="lcnet_035", size=32), NAMES)
    assert gray.mean.item() == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert not {"mean", "std"} & set(model.state_dict())


def test_features__other_shapes_are_refused() -> None:
    model = create(tiny(), NAMES)
    with pytest.raises(ModelError, match=r"\(1, 24, 24\), expected \(1, 16, 16\)"):
        model(torch.rand(2, 1, 24, 24))


def test_compact_resnet__lighting_does_not_count() -> None:
    model = create(tiny(), NAMES).eval()
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(model(0.5 * x + 0.2), model(x), atol=0.02, rtol=0)
    assert torch.isfinite(model(torch.zeros(2, 1, 16, 16))).all()


def test_convnet__a_face_does_not_see_its_batch() -> None:
    model = create(tiny("convnet"), NAMES).train()
    model.net.dropout.p = 0.0
    x = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 6])
def test_conv3x3_function__gradients_are_those_of_conv2d(stride: int, side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    ours = models._Conv3x3Function.apply(x, w, stride)
    plain = F.conv2d(x, w, stride=stride, padding=1)
    grad = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, (x, w), grad), torch.autograd.grad(plain, (x, w), grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_conv3x3_function__second_derivatives_are_right() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return models._Conv3x3Function.apply(x, w, 2)

    assert torch.autograd.gradgradcheck(run, (x, w), fast_mode=True)


def test_conv3x3__bfloat16_training_takes_the_matrix_product() -> None:
    torch.manual_seed(0)
    layer = models._Conv3x3(128, 16, 2)
    x = torch.randn(4, 128, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert "_Conv3x3Function" in type(out.grad_fn).__name__
    out.float().square().sum().backward()
    ours, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    assert ours is not None
    assert (ours - layer.weight.grad).norm() < 0.02 * layer.weight.grad.norm()
    assert "_Conv3x3Function" not in type(layer(x).grad_fn).__name__


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("compact_resnt", {}, "did you mean 'compact_resnet'"),
        ("compact_resnet", {"width": 3}, "args {'width': 3} do not fit"),
        ("compact_resnet", {"stem": 3}, "args {'stem': 3} do not fit"),
        ("compact_resnet", {"stem": [3]}, "do not fit: not enough values"),
        ("test_resnet", {"foo": 3}, "args {'foo': 3} do not fit"),
    ],
)
def test_create__what_does_not_fit_is_named(name: str, args: dict[str, int], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        create(ModelConfig(name=name, args=args), NAMES)


def test_classifier_of__two_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="expected one Linear"):
        create(ModelConfig(name="deit_tiny_distilled_patch16_224", size=224), NAMES)


def test_model_config__weights_name_their_data() -> None:
    with pytest.raises(ConfigError, match="weights need pretraining_data"):
        parse(ModelConfig, {"weights": "timm"})


def test_load_timm_weights__all_but_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(name="test_resnet", size=16)
    model, donor = create(config, NAMES), create(config, NAMES)
    head = models.classifier_of(model.net).weight.clone()
    monkeypatch.setattr(models, "_timm", lambda *_, **__: (donor.net, (0.5,), (0.5,)))
    models.load_timm_weights(model)
    assert torch.equal(model.net.conv1[0].weight, donor.net.conv1[0].weight)
    assert torch.equal(models.classifier_of(model.net).weight, head)
    with pytest.raises(ModelError, match="timm has no compact_resnet"):
        models.load_timm_weights(create(tiny(), NAMES))
