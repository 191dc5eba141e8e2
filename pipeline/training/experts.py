"""Experts: trainings on the real faces whose course trajectory matching follows.

What for: made once for a set of faces and a network, they serve sets of any number of images per
class. Cost: epochs x faces image passes each; `epochs + 1` copies of the weights on storage.
Source: Cazenave et al. (arXiv 2203.11932), section 3.1.
Departs: plain gradient descent, every batch under one siamese transformation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from pipeline.augment import plain
from pipeline.distillers.siamese import siamese
from pipeline.distillers.trajectory import train_expert
from pipeline.errors import SourceError
from pipeline.storage import Location
from pipeline.training.data import Batches, Stream, seed_of
from pipeline.training.distilling import DistillConfig
from pipeline.training.faces import Faces
from pipeline.training.loop import Worker
from pipeline.training.supervised import new_model


def expert(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    label_names: Sequence[str],
    worker: Worker,
    *,
    seed: int,
) -> Tensor:
    """Train one expert; returns its weights epoch by epoch (E + 1, P) float32.

    Args:
        config: network and `experts`.
        faces: the real faces.
        labels: class codes (N,).
        label_names: K class names.
        worker: the one that trains.
        seed: of weights, batches and views; another one for every expert.
    """
    own = config.experts
    steps = own.steps(len(faces))
    stream = Stream(
        name="expert",
        faces=faces,
        batch=own.batch,
        views={"x": plain},
        size=config.net.size,
        targets={"label": labels.astype(np.int64)},
    )

    def epoch(batches: Batches, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(number * steps, (number + 1) * steps):
            batch = batches.at([stream], step, last=False)["expert"]
            x = batch.views["x"]
            if config.siamese:
                x = siamese(x, seed_of(seed, "view", step))
            yield x, batch.targets["label"]

    net = new_model(config.net, label_names, seed).to(worker.device)
    with Batches(seed, 0, 1, worker.device) as batches, worker.autocast():
        return train_expert(net, (epoch(batches, k) for k in range(own.epochs)), own.lr)


def file_of(at: Location, number: int) -> Location:
    """Where an expert lies."""
    return at / f"expert-{number:03d}.safetensors"


def save_expert(at: Location, number: int, weights: Tensor) -> None:
    """Keep an expert's course."""
    file_of(at, number).write_bytes(save({"weights": weights.contiguous()}))


def load_experts(at: Location, count: int) -> list[Tensor]:
    """All experts of a folder.

    Raises:
        SourceError: one is missing.
    """
    missing = [n for n in range(count) if not file_of(at, n).exists()]
    if missing:
        raise SourceError(f"{at.uri}: expected {count} experts, {len(missing)} are missing")
    return [load(file_of(at, number).read_bytes())["weights"] for number in range(count)]
