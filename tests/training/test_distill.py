"""Proves that distilled sets are as stated, learned, reproducible, shared out and resumed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.workers import in_threads
from pydantic import ValidationError
from torch import Tensor

from pipeline.distillers.learned import seeds
from pipeline.distillers.siamese import siamese
from pipeline.errors import ConfigError, LabelError
from pipeline.models import FaceModel, ModelConfig
from pipeline.training.data import Batches, seed_of
from pipeline.training.distill import Distilled, distill
from pipeline.training.distill_cost import blank_expert
from pipeline.training.distilling import (
    DistillConfig,
    Distilling,
    ExpertConfig,
    InnerConfig,
    objective_of,
)
from pipeline.training.faces import ArrayFaces
from pipeline.training.loop import Schedule, Step, Worker, local
from pipeline.training.supervised import new_model

NAMES = ("neutral", "happiness", "anger")
NET = ModelConfig(name="convnet", args={"width": 8, "depth": 2}, size=12, dropout=0)
CONFIG = DistillConfig(ipc=2, steps=4, batch=8, net=NET)
INNER = InnerConfig(networks=4, steps=3, window=2, batch=4, lr=0.1, outer=3)
LEARNED = {
    "distribution": CONFIG,
    "gradient": DistillConfig(
        method="gradient",
        ipc=2,
        steps=4,
        batch=8,
        net=NET,
        inner=INNER,
    ),
    "unrolled": DistillConfig(
        method="unrolled", ipc=2, steps=4, batch=24, net=NET, inner=INNER, learn_labels=True
    ),
    "trajectory": DistillConfig(
        method="trajectory",
        ipc=2,
        steps=4,
        net=NET,
        inner=INNER,
        experts=ExpertConfig(count=1, epochs=4, ahead=1, latest=(1, 3)),
        learn_labels=True,
    ),
}
EXPERT = blank_expert(LEARNED["trajectory"], NAMES)


def chosen(method: str) -> DistillConfig:
    return CONFIG.model_copy(update={"method": method})


def toy(count: int = 60) -> tuple[ArrayFaces, np.ndarray]:
    """Noise with a bright bar whose row is the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % len(NAMES)
    pixels = rng.integers(0, 120, (count, 1, 12, 12), dtype=np.uint8)
    for face, label in zip(pixels, labels, strict=True):
        face[0, 3 * label + 1 : 3 * label + 3] += 100
    return ArrayFaces(pixels), labels


