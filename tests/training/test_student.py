"""Proves the student's loss, its draws, its re-scoring and its controls against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, RESNET, labeled
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.training.data import Batches, MinedFaces
from pipeline.training.loop import Objective, Step, fit, local
from pipeline.training.student import (
    ControlConfig,
    Student,
    StudentConfig,
    control,
    mix_targets,
)
from pipeline.training.studying import train_student
from pipeline.training.supervised import Supervised, new_model, predict_logits

WORKER = local(dtype=torch.float32)


def mined(count: int = 48, sharp: float = 0.9) -> MinedFaces:
    data = labeled(count, seed=5)
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.4, sharp, count)[:, None]
    one_hot = np.eye(4)[data.labels]
    soft = one_hot * confidence + (1 - one_hot) * (1 - confidence) / 3
    source = ["web" if i % 2 else "film" for i in range(count)]
    return MinedFaces(data.faces, soft, rng.uniform(0.1, 1, count), source)


def config(**changes: object) -> StudentConfig:
    base = {
        "model": CONVNET, "steps": 10, "labeled_batch": 8, "mined_batch": 12, "lr": 1e-2,
        "labeled_augment": "plain", "mined_augment": "plain",
    }  # fmt: skip
    return StudentConfig.model_validate({**base, **changes})


def one_step(settings: StudentConfig, number: int, pool: MinedFaces):
    objective = Student(new_model(settings.model, NAMES, 0), settings, labeled(16), pool)
    at = Step(number, settings.steps, 0, WORKER, objective.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), number, last=True)
    return objective, objective.loss(batch, at), batch


@pytest.mark.parametrize("weighting", ["softmatch", "selection", "none"])
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_loss__by_hand(weighting: str, targets: str) -> None:
    pool = mined()
    settings = config(weighting=weighting, targets=targets, ramp=0.5, mined_weight=2.0)
    objective, loss, batch = one_step(settings, 4, pool)
    model = objective.modules()["model"]
    known, guessed = model(batch["labeled"].views["x"]), model(batch["mined"].views["x"])
    index = batch["mined"].index
    confidence = pool.soft.max(1)
    below = np.maximum(confidence.mean() - confidence, 0)
    weight = {
        "softmatch": np.exp(-(below**2) / (2 * confidence.var() / 4)),
        "selection": pool.weight,
        "none": np.ones(len(pool)),
    }[weighting][index]
    log_probs = F.log_softmax(guessed, 1)
    if targets == "hard":
        apart = F.nll_loss(
            log_probs, torch.from_numpy(pool.soft.argmax(1)[index]), reduction="none"
        )
    else:
        apart = F.kl_div(log_probs, torch.from_numpy(pool.soft[index]), reduction="none").sum(1)
    expected = F.cross_entropy(known, batch["labeled"].targets["target"], label_smoothing=0.05)
    expected = expected + 2.0 * (4 / 5) * (torch.from_numpy(weight) * apart).mean()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.trained == 20


def test_loss__one_forward_shares_the_batch_statistics() -> None:
    settings = config(model=RESNET.model_copy(update={"dropout": 0.0}))
    objective, loss, batch = one_step(settings, 0, mined())
    model = objective.modules()["model"]
    together = torch.cat([batch["labeled"].views["x"], batch["mined"].views["x"]])
    expected = F.cross_entropy(
        model(together)[:8], batch["labeled"].targets["target"], label_smoothing=0.05
    )
    torch.testing.assert_close(loss.logs["labeled_loss"], expected)


def test_mined_weight__rises_from_zero_and_stays() -> None:
    objective, _, _ = one_step(config(steps=100, ramp=0.2, mined_weight=1.5), 0, mined())
    weights = [objective.mined_weight(step) for step in (0, 10, 20, 99)]
    assert weights == pytest.approx([0, 0.75, 1.5, 1.5])
    assert one_step(config(ramp=0.0), 0, mined())[0].mined_weight(0) == 1.5


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_streams__sources_keep_to_their_share(share: float) -> None:
    settings = config(source_share={"web": share})
    objective, _, batch = one_step(settings, 0, mined())
    chances = objective.streams()[1].probabilities
    assert chances[1::2].sum() == pytest.approx(share)
    assert chances.sum() == pytest.approx(1)
    assert share or not (batch["mined"].index % 2).any()


def test_update__the_student_scores_the_pool_again(tmp_path: Path) -> None:
    pool = mined()
    settings = config(rescore_at=(0.5,), rescore_keep=0.25)
    seen: dict[int, np.ndarray] = {}

    def keep(objective: Objective, at: Step) -> None:
        seen[at.number + 1] = objective.streams()[1].targets["target"].copy()
        if at.number + 1 == 5:
            logits = predict_logits(at.averaged["model"], pool.faces, WORKER)
            seen[0] = torch.softmax(torch.from_numpy(logits), 1).numpy()

    objective = Student(new_model(CONVNET, NAMES, 0), settings, labeled(16), pool)
    fitted = fit(objective, settings, WORKER, seed=0, hooks=[keep])
    assert seen[4] == pytest.approx(pool.soft)
    assert seen[5] == pytest.approx(0.25 * pool.soft + 0.75 * seen[0], abs=1e-6)
    assert seen[10] is not seen[5]
    assert fitted.passes == pytest.approx(10 * 20 + 48 * 2 / 3)


@pytest.mark.parametrize("killed_after", [3, 7])
def test_train_student__resumes_before_and_after_re_scoring(
    tmp_path: Path, killed_after: int
) -> None:
    settings = config(rescore_at=(0.5,), mined_augment="strong")
    worker = local("cpu", torch.float32, tmp_path, checkpoint_every=3)

    def kill(objective: Objective, at: Step) -> None:
        if at.number + 1 == killed_after:
            raise KeyboardInterrupt

    whole = train_student(settings, labeled(16), mined(), NAMES, WORKER, seed=0)
    with pytest.raises(KeyboardInterrupt):
        train_student(settings, labeled(16), mined(), NAMES, worker, seed=0, hooks=[kill])
    resumed = train_student(settings, labeled(16), mined(), NAMES, worker, seed=0)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.fitted.passes == resumed.fitted.passes


def test_train_student__learns_from_mined_faces_what_labels_do_not_show() -> None:
    few, pool, unseen = labeled(4), mined(200), labeled(80, seed=9)
    settings = config(steps=80, model=RESNET, ramp=0.1)
    student = train_student(settings, few, pool, NAMES, WORKER, seed=0).model
    logits = predict_logits(student, unseen.faces, WORKER, flip=False)
    assert (logits.argmax(1) == unseen.labels).mean() > 0.9


def test_train_student__warm_start_needs_a_model_of_its_kind() -> None:
    start = new_model(CONVNET, NAMES, seed=7)
    settings = config(warm_start=True, steps=1, lr=1e-9)
    warm = train_student(settings, labeled(16), mined(), NAMES, WORKER, seed=0, start=start)
    torch.testing.assert_close(warm.model.net.fc.weight, start.net.fc.weight)
    with pytest.raises(ConfigError, match="expected a convnet, got none"):
        train_student(settings, labeled(16), mined(), NAMES, WORKER, seed=0)


def test_train_student__the_average_of_a_warm_start_does_not_forget_it() -> None:
    start, decay = new_model(CONVNET, NAMES, seed=7), 0.9
    settings = config(warm_start=True, steps=4, ema=decay)
    averages, weights = [start.net.fc.weight.detach().clone()], []

    def look(objective: Objective, at: Step) -> None:
        averages.append(at.averaged["model"].net.fc.weight.detach().clone())
        weights.append(objective.modules()["model"].net.fc.weight.detach().clone())

    given = (settings, labeled(16), mined(), NAMES, WORKER)
    train_student(*given, seed=0, start=start, hooks=[look])
    for before, weight, after in zip(averages[:-1], weights, averages[1:], strict=True):
        torch.testing.assert_close(after, decay * before + (1 - decay) * weight)


def test_train_student__kd_needs_the_teachers_probabilities() -> None:
    with pytest.raises(ConfigError, match=r"student\.kd"):
        train_student(config(kd=0.5), labeled(16), mined(), NAMES, WORKER, seed=0)


def test_mix_targets__is_linear() -> None:
    data, probs = labeled(8), np.full((8, 4), 0.25)
    mixed = mix_targets(data, probs, 0.4)
    assert mixed.targets == pytest.approx(0.6 * np.eye(4)[data.labels] + 0.1)


def test_control__differs_in_nothing_but_the_pool() -> None:
    student = config(steps=50, labeled_power=0.7, smoothing=0.1, ema=0.9)
    same_steps, same_passes = control(student), control(student, passes=3000.0)
    assert (same_steps.steps, same_steps.batch) == (50, 20)
    assert same_passes.steps * same_passes.batch == 3000
    for made in (same_steps, same_passes):
        assert made.model == student.model
        assert (made.lr, made.ema, made.smoothing) == (student.lr, 0.9, 0.1)
    assert control(student, own=ControlConfig(augment="strong")) == same_steps.model_copy(
        update={"augment": "strong"}
    )
    data, model = labeled(16), new_model(CONVNET, NAMES, 0)
    ours = Student(model, student, data, mined()).streams()[0]
    theirs = Supervised(model, same_steps, data).streams()[0]
    assert np.array_equal(ours.probabilities, theirs.probabilities)
    assert ours.views == theirs.views
