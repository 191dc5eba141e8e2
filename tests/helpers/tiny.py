"""Models and teachers small enough for any test, their weights unlike those of a fresh network."""

import torch

from pipeline.artifacts import Teacher
from pipeline.models import ModelConfig, create

NAMES = ("neutral", "happiness", "sadness")
TINY = ModelConfig(size=16, args={"widths": [8, 16]})


def tiny_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    model = create(config, NAMES).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.weight.data.normal_()
    return model


def tiny_teacher(members=2):
    torch.manual_seed(9)
    models = [tiny_model(seed) for seed in range(members)]
    width = sum(model.embed_dim for model in models)

    def rows(n):
        return torch.nn.functional.normalize(torch.randn(n, width), dim=-1)

    return Teacher(
        members=models,
        label_names=NAMES,
        temperature=1.7,
        prototypes=rows(3),
        prototype_labels=torch.tensor([0, 1, 2]),
        bank=rows(7),
        bank_labels=torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        bank_ids=tuple(f"train/{i}" for i in range(7)),
    )


def faces(n, seed=0, channels=1, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
