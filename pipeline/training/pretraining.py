"""Pre-training on faces without labels: contrastive (SimCLR, MoCo) or masked reconstruction (MAE).

What for: a backbone that teachers and students start from. It reads the pool only, and of the pool
only what the leakage guard let through. Labeled training faces are looked at to say how well their
classes lie together (leave-one-out nearest neighbors); nothing is chosen by it.
Cost per step: two image passes per face (simclr), one and a forward (moco), or one (mae, an upper
bound: its encoder sees a quarter of the patches).
Source: simclr: arXiv 2002.05709, eq. 1 and its projection head; as ActiveFER arXiv 2307.02744 uses
it. moco: arXiv 1911.05722, algorithm 1, with the projection, views and temperature of v2, arXiv
2003.04297. mae: arXiv 2111.06377; SSFER arXiv 2410.17622, stage 1 (mask ratio 0.75, plain pixels).
Departs: views are our own (see augment.py); mae sees shifted, turned, scaled and mirrored faces,
where the papers crop at random. The projection is the paper's formula, without the batch norms of
its code: more workers are to learn what one does. moco's key network is the average of the weights
that every training can keep: in evaluation mode, so that batch norms have nothing to betray and
batches need no shuffling; it is also what is kept of the training. BYOL, which has no negatives, is
left out: without batch norms in its heads it may collapse (arXiv 2010.10241).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import VIEWS, Augmentation, Strength, View, augment, plain
from pipeline.config import Config, filled
from pipeline.losses import contrastive, queued_contrastive
from pipeline.masked import (
    Decoder,
    draw_hidden,
    encode_visible,
    patch_side,
    patchify,
    reconstruction_loss,
    unpatchify,
    visible_positions,
)
from pipeline.models import FaceModel, ModelConfig
from pipeline.training.data import Batch, LabeledFaces, Stream
from pipeline.training.faces import Faces
from pipeline.training.loop import Fitted, Hook, Loss, Schedule, Step, Worker, fit
from pipeline.training.neighbors import nearest_accuracy
from pipeline.training.optimizer import Beta
from pipeline.training.supervised import averaged_model, new_model

MOVED = Strength(12.0, 0.25, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
"""Geometry alone: what is erased or darkened by chance cannot be reconstructed."""

PROBES = ("probe_every", "neighbors", "probe_faces")
"""Settings that no weight depends on: others may continue a checkpoint."""


class DecoderConfig(Config):
    """Decoder of masked reconstruction; the defaults are the papers'."""

    width: int = Field(default=512, ge=4)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> DecoderConfig:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of 4 and of {self.heads} heads")
        return self


