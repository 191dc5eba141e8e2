"""Training on candidate sets: which of a face's classes is right is learned on the way.

What for: faces whose raters disagree teach more as a set of candidates than as one label. Loss:
CE(target, p), where a face's target starts at its votes and then follows what the network says
within the candidates (`proden`), the candidate with the nearest class prototype (`pico`), or a
decoder of labels that looks at the tokens (`decoder`); see :mod:`pipeline.partial`. Batches, views,
imbalance and schedule are those of learning from labels. Baselines are settings: momentum 1 never
moves a target, so that `proden` is then cross entropy with the votes' shares.
Cost: batch image passes per step; of `decoder` a few per cent more time.
Source: PRODEN arXiv 2002.08053, PiCO arXiv 2201.08984, decoder arXiv 2209.15402.
Departs: the decoder teaches the linear head, which learns the same targets and is what remains:
everything after training knows one kind of model. PiCO's momentum falls over steps, not epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config, unread
from pipeline.errors import ConfigError
from pipeline.losses import cross_entropy
from pipeline.models import FaceModel
from pipeline.partial import (
    LabelDecoder,
    class_contrast,
    move_prototypes,
    move_targets,
    nearest_candidate,
    trusted,
    uniformity,
)
from pipeline.training.data import Batch, LabeledFaces, seed_of
from pipeline.training.loop import Hook, Loss, Step, Worker, fit
from pipeline.training.supervised import (
    Supervised,
    SupervisedConfig,
    Trained,
    averaged_model,
    new_model,
)

DECODER = "decoder"
OWN = {"pico": ("prototype_momentum", "contrastive"), DECODER: (DECODER, "uniformity")}
"""Settings that one method alone reads."""


class LabelDecoderConfig(Config):
    """Size of the decoder of labels."""

    width: int = Field(default=128, ge=1)
    depth: int = Field(default=1, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> LabelDecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of {self.heads} heads")
        return self


class PartialConfig(Config):
    """Where candidates come from and how the right one is found."""

    method: Literal["proden", "pico", "decoder"] = "proden"
    candidates: Literal["votes", "derived"] = "votes"
    """votes: the classes of the labeled set's soft labels. derived: the label and what teachers of
    plain labels, trained first, find nearly as probable, out of fold; the teachers cost twice."""
    ratio: float = Field(default=0.3, gt=0, le=1)
    """Of derived sets: probability of a candidate over that of the most probable class."""
    start: Literal["votes", "uniform"] = "votes"
    """What targets are at first: shares of the votes, or all candidates alike."""
    momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of a target that stays each time its face is seen; 0 as in PRODEN, 1 never moves."""
    momentum_end: float | None = Field(default=None, ge=0, le=1)
    """The same at the last step, linear in between; None: it stays."""
    vote_power: float = Field(default=0.0, ge=0, le=1)
    """Targets move toward p^(1 - power) * votes^power within the candidates."""
    warm: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps before the first target moves."""
    prototype_momentum: float = Field(default=0.99, ge=0, lt=1)
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of pico's contrast of classes; its paper has 0.5."""
    decoder: LabelDecoderConfig = LabelDecoderConfig()
    uniformity: float = Field(default=0.1, ge=0)
    """Weight of the term that keeps the decoder's label embeddings apart."""

    @model_validator(mode="after")
    def _are_of_the_method(self) -> PartialConfig:
        others = [name for method, names in OWN.items() if method != self.method for name in names]
        if (name := unread(self, others)) is not None:
            raise ValueError(f"{name}: {self.method} has no use for it")
        if self.candidates != "derived" and unread(self, ["ratio"]):
            raise ValueError("ratio: of derived candidates; these are votes")
        return self

    def momentum_at(self, at: Step) -> float:
        """Momentum of the targets in a step."""
        end = self.momentum if self.momentum_end is None else self.momentum_end
        return self.momentum + (end - self.momentum) * at.number / at.steps


