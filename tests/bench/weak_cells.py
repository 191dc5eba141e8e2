"""One cell of the bench weak: a way of learning from votes, judged against votes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pipeline import flow, metrics
from pipeline.artifacts import save_model
from pipeline.config import Config, digest, parse
from pipeline.evaluation import votes_of
from pipeline.models import FaceModel
from pipeline.schema import label_names_of
from pipeline.storage import location
from pipeline.training import exam
from pipeline.training.data import LabeledFaces
from pipeline.training.handed import open_labeled
from pipeline.training.loop import Fitted, Worker, local, precision, prepare_cpu
from pipeline.training.partial import DECODER, PartialConfig, train_partial
from pipeline.training.pretraining import PretrainConfig, train_backbone
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised
from tests.bench.distill_cells import TestSet, open_job, prepared
from tests.bench.harness import Cell, Context
from tests.bench.semi_cells import TINY_NETS

RESNET = {"name": "compact_resnet", "args": {"widths": [16, 32, 64, 128]}, "size": 32}
VIT = {
    "name": "vit_tiny_patch16_224",
    "args": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "size": 32,
}


class Row(Config):
    """A training on labels or on candidate sets, from nothing or from a backbone."""

    pretrain: PretrainConfig | None = None
    supervised: SupervisedConfig
    partial: PartialConfig | None = None
    """None: cross entropy with the most voted class."""
    pretrain_share: float = 0.0
    """Of the budget."""

    @property
    def vit(self) -> bool:
        """Whether the network is a transformer."""
        return self.supervised.model.name.startswith("vit")

    def tiny(self) -> Row:
        """The same with a network and batches for a test of the plumbing."""
        values = self.model_dump()
        for name in ("pretrain", "supervised"):
            if values[name] is not None:
                values[name]["model"] |= TINY_NETS[values[name]["model"]["name"]]
                values[name]["batch"] = 16
        if values["pretrain"] is not None:
            values["pretrain"]["decoder"] = {"width": 16, "depth": 1, "heads": 2}
        return parse(Row, values)


def _rows() -> dict[str, Row]:
    given = {"batch": 128, "ema": 0.998, "augment": "weak", "smoothing": 0.0}
    resnet = {"model": {**RESNET, "dropout": 0.3}, "lr": 5e-3, **given}
    vit = {"model": {**VIT, "dropout": 0.1}, "lr": 1e-3, **given}
    mae = {"method": "mae", "model": {**VIT, "dropout": 0}, "batch": 256, "lr": 1e-3}
    mae |= {"decoder": {"width": 96, "depth": 2, "heads": 4}, "probe_every": None}
    start = {"pretrain": mae, "pretrain_share": 0.4, "supervised": vit}
    moving = {"momentum": 0.9, "warm": 0.2}
    # As in PiCO's code: the share that stays falls from .95 to .8, contrast weighs .5.
    pico = {"method": "pico", "momentum": 0.95, "momentum_end": 0.8, "warm": 0.2}
    decoder = {"method": "decoder", **moving}
    values: dict[str, dict[str, Any]] = {
        "ce": {"supervised": resnet},
        "smoothing": {"supervised": {**resnet, "smoothing": 0.1}},
        "votes": {"supervised": resnet, "partial": {"momentum": 1.0}},
        "proden": {"supervised": resnet, "partial": moving},
        "pico": {"supervised": resnet, "partial": {**pico, "contrastive": 0.5}},
        "decoder": {"supervised": resnet, "partial": decoder},
        "mae": start,
        "mae_decoder": {**start, "partial": decoder},
    }
    return {name: parse(Row, value) for name, value in values.items()}


ROWS = _rows()
"""Rows of the table, at the size of two cores."""


def changed(row: Row, sets: Sequence[str]) -> Row:
    """The row with some settings set; those of what it does not have are left out."""
    values = row.model_dump()
    for item in sets:
        path, _, text = item.partition("=")
        *parents, last = path.split(".")
        at = values
        for name in parents:
            at = at[name] or {}
        at[last] = yaml.safe_load(text)
    return parse(Row, values)


class Decoded(nn.Module):
    """What the decoder itself says; the same outside as a `FaceModel`."""

    def __init__(self, model: FaceModel, decoder: nn.Module) -> None:
        super().__init__()
        self.model, self.decoder = model, decoder
        self.config, self.label_names = model.config, model.label_names

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of faces (B, C, S, S)."""
        logits: Tensor = self.decoder(self.model.tokens(x)[0])
        return logits


