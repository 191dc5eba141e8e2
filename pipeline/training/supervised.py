"""Training on labeled faces: teachers, controls and the upper bound share this objective.

What for: a student may only be compared with a control that differs in nothing but the pool, so
there is one implementation of learning from labels. Class imbalance is met in one of three ways:
`none`; `sampler`, which draws a face of class c with a chance proportional to n_c^-strength; or
`logit_adjust`, which adds strength * log prior to the logits while training. Pairs of faces may be
mixed: `mixup` shows the mixed images alone, `facemix` the faces as well, the more the less the two
faces' boxes overlap.
Cost: batch image passes per step, twice as many with facemix.
Source: logit adjustment arXiv 2007.07314, eq. 10. Mixing: see facemix.py.
Departs: faces and mixed images pass in one forward, so batch statistics are those of both together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.augment import GEOMETRY, VIEWS, Augmentation, move_boxes, plain
from pipeline.boxes import FALLBACK
from pipeline.facemix import draw_mix, facemix_loss, iou, mix, mixup_loss
from pipeline.losses import cross_entropy, logit_adjustment
from pipeline.models import TIMM, FaceModel, ModelConfig, create, load_timm_weights
from pipeline.progress import console
from pipeline.storage import location
from pipeline.training.data import Batch, LabeledFaces, Stream, class_chances, seed_of
from pipeline.training.faces import Faces
from pipeline.training.loop import Fitted, Hook, Loss, Objective, Schedule, Step, Worker, fit
from pipeline.weights import load_weights


class SupervisedConfig(Schedule):
    """A network, how it sees labeled faces, and for how long."""

    model: ModelConfig = ModelConfig()
    batch: int = Field(default=128, ge=1)
    """Faces per step, over all workers together."""
    smoothing: float = Field(default=0.05, ge=0, lt=1)
    """Share of the target given to all classes alike."""
    imbalance: Literal["none", "sampler", "logit_adjust"] = "none"
    imbalance_strength: float = Field(default=0.5, ge=0)
    """Power of the sampler or factor of the log prior."""
    augment: Augmentation = "weak"
    mix: Literal["facemix", "mixup"] | None = None
    """Learn from mixed images of two faces each; facemix from the faces too, by their boxes."""
    mix_alpha: float = Field(default=1.0, gt=0)
    """Shares are drawn from Beta(alpha, alpha), one per step and worker; 1 draws all alike."""

    @property
    def step_images(self) -> int:
        """Images that a step passes forward and backward."""
        return self.batch * (2 if self.mix == "facemix" else 1)


@dataclass(frozen=True)
class Trained:
    """A model at the end of its run, and the run."""

    model: FaceModel
    """With averaged weights, in evaluation mode."""
    fitted: Fitted


class Supervised(Objective):
    """Cross entropy on labeled faces, as they are or mixed.

    Where facemix is asked for and the faces come without boxes, each has `boxes.FALLBACK`: what
    then overlaps more or less are the shifts, turns and sizes of the random views.
    """

    def __init__(
        self,
        model: FaceModel,
        config: SupervisedConfig,
        data: LabeledFaces,
        rows: np.ndarray | None = None,
        frozen_norms: bool = False,
    ) -> None:
        self._model, self._config, self._frozen_norms = model, config, frozen_norms
        labels = data.labels if rows is None else data.labels[rows]
        targets, geometry = {"target": data.targets}, {}
        if config.mix == "facemix":
            known = data.boxes
            targets["box"] = np.tile(FALLBACK, (len(data), 1)) if known is None else known
            geometry["x"] = GEOMETRY[config.augment]
        self._stream = Stream(
            name="labeled",
            faces=data.faces,
            batch=config.batch,
            views={"x": VIEWS[config.augment]},
            size=model.config.size,
            targets=targets,
            geometry=geometry,
            rows=rows,
            probabilities=class_chances(labels, config.imbalance_strength)
            if config.imbalance == "sampler"
            else None,
        )
        strength = config.imbalance_strength if config.imbalance == "logit_adjust" else 0.0
        counts = np.bincount(labels, minlength=len(model.label_names))
        self._adjustment = logit_adjustment(torch.from_numpy(counts), strength)

    def modules(self) -> nn.ModuleDict:
        """The network."""
        return nn.ModuleDict({"model": self._model})

    def streams(self) -> Sequence[Stream]:
        """Labeled faces in one view."""
        return [self._stream]

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """Mean cross entropy, or mean of the mixed losses of `pipeline.facemix`."""
        labeled = batch["labeled"]
        if self._frozen_norms:
            for module in self._model.modules():
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
        if self._config.mix is not None:
            return self._mixed_loss(labeled)
        losses = cross_entropy(
            self._logits(labeled.views["x"]),
            labeled.targets["target"],
            smoothing=self._config.smoothing,
        )
        return Loss(losses.mean(), trained=len(labeled))

    def _mixed_loss(self, labeled: Batch) -> Loss:
        x, target, smoothing = labeled.views["x"], labeled.targets["target"], self._config.smoothing
        order, lam = draw_mix(len(x), self._config.mix_alpha)
        order = order.to(x.device)
        mixed = mix(x, order, lam)
        if self._config.mix == "mixup":
            losses = mixup_loss(self._logits(mixed), target, order, lam, smoothing=smoothing)
            return Loss(losses.mean(), trained=len(x))
        boxes = move_boxes(labeled.targets["box"], labeled.maps["x"])
        overlap = iou(boxes, boxes[order])
        mixed, real = self._logits(torch.cat([mixed, x])).chunk(2)
        losses = facemix_loss(mixed, real, target, order, lam, overlap, smoothing=smoothing)
        return Loss(losses.mean(), trained=2 * len(x), logs={"overlap": overlap.mean()})

    def _logits(self, x: Tensor) -> Tensor:
        """Training logits (B, K) float32, with the prior where imbalance is met that way."""
        logits: Tensor = self._model(x).float()
        return logits + self._adjustment.to(logits.device)


def train_supervised(
    config: SupervisedConfig,
    data: LabeledFaces,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    rows: np.ndarray | None = None,
    start: FaceModel | None = None,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Train a new network on labeled faces, or on some of them, or train one on.

    Args:
        config: network and schedule.
        data: the faces.
        label_names: what their codes index.
        worker: where.
        seed: of the weights and of everything drawn.
        rows: positions of the faces to train on; None for all.
        start: the model to train on, which is not changed; its running statistics stay, because
            a few images have others. None: a new one.
        hooks: called after every step.
    """
    model = new_model(config.model, label_names, seed) if start is None else copy.deepcopy(start)
    objective = Supervised(model, config, data, rows, frozen_norms=start is not None)
    fitted = fit(objective, config, worker, seed=seed, trained=start is not None, hooks=hooks)
    return Trained(averaged_model(fitted), fitted)


