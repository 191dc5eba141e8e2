"""Thresholds and weights of pseudo-labels that follow the training. Pure torch.

What for: semi-supervised training owns one rule and asks it in every step which unlabeled faces
count, how much, and what their targets are. A rule's statistics are a few tensors that live in the
checkpoint; several workers move them alike by joining the rows of the step.
Cost: a few operations on (B, K) per step, and no value that the CPU waits for. A step of 64 labeled
and 128 unlabeled faces of 8 classes takes one CPU thread 0.01 (fixed) to 0.3 ms (flexmatch), which
keeps 2 bytes per face of the pool.
Source: fixed: FixMatch, arXiv 2001.07685, section 2.2. ada_cm: Li et al., arXiv 2203.12341, its
margin as in the released code. flexmatch: arXiv 2110.08263, section 3. freematch: arXiv 2205.07246,
section 4.1 (its fairness term is `losses.fairness`). softmatch: arXiv 2301.10921, section 3.
adamatch: arXiv 2106.04732, section 3. remixmatch: arXiv 1911.09785, section 3.1 and MixMatch's
sharpening, arXiv 1905.02249, eq. 7.
Departs: distributions are aligned to an estimate of the pool's class shares by default, not to the
labeled faces' nor to uniform: class shares of pools of faces are far from both. The mean that the
pool's probabilities are compared with starts as a plain mean of all batches, so that the first
batch does not echo for a thousand steps. softmatch's targets are aligned too, since the estimate is
meant to be true, other than uniform. flexmatch looks at a step's faces before it weighs them, as
all rules do. dtm: the text of "Exploring Large-scale Unlabeled Faces" (CVPRW 2023) could not be
read; by its abstract and its authors' other work its threshold is Ada-CM's margin, so both names
are one rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import ConfigError, IdentityError
from pipeline.losses import ALONE, Gather, align_distribution, softmatch_weight
from pipeline.threshold_config import ThresholdConfig


class Rule:
    """Statistics of a run and the thresholds they give.

    In every step first `observe`, then `weights` and `targets` of the same probabilities. All
    probabilities are the model's own (B, K), of weak views, rows sum to 1; none gets a gradient.
    """

    def __init__(
        self, config: ThresholdConfig, classes: int, pool_size: int, prior: Tensor
    ) -> None:
        """See `rule`; statistics live where `prior` (K,) does."""
        self.config, self.classes, self.pool_size, self.prior = config, classes, pool_size, prior
        self.uniform = torch.full_like(prior, 1 / classes)
        self.stats = self._start()
        """Everything that moves, by name; read-only outside."""

    def _start(self) -> dict[str, Tensor]:
        return {}

    @property
    def asks_labeled(self) -> bool:
        """Whether `observe` is to see labeled faces as the network sees them that gives `probs`."""
        return False

    def cuts(self) -> Tensor:
        """Confidence (K,) from which a face of each class counts; of a soft rule the mean."""
        raise NotImplementedError

    def weights(self, probs: Tensor) -> Tensor:
        """Weights (B,) float32 in [0, 1] of unlabeled faces; 0 or 1 unless the rule is soft."""
        confidence, label = self.targets(probs).max(1)
        return (confidence >= self.cuts()[label]).float()

    def targets(self, probs: Tensor) -> Tensor:
        """What unlabeled faces are taught (B, K) float32: `probs` aligned, or as they are."""
        return probs.detach().float()

    def observe(
        self, labeled: Tensor, probs: Tensor, index: Tensor, gather: Gather = ALONE
    ) -> None:
        """Move the statistics by one step.

        Args:
            labeled: probabilities (L, K) of this worker's labeled faces.
            probs: probabilities (B, K) of this worker's unlabeled faces.
            index: their positions in the pool (B,), int64, below its size.
            gather: joins the rows of all workers; L and B are the same on each.
        """

    def epoch(self, number: float, probs: Tensor, labels: Tensor) -> None:
        """Move the statistics by labeled faces, for rules that do so once per epoch.

        Args:
            number: epochs done, from 1 on; parts of one are fine.
            probs: probabilities (N, K) of all labeled faces that are asked, the same on every
                worker. Give faces that were held out: on faces it was trained on, the model ends up
                sure of every class alike. The papers ask the training faces.
            labels: their codes (N,), int64.
        """

    def state(self) -> dict[str, Tensor]:
        """Everything that moves."""
        return {name: value.clone() for name, value in self.stats.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; raises IdentityError for that of another rule, pool or class set."""
        found = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in self.stats.items()}
        if found != expected:
            rule = self.config.rule
            raise IdentityError(f"thresholds: {rule} keeps {expected}, the checkpoint has {found}")
        for name, value in state.items():
            self.stats[name] = value.to(self.prior.device, copy=True)

    def _move(self, name: str, value: Tensor) -> None:
        """One step of a running mean."""
        self.stats[name] = torch.lerp(self.stats[name], value, 1 - self.config.momentum)


class Fixed(Rule):
    """FixMatch: one cut for all classes and times."""

    def cuts(self) -> Tensor:
        """The same for every class: tau."""
        return torch.full_like(self.prior, self.config.tau)


