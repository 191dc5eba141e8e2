"""How a set is distilled: the settings of all methods, and the objective that the loop runs.

Cost: see the methods in pipeline/distillers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.augment import plain
from pipeline.config import Config, filled
from pipeline.distillers.distribution import Distribution
from pipeline.distillers.gradient import Gradient
from pipeline.distillers.learned import Distiller, Learned, Network, Place, Real
from pipeline.distillers.trajectory import Trajectory
from pipeline.distillers.unrolled import Unrolled
from pipeline.errors import ConfigError
from pipeline.models import ModelConfig
from pipeline.training.data import Batch, Stream, seed_of
from pipeline.training.faces import Faces
from pipeline.training.loop import Loss, Schedule, Step, Worker
from pipeline.training.supervised import new_model

CHOSEN = ("random", "herding", "k_center", "crops")
"""Methods that keep real faces."""


class InnerConfig(Config):
    """The networks that are trained inside: by gradient, unrolled, trajectory."""

    networks: int = Field(default=1, ge=1)
    """Per step, over all workers together; unrolled and trajectory."""
    steps: int = Field(default=20, ge=1)
    """Training steps on the set."""
    window: int | None = Field(default=None, ge=1)
    """Unrolled: last steps that the gradient runs through; None: all."""
    batch: int | None = Field(default=None, ge=1)
    """Images of a training step; None: the whole set."""
    lr: float = Field(default=0.02, gt=0)
    """Unrolled and trajectory learn it from here on."""
    outer: int = Field(default=10, ge=1)
    """Gradient: steps until another network is drawn."""


class ExpertConfig(Config):
    """Trainings on the real faces whose course a trajectory follows."""

    count: int = Field(default=4, ge=1)
    epochs: int = Field(default=20, ge=1)
    epoch_steps: int | None = Field(default=None, ge=1)
    """Steps between two kept states; None: once through the faces."""
    batch: int = Field(default=128, ge=1)
    lr: float = Field(default=0.02, gt=0)
    ahead: int = Field(default=2, ge=1)
    """Epochs that the set's training has to cover."""
    latest: tuple[int, int] = (2, 10)
    """Last epoch to start from, at first and in the end."""

    def steps(self, faces: int) -> int:
        """Steps between two kept states of a training on so many faces."""
        return self.epoch_steps or max(1, faces // self.batch)

    def passes(self, faces: int) -> float:
        """Image passes of all of them on so many faces."""
        return float(self.count * self.epochs * self.steps(faces) * self.batch)

    @model_validator(mode="after")
    def _ends_exist(self) -> ExpertConfig:
        if not 0 <= self.latest[0] <= self.latest[1] <= self.epochs - self.ahead:
            raise ValueError(
                f"experts.latest: {self.latest}, expected two rising epochs, at most "
                f"{self.epochs - self.ahead} = epochs - ahead"
            )
        return self


class DistillConfig(Config):
    """How many images, and how they are learned."""

    method: Literal[
        "distribution",
        "gradient",
        "unrolled",
        "trajectory",
        "random",
        "herding",
        "k_center",
        "crops",
    ] = "distribution"
    ipc: int = Field(default=10, ge=1)
    """Images per class."""
    start: Literal["random", "herding", "k_center"] = "random"
    """The real faces that learned images start as."""
    learn_labels: bool = False
    """Learn soft labels with the images; unrolled and trajectory."""
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=1)
    """Real faces per step over all workers together: of each class (distribution, gradient), or in
    all (unrolled)."""
    lr: float = Field(default=0.01, gt=0)
    """Highest learning rate of a pixel, in units of the full range."""
    siamese: bool = True
    """Whether real and synthetic faces are seen through one random transformation."""
    inner: InnerConfig = InnerConfig()
    experts: ExpertConfig = ExpertConfig()
    net: ModelConfig = ModelConfig(name="convnet", dropout=0)
    """The random networks, without dropout; its size and color are those of the images."""
    preview_every: int | None = Field(default=100, ge=1)
    """Steps between two pictures of the set on its way; None: none."""
    memory_mb: int | None = Field(default=None, ge=1)
    """Refuse to start where a step, on a CPU with the experts, is expected to need more; None: 60 %
    of the host's memory, shared by all workers, or of what is free on the worker's GPU."""

    @field_validator("net", mode="before")
    @classmethod
    def _drops_nothing_unasked(cls, net: Any) -> Any:
        return filled(net, dropout=0.0)

    @model_validator(mode="after")
    def _fits(self) -> DistillConfig:
        if self.net.dropout:
            raise ValueError(
                f"net.dropout: {self.net.dropout:g}, expected 0: every worker would drop other "
                "units of a network that all of them have to train alike"
            )
        if self.learn_labels and self.method not in ("unrolled", "trajectory"):
            raise ValueError(
                f"learn_labels: {self.method} learns pixels alone; "
                "expected method unrolled or trajectory"
            )
        window = self.inner.window
        if window is not None and window > self.inner.steps:
            raise ValueError(f"inner.window: {window}, expected at most {self.inner.steps} steps")
        return self

    @property
    def learned(self) -> bool:
        """Whether images are learned, not chosen."""
        return self.method not in CHOSEN


