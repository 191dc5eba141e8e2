"""One cell of the semi-supervised bench: stages of training that share one budget of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field

from pipeline import flow, pool
from pipeline.artifacts import save_model
from pipeline.config import Config, parse
from pipeline.job import Job
from pipeline.models import FaceModel
from pipeline.schema import label_names_of
from pipeline.storage import location
from pipeline.training.data import LabeledFaces, MinedFaces
from pipeline.training.faces import Faces
from pipeline.training.handed import open_labeled
from pipeline.training.loop import FORWARD, Fitted, Worker, local, precision, prepare_cpu
from pipeline.training.pretrain import PretrainJob, open_pool
from pipeline.training.pretraining import PretrainConfig, train_backbone
from pipeline.training.student import StudentConfig
from pipeline.training.studying import train_student
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised
from tests.bench.distill_cells import TestSet, open_job, prepared
from tests.bench.harness import Cell, Context

RESNET = {"name": "compact_resnet", "size": 48, "color": "gray"}
VIT = {
    "name": "vit_tiny_patch16_224",
    "size": 48,
    "color": "gray",
    "args": {"img_size": 48, "patch_size": 6, "embed_dim": 128, "depth": 6, "num_heads": 4},
}
TINY_NETS = {
    "compact_resnet": {**RESNET, "args": {"widths": [8, 16]}, "size": 32},
    "vit_tiny_patch16_224": {
        **VIT,
        "size": 32,
        "args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    },
}
SOFT_STUDENT = {
    "model": {**RESNET, "dropout": 0.3},
    "labeled_augment": "strong",
    "source_share": {"faces": 0.25},
}
"""The student of ferplus10."""


class Row(Config):
    """Up to three trainings, one starting from the other, and each one's share of the passes."""

    pretrain: PretrainConfig | None = None
    supervised: SupervisedConfig | None = None
    student: StudentConfig | None = None
    teachers: int = Field(default=1, ge=1)
    """Supervised trainings that differ in their seed and divide their share. A student that does
    not label the pool itself learns the mean of their probabilities."""
    shares: dict[str, float]
    """Of the budget; they add up to 1."""

    @property
    def vit(self) -> bool:
        """Whether the network is a transformer."""
        config = self.student or self.supervised
        assert config is not None
        return config.model.name.startswith("vit")

    def tiny(self) -> Row:
        """The same with networks and batches for a test of the plumbing."""
        values = self.model_dump()
        for name in ("pretrain", "supervised", "student"):
            if values[name] is not None:
                values[name]["model"] |= TINY_NETS[values[name]["model"]["name"]]
                for key in ("batch", "labeled_batch", "mined_batch"):
                    if key in values[name]:
                        values[name][key] = 16
        if values["pretrain"] is not None:
            values["pretrain"]["decoder"] = {"width": 16, "depth": 1, "heads": 2}
        return parse(Row, values)


