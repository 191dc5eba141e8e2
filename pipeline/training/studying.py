"""Train a student, on the teacher's pseudo-labels or on its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import ConfigError
from pipeline.models import FaceModel
from pipeline.training.candidates import CandidateStudent
from pipeline.training.data import LabeledFaces, MinedFaces
from pipeline.training.loop import Hook, Worker, fit
from pipeline.training.semi import SemiStudent
from pipeline.training.student import Student, StudentConfig, mix_targets
from pipeline.training.supervised import Trained, averaged_model, new_model


def train_student(
    config: StudentConfig,
    labeled: LabeledFaces,
    mined: MinedFaces,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    start: FaceModel | None = None,
    kd_targets: np.ndarray | None = None,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Train the student.

    Args:
        config: network, schedule and loss.
        labeled: faces with labels.
        mined: faces with the teacher's probabilities.
        label_names: what codes and probabilities index.
        worker: where.
        seed: of the weights and of everything drawn.
        start: the model to start from where `config.warm_start` is set; not changed.
        kd_targets: the teachers' probabilities (N, K) for the labeled faces, out of fold; needed
            where `config.asks_out_of_fold`.
        hooks: called after every step.

    Raises:
        ConfigError: `warm_start`, `kd` or conformal candidates without what they need.
    """
    model = new_model(config.model, label_names, seed)
    if config.warm_start:
        if start is None or start.config.name != config.model.name:
            found = "none" if start is None else start.config.name
            raise ConfigError(f"student.warm_start: expected a {config.model.name}, got {found}")
        model.load_state_dict(start.state_dict())
    if config.kd is not None:
        if kd_targets is None:
            raise ConfigError("student.kd: expected the teachers' out-of-fold probabilities")
        labeled = mix_targets(labeled, kd_targets, config.kd)
    objective: Student
    if config.online is not None:
        objective = SemiStudent(model, config, labeled, mined, worker.device, seed)
    elif config.targets == "candidates":
        objective = CandidateStudent(model, config, labeled, mined, kd_targets)
    else:
        objective = Student(model, config, labeled, mined)
    fitted = fit(objective, config, worker, seed=seed, trained=config.warm_start, hooks=hooks)
    return Trained(averaged_model(fitted), fitted)