class PretrainConfig(Schedule):
    """How a backbone is trained on the pool."""

    method: Literal["simclr", "moco", "mae"] = "simclr"
    model: ModelConfig = ModelConfig(dropout=0.0)
    """What starts from it must be the same network; dropout may differ, and is 0 here unless it is
    named."""
    steps: int = Field(default=5000, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    ema: float | None = Field(default=None, gt=0, lt=1)
    batch: int = Field(default=256, ge=2)
    """Faces per step, over all workers together."""
    read: Literal["packed", "streamed"] = "packed"
    """packed: stored once on every node, drawn from all of them. streamed: for pools that no node
    can hold, see streamed.py."""
    augment: Augmentation = "strong"
    """Both views of simclr and moco."""
    temperature: float = Field(default=0.2, gt=0)
    projection: int = Field(default=128, ge=1)
    """Width of the features that simclr and moco compare."""
    queue: int = Field(default=4096, ge=1)
    """moco: keys of earlier faces that a face is told apart from; the paper has 65,536."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    normalize_patches: bool = True
    decoder: DecoderConfig = DecoderConfig()
    probe_every: int | None = Field(default=500, ge=1)
    """Steps between two looks at labeled faces and, of mae, at reconstructions; None: none."""
    neighbors: int = Field(default=20, ge=1)
    probe_faces: int = Field(default=5000, ge=2)
    """Labeled faces that are looked at, at most."""

    @field_validator("model", mode="before")
    @classmethod
    def _drops_nothing_unasked(cls, model: Any) -> Any:
        return filled(model, dropout=0.0)

    @model_validator(mode="after")
    def _keys_come_from_an_average(self) -> PretrainConfig:
        if self.method == "moco" and self.ema is None:
            raise ValueError("ema: moco's keys come from the average of the weights; say 0.99")
        return self

    @property
    def step_images(self) -> int:
        """Images that a step passes forward and backward."""
        return self.batch * (2 if self.method == "simclr" else 1)


class Probed:
    """Learns from the pool; what it sees of labeled faces on the way is in its checkpoints."""

    _stream: Stream

    def __init__(self, model: FaceModel, config: PretrainConfig) -> None:
        self._model, self._config = model, config
        self.labeled: LabeledFaces | None = None
        """Whom to look at; None: nobody looks."""
        self.probes: list[dict[str, float]] = []
        """As those of `Pretrained`."""

    def streams(self) -> Sequence[Stream]:
        """The pool, every face once per epoch."""
        return [self._stream]

    def update(self, loss: Loss, at: Step) -> None:
        """Look, where the config says so; nothing else moves."""
        done, config, seen = at.number + 1, self._config, at.averaged["model"]
        assert isinstance(seen, FaceModel)
        every, voters, most = (getattr(config, name) for name in PROBES)
        if self.labeled is None or every is None or (done != at.steps and done % every):
            return
        share = nearest_accuracy(seen, self.labeled, at.worker, voters, most)
        self.probes.append({"step": float(done), "knn": share})

    def state(self) -> dict[str, Tensor]:
        """What was seen, if anything was."""
        seen = [[probe["step"], probe["knn"]] for probe in self.probes]
        return {"probes": torch.tensor(seen, dtype=torch.float64)} if seen else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        seen = state["probes"].tolist() if "probes" in state else []
        self.probes = [{"step": step, "knn": share} for step, share in seen]


class Contrastive(Probed):
    """Two views of a face find each other among those of all others; an `Objective`."""

    def __init__(self, model: FaceModel, config: PretrainConfig, faces: Faces) -> None:
        super().__init__(model, config)
        self._projector = _projection(model.embed_dim, config.projection)
        view = VIEWS[config.augment]
        self._stream = _pool_stream(model, config, faces, {"x": view, "y": view})

    def modules(self) -> nn.ModuleDict:
        """Network and projection."""
        return nn.ModuleDict({"model": self._model, "projector": self._projector})

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Mean NT-Xent, the faces of all workers as negatives."""
        views = batch["pool"].views
        embedding, _ = self._model.features(torch.cat([views["x"], views["y"]]))
        x, y = self._projector(embedding).chunk(2)
        gather = at.worker.gather
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        each = contrastive(x, y, everyone, self._config.temperature, gather)
        return Loss(each.mean(), trained=2 * len(x))


class Queued(Probed):
    """A view of a face finds the face's key among those of earlier faces; an `Objective`."""

    def __init__(self, model: FaceModel, config: PretrainConfig, faces: Faces) -> None:
        super().__init__(model, config)
        self._projector = _projection(model.embed_dim, config.projection)
        # As in the released code the first keys are of no face: directions drawn at random.
        self._queue = F.normalize(torch.randn(config.queue, config.projection), dim=1)
        view = VIEWS[config.augment]
        self._stream = _pool_stream(model, config, faces, {"x": view, "y": view})

    def modules(self) -> nn.ModuleDict:
        """Network and projection."""
        return nn.ModuleDict({"model": self._model, "projector": self._projector})

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Mean InfoNCE against the queue, which is the same on all workers."""
        views = batch["pool"].views
        query = self._projector(self._model.features(views["x"])[0])
        average = at.averaged["model"]
        assert isinstance(average, FaceModel)
        with torch.no_grad():
            key = at.averaged["projector"](average.features(views["y"])[0]).float()
        self._queue = self._queue.to(key.device)
        each = queued_contrastive(query, key, self._queue, self._config.temperature)
        gather = at.worker.gather
        keys = gather(F.normalize(key, dim=1))
        return Loss(each.mean(), trained=len(key), forward=len(key), outputs={"keys": keys})

    def update(self, loss: Loss, at: Step) -> None:
        """The newest keys come first, the oldest leave."""
        super().update(loss, at)
        self._queue = torch.cat([loss.outputs["keys"], self._queue])[: self._config.queue]

    def state(self) -> dict[str, Tensor]:
        """The queue, and what was seen."""
        return super().state() | {"queue": self._queue}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        super().load(state)
        self._queue = state["queue"].clone()


class Masked(Probed):
    """Hidden patches are reconstructed from the visible ones; an `Objective`."""

    def __init__(self, model: FaceModel, config: PretrainConfig, faces: Faces) -> None:
        super().__init__(model, config)
        self._side, channels = patch_side(model.net), model.config.channels
        self._patches = (model.config.size // self._side) ** 2
        self._decoder = Decoder(
            model.embed_dim,
            self._patches,
            channels * self._side**2,
            width=config.decoder.width,
            depth=config.decoder.depth,
            heads=config.decoder.heads,
        )
        moved: View = partial(augment, by=MOVED)
        self._stream = _pool_stream(model, config, faces, {"x": moved})

    def modules(self) -> nn.ModuleDict:
        """Encoder and decoder."""
        return nn.ModuleDict({"model": self._model, "decoder": self._decoder})

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Mean over faces of `reconstruction_loss`."""
        faces = batch["pool"].views["x"]
        hidden = draw_hidden(len(faces), self._patches, self._config.mask_ratio, faces.device)
        predicted, patches = self._reconstruct(self._model, self._decoder, faces, hidden)
        each = reconstruction_loss(
            predicted, patches, hidden, normalize=self._config.normalize_patches
        )
        return Loss(each.mean(), trained=len(faces))

    def _reconstruct(
        self, model: FaceModel, decoder: nn.Module, faces: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = (faces - model.mean) / model.std
        visible = visible_positions(hidden)
        predicted: Tensor = decoder(encode_visible(model.net, x, visible), visible)
        return predicted, patchify(x, self._side)

    @torch.no_grad()
    def picture(self, faces: Tensor, at: Step) -> np.ndarray:
        """Each face as it is, with its patches hidden, and filled in again.

        Args:
            faces: uint8 (B, C, S, S).
            at: whose average reconstructs; the same patches are hidden in every step.

        Returns:
            uint8 (3 * B, C, S, S): all faces, all masked, all filled in.
        """
        model, decoder = at.averaged["model"], at.averaged["decoder"]
        assert isinstance(model, FaceModel)
        was_training = at.averaged.training
        at.averaged.eval()
        x = plain(faces.to(at.worker.device), model.config.size, torch.Generator())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = draw_hidden(len(x), self._patches, self._config.mask_ratio, x.device)
        predicted, patches = self._reconstruct(model, decoder, x, hidden)
        predicted = predicted.float()
        if self._config.normalize_patches:  # what it was not asked for is taken from the face
            var, mean = torch.var_mean(patches, 2, keepdim=True)
            predicted = predicted * (var + 1e-6).sqrt() + mean
        masked = torch.where(hidden[:, :, None], torch.zeros_like(patches), patches)
        filled = torch.where(hidden[:, :, None], predicted, patches)
        shown = [
            x,
            *(
                unpatchify(part, self._side, model.config.channels) * model.std + model.mean
                for part in (masked, filled)
            ),
        ]
        at.averaged.train(was_training)
        pixels = torch.cat(shown).clamp(0, 1).mul(255).round().to(torch.uint8)
        found: np.ndarray = pixels.cpu().contiguous().numpy()
        return found


OBJECTIVES: Mapping[str, type[Contrastive] | type[Queued] | type[Masked]] = {
    "simclr": Contrastive,
    "moco": Queued,
    "mae": Masked,
}


def _projection(width: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, features))


def _pool_stream(
    model: FaceModel, config: PretrainConfig, faces: Faces, views: Mapping[str, View]
) -> Stream:
    return Stream("pool", faces, config.batch, views, model.config.size)


@dataclass(frozen=True)
class Pretrained:
    """A backbone, and how it came about."""

    model: FaceModel
    """Its classifier is as random as at the start."""
    fitted: Fitted
    probes: list[dict[str, float]]
    """`step`, and `knn`: the share of labeled faces whose nearest neighbors have their class."""


def train_backbone(
    config: PretrainConfig,
    faces: Faces,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    labeled: LabeledFaces | None = None,
    hooks: Sequence[Hook] = (),
) -> Pretrained:
    """Train a backbone on faces without labels.

    Args:
        config: network, method and schedule.
        faces: the pool.
        label_names: classes that the network will be asked for later.
        worker: where.
        seed: of the weights and of everything drawn.
        labeled: training faces to look at on the way; None: nobody looks.
        hooks: called after every step.

    Raises:
        ConfigError: `mae` with a network that has no patches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(config.model, label_names, seed)
        objective = OBJECTIVES[config.method](model, config, faces)
    objective.labeled = labeled
    unseen = {name: PretrainConfig.model_fields[name].default for name in PROBES}
    schedule = config.model_copy(update=unseen)
    fitted = fit(objective, schedule, worker, seed=seed, hooks=hooks)
    return Pretrained(averaged_model(fitted), fitted, objective.probes)
