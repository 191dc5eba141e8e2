"""Train a classifier from a distilled set with torch and safetensors alone.

python train.py [FOLDER [STEPS]]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def main(folder: str = ".", steps: str = "300") -> None:
    """Train on the soft labels; write trained.safetensors into the folder."""
    data = load_file(Path(folder) / "images.safetensors")
    x, soft = data["images"].float() / 255, data["soft"]
    blocks: list[nn.Module] = []
    for width in (x.shape[1], 64, 64):
        blocks += [nn.Conv2d(width, 64, 3, padding=1), nn.GroupNorm(64, 64), nn.ReLU()]
        blocks += [nn.AvgPool2d(2)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(soft.shape[1]))
    net(x[:1])  # the last layer learns its width
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    for _ in range(int(steps)):
        i, flip = torch.randint(len(x), (64,)), torch.rand(64, 1, 1, 1) < 0.5
        loss = nn.functional.cross_entropy(net(torch.where(flip, x[i].flip(3), x[i])), soft[i])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_file(net.state_dict(), Path(folder) / "trained.safetensors")
    right = (net(x).argmax(1) == data["labels"]).float().mean()
    print(f"{steps} steps: loss {loss:.3f}, {right:.1%} of the images right")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