def judge(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A teacher that looks at the rows of the bars."""
    rows = images.mean((1, 3)) / 255
    bars = np.stack([rows[:, 3 * c + 1 : 3 * c + 3].mean(1) for c in range(len(NAMES))], 1)
    probs = np.exp(8 * bars)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit.astype(np.float32), probs / probs.sum(1, keepdims=True)


def here(checkpoint: Path | None = None) -> Worker:
    return local(dtype=torch.float32, checkpoint=checkpoint, checkpoint_every=2)


def objective(method: str) -> Distilling:
    faces, labels = toy()
    codes = np.repeat(np.arange(3), 2)
    images, targets = np.zeros((6, 1, 12, 12), np.uint8), np.eye(3, dtype=np.float32)[codes]
    config = LEARNED[method]
    return objective_of(config, faces, labels, NAMES, here(), images, targets, [EXPERT])


@pytest.mark.parametrize("method", ["random", *LEARNED])
def test_distill__ipc_images_per_class_with_names(method: str) -> None:
    config = LEARNED.get(method, chosen("random")).model_copy(update={"learn_labels": False})
    found = distill(config, *toy(), NAMES, here(), seed=0, experts=[EXPERT])
    assert found.images.shape == (6, 1, 12, 12)
    assert found.images.dtype == np.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(found.soft, np.eye(3, dtype=np.float32)[found.labels])
    assert found.label_names == NAMES


def test_distill__random_keeps_real_faces_of_the_class() -> None:
    faces, labels = toy()
    found = distill(chosen("random"), faces, labels, NAMES, here(), seed=3)
    for image, code, origin in zip(found.images, found.labels, found.origin, strict=True):
        assert labels[origin] == code
        assert np.array_equal(image, faces.pixels[origin])
    assert found.passes == 0


@pytest.mark.parametrize("method", ["herding", "k_center", "crops"])
def test_distill__a_method_that_asks_the_teacher_needs_one(method: str) -> None:
    faces, labels = toy()
    with pytest.raises(ConfigError, match=f"{method} asks a teacher, and there is none"):
        distill(chosen(method), faces, labels, NAMES, here(), seed=0)
    found = distill(chosen(method), faces, labels, NAMES, here(), seed=0, judge=judge)
    assert labels[found.origin].tolist() == found.labels.tolist()
    assert np.allclose(found.soft, judge(found.images)[1])


def test_distill__the_distance_falls_in_fifty_steps() -> None:
    config = CONFIG.model_copy(update={"steps": 50, "batch": 20, "siamese": False, "lr": 0.05})
    faces, labels = toy()
    losses = []

    def measure(objective: Distilling, at: Step) -> None:
        """On all faces, under a network that learning never draws."""
        batches = Batches(0, 0, 1, torch.device("cpu"))
        with batches, torch.no_grad():
            batch = batches.at(objective.streams(), 0, last=True)
            losses.append(float(objective.loss(batch, replace(at, number=999)).sum))

    found = distill(config, faces, labels, NAMES, here(), seed=0, hooks=[measure])
    assert losses[-1] < 0.5 * losses[0]
    assert found.passes == pytest.approx(50 * (6 + 60 / 3))
    assert found.history[-1]["step"] == 50


def test_distill__one_worker_is_the_loop_written_out() -> None:
    faces, labels = toy()
    found = distill(CONFIG, faces, labels, NAMES, here(), seed=5)
    start = distill(chosen("random"), faces, labels, NAMES, here(), seed=5)
    pixels = torch.nn.Parameter(torch.from_numpy(start.images) / 255)
    optimizer = torch.optim.AdamW([pixels], lr=CONFIG.lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = Schedule(steps=4, lr=CONFIG.lr, warmup=0)
    streams = objective("distribution").streams()
    with Batches(5, 0, 1, torch.device("cpu")) as batches:
        for step in range(4):
            batch = batches.at(streams, step, last=True)
            drawn = seeds(seed_of(5, "distill", step), 4)
            net = new_model(NET, NAMES, drawn[0]).eval()
            loss = torch.zeros(())
            for code, name in enumerate(NAMES):
                view = drawn[1 + code]
                real = net.features(siamese(batch[name].views["x"], view))[0].mean(0)
                own = net.features(siamese(pixels[2 * code : 2 * code + 2], view))[0].mean(0)
                loss = loss + (real.detach() - own).square().sum()
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pixels.data.clamp_(0, 1)
    expected = (pixels.detach() * 255).round().numpy()
    assert np.abs(found.images - expected).max() <= 1
    assert np.abs(found.images.astype(int) - start.images).max() > 1


@pytest.mark.parametrize("method", LEARNED)
def test_distill__interrupted_and_continued_gives_the_same_images(
    method: str, tmp_path: Path
) -> None:
    config, given = LEARNED[method], {"seed": 1, "experts": [EXPERT]}
    whole = distill(config, *toy(), NAMES, here(), **given)

    def stop(objective: Distilling, at: Step) -> None:
        if at.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(config, *toy(), NAMES, here(tmp_path), **given, hooks=[stop])
    continued = distill(config, *toy(), NAMES, here(tmp_path), **given)
    assert np.array_equal(continued.images, whole.images)
    assert np.array_equal(continued.soft, whole.soft)
    assert continued.rate == whole.rate
    assert continued.passes == pytest.approx(whole.passes)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("method", LEARNED)
def test_distill__several_workers_learn_the_images_of_one(
    method: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LEARNED[method]
    one = distill(config, *toy(), NAMES, here(), seed=2, experts=[EXPERT])
    # Threads, unlike processes, share the generator that networks are drawn from.
    drawing, seeded = threading.RLock(), torch.manual_seed

    def draw(net: ModelConfig, names: Sequence[str], seed: int) -> FaceModel:
        with drawing:
            return new_model(net, names, seed)

    def manual_seed(seed: int) -> torch.Generator:
        with drawing:
            return seeded(seed)

    monkeypatch.setattr("pipeline.training.distilling.new_model", draw)
    monkeypatch.setattr("torch.manual_seed", manual_seed)
    found: dict[int, Distilled] = {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(here(), rank=rank, world=workers, sum_over_workers=reduce)
        found[rank] = distill(config, *toy(), NAMES, worker, seed=2, experts=[EXPERT])

    in_threads(workers, run)
    start = distill(chosen("random"), *toy(), NAMES, here(), seed=2)
    assert np.abs(one.images.astype(int) - start.images).max() > 2
    for rank in range(workers):
        assert np.abs(found[rank].images.astype(int) - one.images).max() <= 1
        assert np.allclose(found[rank].soft, one.soft, atol=1e-4)
        assert found[rank].passes == pytest.approx(one.passes)


def test_distill__inner_networks_that_workers_cannot_share_are_refused() -> None:
    worker = replace(here(), world=3, sum_over_workers=lambda tensor: tensor)
    with pytest.raises(ConfigError, match=r"networks: 4, expected a multiple of 3"):
        distill(LEARNED["unrolled"], *toy(), NAMES, worker, seed=0)


def test_distill__a_learned_rate_and_learned_labels_leave_their_start() -> None:
    config = LEARNED["unrolled"]
    found = distill(config, *toy(), NAMES, here(), seed=0, judge=judge)
    assert found.rate is not None
    assert found.rate != pytest.approx(config.inner.lr, rel=1e-4)
    assert np.allclose(found.soft.sum(1), 1, atol=1e-5)
    start = distill(chosen("random"), *toy(), NAMES, here(), seed=0)
    assert not np.allclose(found.soft, judge(start.images)[1], atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learn_labels": True}, "distribution learns pixels alone"),
        ({"inner": {"steps": 3, "window": 4}}, "window: 4, expected at most 3"),
        ({"net": {"name": "convnet", "dropout": 0.1}}, r"net.dropout: 0.1, expected 0"),
        ({"experts": {"epochs": 3, "latest": [1, 2]}}, r"latest: \(1, 2\), expected two rising"),
    ],
)
def test_config__what_does_not_fit_is_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillConfig.model_validate(changed)


def test_config__a_network_named_without_dropout_has_none() -> None:
    assert DistillConfig.model_validate({"net": {"name": "convnet"}}).net.dropout == 0


def test_distill__a_class_without_faces_is_named() -> None:
    faces, labels = toy()
    with pytest.raises(LabelError, match="no face of class 'contempt'"):
        distill(CONFIG, faces, labels, (*NAMES, "contempt"), here(), seed=0)


def test_distill__too_few_faces_come_more_than_once() -> None:
    faces, _ = toy(3)
    found = distill(chosen("random"), faces, np.arange(3), NAMES, here(), seed=0)
    assert np.array_equal(found.images[0], found.images[1])