def _supervised(net: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    drop = 0.3 if net is RESNET else 0.1
    given = {"lr": 2e-3, "ema": 0.999, "batch": 192, "augment": "strong"}
    balanced = {"imbalance": "sampler", "imbalance_strength": 0.5}
    return {"model": {**net, "dropout": drop}, **given, **balanced, **more}


def _online(rule: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    given = {
        "model": {**RESNET, "dropout": 0.3},
        "labeled_augment": "strong",
        "targets": "hard",
        "mined_weight": 1.0,
        "online": {"thresholds": rule},
        "source_share": {"faces": 0.25},
    }
    online = {**given["online"], **more.pop("online", {})}
    return {**given, **more, "online": online}


def _rows() -> dict[str, Row]:
    fixed = {"rule": "fixed", "tau": 0.8}
    mae = {"method": "mae", "model": {**VIT, "dropout": 0}, "batch": 256, "lr": 1e-3}
    mae |= {"decoder": {"width": 96, "depth": 2, "heads": 4}}
    vit = _supervised(VIT, lr=1e-3)
    simclr = {"method": "simclr", "model": {**RESNET, "dropout": 0}, "batch": 256, "lr": 2e-3}
    soft = {"rule": "softmatch", "momentum": 0.99}
    free = {"rule": "freematch", "momentum": 0.99}
    values: dict[str, dict[str, Any]] = {
        "control": {"supervised": _supervised(RESNET), "shares": {"supervised": 1}},
        "control_vit": {"supervised": vit, "shares": {"supervised": 1}},
        "simclr": {
            "pretrain": simclr,
            "supervised": _supervised(RESNET, lr=1e-3),
            "shares": {"pretrain": 0.4, "supervised": 0.6},
        },
        "mae": {"pretrain": mae, "supervised": vit, "shares": {"pretrain": 0.4, "supervised": 0.6}},
        "fixmatch": {"student": _online(fixed), "shares": {"student": 1}},
        "dtm": {
            "student": _online({"rule": "dtm"}, online={"low": "contrastive", "low_weight": 0.1}),
            "shares": {"student": 1},
        },
        "freematch": {
            "student": _online(free, online={"fairness": 0.01}),
            "shares": {"student": 1},
        },
        "softmatch": {"student": _online(soft), "shares": {"student": 1}},
        "fixmatch_warm": {
            "supervised": _supervised(RESNET),
            "student": _online(fixed, lr=1e-3, warm_start=True),
            "shares": {"supervised": 0.6, "student": 0.4},
        },
        "noisy_student": {
            "supervised": _supervised(RESNET),
            "student": SOFT_STUDENT,
            "shares": {"supervised": 0.4, "student": 0.6},
        },
        "noisy_students": {
            "supervised": _supervised(RESNET),
            "teachers": 3,
            "student": SOFT_STUDENT,
            "shares": {"supervised": 0.5, "student": 0.5},
        },
        "ssfer": {
            "pretrain": {**mae, "normalize_patches": False},
            "supervised": {**vit, "batch": 96, "mix": "facemix"},
            "student": _online(
                {"rule": "fixed", "tau": 0.7},
                model={**VIT, "dropout": 0.1},
                lr=5e-4,
                warm_start=True,
                mined_weight=5.0,
            ),
            "shares": {"pretrain": 0.4, "supervised": 0.3, "student": 0.3},
        },
    }
    return {name: parse(Row, value) for name, value in values.items()}


ROWS = _rows()
"""Rows of the table, at the size of two cores."""


def changed(row: Row, sets: Sequence[str]) -> Row:
    """The row with some settings set."""
    values = row.model_dump()
    for item in sets:
        path, _, text = item.partition("=")
        *parents, last = path.split(".")
        at = values
        for name in parents:
            at = at[name]
        at[last] = yaml.safe_load(text)
    return parse(Row, values)


@dataclass(frozen=True)
class _Data:
    labeled: LabeledFaces
    pool: Faces
    source: Sequence[str]
    names: tuple[str, ...]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Train the row's stages one from the other, judge the last model."""
    root = prepared(cell, context, "guard")
    job = open_job(cell, root)
    row = parse(Row, cell.identity["row"])
    prepare_cpu(context.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worker = local(device, precision(None, device))
    developing = cell.identity["on"] == "development"
    test = TestSet(job, worker, developing=developing)
    data = _open(job, row)
    budget = float(cell.identity["passes"])
    model, fits, probes = _train(row, data, budget, worker, cell.seed, root)
    if context.left() <= 0:
        raise RuntimeError("no time left after training; give the cell more")
    passes = sum(fit.passes for fit in fits) + _guessing_passes(row, data)
    said = test.model(model, sum(fit.seconds for fit in fits), passes)
    last = fits[-1].history[-1]
    return {
        **said,
        "budget": budget,
        "step_passes": max(_step_passes(row, name) for name in row.shares),
        "probes": probes,
        "last": {k: round(v, 4) for k, v in last.items()},
        "pool": len(data.pool),
        "labels": len(data.labeled),
        "trained_in": str(worker.dtype).removeprefix("torch."),
        "n": test.count,
        "readings": int(not context.options.quick and not developing),
        "command": f"python -m tests.bench.semi --only {cell.name}",
    }


def _open(job: Job, row: Row) -> _Data:
    config = row.student or row.supervised
    assert config is not None
    labeled, rows = open_labeled(flow.handed(job), config.model)
    survey = job.run.artifact("survey").dir
    own = PretrainJob(
        handed=flow.handed(job),
        pretrain=PretrainConfig(model=config.model),
        plan=pool.plan_at(survey).uri,
        survey=survey.uri,
        sources=job.sources,
        out="",
        checkpoints="",
        seed=0,
    )
    faces = open_pool(own)
    counts = [len(part) for part in faces.parts]
    source = np.repeat(list(job.sources), counts).tolist()
    return _Data(labeled, faces, source, label_names_of(rows.schema))


def _step_passes(row: Row, name: str) -> float:
    """Image passes of a step of one training."""
    config = getattr(row, name)
    own = float(config.step_images)
    if isinstance(config, StudentConfig) and config.online is not None:
        if config.online.labeler == "ema":
            own += config.mined_batch * FORWARD
        # Held-out faces are looked at once per epoch of those that train; None: all are both.
        if config.online.thresholds.rule in ("dtm", "ada_cm"):
            held = config.online.held_out
            own += config.labeled_batch * (1.0 if held is None else held / (1 - held)) * FORWARD
    return own


def _train(
    row: Row, data: _Data, budget: float, worker: Worker, seed: int, scratch: Path
) -> tuple[FaceModel, list[Fitted], list[dict[str, float]]]:
    """The last model, what every training took, and what the pre-training's probe said."""
    model: FaceModel | None = None
    guesses: np.ndarray | None = None
    fits: list[Fitted] = []
    probes: list[dict[str, float]] = []
    guessing = _guessing_passes(row, data)
    for name, share in row.shares.items():
        config = getattr(row, name)
        each, left = _step_passes(row, name), budget * share
        if name == "student":
            left -= guessing
        config = config.model_copy(update={"steps": max(1, int(left / each))})
        if isinstance(config, PretrainConfig):
            own = config.model_copy(update={"probe_every": config.steps})
            made = train_backbone(
                own, data.pool, data.names, worker, seed=seed, labeled=data.labeled
            )
            model, probes = made.model, made.probes
            fits.append(made.fitted)
            continue
        if model is not None and guesses is None and not getattr(config, "warm_start", False):
            at = location(str(scratch / f"backbone-{seed}"))
            save_model(model, at, {})
            net = {"weights": at.uri, "pretraining_data": "the pool"}
            config = config.model_copy(update={"model": config.model.model_copy(update=net)})
        if isinstance(config, SupervisedConfig):
            each = config.model_copy(update={"steps": max(1, config.steps // row.teachers)})
            taught = [
                train_supervised(each, data.labeled, data.names, worker, seed=seed + 100 * number)
                for number in range(row.teachers)
            ]
            fits += [one.fitted for one in taught]
            model = taught[0].model
            guesses = _guess([one.model for one in taught], data, worker) if guessing else None
            continue
        if guesses is None:
            # Nobody has guessed the pool's labels: every face has the labeled faces' shares.
            shares = np.bincount(data.labeled.labels, minlength=len(data.names))
            guesses = np.tile(shares / shares.sum(), (len(data.pool), 1))
        mined = MinedFaces(data.pool, guesses, np.ones(len(data.pool)), data.source)
        trained = train_student(
            config, data.labeled, mined, data.names, worker, seed=seed, start=model
        )
        model = trained.model
        fits.append(trained.fitted)
    assert model is not None
    return model, fits, probes


def _guessing_passes(row: Row, data: _Data) -> float:
    """Image passes of what the teachers guess: two forwards of each for every face of the pool."""
    guessing = row.student is not None and row.student.online is None
    return row.teachers * 2 * len(data.pool) * FORWARD if guessing else 0.0


def _guess(teachers: Sequence[FaceModel], data: _Data, worker: Worker) -> np.ndarray:
    """Mean probabilities (M, K) of the teachers for the pool, each of both mirror images."""
    logits = [torch.from_numpy(predict_logits(t, data.pool, worker)) for t in teachers]
    return torch.stack(logits).softmax(2).mean(0).numpy()
