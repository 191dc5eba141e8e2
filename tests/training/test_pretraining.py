"""Proves both ways of pre-training by hand, in one and two workers, and what the probe says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, RESNET, labeled
from helpers.workers import in_threads
from test_masked import VIT
from torch import Tensor
from torch.nn import functional as F

from pipeline.augment import plain
from pipeline.config import parse
from pipeline.errors import ConfigError, IdentityError
from pipeline.losses import contrastive
from pipeline.masked import encode_visible, patchify, reconstruction_loss
from pipeline.models import ModelConfig
from pipeline.training import pretraining
from pipeline.training.data import Batches
from pipeline.training.loop import Fitted, Step, Worker, fit, local
from pipeline.training.pretraining import (
    OBJECTIVES,
    Masked,
    PretrainConfig,
    train_backbone,
)
from pipeline.training.supervised import new_model

WORKER = local(dtype=torch.float32)
DECODER = {"width": 8, "depth": 1, "heads": 2}
NETS = {"simclr": CONVNET, "moco": CONVNET, "mae": VIT}
OWN = {"moco": {"ema": 0.9, "queue": 24}}


def settings(method: str, **changes: object) -> PretrainConfig:
    given = {"model": NETS[method], "steps": 6, "batch": 16, "decoder": DECODER, **changes}
    given = {**OWN.get(method, {}), **given}
    return PretrainConfig.model_validate({"method": method, "augment": "plain", **given})


def objective(config: PretrainConfig):
    torch.manual_seed(0)
    model = new_model(config.model, NAMES, 0)
    return OBJECTIVES[config.method](model, config, labeled(40).faces)


def fixed(batch: int, patches: int, ratio: float, device: torch.device) -> Tensor:
    return (torch.arange(patches) % 4 > 0).expand(batch, -1)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same patches of every face are hidden, and no face is moved."""
    monkeypatch.setattr(pretraining, "draw_hidden", fixed)
    monkeypatch.setattr(pretraining, "augment", lambda x, size, rng, by: plain(x, size, rng))


