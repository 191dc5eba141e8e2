"""Learn or choose a few images per class that stand for all faces of a training set.

What for: a set of some hundred images trains a student in seconds and can be looked at. Chosen sets
(random, herding, k_center, crops) are real faces; learned ones (distribution, gradient, unrolled,
trajectory) start as real faces and are changed. A random set with the teacher's soft labels is what
every other set has to beat at the same number of images. Cost: distill_cost.py counts it.
Departs: pixels, soft labels and inner learning rate are learned with AdamW and one cosine instead
of SGD with momentum; pixels are cut to [0, 1] after every step, because they are stored as images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import plain
from pipeline.distillers.coresets import choose
from pipeline.distillers.crops import best_crops
from pipeline.errors import ConfigError, LabelError
from pipeline.training.data import seed_of
from pipeline.training.distilling import DistillConfig, objective_of, schedule_of
from pipeline.training.faces import Faces
from pipeline.training.loop import Hook, Worker, fit

CHUNK = 256  # faces that the teacher sees at once
CANDIDATES = 300  # faces of a class that crops are tried of
CROPS = 5  # of each of them

Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A teacher: uint8 (N, C, S, S) -> unit embeddings (N, D), calibrated probabilities (N, K)."""


@dataclass(frozen=True)
class Distilled:
    """A distilled set, class after class."""

    images: np.ndarray
    """uint8 (K * ipc, C, S, S)."""
    labels: np.ndarray
    """Class codes (K * ipc,) int64."""
    soft: np.ndarray
    """Probabilities (K * ipc, K) float32: learned, the teacher's, or 1 for the class."""
    label_names: tuple[str, ...]
    origin: np.ndarray
    """Positions (K * ipc,) of the real faces that the images are or started as."""
    history: list[dict[str, float]]
    """Loss over steps; empty where nothing was learned."""
    passes: float
    """Image passes that learning took; experts are not in it."""
    seconds: float = 0.0
    """That learning took."""
    rate: float | None = None
    """Learning rate that was learned with the images."""


def distill(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
    judge: Judge | None = None,
    experts: Sequence[Tensor] = (),
    hooks: Sequence[Hook] = (),
) -> Distilled:
    """Distill a labeled or mined set.

    Args:
        config: how many images and how they are learned.
        faces: the real faces.
        labels: class codes (N,) of those faces.
        label_names: what the codes index.
        worker: where.
        seed: of the first images, of networks, batches and transformations.
        judge: a teacher: embeds the faces where faces are chosen by that, and gives the finished
            images soft labels unless they are learned. None: the class alone.
        experts: trajectories (E + 1, P) of `config.net`, for the method of that name.
        hooks: called after every step.

    Raises:
        LabelError: a class has no face to start from.
        ConfigError: the method needs a teacher, experts or as many networks as workers.
    """
    images, origin = _first_images(config, faces, labels, label_names, judge, seed)
    codes = np.repeat(np.arange(len(label_names)), config.ipc)
    hard = np.eye(len(label_names), dtype=np.float32)[codes]
    if not config.learned:
        soft = hard if judge is None else judge(images)[1]
        names = tuple(label_names)
        return Distilled(images, codes, soft.astype(np.float32), names, origin, [], 0.0)
    targets = judge(images)[1] if judge is not None and config.learn_labels else hard
    objective = objective_of(config, faces, labels, label_names, worker, images, targets, experts)
    fitted = fit(objective, schedule_of(config), worker, seed=seed, hooks=hooks)
    learned = objective.learned
    with torch.no_grad():
        final = learned.pixels.cpu().contiguous().mul(255).round().to(torch.uint8).numpy()
        rate = None if learned.log_rate is None else float(learned.rate())
        soft = learned.targets().cpu().numpy()
    if judge is not None and not config.learn_labels:
        soft = judge(final)[1]
    return Distilled(
        final,
        codes,
        soft.astype(np.float32),
        tuple(label_names),
        origin,
        fitted.history,
        fitted.passes,
        fitted.seconds,
        rate,
    )


def _first_images(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    judge: Judge | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Real faces (K * ipc, C, S, S) uint8 and their positions; some twice where there are few."""
    for code, name in enumerate(label_names):
        if not (labels == code).any():
            raise LabelError(f"distill: no face of class {name!r} to start its images from")
    rng = np.random.default_rng(seed_of(seed, "images"))
    method = config.start if config.learned else config.method
    if method != "random" and judge is None:
        raise ConfigError(f"distill: {method} asks a teacher, and there is none")
    if method == "crops":
        assert judge is not None
        return _crops(config, faces, labels, len(label_names), judge, rng)
    embeddings = None
    if method != "random":
        assert judge is not None
        embeddings = embed(judge, faces, config.net.size)
    rows = choose(method, labels, embeddings, len(label_names), config.ipc, rng)
    return pixels_of(faces, rows, config.net.size), rows


def _crops(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    classes: int,
    judge: Judge,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    def probabilities(images: Tensor) -> Tensor:
        pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
        parts = [judge(pixels[i : i + CHUNK])[1] for i in range(0, len(pixels), CHUNK)]
        return torch.from_numpy(np.concatenate(parts))

    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    images, origin = [], []
    for code in range(classes):
        rows = np.flatnonzero(labels == code)
        tried = rng.permutation(rows)[: max(CANDIDATES, config.ipc)]
        candidates = torch.from_numpy(pixels_of(faces, tried, config.net.size)).float() / 255
        best, order = best_crops(
            candidates,
            code,
            probabilities,
            count=config.ipc,
            crops=CROPS,
            generator=generator,
        )
        again = np.resize(np.arange(len(order)), config.ipc)  # a class may have too few
        images.append(best[again].clamp(0, 1).mul(255).round().to(torch.uint8).numpy())
        origin.append(tried[order.numpy()][again])
    return np.concatenate(images), np.concatenate(origin)


def pixels_of(faces: Faces, rows: np.ndarray, size: int) -> np.ndarray:
    """Faces at positions (B,) as uint8 (B, C, S, S)."""
    x = plain(torch.from_numpy(faces.take(rows)), size, torch.Generator())
    return x.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


def embed(judge: Judge, faces: Faces, size: int) -> np.ndarray:
    """Unit embeddings (N, D) float32 of all faces; a forward of the teacher each."""
    parts = [
        judge(pixels_of(faces, np.arange(i, min(i + CHUNK, len(faces))), size))[0]
        for i in range(0, len(faces), CHUNK)
    ]
    return np.concatenate(parts)