class Distilling:
    """A distiller's loss on a learned set; an `Objective`."""

    def __init__(
        self, distiller: Distiller, learned: Learned, streams: Sequence[Stream], worker: Worker
    ) -> None:
        self.distiller, self.learned = distiller, learned
        own = range(len(streams))
        if distiller.shares == "classes":
            own = range(worker.rank, len(streams), worker.world)
        self._streams = {code: streams[code] for code in own}

    def modules(self) -> nn.ModuleDict:
        """The set."""
        return nn.ModuleDict({"learned": self.learned})

    def streams(self) -> Sequence[Stream]:
        """Real faces that this worker needs."""
        return list(self._streams.values())

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """What the method asks of the set in this step."""
        part = self.distiller.loss(self.learned, self._real(batch), self.place(at))
        device = self.learned.pixels.device
        passes = at.worker.all_reduce(
            torch.tensor([part.passes], dtype=torch.float64, device=device)
        )
        return Loss(part.sum, trained=float(passes) / at.worker.world, count=part.count)

    def _real(self, batch: Mapping[str, Batch]) -> Real:
        pixels, where, end = self.learned.pixels, {}, 0
        found = {code: batch[stream.name] for code, stream in self._streams.items()}
        if not found:
            return Real(pixels.new_zeros(0, *pixels.shape[1:]), torch.zeros(0, dtype=torch.long))
        for code, one in found.items():
            where[code] = slice(end, end := end + len(one))
        images = torch.cat([one.views["x"] for one in found.values()])
        labels = torch.cat([one.targets["label"] for one in found.values()])
        return Real(images, labels, where)

    def update(self, loss: Loss, at: Step) -> None:
        """Keep the pixels an image, and let the method move on."""
        with torch.no_grad():
            self.learned.pixels.clamp_(0, 1)
        at.passes += at.worker.world * self.distiller.update(self.learned, self.place(at))

    def state(self) -> dict[str, Tensor]:
        """The method's."""
        return self.distiller.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The method's."""
        self.distiller.load(state)

    def place(self, at: Step) -> Place:
        """Where the method stands in a step."""
        worker = at.worker
        seed = seed_of(at.seed, "distill", at.number)
        return Place(at.number, at.steps, seed, worker.rank, worker.world, worker.all_reduce)


def schedule_of(config: DistillConfig) -> Schedule:
    """One cosine over the steps; gradients through training are clipped, they can explode."""
    clip = None if config.method == "distribution" else 1.0
    return Schedule(steps=config.steps, lr=config.lr, warmup=0, weight_decay=0, clip=clip, ema=None)


def objective_of(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    worker: Worker,
    images: np.ndarray,
    targets: np.ndarray,
    experts: Sequence[Tensor],
) -> Distilling:
    """The objective of a method, its set at the first images (K * ipc, C, S, S) uint8."""
    network: Network = lambda seed: new_model(config.net, label_names, seed)  # noqa: E731
    distiller = _distiller(config, network, experts)
    if distiller.shares == "networks" and config.inner.networks % worker.world:
        raise ConfigError(
            f"distill.inner.networks: {config.inner.networks}, expected a multiple of "
            f"{worker.world}, the number of workers"
        )
    learned = Learned(
        torch.from_numpy(images).float() / 255,
        torch.from_numpy(targets),
        rate=config.inner.lr if config.method in ("unrolled", "trajectory") else None,
        learn_targets=config.learn_labels,
    )
    streams: list[Stream] = []
    codes = labels.astype(np.int64)
    if config.method in ("distribution", "gradient"):
        shared = distiller.shares == "faces"
        for code, name in enumerate(label_names):
            rows = np.flatnonzero(codes == code)
            streams.append(_stream(name, config, faces, codes, rows, shared=shared))
    elif config.method == "unrolled":
        streams.append(_stream("real", config, faces, codes, None, shared=False))
    return Distilling(distiller, learned, streams, worker)


def _stream(
    name: str,
    config: DistillConfig,
    faces: Faces,
    codes: np.ndarray,
    rows: np.ndarray | None,
    *,
    shared: bool,
) -> Stream:
    return Stream(
        name=name,
        faces=faces,
        batch=config.batch,
        views={"x": plain},
        size=config.net.size,
        targets={"label": codes},
        rows=rows,
        shared=shared,
    )


def _distiller(config: DistillConfig, network: Network, experts: Sequence[Tensor]) -> Distiller:
    inner = config.inner
    if config.method == "distribution":
        return Distribution(network, augment=config.siamese)
    if config.method == "gradient":
        return Gradient(
            network,
            augment=config.siamese,
            outer=inner.outer,
            inner=inner.steps,
            batch=inner.batch,
            rate=inner.lr,
        )
    if config.method == "unrolled":
        return Unrolled(
            network,
            augment=config.siamese,
            networks=inner.networks,
            steps=inner.steps,
            window=inner.window,
            batch=inner.batch,
        )
    if not experts:
        raise ConfigError("distill.method trajectory: expected experts, found none")
    return Trajectory(
        network,
        experts,
        augment=config.siamese,
        pairs=inner.networks,
        steps=inner.steps,
        ahead=config.experts.ahead,
        latest=config.experts.latest,
        batch=inner.batch,
    )
