"""Learn a few synthetic images per class that stand for all faces of a training set.

What for: a set of some hundred images trains a student in seconds and can be looked at. The images
start as real faces of their class. `random` keeps them as they are: the baseline that a distilled
set has to beat at the same number of images. Cost per step: see pipeline/distillers.
Departs: the pixels are learned with AdamW and one cosine instead of SGD with momentum, and are cut
to [0, 1] after every step, because they are stored as images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import load, save
from torch import Tensor, nn

from pipeline.augment import plain
from pipeline.config import Config
from pipeline.distillers.matching import matching_loss
from pipeline.errors import LabelError, SourceError
from pipeline.models import ModelConfig
from pipeline.schema import label_codes
from pipeline.storage import Location
from pipeline.training.data import Batch, Stream, seed_of
from pipeline.training.faces import Faces
from pipeline.training.loop import Hook, Loss, Schedule, Step, Worker, fit
from pipeline.training.supervised import new_model

IMAGES = "images.safetensors"
LABELS = "labels.json"
GRID = "grid.png"

Soften = Callable[[np.ndarray], np.ndarray]
"""A teacher: uint8 (N, C, S, S) -> calibrated probabilities (N, K)."""


class DistillConfig(Config):
    """How many images, and how they are learned."""

    method: Literal["matching", "random"] = "matching"
    ipc: int = Field(default=10, ge=1)
    """Images per class."""
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=1)
    """Real faces of each class per step, over all workers together."""
    lr: float = Field(default=0.01, gt=0)
    """Highest learning rate of a pixel, in units of the full range."""
    siamese: bool = True
    """Whether real and synthetic faces are seen through one random transformation."""
    net: ModelConfig = ModelConfig(name="convnet", dropout=0)
    """The random networks; its size and color are those of the images."""


@dataclass(frozen=True)
class Distilled:
    """A distilled set, class after class."""

    images: np.ndarray
    """uint8 (K * ipc, C, S, S)."""
    labels: np.ndarray
    """Class codes (K * ipc,) int64."""
    soft: np.ndarray
    """Probabilities (K * ipc, K) float32: the teacher's, or 1 for the class."""
    label_names: tuple[str, ...]
    history: list[dict[str, float]]
    """Loss over steps; empty where nothing was learned."""
    passes: float
    """Image passes that learning took."""


class Matching:
    """Distribution matching of one set of pixels; an `Objective`."""

    def __init__(
        self,
        config: DistillConfig,
        faces: Faces,
        labels: np.ndarray,
        label_names: Sequence[str],
        images: np.ndarray,
    ) -> None:
        self._config, self._names = config, tuple(label_names)
        self._pixels = nn.Parameter(torch.from_numpy(images).float() / 255)
        self._streams = [
            Stream(
                name=name,
                faces=faces,
                batch=config.batch,
                views={"x": plain},
                size=config.net.size,
                rows=np.flatnonzero(labels == code),
            )
            for code, name in enumerate(self._names)
        ]

    def modules(self) -> nn.ModuleDict:
        """The pixels."""
        return nn.ModuleDict({"images": nn.ParameterDict({"pixels": self._pixels})})

    def streams(self) -> Sequence[Stream]:
        """Real faces of every class."""
        return self._streams

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Distance of mean embeddings under a network that is drawn for this step."""
        seed = seed_of(at.seed, "net", at.number)
        net = new_model(self._config.net, self._names, seed).to(at.worker.device)
        net.eval().requires_grad_(False)
        real = [batch[name].views["x"] for name in self._names]
        seeds = None
        if self._config.siamese:
            seeds = [seed_of(at.seed, "siamese", at.number, name) for name in self._names]
        loss = matching_loss(net, real, self._pixels, at.worker.all_reduce, seeds)
        return Loss(loss, trained=len(self._pixels), forward=sum(len(faces) for faces in real))

    @torch.no_grad()
    def update(self, loss: Loss, at: Step) -> None:
        """Keep the pixels an image."""
        self._pixels.clamp_(0, 1)

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the pixels."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beside the pixels."""


