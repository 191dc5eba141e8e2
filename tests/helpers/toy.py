"""Faces a small network learns in seconds: each class has its own bright band."""

import numpy as np

from pipeline.models import ModelConfig
from pipeline.training.data import LabeledFaces
from pipeline.training.faces import ArrayFaces

NAMES = ("neutral", "happiness", "sadness", "surprise")
CONVNET = ModelConfig(name="convnet", args={"width": 8, "depth": 2}, size=16, dropout=0.0)
RESNET = ModelConfig(args={"widths": [8, 16]}, size=16, dropout=0.2)
# Without the keys' biases, which a softmax takes out again: their gradient is rounding alone.
VIT = ModelConfig(
    name="vit_tiny_patch16_224",
    args={
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2,
        "qkv_bias": False,
    },
    size=16,
    dropout=0.0,
)  # fmt: skip
# Strides end at 2 x 2 places: of a group of two values nothing but signs would be left.
SMALL_RESNET = {"channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1], "output_stride": 8}
GROUPNORM = ModelConfig(
    name="resnet18", args={**SMALL_RESNET, "norm_layer": "groupnorm"}, size=16, dropout=0.0
)
BATCHNORM = ModelConfig(name="resnet18", args=SMALL_RESNET, size=16, dropout=0.0)


def labeled(count: int = 64, seed: int = 0, noise: int = 120) -> LabeledFaces:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(NAMES))
    pixels = rng.integers(0, noise, (count, 1, 16, 16))
    for face, label in zip(pixels, labels, strict=True):
        face[:, 4 * label : 4 * label + 4] += 80
    return LabeledFaces(ArrayFaces(pixels.clip(0, 255).astype(np.uint8)), labels)