class Partial(Supervised):
    """Cross entropy with targets that settle within each face's candidates; an `Objective`."""

    def __init__(
        self,
        model: FaceModel,
        config: SupervisedConfig,
        partial: PartialConfig,
        data: LabeledFaces,
        device: torch.device,
        seed: int,
        rows: np.ndarray | None = None,
    ) -> None:
        """An objective on faces whose `soft` says what the candidates are: all above 0.

        Raises:
            ConfigError: there is no `soft`, a face without a candidate, or mixing as well.
        """
        super().__init__(model, config, data, rows)
        if config.mix is not None:
            raise ConfigError(f"partial: targets of faces mixed by {config.mix} cannot move")
        self._partial = partial
        self._votes = votes_of(data, rows).to(device)
        self._targets = self._votes.clone()
        if partial.start == "uniform":
            there = (self._votes > 0).float()
            self._targets = there / there.sum(1, keepdim=True).clamp(min=1)
        classes = self._votes.shape[1]
        self._prototypes = torch.zeros(classes, model.embed_dim, device=device)
        self._decoder: LabelDecoder | None = None
        if partial.method == "decoder":
            own = partial.decoder
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, DECODER))
                self._decoder = LabelDecoder(_token_dim(model), classes, **own.model_dump())

    def modules(self) -> nn.ModuleDict:
        """The network, and the decoder where there is one."""
        own = {} if self._decoder is None else {DECODER: self._decoder}
        return nn.ModuleDict({"model": self._model, **own})

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Mean cross entropy with the faces' targets, and the method's own terms."""
        labeled, own = batch["labeled"], self._partial
        tokens, embedding, plain = self._model.tokens(labeled.views["x"])
        logits = plain.float() + self._adjustment.to(plain.device)
        index = torch.from_numpy(labeled.index).to(logits.device)
        votes, target = self._votes[index], self._targets[index]
        smoothing = self._config.smoothing
        head_loss = cross_entropy(logits, target, smoothing=smoothing).mean()
        total, logs = head_loss, {"head_loss": head_loss.detach()}
        outputs = {"index": index}
        if self._decoder is not None:
            said = self._decoder(tokens).float()
            decoder_loss = cross_entropy(said, target, smoothing=smoothing).mean()
            apart = uniformity(self._decoder.embeddings)
            total = total + decoder_loss + own.uniformity * apart
            logs |= {"decoder_loss": decoder_loss.detach(), "uniformity": apart.detach()}
        else:
            said = logits
        toward = trusted(said.detach().softmax(1), votes, own.vote_power)
        if own.method == "pico":
            features = F.normalize(embedding.float(), dim=1)
            classes = toward.argmax(1)
            if own.contrastive:
                contrast = class_contrast(features, classes, gather=at.worker.gather).mean()
                total = total + own.contrastive * contrast
                logs["contrast"] = contrast.detach()
            outputs |= {"features": features.detach(), "classes": classes}
            toward = self._by_prototype(features.detach(), votes > 0, target)
        outputs["toward"] = toward
        logs["certainty"] = target.amax(1).mean()
        logs["overruled"] = (target.argmax(1) != votes.argmax(1)).float().mean()
        return Loss(total, trained=len(labeled), logs=logs, outputs=outputs)

    def _by_prototype(self, features: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        """Nearest candidate (B, K); a face with a candidate that nobody has stood for yet waits."""
        known = self._prototypes.any(1)
        nearest = nearest_candidate(features, self._prototypes, candidates)
        return torch.where((known | ~candidates).all(1, keepdim=True), nearest, target)

    def update(self, loss: Loss, at: Step) -> None:
        """Move the targets of the batch's faces, and the prototypes of their classes."""
        gather = at.worker.gather
        own, out = self._partial, loss.outputs
        momentum = own.momentum_at(at)
        if at.number >= own.warm * at.steps and momentum < 1:
            move_targets(self._targets, out["index"], out["toward"], momentum, gather)
        if own.method == "pico":
            move_prototypes(
                self._prototypes, out["features"], out["classes"], own.prototype_momentum, gather
            )

    def state(self) -> dict[str, Tensor]:
        """Targets, and the prototypes where there are any."""
        own = {"prototypes": self._prototypes} if self._partial.method == "pico" else {}
        return {"targets": self._targets, **own}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._targets = state["targets"].to(self._targets.device)
        if "prototypes" in state:
            self._prototypes = state["prototypes"].to(self._prototypes.device)


def votes_of(data: LabeledFaces, rows: np.ndarray | None = None) -> Tensor:
    """Shares (N, K) float32 of each face's candidates; rows that train sum to 1.

    Raises:
        ConfigError: no shares, or a face that trains without any.
    """
    if data.soft is None:
        raise ConfigError("partial: the faces have neither votes nor derived candidates")
    shares = np.asarray(data.soft, np.float64)
    total = shares.sum(1, keepdims=True)
    empty = np.count_nonzero((total if rows is None else total[rows]) == 0)
    if empty:
        raise ConfigError(f"partial: {empty} faces have no candidate at all")
    return torch.from_numpy(shares / np.where(total > 0, total, 1)).float()


def _token_dim(model: FaceModel) -> int:
    """Width of a network's tokens."""
    was_training = model.training
    config = model.config
    with torch.no_grad():
        blank = torch.zeros(1, config.channels, config.size, config.size)
        width = model.eval().tokens(blank)[0].shape[2]
    model.train(was_training)
    return int(width)


def train_partial(
    config: SupervisedConfig,
    partial: PartialConfig,
    data: LabeledFaces,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    rows: np.ndarray | None = None,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Train a new network on faces with candidate sets, or on some of them.

    Args:
        config: network and schedule.
        partial: the method.
        data: the faces; `soft` says what the candidates are.
        label_names: what codes and shares index.
        worker: where.
        seed: of the weights and of everything drawn.
        rows: positions of the faces to train on; None for all.
        hooks: called after every step.

    Raises:
        ConfigError: as :class:`Partial`.
    """
    model = new_model(config.model, label_names, seed)
    objective = Partial(model, config, partial, data, worker.device, seed, rows)
    fitted = fit(objective, config, worker, seed=seed, hooks=hooks)
    return Trained(averaged_model(fitted), fitted)