def distill(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    soften: Soften | None = None,
    hooks: Sequence[Hook] = (),
) -> Distilled:
    """Distill a labeled or mined set.

    Args:
        config: how many images and how they are learned.
        faces: the real faces.
        labels: class codes (N,) of those faces.
        label_names: what the codes index.
        worker: where.
        seed: of the first images, of networks, batches and transformations.
        soften: a teacher that gives the finished images soft labels; None: the class alone.
        hooks: called after every step.

    Raises:
        LabelError: a class has no face to start from.
    """
    images = _first_images(config, faces, labels, label_names, seed)
    history: list[dict[str, float]] = []
    passes = 0.0
    if config.method == "matching":
        schedule = Schedule(
            steps=config.steps, lr=config.lr, warmup=0, weight_decay=0, clip=None, ema=None
        )
        objective = Matching(config, faces, labels, label_names, images)
        fitted = fit(objective, schedule, worker, seed=seed, hooks=hooks)
        learned = fitted.averaged.state_dict()["images.pixels"].cpu().contiguous()
        images = learned.mul(255).round().to(torch.uint8).numpy()
        history, passes = fitted.history, fitted.passes
    codes = np.repeat(np.arange(len(label_names)), config.ipc)
    soft = np.eye(len(label_names))[codes] if soften is None else soften(images)
    return Distilled(images, codes, soft.astype(np.float32), tuple(label_names), history, passes)


def _first_images(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    seed: int,
) -> np.ndarray:
    """Real faces (K * ipc, C, S, S) uint8; some come twice where a class has too few."""
    rng = np.random.default_rng(seed_of(seed, "images"))
    chosen = []
    for code, name in enumerate(label_names):
        rows = np.flatnonzero(labels == code)
        if len(rows) == 0:
            raise LabelError(f"distill: no face of class {name!r} to start its images from")
        chosen.append(rng.choice(rows, config.ipc, replace=len(rows) < config.ipc))
    pixels = torch.from_numpy(faces.take(np.concatenate(chosen)))
    x = plain(pixels, config.net.size, torch.Generator())
    return x.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


def save_distilled(at: Location, distilled: Distilled) -> str:
    """Write images, labels and a grid with one row per class; labels last.

    Returns:
        hex sha256 of `images.safetensors`.
    """
    data = save({"images": distilled.images, "soft": distilled.soft})
    (at / IMAGES).write_bytes(data)
    (at / GRID).write_bytes(_grid(distilled))
    names = [distilled.label_names[code] for code in distilled.labels]
    (at / LABELS).write_json({"label_names": list(distilled.label_names), "labels": names})
    return hashlib.sha256(data).hexdigest()


def load_distilled(at: Location) -> Distilled:
    """Inverse of :func:`save_distilled`, without history and passes.

    Raises:
        SourceError: no distilled set, or images and labels of different numbers.
    """
    facts: dict[str, Any] = (at / LABELS).read_json()
    tensors = load((at / IMAGES).read_bytes())
    names, labels = tuple(facts["label_names"]), facts["labels"]
    if len(tensors["images"]) != len(labels):
        count = len(tensors["images"])
        raise SourceError(f"{at}: {count} images in {IMAGES}, {len(labels)} in {LABELS}")
    codes = label_codes(labels, names)
    return Distilled(tensors["images"], codes, tensors["soft"], names, [], 0.0)


def _grid(distilled: Distilled) -> bytes:
    from torchvision.io import encode_png
    from torchvision.utils import make_grid

    per_row = len(distilled.labels) // len(distilled.label_names)
    grid = make_grid(torch.from_numpy(distilled.images), nrow=per_row, padding=2)
    data: bytes = encode_png(grid).numpy().tobytes()
    return data
