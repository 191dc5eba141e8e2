"""The student: labeled faces and mined faces in one forward, and its controls.

What for: the model the whole run is for. Loss: CE(labeled) + lambda * mean(w * KL(q || p(strong
view of a mined face))), lambda rising from 0, so that the labels shape the network first. Controls
learn from the labels alone with the same network, sampler, view, average and schedule: A for the
same steps and batch, B for all the image passes that teachers, scoring and student took.
Cost: labeled_batch + mined_batch image passes per step; a re-scoring two forwards per mined face.
Source: omni-supervised FER arXiv 2005.08551 (a model trained on labels selects, its student learns
from both); weights w: SoftMatch arXiv 2301.10921, the truncated Gaussian; soft targets and strong
views: Noisy Student arXiv 1911.04252.
Departs: soft targets of a calibrated ensemble in place of the hard label of one primitive model,
because hard labels of the two or three classes that pass a cut lose to no pool at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.augment import VIEWS, Augmentation, View
from pipeline.config import Config, filled, unread
from pipeline.losses import cross_entropy, kl_divergence, softmatch_weight
from pipeline.models import PRETRAINED, FaceModel, ModelConfig
from pipeline.threshold_config import READ, ThresholdConfig
from pipeline.training.data import (
    Batch,
    LabeledFaces,
    MinedFaces,
    Stream,
    cap_shares,
    class_chances,
    mass_chances,
)
from pipeline.training.loop import Loss, Schedule, Step
from pipeline.training.supervised import (
    SupervisedConfig,
    predict_logits,
)

MOMENTUM = 0.99
"""Of an online rule's running means: runs are of thousands of steps, those with 0.999 of a million.
"""


class OnlineConfig(Config):
    """Pseudo-labels that follow the training; see semi.py."""

    thresholds: ThresholdConfig = ThresholdConfig(momentum=MOMENTUM)
    """Which faces count, and how much; rules with running means look back 100 steps here, unless
    momentum is named."""
    labeler: Literal["ema", "model"] = "ema"
    """Who labels the weak views: the running average of the weights, or the model itself."""
    weak: Augmentation = "weak"
    anchors: int = Field(default=1, ge=1, le=8)
    """Strong views of a face that are taught the weak view's guess, in one step; ReMixMatch: 8."""
    low: Literal["consistency", "negative", "contrastive"] | None = None
    """What faces below their threshold are still good for."""
    low_weight: float = Field(default=0.5, ge=0)
    fairness: float = Field(default=0.0, ge=0)
    """Weight of freematch's fairness term; its paper has 0.01."""
    held_out: float | None = Field(default=0.1, gt=0, le=0.5)
    """Share of the labeled faces that ada_cm and dtm read their thresholds from and nothing trains
    on; None: the training faces, as their papers do."""
    epoch_steps: int | None = Field(default=None, ge=1)
    """Steps between two readings of ada_cm's and dtm's thresholds, which their ramp counts; None:
    once through the labeled faces that train. Ada-CM's code: 800, twenty times in all."""

    @field_validator("thresholds", mode="before")
    @classmethod
    def _remembers_little_unasked(cls, thresholds: Any) -> Any:
        named = thresholds if isinstance(thresholds, Mapping) else {}
        rule = named.get("rule", ThresholdConfig.model_fields["rule"].default)
        if "momentum" not in READ.get(str(rule), ()):
            return thresholds  # a momentum would be refused
        return filled(thresholds, momentum=MOMENTUM)

    @model_validator(mode="after")
    def _terms_have_a_subject(self) -> OnlineConfig:
        rule = self.thresholds.rule
        if (name := self.thresholds.stray) is not None:
            raise ValueError(f"thresholds.{name}: {rule} has no use for it")
        if rule not in ("ada_cm", "dtm") and self.held_out and unread(self, ["held_out"]):
            raise ValueError(f"held_out: {rule} reads no threshold from labeled faces")
        if rule not in ("ada_cm", "dtm") and self.epoch_steps is not None:
            raise ValueError(f"epoch_steps: {rule} reads no threshold from labeled faces")
        if self.low is not None and self.thresholds.rule == "remixmatch":
            raise ValueError(f"low: {self.low}, and remixmatch leaves no face below a threshold")
        if self.fairness and self.thresholds.rule != "freematch":
            raise ValueError(
                f"fairness: {self.thresholds.rule} keeps no shares; only freematch does"
            )
        return self

    @property
    def sharpens(self) -> bool:
        """Whether the rule raises targets to a power."""
        return self.thresholds.rule == "remixmatch" and self.thresholds.temperature < 1


