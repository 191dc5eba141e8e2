"""Proves what is predicted, how imbalance is met, and that a toy problem is learned."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, RESNET, labeled
from safetensors.torch import save_file

from pipeline.artifacts import save_model
from pipeline.augment import move_boxes
from pipeline.boxes import FALLBACK
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.facemix import draw_mix, iou
from pipeline.models import ModelConfig
from pipeline.storage import location
from pipeline.training.data import Batches, LabeledFaces
from pipeline.training.loop import Step, Worker, local
from pipeline.training.supervised import (
    Supervised,
    SupervisedConfig,
    new_model,
    predict_logits,
    train_supervised,
)

WORKER = local(dtype=torch.float32)


def config(**changes: object) -> SupervisedConfig:
    base = {"model": RESNET, "steps": 60, "batch": 16, "lr": 1e-2, "augment": "plain"}
    return SupervisedConfig.model_validate({**base, **changes})


def unbalanced() -> LabeledFaces:
    data = labeled(64)
    keep = np.flatnonzero((data.labels != 3) | (np.arange(64) % 16 < 4))
    return LabeledFaces(data.faces, np.where(np.isin(np.arange(64), keep), data.labels, 0))


def test_train_supervised__learns_what_it_has_not_seen() -> None:
    trained = train_supervised(config(), labeled(64), NAMES, WORKER, seed=0)
    unseen = labeled(64, seed=1)
    logits = predict_logits(trained.model, unseen.faces, WORKER, flip=False)
    assert (logits.argmax(1) == unseen.labels).mean() > 0.9
    assert trained.fitted.passes == 60 * 16
    assert not trained.model.training


def test_train_supervised__rows_are_all_it_learns_from() -> None:
    data = labeled(64)
    rows = np.flatnonzero(data.labels < 2)
    trained = train_supervised(config(steps=40), data, NAMES, WORKER, seed=0, rows=rows)
    assert set(predict_logits(trained.model, data.faces, WORKER).argmax(1)) <= {0, 1}


def test_train_supervised__soft_targets_take_the_place_of_labels() -> None:
    data = labeled(64)
    wrong = np.eye(4)[(data.labels + 1) % 4]
    other = LabeledFaces(data.faces, data.labels, wrong)
    trained = train_supervised(config(), other, NAMES, WORKER, seed=0)
    logits = predict_logits(trained.model, data.faces, WORKER, flip=False)
    assert (logits.argmax(1) == (data.labels + 1) % 4).mean() > 0.9


def test_supervised__the_sampler_draws_rare_classes_more_often() -> None:
    data, model = unbalanced(), new_model(CONVNET, NAMES, 0)
    drawn = Supervised(model, config(imbalance="sampler", imbalance_strength=1.0), data)
    chances = drawn.streams()[0].probabilities
    assert np.bincount(data.labels, chances) == pytest.approx([0.25] * 4)
    assert Supervised(model, config(), data).streams()[0].probabilities is None


def test_supervised__logit_adjustment_moves_training_logits_only() -> None:
    data, model = unbalanced(), new_model(CONVNET, NAMES, 0)
    adjusted = config(imbalance="logit_adjust", imbalance_strength=1.0, smoothing=0.0)
    objective = Supervised(model, adjusted, data)
    at = Step(0, 1, 0, WORKER, objective.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 0, last=True)
    loss = objective.loss(batch, at)
    prior = torch.from_numpy(np.bincount(data.labels) / 64).float()
    logits = model(batch["labeled"].views["x"]) + prior.log()
    expected = torch.nn.functional.cross_entropy(logits, batch["labeled"].targets["target"])
    torch.testing.assert_close(loss.sum, expected)


def boxed(count: int) -> LabeledFaces:
    ends = np.random.default_rng(5).uniform(0, 0.5, (count, 2, 2))
    boxes = np.concatenate([ends[:, 0], 0.5 + ends[:, 1]], 1)
    return replace(labeled(count), boxes=boxes.astype(np.float32))


def one_mixed_step(data: LabeledFaces, **changes: object):
    model = new_model(CONVNET, NAMES, 0)
    objective = Supervised(model, config(model=CONVNET, smoothing=0.1, **changes), data)
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 0, last=True)
    torch.manual_seed(8)
    loss = objective.loss(batch, Step(0, 1, 0, WORKER, objective.modules()))
    torch.manual_seed(8)
    return model, batch["labeled"], loss, *draw_mix(16, 1.0)


def test_supervised__mixup_learns_from_the_mixed_images_alone() -> None:
    model, batch, loss, order, lam = one_mixed_step(labeled(64), mix="mixup")
    x, hot = batch.views["x"], torch.eye(4)[batch.targets["target"]]
    target = 0.9 * (lam * hot + (1 - lam) * hot[order]) + 0.1 / 4
    expected = torch.nn.functional.cross_entropy(model(lam * x + (1 - lam) * x[order]), target)
    torch.testing.assert_close(loss.sum, expected)
    assert loss.trained == 16
    assert batch.maps == {}


@pytest.mark.parametrize("known", [True, False])
def test_supervised__facemix_weighs_faces_by_their_boxes_in_the_view(known: bool) -> None:
    data = boxed(64) if known else labeled(64)
    model, batch, loss, order, lam = one_mixed_step(data, mix="facemix", augment="strong")
    boxes = data.boxes[batch.index] if known else np.tile(FALLBACK, (16, 1))
    seen = move_boxes(torch.from_numpy(boxes), batch.maps["x"])
    overlap = iou(seen, seen[order])
    x, y = batch.views["x"], batch.targets["target"]
    mixed = torch.log_softmax(model(lam * x + (1 - lam) * x[order]), 1)
    hot = torch.eye(4)[y]
    target = 0.9 * (lam * hot + (1 - lam) * hot[order]) + 0.1 / 4
    real = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = -(target * mixed).sum(1) + (1 - overlap) * (real + real[order])
    torch.testing.assert_close(loss.sum, expected.mean())
    assert overlap.std() > 0.05
    assert loss.trained == 32


def test_train_supervised__facemix_learns_and_counts_both_images() -> None:
    mixing = config(mix="facemix", mix_alpha=0.4, steps=50)
    trained = train_supervised(mixing, boxed(64), NAMES, WORKER, seed=0)
    unseen = labeled(64, seed=1)
    logits = predict_logits(trained.model, unseen.faces, WORKER, flip=False)
    assert (logits.argmax(1) == unseen.labels).mean() > 0.9
    assert trained.fitted.passes == 50 * mixing.step_images == 50 * 32
    assert 0.1 < trained.fitted.history[0]["overlap"] < 0.9


def test_train_supervised__facemix_continues_as_if_never_killed(tmp_path: Path) -> None:
    mixing = config(model=CONVNET, mix="facemix", augment="strong", steps=6)

    def kill(objective: object, at: Step) -> None:
        if at.number == 3:
            raise KeyboardInterrupt

    whole = train_supervised(mixing, boxed(32), NAMES, WORKER, seed=2)
    worker = local("cpu", torch.float32, tmp_path, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_supervised(mixing, boxed(32), NAMES, worker, seed=2, hooks=[kill])
    resumed = train_supervised(mixing, boxed(32), NAMES, worker, seed=2)
    ends = (one.model.state_dict() for one in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


def test_config__mixing_is_off_and_misspelt_kinds_are_refused() -> None:
    assert SupervisedConfig().mix is None
    assert SupervisedConfig(batch=7).step_images == SupervisedConfig(batch=7, mix="mixup").batch
    with pytest.raises(ConfigError, match=r"mix: .*'facemix' or 'mixup'"):
        parse(SupervisedConfig, {"mix": "cutmix"})
    with pytest.raises(ConfigError, match="mix_alpha"):
        parse(SupervisedConfig, {"mix_alpha": 0})


def test_predict_logits__is_the_mean_of_both_mirror_images() -> None:
    data, model = labeled(10), new_model(RESNET, NAMES, 0).eval()
    x = torch.from_numpy(data.faces.take(np.arange(10))) / 255
    expected = (model(x) + model(x.flip(3))) / 2
    rows = np.array([7, 1, 8])
    found = predict_logits(model.train(), data.faces, WORKER, rows=rows, batch=2)
    assert found == pytest.approx(expected[rows].detach().numpy(), abs=1e-5)
    assert model.training


def test_predict_logits__workers_share_the_faces() -> None:
    data, model = labeled(10), new_model(RESNET, NAMES, 0)
    parts: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor)
        return tensor

    for rank in range(3):
        worker = Worker(torch.device("cpu"), torch.float32, rank, 3, sum_over_workers=keep)
        predict_logits(model, data.faces, worker, batch=2)
    whole = predict_logits(model, data.faces, WORKER, batch=2)
    assert sum(parts).numpy() == pytest.approx(whole)
    assert [(part != 0).all(1).sum() for part in parts] == [4, 4, 2]


def test_new_model__a_seed_gives_the_weights_and_takes_nothing() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one, same, other = (new_model(RESNET, NAMES, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one.net.fc.weight, same.net.fc.weight)
    assert not torch.equal(one.net.fc.weight, other.net.fc.weight)


def test_new_model__starts_from_a_file(tmp_path) -> None:
    source = new_model(RESNET, NAMES, seed=0)
    save_file(source.net.state_dict(), tmp_path / "w.safetensors")
    weights = {"weights": str(tmp_path / "w.safetensors"), "pretraining_data": "toy"}
    started = new_model(ModelConfig(**{**RESNET.model_dump(), **weights}), NAMES, seed=1)
    assert torch.equal(started.net.conv_stem.weight, source.net.conv_stem.weight)
    assert not torch.equal(started.net.fc.weight, source.net.fc.weight)
    assert started.started is not None
    assert started.started["matched"] == started.started["total"]
    save_model(started, location(tmp_path / "made"), {})
    kept = (location(tmp_path / "made") / "config.json").read_json()["omnifer"]["started_from"]
    assert kept["sha256"] == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