class VotedTest(TestSet):
    """Test faces that raters voted on."""

    def figures(self, model: Any) -> dict[str, float]:
        """What a network is worth against labels and votes."""
        rows = self._rows
        faces = exam.faces_of(rows, flow.handed(self._job), model.config)
        logits = predict_logits(model.to(self._worker.device), faces, self._worker)
        probs = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
        votes = votes_of(rows)
        assert votes is not None
        votes = votes / votes.sum(1, keepdims=True)
        scores = metrics.vote_scores(probs, self.labels, votes)
        confusion = metrics.confusion_matrix(probs.argmax(1), self.labels, len(self.names))
        return {
            "accuracy": float(metrics.accuracy(confusion)),
            "macro_f1": float(metrics.macro_f1(confusion)),
            "ece": metrics.calibration_error(probs, self.labels),
            **{name: float(value[counted].mean()) for name, (value, counted) in scores.items()},
        }


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Train the row, judge it; a decoder is judged beside the head that it taught."""
    root = prepared(cell, context, "guard")
    job = open_job(cell, root)
    row = parse(Row, cell.identity["row"])
    prepare_cpu(context.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worker = local(device, precision(None, device))
    developing = cell.identity["on"] == "development"
    test = VotedTest(job, worker, developing=developing)
    data, rows = open_labeled(flow.handed(job), row.supervised.model, votes=True)
    names, budget = label_names_of(rows.schema), float(cell.identity["passes"])
    model, fits = _train(row, data, names, budget, worker, cell.seed, root)
    if context.left() <= 0:
        raise RuntimeError("no time left after training; give the cell more")
    found: dict[str, Any] = test.figures(model)
    modules = fits[-1].averaged
    if DECODER in modules:
        found["decoder"] = test.figures(Decoded(model, modules[DECODER]).eval())
    assert data.soft is not None
    return {
        **found,
        "seconds": round(sum(fit.seconds for fit in fits), 1),
        "passes": sum(fit.passes for fit in fits),
        "budget": budget,
        "step_passes": sum(
            config.step_images for config in (row.pretrain, row.supervised) if config is not None
        ),
        "last": {k: round(v, 4) for k, v in fits[-1].history[-1].items()},
        "faces": len(data),
        "candidates": float((data.soft > 0).sum(1).mean()),
        "trained_in": str(worker.dtype).removeprefix("torch."),
        "n": test.count,
        "readings": int(not context.options.quick and not developing),
        "command": f"python -m tests.bench.weak --only {cell.name}",
    }


def _train(
    row: Row,
    data: LabeledFaces,
    names: tuple[str, ...],
    budget: float,
    worker: Worker,
    seed: int,
    scratch: Path,
) -> tuple[FaceModel, list[Fitted]]:
    """The model and what its trainings took."""
    fits: list[Fitted] = []
    config = row.supervised
    if row.pretrain is not None:
        steps = max(1, int(budget * row.pretrain_share / row.pretrain.step_images))
        own = row.pretrain.model_copy(update={"steps": steps})
        # Rows that start from the same backbone train it once: its checkpoint is the finished run.
        key = digest([own.model_dump(mode="json"), seed, len(data)])[:12]
        kept = scratch / f"bench-backbone-{key}"
        its = replace(worker, checkpoint=str(kept / "checkpoints"))
        made = train_backbone(own, data.faces, names, its, seed=seed)
        fits.append(made.fitted)
        save_model(made.model, location(str(kept / "model")), {})
        net = {"weights": location(str(kept / "model")).uri, "pretraining_data": "the faces"}
        config = config.model_copy(update={"model": config.model.model_copy(update=net)})
    left = budget - sum(fit.passes for fit in fits)
    config = config.model_copy(update={"steps": max(1, int(left / config.step_images))})
    if row.partial is None:
        plain = replace(data, soft=None)
        trained = train_supervised(config, plain, names, worker, seed=seed)
    else:
        trained = train_partial(config, row.partial, data, names, worker, seed=seed)
    return trained.model, [*fits, trained.fitted]
