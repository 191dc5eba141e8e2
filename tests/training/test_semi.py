"""Proves semi-supervised losses by hand, who labels, held-out faces, workers and resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, labeled
from helpers.workers import in_threads
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pipeline.adaptive import RULES
from pipeline.errors import ConfigError
from pipeline.threshold_config import READ, ThresholdConfig
from pipeline.training.data import Batches
from pipeline.training.loop import Fitted, Step, Worker, fit, local
from pipeline.training.semi import SemiStudent
from pipeline.training.student import StudentConfig, control
from pipeline.training.studying import train_student
from pipeline.training.supervised import new_model
from training.test_student import config, mined

WORKER = local(dtype=torch.float32)


def semi(settings: StudentConfig, worker: Worker = WORKER) -> SemiStudent:
    model = new_model(settings.model, NAMES, 0)
    return SemiStudent(model, settings, labeled(40), mined(), worker.device, 0)


def online(thresholds: dict[str, object], **changes: object) -> StudentConfig:
    own = {name: changes.pop(name) for name in list(changes) if name in OWN}
    own = {"weak": "plain", **own}
    return config(online={"thresholds": thresholds, **own}, **changes)


OWN = ("labeler", "low", "low_weight", "fairness", "held_out", "anchors", "epoch_steps")


def one_step(settings: StudentConfig, number: int = 4, sharper: float = 1.0):
    objective = semi(settings)
    with torch.no_grad():
        objective.modules()["model"].net.fc.weight *= sharper
    at = Step(number, settings.steps, 0, WORKER, objective.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), number, last=True)
    return objective, objective.loss(batch, at), batch


@pytest.mark.parametrize("labeler", ["ema", "model"])
@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_loss__fixmatch_by_hand(labeler: str, targets: str) -> None:
    settings = online(
        {"rule": "fixed", "tau": 0.3}, labeler=labeler, targets=targets, mined_weight=2.0, ramp=0
    )
    objective, loss, batch = one_step(settings)
    model = objective.modules()["model"]
    known = model(batch["labeled"].views["x"])
    strong, weak = model(batch["mined"].views["x"]), model(batch["mined"].views["w"])
    probs = weak.detach().softmax(1)
    keep = (probs.amax(1) >= 0.3).float()
    assert 0 < keep.sum() < len(keep)
    target = F.one_hot(probs.argmax(1), 4).float() if targets == "hard" else probs
    apart = -(target * F.log_softmax(strong, 1)).sum(1)
    expected = F.cross_entropy(known, batch["labeled"].targets["target"], label_smoothing=0.05)
    expected = expected + 2.0 * (keep * apart).mean()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.logs["used"].item() == pytest.approx(keep.mean().item())
    # An average labels in a forward of its own; the model sees the weak views beside the others.
    assert (loss.trained, loss.forward) == ((20, 12) if labeler == "ema" else (32, 0))
    assert settings.step_images == loss.trained


@pytest.mark.parametrize("labeler", ["ema", "model"])
def test_loss__the_network_that_labels_is_compared_with_itself(labeler: str) -> None:
    settings = online({"rule": "adamatch", "align": "labeled", "momentum": 0.0}, labeler=labeler)
    objective = semi(settings)
    model, average = objective.modules()["model"], new_model(settings.model, NAMES, 7)
    at = Step(4, settings.steps, 0, WORKER, {"model": average})
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 4, last=True)
    loss = objective.loss(batch, at)
    seen = (average if labeler == "ema" else model)(batch["labeled"].views["x"]).softmax(1)
    stats = objective.state()
    torch.testing.assert_close(stats["confidence"], seen.amax(1).mean())
    torch.testing.assert_close(stats["labeled"], seen.mean(0))
    assert (loss.trained, loss.forward) == ((20, 20) if labeler == "ema" else (32, 0))


@pytest.mark.parametrize("labeler", ["ema", "model"])
def test_loss__every_anchor_is_taught_the_aligned_sharpened_guess(labeler: str) -> None:
    settings = online(
        {"rule": "remixmatch", "align": "uniform", "temperature": 0.25, "momentum": 0.5},
        anchors=3,
        labeler=labeler,
        mined_augment="strong",
        mined_weight=2.0,
        ramp=0,
    )
    objective, loss, batch = one_step(settings)
    model, views = objective.modules()["model"], batch["mined"].views
    guesses = model(views["w"]).detach().softmax(1).tolist()
    mean = [sum(column) / len(guesses) for column in zip(*guesses, strict=True)]
    total = 0.0
    for name in ("x", "x2", "x3"):
        assert name == "x" or not torch.equal(views[name], views["x"])
        for row, said in zip(guesses, F.log_softmax(model(views[name]), 1).tolist(), strict=True):
            sharp = [(p * 0.25 / m) ** 4 for p, m in zip(row, mean, strict=True)]
            total -= sum(q / sum(sharp) * log for q, log in zip(sharp, said, strict=True))
    assert loss.logs["mined_loss"].item() == pytest.approx(total / (3 * len(guesses)), rel=1e-4)
    assert loss.logs["used"].item() == 1
    known = model(batch["labeled"].views["x"])
    own = F.cross_entropy(known, batch["labeled"].targets["target"], label_smoothing=0.05).item()
    assert loss.sum.item() == pytest.approx(own + 2 * total / (3 * len(guesses)), rel=1e-4)
    assert settings.step_images == loss.trained == 8 + 12 * (3 + (labeler == "model"))


@pytest.mark.parametrize("low", ["consistency", "contrastive", "negative"])
def test_loss__what_is_below_the_cut_has_a_term_of_its_own(low: str) -> None:
    given = {"ramp": 0, "mined_augment": "strong"}
    settings = online({"rule": "fixed", "tau": 1.0}, low=low, low_weight=0.5, **given)
    without = online({"rule": "fixed", "tau": 1.0}, **given)
    _, loss, batch = one_step(settings, sharper=20.0)  # some classes must be ruled out
    _, plain, _ = one_step(without, sharper=20.0)
    assert loss.sum.item() > plain.sum.item()
    assert loss.logs["used"].item() == 0
    second = low != "negative"
    assert ("y" in batch["mined"].views) == second
    assert settings.step_images == loss.trained == 20 + 12 * second


def test_loss__a_running_average_labels_and_not_the_model() -> None:
    settings = online({"rule": "fixed", "tau": 0.3}, targets="hard", ramp=0)
    objective, _, batch = one_step(settings)
    other = torch.nn.ModuleDict({"model": new_model(CONVNET, NAMES, 9).eval()})
    at = Step(4, settings.steps, 0, WORKER, other)
    loss = objective.loss(batch, at)
    probs = other["model"](batch["mined"].views["w"]).detach().softmax(1)
    strong = objective.modules()["model"](batch["mined"].views["x"])
    keep = (probs.amax(1) >= 0.3).float()
    apart = F.cross_entropy(strong, probs.argmax(1), reduction="none")
    assert loss.logs["mined_loss"].item() == pytest.approx((keep * apart).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", list(RULES))
def test_train_student__every_rule_trains_and_logs_its_cuts(name: str) -> None:
    own = {"tau": 0.6} if "tau" in READ[name] else {}
    settings = online({"rule": name, **own}, steps=12, ema=0.9)
    trained = train_student(settings, labeled(40), mined(), NAMES, WORKER, seed=0)
    row = trained.fitted.history[-1]
    assert 0 <= row["used"] <= 1
    assert all(0 <= row[f"cut_{name}"] <= 1 for name in NAMES)


@pytest.mark.parametrize("rule", ["softmatch", "adamatch"])
def test_rule__a_right_guess_is_left_alone_however_faces_are_drawn(rule: str) -> None:
    settings = online({"rule": rule, "momentum": 0.0}, mined_batch=20_000, mined_power=1.0)
    rare = np.concatenate([np.full(45, 0), np.full(3, 1)])
    soft = np.full((48, 4), 0.1)
    soft[np.arange(48), rare] = 0.7
    model = new_model(settings.model, NAMES, 0)
    pool = replace(mined(), soft=soft)
    objective = SemiStudent(model, settings, labeled(40), pool, WORKER.device, 0)
    with Batches(0, 0, 1, WORKER.device) as batches:
        drawn = batches.draw(objective.streams()[1], 0)
    said = torch.from_numpy(soft).float()
    objective._rule.observe(said[:8], said[drawn], torch.from_numpy(drawn))
    torch.testing.assert_close(objective._rule.targets(said), said, atol=0.02, rtol=0)


def test_hold_out__class_thresholds_are_read_from_faces_that_do_not_train() -> None:
    held = semi(online({"rule": "dtm"}, held_out=0.25))
    rows = held.streams()[0].rows
    assert rows is not None
    assert len(rows) == 30
    assert set(rows) | set(held._judged) == set(range(40))
    assert not set(rows) & set(held._judged)
    everything = semi(online({"rule": "dtm"}, held_out=None))
    assert everything.streams()[0].rows is None
    assert len(everything._judged) == 40
    assert semi(online({"rule": "flexmatch"})).streams()[0].rows is None


@pytest.mark.parametrize(
    ("share", "faces"), [(0.1, 8), (0.15, 12), (0.2, 16), (0.3, 24), (0.4, 32), (0.5, 40)]
)
def test_hold_out__as_many_faces_as_asked(share: float, faces: int) -> None:
    settings = online({"rule": "dtm"}, held_out=share)
    data = labeled(80)
    model = new_model(settings.model, NAMES, 0)
    held = SemiStudent(model, settings, data, mined(), WORKER.device, 0)
    assert len(held._judged) == faces
    counts = np.bincount(data.labels[held._judged])  # of 20 faces in every class
    assert np.abs(counts - share * np.bincount(data.labels)).max() <= 1


def test_hold_out__a_small_share_has_parts_of_its_own() -> None:
    settings = online({"rule": "dtm"}, held_out=0.025)
    assert len(semi(settings)._judged) == 1


def test_hold_out__fewer_groups_than_parts_name_the_setting() -> None:
    settings = online({"rule": "dtm"}, held_out=0.25)
    model = new_model(settings.model, NAMES, 0)
    faces = replace(labeled(40), groups=["a", "b", "c", "a"] * 10)
    said = r"student\.online\.held_out: 0\.25, parts: 4, expected at most 3, the number of groups"
    with pytest.raises(ConfigError, match=said):
        SemiStudent(model, settings, faces, mined(), WORKER.device, 0)


def test_update__class_thresholds_move_once_per_epoch_of_the_labels() -> None:
    settings = online({"rule": "dtm", "floor": None, "beta": 1.0}, steps=12)
    objective = semi(settings)
    seen: list[Tensor] = []
    fit(
        objective,
        settings,
        WORKER,
        seed=0,
        hooks=[lambda o, at: seen.append(objective.state()["cuts"])],
    )
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    # 36 of 40 labeled faces train, 8 a step: after steps 4, 8 and 12.
    assert [number + 2 for number, move in enumerate(moved) if move] == [4, 8, 12]


def test_update__an_epoch_has_the_steps_that_are_asked_for() -> None:
    settings = online({"rule": "dtm", "floor": None}, steps=6, epoch_steps=3)
    objective = semi(settings)
    asked: list[float] = []
    read = objective._rule.epoch
    objective._rule.epoch = lambda number, *given: (asked.append(number), read(number, *given))[1]
    fit(objective, settings, WORKER, seed=0)
    assert asked == [1, 2]  # what the ramp beta / (1 + exp(-epoch)) counts


def test_fit__interrupted_and_continued_gives_the_same_model(tmp_path: Path) -> None:
    settings = online({"rule": "flexmatch", "tau": 0.3}, steps=8, ema=0.9)

    def stop(objective: SemiStudent, at: Step) -> None:
        if at.number == 5:
            raise KeyboardInterrupt

    whole = train_student(settings, labeled(40), mined(), NAMES, WORKER, seed=0)
    worker = replace(WORKER, checkpoint=str(tmp_path), checkpoint_every=4)
    given = (settings, labeled(40), mined(), NAMES, worker)
    with pytest.raises(KeyboardInterrupt):
        train_student(*given, seed=0, hooks=[stop])
    continued = train_student(*given, seed=0)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name]), name


def test_fit__two_workers_equal_one() -> None:
    settings = online(
        {"rule": "softmatch", "align": "prior"}, low="contrastive", ramp=0, steps=6, ema=0.9
    )
    one = fit(semi(settings), settings, WORKER, seed=3)
    objectives = [semi(settings), semi(settings)]
    done: dict[int, Fitted] = {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(WORKER, rank=rank, world=2, sum_over_workers=reduce)
        done[rank] = fit(objectives[rank], settings, worker, seed=3)

    in_threads(2, run)
    expected = one.averaged["model"].state_dict()
    for rank in range(2):
        for name, value in done[rank].averaged["model"].state_dict().items():
            if "blocks" in name and name.endswith("bias") and value.ndim == 1:
                continue  # before a norm: no gradient but rounding
            assert torch.allclose(value, expected[name], atol=1e-4), name
        assert done[rank].history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], abs=1e-4)


def test_control__has_the_images_of_an_online_step() -> None:
    settings = online({"rule": "fixed"}, low="consistency", labeler="model")
    assert control(settings).batch == 8 + 3 * 12
    assert control(settings, passes=440.0).steps == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescore_at": (0.5,)}, "labels the faces in every step anyway"),
        ({"ema": None}, "there is no average of the weights"),
        ({"fairness": 0.01}, "fixed keeps no shares"),
        ({"anchors": 0}, "greater than or equal to 1"),
        ({"held_out": 0.25}, "held_out: fixed reads no threshold from labeled faces"),
        ({"epoch_steps": 800}, "epoch_steps: fixed reads no threshold from labeled faces"),
        ({"weighting": "none"}, "online.thresholds say how much a face counts"),
    ],
)
def test_config__what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        online({"rule": "fixed"}, **changes)


def test_config__settings_of_another_rule_are_refused_and_stored_ones_are_not() -> None:
    with pytest.raises(ValidationError, match=r"thresholds\.width: fixed has no use for it"):
        online({"rule": "fixed", "width": 3.0})
    assert StudentConfig.model_validate(online({"rule": "fixed"}).model_dump()).online is not None


@pytest.mark.parametrize("rule", sorted(READ))
def test_config__naming_a_rule_leaves_its_memory_as_it_is(rule: str) -> None:
    first = StudentConfig.model_validate({"online": {}}).online
    assert first is not None
    assert (first.thresholds.rule, first.thresholds.momentum) == ("softmatch", 0.99)
    named = online({"rule": rule}).online
    assert named is not None
    kept = ThresholdConfig.model_fields["momentum"].default  # nothing asks for it
    assert named.thresholds.momentum == (0.99 if "momentum" in READ[rule] else kept)
    part = online({"width": 3.0}).online
    assert part is not None
    assert part.thresholds.momentum == 0.99


def test_config__a_memory_that_is_named_stays() -> None:
    named = online({"rule": "freematch", "momentum": 0.999})
    stored = StudentConfig.model_validate(named.model_dump())
    assert stored == named
    assert stored.online is not None
    assert stored.online.thresholds.momentum == 0.999


def test_config__hard_targets_would_lose_what_remixmatch_sharpens() -> None:
    with pytest.raises(ValidationError, match="remixmatch's sharpened targets would be lost"):
        online({"rule": "remixmatch"}, targets="hard")
    online({"rule": "remixmatch", "temperature": 1.0}, targets="hard")


def test_config__remixmatch_has_no_face_below_a_threshold() -> None:
    with pytest.raises(ValidationError, match="low: negative, and remixmatch leaves no face"):
        online({"rule": "remixmatch"}, low="negative")