class ClassMargin(Rule):
    """Ada-CM, DTM: per class a growing share of the confidence of labeled faces that it gets right.

    max(floor, beta / (1 + exp(-epoch)) * mean confidence). A class without such a face gets the
    floor; without a floor, the mean of all classes' such faces (1 where there is none at all).
    Before the first epoch the cut is the floor, or beta.
    """

    def _start(self) -> dict[str, Tensor]:
        floor = self.config.floor
        return {"cuts": torch.full_like(self.prior, self.config.beta if floor is None else floor)}

    def cuts(self) -> Tensor:
        """Those of the last epoch."""
        return self.stats["cuts"]

    @torch.no_grad()
    def epoch(self, number: float, probs: Tensor, labels: Tensor) -> None:
        """Set the cuts of the epoch."""
        confidence, predicted = probs.float().to(self.prior.device).max(1)
        labels = labels.to(self.prior.device)
        codes = torch.arange(self.classes, device=self.prior.device)
        right = (labels == predicted)[:, None] & (labels[:, None] == codes)
        sums, counts = (right * confidence[:, None]).sum(0), right.sum(0)
        total = counts.sum()
        pooled = torch.where(total > 0, sums.sum() / total.clamp(min=1), 1.0)
        missing = pooled if self.config.floor is None else torch.zeros_like(pooled)
        mean = torch.where(counts > 0, sums / counts.clamp(min=1), missing)
        ramp = self.config.beta / (1 + math.exp(-number))
        self.stats["cuts"] = (ramp * mean).clamp(min=self.config.floor or 0.0)


class FlexMatch(Rule):
    """Per class: the more faces of the pool it is sure of, the higher the cut, up to tau.

    b_c = faces last seen confident as c / max(the largest class's, faces never confident);
    the cut is tau * b / (2 - b). Trap: all cuts start at 0, where every face counts, and that of a
    class that is never confident stays there.
    """

    def _start(self) -> dict[str, Tensor]:
        # One entry more than faces: what is not to be remembered is written there.
        memory = torch.full((self.pool_size + 1,), self.classes, dtype=torch.int16)
        counts = torch.tensor([0] * self.classes + [self.pool_size])
        return {"memory": memory.to(self.prior.device), "counts": counts.to(self.prior.device)}

    def unused(self) -> Tensor:
        """Share of the pool's faces that were never confident, scalar."""
        return self.stats["counts"][-1] / self.pool_size

    def cuts(self) -> Tensor:
        """By the convex mapping: tau * b / (2 - b)."""
        counts = self.stats["counts"].float()
        b = counts[:-1] / counts.max()
        return self.config.tau * b / (2 - b)

    @torch.no_grad()
    def observe(
        self, labeled: Tensor, probs: Tensor, index: Tensor, gather: Gather = ALONE
    ) -> None:
        """Remember the faces that are confident now; those that no longer are keep their class."""
        memory, counts = self.stats["memory"], self.stats["counts"]
        confidence, label = probs.float().max(1)
        sure = confidence >= self.config.tau
        index = torch.where(sure, index.to(memory.device), self.pool_size)
        seen = gather(torch.stack([index, torch.where(sure, label, self.classes)], 1))
        # A face drawn twice counts once, as what it was last: sorted, the last of its run.
        order = seen[:, 0].sort(stable=True).indices
        index, label = seen[order, 0], seen[order, 1]
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = index[1:] != index[:-1]
        index = torch.where(last, index, self.pool_size)
        label = torch.where(last, label, self.classes)
        one = torch.ones_like(label)
        counts.index_add_(0, memory[index].long(), -one)
        counts.index_add_(0, label, one)
        memory[index] = label.to(memory.dtype)


class FreeMatch(Rule):
    """Per class: the running mean confidence, times the class's running share over the largest."""

    def _start(self) -> dict[str, Tensor]:
        level, alike = self.prior.new_tensor(1 / self.classes), self.uniform
        return {"level": level, "shares": alike, "histogram": alike}

    def cuts(self) -> Tensor:
        """Of each class level * share / largest share."""
        shares = self.stats["shares"]
        return self.stats["level"] * shares / shares.max()

    @torch.no_grad()
    def observe(
        self, labeled: Tensor, probs: Tensor, index: Tensor, gather: Gather = ALONE
    ) -> None:
        """Move mean confidence, mean probabilities and shares of predicted classes."""
        seen = gather(probs.float())
        confidence, label = seen.max(1)
        given = torch.zeros_like(self.prior).index_add_(0, label, torch.ones_like(confidence))
        self._move("level", confidence.mean())
        self._move("shares", seen.mean(0))
        self._move("histogram", given / len(seen))