def one_step(config: PretrainConfig):
    made = objective(config)
    at = Step(0, config.steps, 0, WORKER, made.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(made.streams(), 0, last=True)
    return made, made.loss(batch, at), batch["pool"]


def test_simclr__nt_xent_of_projected_views() -> None:
    made, loss, pool = one_step(settings("simclr", augment="strong", temperature=0.3))
    modules = made.modules()
    assert not torch.equal(pool.views["x"], pool.views["y"])
    x, y = (modules["projector"](modules["model"].features(pool.views[v])[0]) for v in "xy")
    expected = contrastive(x, y, torch.ones(16, dtype=torch.bool), 0.3).mean()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.trained == 32 == settings("simclr").step_images


def test_moco__info_nce_against_the_queue_by_a_loop() -> None:
    made = objective(config := settings("moco", augment="strong", temperature=0.3, queue=20))
    other = objective(config).modules().eval()  # an average that is not the model
    with torch.no_grad():
        other["projector"][2].weight += 0.1
    at = Step(0, config.steps, 0, WORKER, other)
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(made.streams(), 0, last=True)
    queue = made.state()["queue"]
    loss, views, modules = made.loss(batch, at), batch["pool"].views, made.modules()
    x = modules["projector"](modules["model"].features(views["x"])[0])
    keys = F.normalize(other["projector"](other["model"].features(views["y"])[0]), dim=1).detach()
    total = 0.0
    for face, key in zip(F.normalize(x, dim=1).detach(), keys, strict=True):
        own = math.exp(float(face @ key) / 0.3)
        rest = [math.exp(float(face @ old) / 0.3) for old in queue]
        total -= math.log(own / (own + sum(rest))) / len(x)
    assert loss.sum.item() == pytest.approx(total, rel=1e-5)
    assert (loss.trained, loss.forward) == (16, 16)
    assert config.step_images == 16
    assert queue.norm(dim=1).tolist() == pytest.approx([1.0] * 20, abs=1e-5)

    loss.sum.backward()
    assert all(p.grad is None for p in other.parameters())
    made.update(loss, at)
    after = made.state()["queue"]
    torch.testing.assert_close(after[:16], keys)
    assert torch.equal(after[16:], queue[:4])


def test_config__moco_needs_an_average() -> None:
    with pytest.raises(ConfigError, match="ema: moco's keys come from the average of the weights"):
        parse(PretrainConfig, {"method": "moco"})
    with pytest.raises(ConfigError, match="method: Input should be 'simclr', 'moco' or 'mae'"):
        parse(PretrainConfig, {"method": "byol"})


@pytest.mark.usefixtures("still")
def test_mae__error_of_hidden_patches() -> None:
    made, loss, pool = one_step(settings("mae", normalize_patches=False))
    modules, faces = made.modules(), pool.views["x"]
    model = modules["model"]
    x = (faces - model.mean) / model.std
    visible = torch.tensor([0, 4, 8, 12]).expand(16, -1)
    predicted = modules["decoder"](encode_visible(model.net, x, visible), visible)
    hidden = fixed(16, 16, 0.75, x.device)
    expected = reconstruction_loss(predicted, patchify(x, 4), hidden, normalize=False).mean()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.trained == 16 == settings("mae").step_images


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("method", list(OBJECTIVES))
def test_fit__two_workers_learn_what_one_does(method: str) -> None:
    config = settings(method)
    one = fit(objective(config), config, WORKER, seed=3)
    both = [objective(config) for _ in range(2)]
    done: list[Fitted | None] = [None, None]

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker: Worker = replace(WORKER, rank=rank, world=2, sum_over_workers=reduce)
        done[rank] = fit(both[rank], config, worker, seed=3)

    in_threads(2, run)
    assert one.passes == done[0].passes
    expected = one.averaged.state_dict()
    for rank in range(2):
        ours = done[rank].history[-1]["loss"]
        assert ours == pytest.approx(one.history[-1]["loss"], abs=1e-5)
        for name, value in done[rank].averaged.state_dict().items():
            # AdamW moves by the sign of a gradient that is nothing but rounding.
            if name.endswith("weight") and value.ndim > 1:
                assert (value - expected[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize("method", list(OBJECTIVES))
def test_train_backbone__killed_and_continued_is_the_same(method: str, tmp_path: Path) -> None:
    config, data = settings(method, probe_every=2, neighbors=3), labeled(40)
    given = (config, data.faces, NAMES)
    whole = train_backbone(*given, WORKER, seed=1, labeled=data)
    worker = replace(WORKER, checkpoint=str(tmp_path), checkpoint_every=2)

    class Killed(Exception):
        pass

    def kill(_: object, at: Step) -> None:
        if at.number == 3:
            raise Killed

    with pytest.raises(Killed):
        train_backbone(*given, worker, seed=1, labeled=data, hooks=[kill])
    again = train_backbone(*given, worker, seed=1, labeled=data)
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in again.model.state_dict().items())
    assert [probe["step"] for probe in whole.probes] == [2.0, 4.0, 6.0]
    assert again.probes == whole.probes


def test_train_backbone__continues_under_other_probe_settings(tmp_path: Path) -> None:
    worker = replace(WORKER, checkpoint=str(tmp_path))
    data = labeled(40)
    train_backbone(settings("simclr"), data.faces, NAMES, worker, seed=1, labeled=data)
    other = settings("simclr", probe_every=2, neighbors=3, probe_faces=10)
    again = train_backbone(other, data.faces, NAMES, worker, seed=1, labeled=data)
    assert [probe["step"] for probe in again.probes] == [6.0]
    with pytest.raises(IdentityError, match=r"temperature 0\.2, not 0\.3"):
        train_backbone(settings("simclr", temperature=0.3), data.faces, NAMES, worker, seed=1)


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_train_backbone__learns_and_is_looked_at_on_the_way(method: str) -> None:
    config = settings(method, model=RESNET, augment="weak", steps=120, batch=32, probe_every=50)
    data = labeled(80, noise=160)
    made = train_backbone(config, data.faces, NAMES, WORKER, seed=0, labeled=data)
    assert [probe["step"] for probe in made.probes] == [50.0, 100.0, 120.0]
    assert made.fitted.history[-1]["loss"] < 0.95 * made.fitted.history[0]["loss"]
    assert made.model.config == config.model


def test_picture__visible_patches_are_as_they_were() -> None:
    config = settings("mae")
    made = objective(config)
    assert isinstance(made, Masked)
    at = Step(0, config.steps, 0, WORKER, made.modules())
    pixels = torch.from_numpy(labeled(3).faces.take(np.arange(3)))
    shown = torch.from_numpy(made.picture(pixels, at))
    assert shown.shape == (9, 1, 16, 16)
    real, masked, filled = shown.chunk(3)
    assert (real.int() - pixels.int()).abs().max() <= 1
    same = (patchify(filled.float(), 4) - patchify(real.float(), 4)).abs().amax(2) <= 1
    gone = (patchify(masked.float(), 4) - 127.5).abs().amax(2) <= 1
    assert (same.sum(1) == 4).all()
    assert torch.equal(~same, gone)


def test_config__a_network_named_without_dropout_has_none() -> None:
    assert PretrainConfig().model.dropout == 0
    assert PretrainConfig.model_validate({"model": {"size": 32}}).model.dropout == 0
    asked = {"model": {"size": 32, "dropout": 0.3}}
    assert PretrainConfig.model_validate(asked).model.dropout == 0.3


def test_same_network__but_for_its_dropout() -> None:
    assert CONVNET.same_network(CONVNET.model_copy(update={"dropout": 0.5}))
    assert not CONVNET.same_network(ModelConfig(name="convnet", size=16))
