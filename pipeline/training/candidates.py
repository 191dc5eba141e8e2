"""A student whose mined faces carry candidate sets: which class is right is learned on the way.

What for: a pseudo-label that is wrong is learned as if it were right; a set that holds the right
class is not wrong. Sets come from the teacher's probabilities, as many classes as cover a share of
them or, conformal, as hold the truth that often on labeled faces out of fold. Targets start at the
teacher's probabilities within the set and follow the student's own (PRODEN). A student in all else:
streams, draws, weights, ramp of lambda, controls of equal compute.
Cost: that of a student.
Source: sets in place of pseudo-labels: LEAF arXiv 2404.15041 (cumulative); conformal sets: see
ambiguity.py; targets: PRODEN arXiv 2002.08053.
Departs: conformal cuts are made on what single teachers say out of fold, the pool's probabilities
are those of all teachers together, which are less extreme: coverage of the pool is near what was
asked for, not promised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline import ambiguity
from pipeline.errors import ConfigError
from pipeline.models import FaceModel
from pipeline.partial import move_targets, within
from pipeline.training.data import LabeledFaces, MinedFaces
from pipeline.training.loop import Loss, Step
from pipeline.training.student import CandidatesConfig, Student, StudentConfig


class CandidateStudent(Student):
    """A student whose targets settle within candidate sets; an `Objective`."""

    def __init__(
        self,
        model: FaceModel,
        config: StudentConfig,
        labeled: LabeledFaces,
        mined: MinedFaces,
        out_of_fold: np.ndarray | None,
    ) -> None:
        super().__init__(model, config, labeled, mined)
        self._own = config.candidates or CandidatesConfig()
        sets = candidate_sets(self._own, mined.soft, labeled.labels, out_of_fold)
        self._sets = torch.from_numpy(sets)
        # The stream hands out rows of this very array, which `update` and `load` change in place;
        # how often faces are drawn and what they weigh stays as the teacher's probabilities say.
        self._soft = ambiguity.within(mined.soft, sets)
        targets = {**self._mined_stream.targets, "target": self._soft}
        self._mined_stream = replace(self._mined_stream, targets=targets)

    def update(self, loss: Loss, at: Step) -> None:
        """Move the targets of the batch's mined faces."""
        gather = at.worker.gather
        index = gather(loss.outputs["index"]).cpu()
        probs = gather(loss.outputs["guessed"].float().softmax(1)).cpu()
        toward = within(probs, self._sets[index])
        move_targets(torch.from_numpy(self._soft), index, toward, self._own.momentum)

    def state(self) -> dict[str, Tensor]:
        """The targets."""
        return {"soft": torch.from_numpy(self._soft)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._soft[:] = state["soft"].numpy()


def candidate_sets(
    config: CandidatesConfig,
    soft: np.ndarray,
    labels: np.ndarray,
    out_of_fold: np.ndarray | None,
) -> np.ndarray:
    """Candidates (M, K) bool of mined faces.

    Args:
        config: rule and coverage.
        soft: the teacher's probabilities (M, K).
        labels: codes (N,) of the labeled faces.
        out_of_fold: theirs (N, K); conformal rules need them.

    Raises:
        ConfigError: a conformal rule without them.
    """
    if config.rule == "cumulative":
        return ambiguity.cumulative_sets(soft, config.coverage)
    if out_of_fold is None:
        raise ConfigError(
            f"student.candidates: {config.rule} expects the teachers' out-of-fold probabilities"
        )
    cut = ambiguity.conformal_cut(out_of_fold, labels, config.coverage, config.rule)
    return ambiguity.conformal_sets(soft, cut, config.rule)