class Aligned(Rule):
    """Brings the pool's probabilities to the class shares that the pool is believed to have."""

    def _start(self) -> dict[str, Tensor]:
        # Equal to what they are compared with: nothing is aligned before the first step.
        pool = self.prior if self.config.align == "prior" else self.uniform
        return {"pool": pool, "labeled": self.uniform, "steps": self.prior.new_zeros(())}

    @property
    def asks_labeled(self) -> bool:
        """Where their mean answer is what the pool's is brought to."""
        return self.config.align == "labeled"

    def targets(self, probs: Tensor) -> Tensor:
        """Times (believed share / the model's mean answer)^power, rows made to sum to 1."""
        probs = super().targets(probs)
        if self.config.align is None:
            return probs
        believed = {"prior": self.prior, "uniform": self.uniform, "labeled": self.stats["labeled"]}
        # A share of 0 would make 0 / 0 of a face that is wholly of that class.
        to = believed[self.config.align].clamp(min=1e-6)
        return align_distribution(probs, to, self.stats["pool"], self.config.align_power)

    @torch.no_grad()
    def observe(
        self, labeled: Tensor, probs: Tensor, index: Tensor, gather: Gather = ALONE
    ) -> None:
        """Move the model's mean answers on the pool and on labeled faces, then the rule's own."""
        labeled, probs = gather(labeled.float()), gather(probs.float())
        steps = self.stats["steps"] + 1
        rate = (1 / steps).clamp(min=1 - self.config.momentum)
        for name, seen in (("pool", probs), ("labeled", labeled)):
            self.stats[name] = torch.lerp(self.stats[name], seen.mean(0), rate)
        self.stats["steps"] = steps
        self._measure(labeled, self.targets(probs))

    def _measure(self, labeled: Tensor, aligned: Tensor) -> None:
        """Move the rule's own statistics by the faces of all workers."""
        raise NotImplementedError


class SoftMatch(Aligned):
    """Every face counts: fully from the pool's mean confidence up, along a Gaussian below it."""

    def _start(self) -> dict[str, Tensor]:
        mean, var = self.prior.new_tensor(1 / self.classes), self.prior.new_tensor(1.0)
        return {**super()._start(), "mean": mean, "var": var}

    def cuts(self) -> Tensor:
        """The mean confidence, for every class."""
        return self.stats["mean"].expand(self.classes)

    def weights(self, probs: Tensor) -> Tensor:
        """`losses.softmatch_weight` of the aligned confidence, (0, 1]."""
        confidence = self.targets(probs).amax(1)
        return softmatch_weight(
            confidence, self.stats["mean"], self.stats["var"], self.config.width
        )

    def _measure(self, labeled: Tensor, aligned: Tensor) -> None:
        confidence = aligned.amax(1)
        self._move("mean", confidence.mean())
        # The unbiased variance, as in the paper; of a single face there is none but 0.
        self._move("var", confidence.var(correction=min(1, len(confidence) - 1)))


class AdaMatch(Aligned):
    """One cut for all classes: tau times the mean confidence on the step's labeled faces."""

    def _start(self) -> dict[str, Tensor]:
        return {**super()._start(), "confidence": self.prior.new_tensor(1.0)}

    @property
    def asks_labeled(self) -> bool:
        """Always: the cut follows their confidence."""
        return True

    def cuts(self) -> Tensor:
        """The same for every class: tau * labeled confidence."""
        return (self.config.tau * self.stats["confidence"]).expand(self.classes)

    def _measure(self, labeled: Tensor, aligned: Tensor) -> None:
        self.stats["confidence"] = labeled.amax(1).mean()


class ReMixMatch(Aligned):
    """Every face counts fully, and is taught the aligned guess, sharpened: no threshold at all."""

    def cuts(self) -> Tensor:
        """0 for every class."""
        return torch.zeros_like(self.prior)

    def targets(self, probs: Tensor) -> Tensor:
        """Aligned probabilities to the power of 1 / temperature, rows made to sum to 1."""
        aligned = super().targets(probs)
        sharp = aligned.pow(1 / self.config.temperature)
        return sharp / sharp.sum(1, keepdim=True)

    def _measure(self, labeled: Tensor, aligned: Tensor) -> None:
        """There is nothing but the alignment."""


RULES: dict[str, type[Rule]] = {
    "fixed": Fixed,
    "ada_cm": ClassMargin,
    "dtm": ClassMargin,
    "flexmatch": FlexMatch,
    "freematch": FreeMatch,
    "softmatch": SoftMatch,
    "adamatch": AdaMatch,
    "remixmatch": ReMixMatch,
}


def rule(
    config: ThresholdConfig,
    classes: int,
    pool_size: int,
    prior: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Rule:
    """The rule that a config names, at the start of a run.

    Args:
        config: which, and its parameters.
        classes: K.
        pool_size: unlabeled faces that may be drawn.
        prior: (K,) class shares that the pool is estimated to have; needed by rules that align to
            them.
        device: where the probabilities are.

    Raises:
        ConfigError: the rule needs a prior and has none, or the prior is not K shares.
    """
    made = RULES[config.rule]
    if prior is None:
        if issubclass(made, Aligned) and config.align == "prior":
            raise ConfigError(f"{config.rule}: align is prior, and the pool's shares are not known")
        prior = torch.full((classes,), 1 / classes)
    elif prior.shape != (classes,) or (prior < 0).any() or abs(prior.sum().item() - 1) > 1e-3:
        raise ConfigError(f"prior: expected {classes} shares that sum to 1, got {prior.tolist()}")
    return made(config, classes, pool_size, prior.to(device, torch.float32))
