"""Open an exported folder without OmniFER: torch and safetensors, and timm for timm's networks.

    model = load("FOLDER")
    probs = model(faces)  # (B, C, size, size) in [0, 1] -> (B, classes), calibrated

python modeling.py FOLDER IMAGE ...   prints the classes of face crops (needs pillow)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def load(folder: str = ".") -> "Exported":
    """The model of a folder, in evaluation mode; an ensemble is the mean of its members."""
    about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    own = [str(Path(folder) / "members" / str(i)) for i in range(about.get("members", 0))]
    members = [Member(at) for at in own or [folder]]
    return Exported(members, about["temperature"], about["label_names"]).eval()


class Exported(nn.Module):
    """Members with their temperatures; `label_names` says what the probabilities index."""

    def __init__(
        self, members: list["Member"], temperatures: list[float], label_names: list[str]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperatures = temperatures
        self.label_names = label_names
        self.size, self.channels = members[0].size, members[0].channels

    def forward(self, x: Tensor) -> Tensor:
        """Calibrated probabilities (B, K) of faces (B, C, S, S) in [0, 1]."""
        pairs = zip(self.members, self.temperatures, strict=True)
        return torch.stack([(member(x) / t).softmax(-1) for member, t in pairs]).mean(0)


class Member(nn.Module):
    """One network behind its normalization."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        facts, args = about["pretrained_cfg"], about["model_args"]
        self.channels, self.size, _ = facts["input_size"]
        self.register_buffer("mean", torch.tensor(facts["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(facts["std"]).view(1, -1, 1, 1))
        name, classes = about["architecture"], about["num_classes"]
        if name == "compact_resnet":
            self.net: nn.Module = CompactResNet(classes, self.channels, **args)
        elif name == "convnet":
            self.net = ConvNet(classes, self.channels, self.size, **args)
        else:
            import timm

            self.net = timm.create_model(name, num_classes=classes, in_chans=self.channels, **args)
        self.net.load_state_dict(load_file(Path(folder) / "model.safetensors"))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of faces (B, C, S, S) in [0, 1]."""
        out: Tensor = self.net((x - self.mean) / self.std)
        return out


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            down = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of a feature map."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CompactResNet(nn.Module):
    """Blocks of growing width behind a stem (kernel, stride); each image is standardized first."""

    def __init__(
        self,
        classes: int,
        channels: int,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        stem: tuple[int, int] = (5, 2),
        blocks: int = 1,
    ) -> None:
        super().__init__()
        kernel, stride = stem
        self.conv_stem = nn.Conv2d(channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        after = [width for width in widths for _ in range(blocks)]
        before = [widths[0], *after[:-1]]
        steps = [2 if i and i % blocks == 0 else 1 for i in range(len(after))]
        self.blocks = nn.Sequential(*map(Block, before, after, steps))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalized faces."""
        std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        x = self.blocks(F.relu(self.bn1(self.conv_stem((x - mean) / (std + 1e-3)))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class ConvNet(nn.Module):
    """(convolution, instance norm, ReLU, average pool) x depth."""

    def __init__(
        self, classes: int, channels: int, size: int, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in [channels] + [width] * (depth - 1):
            layers += [nn.Conv2d(before, width, 3, padding=1)]
            layers += [nn.InstanceNorm2d(width, affine=True), nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalized faces."""
        out: Tensor = self.fc(self.blocks(x).flatten(1))
        return out


def main(folder: str, *images: str) -> None:
    """Print the perceived expression of face crops."""
    from PIL import Image

    model = load(folder)
    side, mode = (model.size, model.size), "L" if model.channels == 1 else "RGB"
    for image in images:
        face: Any = Image.open(image).convert(mode).resize(side, Image.Resampling.BOX)
        pixels = torch.tensor(list(face.tobytes())).view(1, model.size, model.size, -1)
        with torch.inference_mode():
            probs = model(pixels.permute(0, 3, 1, 2) / 255)[0].tolist()
        ranked = sorted(zip(probs, model.label_names, strict=True), reverse=True)
        said = ", ".join(f"{name} {p:.3f}" for p, name in ranked[:3])
        print(f"{image}: {said}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