def new_model(config: ModelConfig, label_names: Sequence[str], seed: int) -> FaceModel:
    """A network as training starts it: random weights of a seed, then those `weights` names.

    Raises:
        ModelError: no such network, or weights that do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        model = create(config, label_names)
        if config.weights == TIMM:
            load_timm_weights(model)
        elif config.weights is not None:
            report = load_weights(model, location(config.weights))
            console.print(f"{config.weights}: {report}", markup=False, soft_wrap=True)
            model.started = asdict(report)
    return model


def averaged_model(fitted: Fitted) -> FaceModel:
    """The network that a run of one network leaves."""
    model = fitted.averaged["model"]
    assert isinstance(model, FaceModel)
    return model


@torch.no_grad()
def predict_logits(
    model: FaceModel,
    faces: Faces,
    worker: Worker,
    *,
    rows: np.ndarray | None = None,
    flip: bool = True,
    batch: int = 256,
) -> np.ndarray:
    """Logits (N, K) float32 of faces, shared out over the workers; every worker gets all of them.

    Costs a forward per face, two with flip: `Step.count_forward` or FORWARD image passes each.

    Args:
        model: on the worker's device; comes back in the mode it was in.
        faces: the store.
        worker: where.
        rows: positions to look at (N,); None for all.
        flip: average with the logits of the mirrored face.
        batch: faces per forward.
    """
    index = np.arange(len(faces)) if rows is None else rows
    logits = torch.zeros(len(index), len(model.label_names), device=worker.device)
    generator = torch.Generator()
    was_training = model.training
    model.eval()
    for start in range(worker.rank * batch, len(index), worker.world * batch):
        here = slice(start, start + batch)
        pixels = torch.from_numpy(faces.take(index[here])).to(worker.device)
        x = plain(pixels, model.config.size, generator)
        x = x.contiguous(memory_format=torch.channels_last)
        with worker.autocast():
            seen = model(x).float()
            if flip:
                seen = (seen + model(x.flip(3)).float()) / 2
        logits[here] = seen
    model.train(was_training)
    return worker.all_reduce(logits).cpu().numpy()
