"""What rounds of active learning ask of a network: train on some faces, look at all, take the test.

The loop of rounds (pipeline/active.py) knows nothing of networks; :class:`Networks` is what it
calls. Each training starts from the network's own start again, random or pre-trained.

Cost: a look is one forward a face; `passes` adds T times the last layers; `boundary` is by far
the dearest, see pipeline/acquisition/adversarial.py, so `boundary_faces` looks at a sample.
Source: dropout passes: Gal et al., Deep Bayesian Active Learning (arXiv 1703.02910).
Departs: only dropout before the classifier is drawn; the features below it are computed once, in
evaluation mode. In our own networks there is no other dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pipeline.acquisition.adversarial import ITERATIONS, OVERSHOOT, boundary
from pipeline.artifacts import is_complete, load_model, read_meta, save_model
from pipeline.augment import plain
from pipeline.config import Config
from pipeline.models import FaceModel
from pipeline.storage import Location
from pipeline.training.data import LabeledFaces, seed_of
from pipeline.training.faces import Faces
from pipeline.training.loop import FORWARD, Worker
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised

BATCH = 256


class LookConfig(Config):
    """How closely unlabeled faces are looked at."""

    passes: int = Field(default=10, ge=2)  # dropout passes of bald
    boundary_faces: int | None = Field(default=None, ge=1)
    """deepfool's sample, a round's budget or more; None: all."""
    boundary_steps: int = Field(default=ITERATIONS, ge=1)  # of DeepFool, at most
    overshoot: float = Field(default=OVERSHOOT, ge=0)


class Networks:
    """Trains and asks face networks, in this process.

    Args:
        config: network, with the weights that every round starts from, and schedule.
        data: all faces with their labels; a training sees the rows it is given.
        test: faces that are judged in every round.
        label_names: what the codes index.
        worker: where.
        seed: of weights and of everything that trainings draw, with the round's number.
        epochs: over the labels there are; None: `config.steps` in every round.
        look: how closely faces are looked at.
        first: folder of the first round's model, which all strategies of a seed and start share;
            trained if it is not there. None: every strategy trains its own, which is the same.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        data: LabeledFaces,
        test: Faces,
        label_names: Sequence[str],
        worker: Worker,
        *,
        seed: int,
        epochs: float | None = None,
        look: LookConfig | None = None,
        first: Location | None = None,
    ) -> None:
        self._config, self._data, self._test, self._names = config, data, test, label_names
        self._worker, self._seed, self._epochs = worker, seed, epochs
        self._look, self._first = look or LookConfig(), first

    def train(self, rows: NDArray[np.int64], number: int) -> tuple[FaceModel, float]:
        """A model of these rows in a round, and the image passes it took."""
        shared = self._first if number == 0 else None
        if shared is not None and is_complete(shared):
            found = load_model(shared).to(self._worker.device)
            return found, float(read_meta(shared)["passes"])
        config = self._config
        if self._epochs is not None:
            steps = max(1, math.ceil(self._epochs * len(rows) / config.batch))
            config = config.model_copy(update={"steps": steps})
        seed = seed_of(self._seed, "round", number)
        trained = train_supervised(
            config, self._data, self._names, self._worker, seed=seed, rows=rows
        )
        passes = trained.fitted.passes
        if shared is not None:
            save_model(trained.model, shared, {"passes": passes})
        return trained.model, passes

    def look(
        self,
        model: FaceModel,
        columns: Sequence[str],
        labeled: NDArray[np.bool_],
        seed: int,
    ) -> tuple[Mapping[str, NDArray[Any]], float]:
        """Columns of an `acquisition.Pool` over all faces, and the image passes they took.

        `boundary` is infinite for faces that are labeled or not in its sample.

        Args:
            model: as `train` gave it.
            columns: among embeddings, probs, passes, boundary.
            labeled: (N,).
            seed: of dropout and of the sample.
        """
        found: dict[str, NDArray[Any]] = {}
        passes = 0.0
        plainly = [name for name in columns if name != "boundary"]
        if plainly:
            found |= self._answers(model, plainly, seed)
            passes += len(labeled) * FORWARD
        if "boundary" in columns:
            distance, looked_at = self._boundary(model, labeled, seed)
            found["boundary"] = distance
            # Its first step alone: a forward and, per class, a backward as dear as a forward.
            passes += looked_at * (1 + len(self._names)) * FORWARD
        return found, passes

    def say(self, model: FaceModel) -> NDArray[np.int64]:
        """Codes (T,) of the test faces, each seen as it is and mirrored."""
        return predict_logits(model, self._test, self._worker).argmax(1)

    @torch.no_grad()
    def _answers(
        self, model: FaceModel, columns: Sequence[str], seed: int
    ) -> dict[str, NDArray[Any]]:
        net: Any = model.net
        parts: dict[str, list[Tensor]] = {name: [] for name in columns}
        model.eval()
        devices = [self._worker.device] if self._worker.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(self._data), BATCH):
                x = self._pixels(model, np.arange(start, min(start + BATCH, len(self._data))))
                with self._worker.autocast():
                    features = net.forward_features((x - model.mean) / model.std)
                    if "embeddings" in parts:
                        embedding = net.forward_head(features, pre_logits=True)
                        parts["embeddings"].append(embedding.float().cpu())
                    if "probs" in parts:
                        parts["probs"].append(_probs(net.forward_head(features)))
                    if "passes" in parts:
                        with _Dropping(net):
                            several = [
                                _probs(net.forward_head(features)) for _ in range(self._look.passes)
                            ]
                        parts["passes"].append(torch.stack(several))
        return {
            name: torch.cat(tensors, dim=int(name == "passes")).numpy()
            for name, tensors in parts.items()
        }

    def _boundary(
        self, model: FaceModel, labeled: NDArray[np.bool_], seed: int
    ) -> tuple[NDArray[np.float64], int]:
        rows = np.flatnonzero(~labeled)
        most = self._look.boundary_faces
        if most is not None and most < len(rows):
            rng = np.random.default_rng(seed_of(seed, "boundary"))
            rows = np.sort(rng.choice(rows, most, replace=False))
        distance = np.full(len(labeled), np.inf)
        model.eval()
        for start in range(0, len(rows), BATCH):
            own = rows[start : start + BATCH]
            distance[own] = boundary(
                model,
                self._pixels(model, own),
                iterations=self._look.boundary_steps,
                overshoot=self._look.overshoot,
            )
        return distance, len(rows)

    def _pixels(self, model: FaceModel, rows: NDArray[np.int64]) -> Tensor:
        """Faces (B, C, S, S) as they are, on the worker's device."""
        pixels = torch.from_numpy(self._data.faces.take(rows)).to(self._worker.device)
        x = plain(pixels, model.config.size, torch.Generator())
        return x.contiguous(memory_format=torch.channels_last)


def _probs(logits: Tensor) -> Tensor:
    return torch.softmax(logits.float(), dim=-1).cpu()


class _Dropping:
    """Dropout is drawn while the block runs; everything else stays in evaluation mode."""

    def __init__(self, net: nn.Module) -> None:
        # timm's networks drop by their own `training`, ours by a layer's.
        self._modules = [net, *(m for m in net.modules() if isinstance(m, nn.Dropout))]

    def __enter__(self) -> None:
        for module in self._modules:
            module.training = True

    def __exit__(self, *error: object) -> None:
        for module in self._modules:
            module.training = False
