"""Proves which sets mined faces carry, how targets move, and that resuming changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import NAMES, labeled
from helpers.workers import in_threads
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pipeline import ambiguity
from pipeline.errors import ConfigError
from pipeline.training.candidates import CandidateStudent, candidate_sets
from pipeline.training.data import Batches
from pipeline.training.loop import Step, fit, local
from pipeline.training.student import CandidatesConfig, StudentConfig
from pipeline.training.studying import train_student
from pipeline.training.supervised import new_model
from training.test_student import config, mined

WORKER = local(dtype=torch.float32)


def settings(**changes: object) -> StudentConfig:
    own = {"rule": "cumulative", "coverage": 0.8, "momentum": 0.5}
    return config(targets="candidates", candidates=own, **changes)


def student(given: StudentConfig) -> CandidateStudent:
    return CandidateStudent(new_model(given.model, NAMES, 0), given, labeled(40), mined(), None)


def one_step(given: StudentConfig):
    objective = student(given)
    at = Step(4, given.steps, 0, WORKER, objective.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 4, last=True)
    return objective, objective.loss(batch, at), batch, at


def test_loss_and_update__by_hand() -> None:
    given, pool = settings(ramp=0, mined_weight=2.0), mined()
    objective, loss, batch, at = one_step(given)
    model, index = objective.modules()["model"], batch["mined"].index
    sets = ambiguity.cumulative_sets(pool.soft, 0.8)
    assert 1 < sets.sum(1).mean() < 4
    inside = np.where(sets, pool.soft, 0)
    target = torch.from_numpy(inside / inside.sum(1, keepdims=True)).float()[index]
    guessed = model(batch["mined"].views["x"])
    known = model(batch["labeled"].views["x"])
    # What faces weigh is the teacher's word, not that of the sets.
    confidence = pool.soft.max(1)
    below = np.maximum(confidence.mean() - confidence, 0)
    weight = torch.from_numpy(np.exp(-(below**2) / (2 * confidence.var() / 4))[index])
    apart = F.kl_div(F.log_softmax(guessed, 1), target, reduction="none").sum(1)
    want = F.cross_entropy(known, batch["labeled"].targets["target"], label_smoothing=0.05)
    want = want + 2.0 * (weight * apart).mean()
    assert loss.sum.item() == pytest.approx(want.item(), rel=1e-5)
    objective.update(loss, at)
    probs = guessed.detach().softmax(1) * torch.from_numpy(sets)[index]
    toward = probs / probs.sum(1, keepdim=True)
    moved = objective.state()["soft"]
    for face in np.unique(index):
        rows = index == face
        settled = 0.5 * target[rows][0] + 0.5 * toward[rows].mean(0)
        torch.testing.assert_close(moved[face], settled)


def test_update__the_next_batch_has_the_moved_targets() -> None:
    objective, loss, _, at = one_step(settings())
    chances = objective.streams()[1].probabilities
    objective.update(loss, at)
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 5, last=True)["mined"]
    torch.testing.assert_close(batch.targets["target"], objective.state()["soft"][batch.index])
    assert objective.streams()[1].probabilities is chances


def test_candidate_sets__conformal_cut_is_of_labeled_faces_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    labels, out_of_fold = rng.integers(0, 4, 99), rng.dirichlet(np.ones(4), 99)
    soft = mined().soft
    own = CandidatesConfig(rule="lac", coverage=0.8)
    sets = candidate_sets(own, soft, labels, out_of_fold)
    # The 80th of 99 scores: ceil(100 * 0.8).
    cut = np.sort(1 - out_of_fold[np.arange(99), labels])[79]
    want = (1 - soft <= cut) | (soft == soft.max(1, keepdims=True))
    assert np.array_equal(sets, want)
    with pytest.raises(ConfigError, match="lac expects the teachers' out-of-fold"):
        candidate_sets(own, soft, labels, None)


def test_train_student__conformal_candidates_train() -> None:
    given = config(targets="candidates", candidates={"rule": "aps"}, steps=4)
    assert given.asks_out_of_fold
    probs = np.full((40, 4), 0.05) + 0.8 * np.eye(4)[labeled(40).labels]
    pool = mined()
    trained = train_student(given, labeled(40), pool, NAMES, WORKER, seed=0, kd_targets=probs)
    assert trained.fitted.passes == 4 * 20


def test_fit__interrupted_and_continued_gives_the_same_model(tmp_path: Path) -> None:
    given = settings(steps=8, ema=0.9, ramp=0)

    def stop(objective: object, at: Step) -> None:
        if at.number == 5:
            raise KeyboardInterrupt

    whole = train_student(given, labeled(40), mined(), NAMES, WORKER, seed=0)
    worker = replace(WORKER, checkpoint=str(tmp_path), checkpoint_every=4)
    args = (given, labeled(40), mined(), NAMES, worker)
    with pytest.raises(KeyboardInterrupt):
        train_student(*args, seed=0, hooks=[stop])
    continued = train_student(*args, seed=0)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name]), name


def test_fit__two_workers_equal_one() -> None:
    given = settings(steps=6, ema=0.9, ramp=0)
    one, objectives = student(given), [student(given), student(given)]
    fit(one, given, WORKER, seed=3)

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(WORKER, rank=rank, world=2, sum_over_workers=reduce)
        fit(objectives[rank], given, worker, seed=3)

    in_threads(2, run)
    for objective in objectives:
        torch.testing.assert_close(
            objective.state()["soft"], one.state()["soft"], atol=1e-4, rtol=0
        )
    assert torch.equal(objectives[0].state()["soft"], objectives[1].state()["soft"])
    start = torch.from_numpy(ambiguity.within(mined().soft, one._sets.numpy()))
    assert not torch.allclose(one.state()["soft"], start, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "candidates", "rescore_at": (0.5,)}, "neither online nor rescore_at"),
        ({"targets": "candidates", "online": {}}, "neither online nor rescore_at"),
        ({"candidates": {"coverage": 0.8}}, "targets are soft, not candidates"),
    ],
)
def test_config__what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_config__cumulative_sets_ask_for_nothing() -> None:
    assert not settings().asks_out_of_fold
    assert not config().asks_out_of_fold
    assert config(kd=0.5).asks_out_of_fold
