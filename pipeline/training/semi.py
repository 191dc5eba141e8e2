"""Semi-supervised training: the model labels the unlabeled faces itself, in every step anew.

What for: pseudo-labels that follow the training in place of a teacher's fixed ones. Loss:
CE(labeled) + lambda * mean(w * CE(target, strong view)) + low * term(faces below the cut); targets
come from the weak view, by the running average of the weights or by the model itself; w and the
targets' alignment from a rule of adaptive.py. A student in all else: streams, ramp of lambda,
controls of equal compute.
Cost per step: labeled_batch + mined_batch image passes, mined_batch more for each further anchor,
where the low-confidence term has a second strong view or the model labels itself, and a forward of
the weak views otherwise, and of the labeled faces for a rule that compares the two.
Source: FixMatch arXiv 2001.07685; EMA labeler: Mean Teacher arXiv 1703.01780, as in SSFER
arXiv 2410.17622 (tau 0.7, lambda 5); per-class thresholds over time: arXiv 2303.08617, Ada-CM arXiv
2203.12341. Alignment and augmentation anchoring, for pools whose class shares are not those of the
labels: ReMixMatch arXiv 1911.09785, rule remixmatch with some anchors and soft targets.
Departs: thresholds that follow labeled faces look at held-out ones, once per epoch: so many steps
as the faces that train take, where Ada-CM's code has 800 for any number of them
(`online.epoch_steps`). Their ramp 1 / (1 + exp(-epoch)) ends after some five epochs, so on few
labels long before Ada-CM's quarter of the training. The mean runs over all faces of the batch,
those of weight 0 included, as in FixMatch. Of ReMixMatch there are the guess and what it
is taught to: MixUp of labeled and unlabeled faces and the rotation term are left out, and the
strong views are those of augment.py in place of CTAugment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from pipeline.adaptive import ClassMargin, rule
from pipeline.augment import VIEWS, View
from pipeline.losses import (
    Gather,
    consistency,
    contrastive,
    cross_entropy,
    fairness,
    negative_learning,
)
from pipeline.models import FaceModel
from pipeline.training.data import Batch, LabeledFaces, MinedFaces
from pipeline.training.loop import Loss, Step
from pipeline.training.student import Student, StudentConfig
from pipeline.training.supervised import predict_logits
from pipeline.training.teacher import stratified_folds

PARTS = 20
"""Labeled faces are cut into at most so many parts to hold out some; more where a share is less."""


class SemiStudent(Student):
    """A student whose pseudo-labels are its own; an `Objective`."""

    def __init__(
        self,
        model: FaceModel,
        config: StudentConfig,
        labeled: LabeledFaces,
        mined: MinedFaces,
        device: torch.device,
        seed: int,
    ) -> None:
        assert config.online is not None
        self._online, self._names = config.online, model.label_names
        self._faces = labeled
        self._judged, kept = _hold_out(labeled, config, seed)
        super().__init__(model, config, labeled, mined, rows=kept)
        # What the teacher says of the pool as a whole is more certain than of any face. Faces are
        # not drawn alike, and the model's mean answer is one of the faces that are drawn.
        chances = self._mined_stream.probabilities
        shares = np.average(np.asarray(mined.soft, np.float64), 0, chances)
        prior = torch.from_numpy(shares).float()
        self._rule = rule(
            config.online.thresholds,
            len(model.label_names),
            len(mined),
            (prior / prior.sum()).to(device),
            device,
        )
        once = self._labeled_stream.count // config.labeled_batch
        self._epoch_steps = config.online.epoch_steps or max(1, once)

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        """CE(labeled) + lambda * mean(w * CE(target, strong)) + low-confidence term."""
        labeled, pool, online = batch["labeled"], batch["mined"], self._online
        gather = at.worker.gather
        views = [labeled.views["x"], pool.views["x"]]
        views += [pool.views["y"]] if "y" in pool.views else []
        views += [pool.views[name] for name in _more(online.anchors)]
        views += [pool.views["w"]] if online.labeler == "model" else []
        embedding, logits = self._model.features(torch.cat(views))
        sizes = [len(view) for view in views]
        known, strong, *others = torch.split(logits.float(), sizes)
        own, forward = known, 0
        if online.labeler == "model":
            weak = others.pop()
        else:
            average, forward = at.averaged["model"], len(pool)
            with torch.no_grad():
                weak = average(pool.views["w"]).float()
                if self._rule.asks_labeled:  # as confident as who labels, not as who learns
                    own, forward = average(labeled.views["x"]).float(), forward + len(labeled)
        probs = torch.softmax(weak.detach(), 1)
        seen = torch.softmax(own.detach(), 1)
        self._rule.observe(seen, probs, torch.from_numpy(pool.index), gather)
        weight, target = self._rule.weights(probs), self._rule.targets(probs)
        hard = self._config.targets == "hard"
        labeled_loss = cross_entropy(
            known, labeled.targets["target"], smoothing=self._config.smoothing
        ).mean()
        taught = target.argmax(1) if hard else target
        anchored = [strong, *(others.pop() for _ in _more(online.anchors))]
        apart = torch.stack([cross_entropy(view, taught) for view in anchored])
        pool_loss = (weight * apart).mean()
        total = labeled_loss + self.mined_weight(at.number) * pool_loss
        if online.low is not None:
            low = self._low(
                strong, others, torch.split(embedding, sizes), probs, weight < 0.5, gather
            )
            total = total + online.low_weight * low.mean()
        if online.fairness:
            stats = self._rule.stats
            total = total + online.fairness * fairness(
                strong, weight > 0, stats["shares"], stats["histogram"], gather
            )
        logs = {"labeled_loss": labeled_loss, "mined_loss": pool_loss, "used": weight.mean()}
        logs |= {f"cut_{n}": c for n, c in zip(self._names, self._rule.cuts(), strict=True)}
        return Loss(
            total,
            trained=len(logits),
            forward=forward,
            logs={name: value.detach() for name, value in logs.items()},
        )

    def _low(
        self,
        strong: Tensor,
        others: Sequence[Tensor],
        embedding: Sequence[Tensor],
        probs: Tensor,
        below: Tensor,
        gather: Gather,
    ) -> Tensor:
        """The low-confidence term (B,)."""
        if self._online.low == "negative":
            return negative_learning(strong, probs, below)
        if self._online.low == "consistency":
            return consistency(strong, others[0], below)
        return contrastive(embedding[1], embedding[2], below, gather=gather)

    def guess(self, rows: np.ndarray, at: Step) -> tuple[np.ndarray, np.ndarray]:
        """Label codes and weights (n,) that mined faces would get now, from plain views.

        Every worker must ask; nothing moves.
        """
        labeler = self._model if self._online.labeler == "model" else at.averaged["model"]
        assert isinstance(labeler, FaceModel)
        logits = predict_logits(labeler, self._mined.faces, at.worker, rows=rows, flip=False)
        probs = torch.softmax(torch.from_numpy(logits), 1).to(at.worker.device)
        target, weight = self._rule.targets(probs), self._rule.weights(probs)
        return target.argmax(1).cpu().numpy(), weight.cpu().numpy()

    def update(self, loss: Loss, at: Step) -> None:
        """Once per epoch of `online.epoch_steps`, thresholds that follow labeled faces."""
        done = at.number + 1
        if not isinstance(self._rule, ClassMargin) or done % self._epoch_steps:
            return
        model = at.averaged["model"]
        assert isinstance(model, FaceModel)
        logits = predict_logits(model, self._faces.faces, at.worker, rows=self._judged, flip=False)
        at.count_forward(len(self._judged))
        labels = torch.from_numpy(self._faces.labels[self._judged])
        probs = torch.softmax(torch.from_numpy(logits), 1)
        self._rule.epoch(done / self._epoch_steps, probs, labels)

    def state(self) -> dict[str, Tensor]:
        """The rule's statistics."""
        return self._rule.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._rule.load(state)

    def _mined_views(self) -> dict[str, View]:
        strong = VIEWS[self._config.mined_augment]
        views = {"x": strong, "w": VIEWS[self._online.weak]}
        if self._online.low in ("consistency", "contrastive"):
            views["y"] = strong
        return views | dict.fromkeys(_more(self._online.anchors), strong)


def _more(anchors: int) -> list[str]:
    """Names of the strong views beside the first."""
    return [f"x{number}" for number in range(2, anchors + 1)]


def _hold_out(
    labeled: LabeledFaces, config: StudentConfig, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Faces that class thresholds are read from, and those that train (None: all)."""
    assert config.online is not None
    share, rule_name = config.online.held_out, config.online.thresholds.rule
    if share is None or rule_name not in ("ada_cm", "dtm"):
        return np.arange(len(labeled)), None
    # Some of few parts: the more parts there are, the less evenly rare classes fill them.
    held = Fraction(share).limit_denominator(max(PARTS, round(1 / share)))
    parts = f"student.online.held_out: {share:g}, parts"
    folds = stratified_folds(labeled.labels, labeled.groups, held.denominator, seed, parts)
    judged = folds < held.numerator
    return np.flatnonzero(judged), np.flatnonzero(~judged)
