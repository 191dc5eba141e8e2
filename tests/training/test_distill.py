"""Proves that distilled sets have the stated images, learn, are reproducible and can be stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.distillers.matching import siamese
from pipeline.errors import LabelError, SourceError
from pipeline.models import ModelConfig
from pipeline.storage import location
from pipeline.training.data import Batches, seed_of
from pipeline.training.distill import (
    DistillConfig,
    Matching,
    distill,
    load_distilled,
    save_distilled,
)
from pipeline.training.faces import ArrayFaces
from pipeline.training.loop import Schedule, Step, Worker, local
from pipeline.training.supervised import new_model

NAMES = ("neutral", "happiness", "anger")
NET = ModelConfig(name="convnet", args={"width": 8, "depth": 2}, size=12, dropout=0)
CONFIG = DistillConfig(ipc=2, steps=4, batch=6, net=NET)


def toy(count: int = 60) -> tuple[ArrayFaces, np.ndarray]:
    """Noise with a bright bar whose row is the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % len(NAMES)
    pixels = rng.integers(0, 120, (count, 1, 12, 12), dtype=np.uint8)
    for face, label in zip(pixels, labels, strict=True):
        face[0, 3 * label + 1 : 3 * label + 3] += 100
    return ArrayFaces(pixels), labels


def here(checkpoint: Path | None = None) -> Worker:
    return local(dtype=torch.float32, checkpoint=checkpoint, checkpoint_every=2)


@pytest.mark.parametrize("method", ["matching", "random"])
def test_distill__ipc_images_per_class_with_names(method: str) -> None:
    config = CONFIG.model_copy(update={"method": method})
    found = distill(config, *toy(), NAMES, here(), seed=0)
    assert found.images.shape == (6, 1, 12, 12)
    assert found.images.dtype == np.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(found.soft, np.eye(3, dtype=np.float32)[found.labels])
    assert found.label_names == NAMES


def test_distill__random_keeps_real_faces_of_the_class() -> None:
    faces, labels = toy()
    config = CONFIG.model_copy(update={"method": "random"})
    found = distill(config, faces, labels, NAMES, here(), seed=3)
    for image, code in zip(found.images, found.labels, strict=True):
        assert any(np.array_equal(image, face) for face in faces.pixels[labels == code])
    assert found.passes == 0


def test_distill__the_distance_falls_in_fifty_steps() -> None:
    config = CONFIG.model_copy(update={"steps": 50, "batch": 20, "siamese": False, "lr": 0.05})
    faces, labels = toy()
    losses = []

    def measure(objective: Matching, at: Step) -> None:
        """On all faces, under a network that learning never draws."""
        batches = Batches(0, 0, 1, torch.device("cpu"))
        with batches, torch.no_grad():
            batch = batches.at(objective.streams(), 0, last=True)
            losses.append(float(objective.loss(batch, replace(at, number=999)).sum))

    found = distill(config, faces, labels, NAMES, here(), seed=0, hooks=[measure])
    assert losses[-1] < 0.5 * losses[0]
    assert found.passes == 50 * (6 + 60 / 3)
    assert found.history[-1]["step"] == 50


def test_distill__one_worker_is_the_loop_written_out() -> None:
    faces, labels = toy()
    found = distill(CONFIG, faces, labels, NAMES, here(), seed=5)
    start = distill(
        CONFIG.model_copy(update={"method": "random"}), faces, labels, NAMES, here(), seed=5
    )
    pixels = torch.nn.Parameter(torch.from_numpy(start.images) / 255)
    optimizer = torch.optim.AdamW([pixels], lr=CONFIG.lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = Schedule(steps=4, lr=CONFIG.lr, warmup=0)
    streams = Matching(CONFIG, faces, labels, NAMES, start.images).streams()
    with Batches(5, 0, 1, torch.device("cpu")) as batches:
        for step in range(4):
            batch = batches.at(streams, step, last=True)
            net = new_model(NET, NAMES, seed_of(5, "net", step)).eval()
            loss = torch.zeros(())
            for code, name in enumerate(NAMES):
                seed = seed_of(5, "siamese", step, name)
                real = net.features(siamese(batch[name].views["x"], seed))[0].mean(0)
                own = net.features(siamese(pixels[2 * code : 2 * code + 2], seed))[0].mean(0)
                loss = loss + (real.detach() - own).square().sum()
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pixels.data.clamp_(0, 1)
    expected = (pixels.detach() * 255).round().numpy()
    assert np.abs(found.images - expected).max() <= 1
    assert np.abs(found.images.astype(int) - start.images).max() > 1


def test_distill__interrupted_and_continued_gives_the_same_images(tmp_path: Path) -> None:
    whole = distill(CONFIG, *toy(), NAMES, here(), seed=1)

    def stop(objective: Matching, at: Step) -> None:
        if at.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(CONFIG, *toy(), NAMES, here(tmp_path), seed=1, hooks=[stop])
    continued = distill(CONFIG, *toy(), NAMES, here(tmp_path), seed=1)
    assert np.array_equal(continued.images, whole.images)


def test_distill__a_class_without_faces_is_named() -> None:
    faces, labels = toy()
    with pytest.raises(LabelError, match="no face of class 'contempt'"):
        distill(CONFIG, faces, labels, (*NAMES, "contempt"), here(), seed=0)


def test_distill__too_few_faces_come_more_than_once() -> None:
    faces, _ = toy(3)
    config = CONFIG.model_copy(update={"method": "random"})
    found = distill(config, faces, np.arange(3), NAMES, here(), seed=0)
    assert np.array_equal(found.images[0], found.images[1])


def test_save_distilled__loads_again_and_shows_a_row_per_class(tmp_path: Path) -> None:
    def soften(images: np.ndarray) -> np.ndarray:
        return np.full((len(images), 3), 1 / 3)

    found = distill(CONFIG, *toy(), NAMES, here(), seed=0, soften=soften)
    at = location(tmp_path / "distilled")
    digest = save_distilled(at, found)
    again = load_distilled(at)
    assert np.array_equal(again.images, found.images)
    assert np.array_equal(again.labels, found.labels)
    assert np.allclose(again.soft, 1 / 3)
    assert again.label_names == NAMES
    assert (at / "labels.json").read_json()["labels"][:3] == ["neutral", "neutral", "happiness"]
    assert Image.open(tmp_path / "distilled" / "grid.png").size == (2 * 14 + 2, 3 * 14 + 2)
    assert save_distilled(at, found) == digest
    (at / "labels.json").write_json({"label_names": NAMES, "labels": ["neutral"]})
    with pytest.raises(SourceError, match=r"6 images in images.safetensors, 1 in labels.json"):
        load_distilled(at)