class CandidatesConfig(Config):
    """Candidate sets of mined faces; see candidates.py."""

    rule: Literal["cumulative", "lac", "aps"] = "cumulative"
    """The most probable classes until they hold `coverage` of the probability, or conformal."""
    coverage: float = Field(default=0.9, gt=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of a target that stays each time its face is seen."""


class StudentConfig(Schedule):
    """How the student is trained."""

    steps: int = Field(default=5000, ge=1)
    ema: float | None = Field(default=0.999, gt=0, lt=1)
    model: ModelConfig = ModelConfig()
    warm_start: bool = False
    """Start from a teacher's weights in place of random ones. The average of the weights starts
    there too, and has `ema` from the first step on."""
    beside: Literal["mined", "distilled"] = "mined"
    """What is learned beside the labeled faces: all mined faces, or the distilled set."""
    labeled_batch: int = Field(default=64, ge=1)
    mined_batch: int = Field(default=128, ge=1)
    """Both per step, over all workers together."""
    labeled_augment: Augmentation = "weak"
    mined_augment: Augmentation = "strong"
    smoothing: float = Field(default=0.05, ge=0, lt=1)
    """Of the labels; the teacher's targets are as they are."""
    labeled_power: float = Field(default=0.5, ge=0)
    """Labeled faces are drawn by n_c^-power; 0 draws all alike."""
    mined_power: float = Field(default=0.5, ge=0)
    """Mined faces are drawn by (class mass)^-power."""
    mined_cap: float = Field(default=5.0, ge=1)
    """No mined face is drawn more than this many times as often as the mean."""
    source_share: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Largest share of the mined draws, by name of the source; 0: none of its faces is drawn."""
    mined_weight: float = Field(default=1.5, ge=0)
    """lambda at the end of its ramp."""
    ramp: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps in which lambda rises from 0."""
    targets: Literal["soft", "hard", "candidates"] = "soft"
    """The teacher's probabilities, their top class (of a distilled set its own), or sets of classes
    to choose from."""
    candidates: CandidatesConfig | None = None
    """How sets are made; None: the defaults."""
    weighting: Literal["softmatch", "selection", "none"] = "softmatch"
    """Of mined faces: by confidence among all mined faces, as select decided, or alike."""
    kd: float | None = Field(default=None, gt=0, le=1)
    """Share of the labeled faces' targets that comes from the teachers' probabilities."""
    online: OnlineConfig | None = None
    """Semi-supervised: the student labels the mined faces itself, in every step. None: the
    teacher's probabilities, as they are or scored again."""
    rescore_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the steps after which the student itself scores the mined faces again."""
    rescore_keep: float = Field(default=0.5, ge=0, le=1)
    """Share of the old targets that stays."""

    @model_validator(mode="after")
    def _one_kind_of_targets(self) -> StudentConfig:
        if self.online is not None and self.rescore_at:
            raise ValueError("rescore_at: an online student labels the faces in every step anyway")
        if self.online is not None and self.online.labeler == "ema" and self.ema is None:
            raise ValueError("online.labeler: ema, and there is no average of the weights (ema)")
        if self.online is not None and unread(self, ["weighting"]):
            raise ValueError("weighting: online.thresholds say how much a face counts")
        sharp = self.online is not None and self.online.sharpens
        if sharp and self.targets == "hard":
            raise ValueError(
                "targets: hard, and remixmatch's sharpened targets would be lost; say soft, or "
                "online.thresholds.temperature=1"
            )
        if self.targets == "candidates" and (self.online is not None or self.rescore_at):
            raise ValueError("targets: candidates are the teacher's; neither online nor rescore_at")
        if self.candidates is not None and self.targets != "candidates":
            raise ValueError(f"candidates: targets are {self.targets}, not candidates")
        return self

    @property
    def asks_out_of_fold(self) -> bool:
        """Whether it needs what the teachers say of labeled faces that they have not seen."""
        own = self.candidates or CandidatesConfig()
        conformal = self.targets == "candidates" and own.rule != "cumulative"
        return conformal or self.kd is not None

    @property
    def step_images(self) -> int:
        """Images that a step passes forward and backward."""
        if self.online is None:
            return self.labeled_batch + self.mined_batch
        second = self.online.low in ("consistency", "contrastive")
        return self.labeled_batch + self.mined_batch * (
            self.online.anchors + second + (self.online.labeler == "model")
        )


class Student:
    """Labeled and mined faces in one forward; an `Objective`."""

    def __init__(
        self,
        model: FaceModel,
        config: StudentConfig,
        labeled: LabeledFaces,
        mined: MinedFaces,
        rows: np.ndarray | None = None,
    ) -> None:
        self._model, self._config, self._mined = model, config, mined
        drawn = labeled.labels if rows is None else labeled.labels[rows]
        self._labeled_stream = Stream(
            name="labeled",
            faces=labeled.faces,
            batch=config.labeled_batch,
            views={"x": VIEWS[config.labeled_augment]},
            size=model.config.size,
            targets={"target": labeled.targets},
            rows=rows,
            probabilities=class_chances(drawn, config.labeled_power),
        )
        self._soft: np.ndarray = mined.soft.astype(np.float32)
        self._rescored = False
        self._mined_stream = self._stream_of_mined()

    def modules(self) -> nn.ModuleDict:
        """The network."""
        return nn.ModuleDict({"model": self._model})

    def streams(self) -> Sequence[Stream]:
        """Labeled and mined faces, one view of each."""
        return [self._labeled_stream, self._mined_stream]

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """CE(labeled) + lambda * mean(w * KL(q || p))."""
        labeled, mined = batch["labeled"], batch["mined"]
        # One forward: the batch statistics are those of labeled and mined faces together.
        logits = self._model(torch.cat([labeled.views["x"], mined.views["x"]]))
        known, guessed = logits[: len(labeled)], logits[len(labeled) :]
        target = labeled.targets["target"]
        labeled_loss = cross_entropy(known, target, smoothing=self._config.smoothing).mean()
        apart = kl_divergence(mined.targets["target"], guessed)
        mined_loss = (mined.targets["weight"] * apart).mean()
        return Loss(
            labeled_loss + self.mined_weight(at.number) * mined_loss,
            trained=len(logits),
            logs={"labeled_loss": labeled_loss.detach(), "mined_loss": mined_loss.detach()},
            outputs={
                "guessed": guessed.detach(),
                "index": torch.from_numpy(mined.index).to(guessed.device),
            },
        )

    def mined_weight(self, step: int) -> float:
        """The mined loss's factor lambda in a step, counted from 0."""
        rising = self._config.ramp * self._config.steps
        return self._config.mined_weight * (min(1.0, step / rising) if rising else 1.0)

    def update(self, loss: Loss, at: Step) -> None:
        """Score the mined faces again where the config says so."""
        done = at.number + 1
        if done not in {round(share * at.steps) for share in self._config.rescore_at}:
            return
        model = at.averaged["model"]
        assert isinstance(model, FaceModel)
        logits = predict_logits(model, self._mined.faces, at.worker)
        at.count_forward(2 * len(self._mined))
        new = torch.softmax(torch.from_numpy(logits), 1).numpy()
        keep = self._config.rescore_keep
        self._soft = keep * self._soft + (1 - keep) * new
        self._rescored = True
        self._mined_stream = self._stream_of_mined()

    def state(self) -> dict[str, Tensor]:
        """The targets, once they are no longer the teacher's."""
        return {"soft": torch.from_numpy(self._soft)} if self._rescored else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        if "soft" in state:
            self._soft, self._rescored = state["soft"].numpy(), True
            self._mined_stream = self._stream_of_mined()

    def _stream_of_mined(self) -> Stream:
        config, target = self._config, self._soft
        if config.targets == "hard":
            target = np.eye(target.shape[1], dtype=np.float32)[target.argmax(1)]
        chances = mass_chances(target, config.mined_power, config.mined_cap)
        return Stream(
            name="mined",
            faces=self._mined.faces,
            batch=config.mined_batch,
            views=self._mined_views(),
            size=self._model.config.size,
            targets={"target": target, "weight": self._weights()},
            probabilities=cap_shares(chances, self._mined.source, config.source_share),
        )

    def _mined_views(self) -> dict[str, View]:
        return {"x": VIEWS[self._config.mined_augment]}

    def _weights(self) -> np.ndarray:
        """Weights (M,) float32 of the mined faces."""
        if self._config.weighting == "none":
            return np.ones(len(self._mined), np.float32)
        if self._config.weighting == "selection":
            return self._mined.weight.astype(np.float32)
        confidence = torch.from_numpy(self._soft).amax(1)
        spread = confidence.var(correction=0)
        return softmatch_weight(confidence, confidence.mean(), spread).numpy()


def mix_targets(data: LabeledFaces, probs: np.ndarray, share: float) -> LabeledFaces:
    """Labeled faces whose targets are (1 - share) * label + share * probs (N, K).

    Cross entropy is linear in its target, so this is distillation beside the labels.
    """
    own = np.eye(probs.shape[1])[data.labels] if data.soft is None else data.soft
    return replace(data, soft=(1 - share) * own + share * probs)


class ControlConfig(Config):
    """How the controls of equal compute see the labels."""

    augment: Augmentation | None = None
    """None: as the student sees labeled faces. Name the better: a weak control proves little."""


def control(
    config: StudentConfig, passes: float | None = None, own: ControlConfig | None = None
) -> SupervisedConfig:
    """The run on labels alone that a student is compared with.

    Args:
        config: the student's.
        passes: control B: all image passes of pre-training, teachers, scoring and student. None:
            control A, the student's steps.
        own: what the controls do otherwise.
    """
    batch = config.step_images
    shared = {name: getattr(config, name) for name in Schedule.model_fields}
    if passes is not None:
        shared["steps"] = max(1, round(passes / batch))
    # Pre-training is something learned from the pool, too: a control starts from nothing.
    model = config.model
    if model.weights == PRETRAINED:
        model = model.model_copy(update={"weights": None})
    return SupervisedConfig(
        model=model,
        batch=batch,
        smoothing=config.smoothing,
        imbalance="sampler",
        imbalance_strength=config.labeled_power,
        augment=(own and own.augment) or config.labeled_augment,
        **shared,
    )
