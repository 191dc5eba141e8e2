"""One cell of the distillation bench: a set, the networks that see nothing else, tuned teachers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from pipeline import conduct, flow
from pipeline.active import pack
from pipeline.artifacts import load_teacher
from pipeline.config import digest
from pipeline.job import Job
from pipeline.labeled.reader import read_labeled
from pipeline.metrics import accuracy, confusion_matrix, macro_f1
from pipeline.models import ModelConfig
from pipeline.recipe import load
from pipeline.schema import label_codes, label_names_of
from pipeline.tables import read_table
from pipeline.training import exam, runs
from pipeline.training.data import LabeledFaces, seed_of
from pipeline.training.distill import Distilled, distill
from pipeline.training.distillation import TuneConfig, faces_of, judge_of, real_faces
from pipeline.training.distilling import DistillConfig
from pipeline.training.experts import expert
from pipeline.training.faces import Faces
from pipeline.training.handed import FACES_FILE, LABELED_FILE, open_labeled, usable
from pipeline.training.loop import Worker, local, precision, prepare_cpu
from pipeline.training.supervised import SupervisedConfig, predict_logits, train_supervised
from tests.bench import ferplus10
from tests.bench.distill_protocols import TINY
from tests.bench.harness import ROOT, Cell, Context, call, python

TUNED_ON = "trajectory"
"""The learned method whose set the teacher is tuned on, and that gets 50 images per class: the best
on the development set."""


def config_of(identity: Mapping[str, Any]) -> DistillConfig:
    """How a cell's set is distilled."""
    method = identity["method"]
    net = {"name": "convnet", "args": {"width": identity["width"]}, "dropout": 0}
    size = 32 if identity["width"] == TINY["width"] else 48
    return DistillConfig.model_validate(
        {
            "method": {"window": "unrolled", "tune": TUNED_ON}.get(method, method),
            "ipc": identity["ipc"],
            "net": {**net, "size": size},
            "preview_every": None,
            **identity["distill"],
        }
    )


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Distill, train from the images, judge; or tune the teacher."""
    root = prepared(cell, context, "mine")
    job = open_job(cell, root)
    use_gpu = torch.cuda.is_available()
    prepare_cpu(context.threads)
    device = "cuda" if use_gpu else "cpu"
    worker = local(device, precision(None, device))
    identity = cell.identity
    developing = identity["on"] == "development"
    test = TestSet(job, worker, developing=developing)
    faces, labels, names = _faces(job, identity)
    judge = judge_of(load_teacher(job.run.artifact("teach").dir / runs.TEACHER), worker.device)
    config = config_of(identity)
    experts, before = [], {}
    if config.method == "trajectory":
        experts, before = experts_of(config, faces, labels, names, worker, root, cell)
    start = time.perf_counter()
    made = distill(
        config, faces, labels, names, worker, seed=cell.seed, judge=judge, experts=experts
    )
    took = time.perf_counter() - start
    if context.left() <= 0:
        raise RuntimeError("no time left after distilling; give the cell more")
    found: dict[str, Any] = {
        "faces": len(labels),
        "passes": made.passes,
        "seconds_distilling": round(took, 1),
        **before,
        "first_loss": made.history[0]["loss"] if made.history else None,
        "last_loss": made.history[-1]["loss"] if made.history else None,
        "rate": made.rate,
        "trained_in": str(worker.dtype).removeprefix("torch."),
        "n": test.count,
        "readings": int(not context.options.quick and not developing),
        "command": f"python -m tests.bench.distill --only {cell.name}",
    }
    if identity["method"] == "tune":
        models = _tuned(job, made, faces, labels, judge, worker, test, cell)
        return {**found, "random_from": "mined", "models": models}
    return {**found, "models": _from_images(made, identity, worker, test, cell.seed)}


def prepared(cell: Cell, context: Context, until: str) -> Path:
    """The cell's run folder of ferplus10, finished up to a stage."""
    root = context.cache / cell.run
    if not list(root.glob(f"{until}/g*/done*.json")):
        root.mkdir(parents=True, exist_ok=True)
        sets = [*cell.sets, f"train.threads={context.threads}", "tracking.uri='off'"]
        if context.options.jobs > 1:
            sets.append("stream.object_store_mb=300")
        argv = [part for item in sets for part in ("--set", item)]
        command = ("-m", "pipeline.cli", "run", ferplus10.RECIPE, "--run", str(root), "--fresh")
        threads = {"OMP_NUM_THREADS": str(context.threads)}
        log = root.with_suffix(".log")
        call(python(*command, "--until", until, *argv), context, log, threads)
    return root


def open_job(cell: Cell, root: Path) -> Job:
    recipe = load(ROOT / ferplus10.RECIPE, [*cell.sets, "tracking.uri='off'"])
    return conduct.start(recipe, str(root), fresh=True, show_faces=False)


def _faces(job: Job, identity: Mapping[str, Any]) -> tuple[Faces, np.ndarray, tuple[str, ...]]:
    """What is distilled: mined and labeled faces, as the stage does it, or the labeled alone.

    Mined alone lacks the classes that no teacher is ever sure of.
    """
    config, handed = config_of(identity), flow.handed(job, mined=True)
    if identity["source"] == "labeled":
        labeled, rows = open_labeled(handed, config.net)
        return labeled.faces, labeled.labels, label_names_of(rows.schema)
    faces, labels, _, _, names = real_faces(handed, config)
    return faces, labels, names


def experts_of(
    config: DistillConfig,
    faces: Faces,
    labels: np.ndarray,
    names: tuple[str, ...],
    worker: Worker,
    root: Path,
    cell: Cell,
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Experts of a run, trained once for all its cells, and what that took: figures of their own.

    Without figures where they were trained and nobody kept the time.
    """
    key = digest([config.net.model_dump(), config.experts.model_dump(), cell.identity["source"]])
    at, found = root / "bench-experts", []
    at.mkdir(exist_ok=True)
    seconds: list[float | None] = []
    for number in range(config.experts.count):
        file = at / f"{key[:12]}-{number}.npy"
        took = file.with_suffix(".json")
        if not file.exists():
            seed, start = seed_of(cell.seed, "expert", number), time.perf_counter()
            weights = expert(config, faces, labels, names, worker, seed=seed)
            took.write_text(json.dumps({"seconds": time.perf_counter() - start}))
            np.save(file.with_suffix(".partial.npy"), weights.numpy())
            file.with_suffix(".partial.npy").replace(file)
        found.append(torch.from_numpy(np.load(file)))
        seconds.append(json.loads(took.read_text())["seconds"] if took.exists() else None)
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return found, {}
    passes = config.experts.passes(len(labels))
    return found, {"experts_seconds": round(sum(known), 1), "experts_passes": passes}


def mined_alone(labels: np.ndarray, labeled: int) -> np.ndarray:
    """Labels (N,) with -1 for the first `labeled` faces, but of classes that no mined face has."""
    own, mined = labels[:labeled], labels[labeled:]
    return np.concatenate([np.where(np.isin(own, mined), -1, own), mined])


class TestSet:
    """The faces that models are judged on."""

    def __init__(self, job: Job, worker: Worker, *, developing: bool) -> None:
        if developing:
            development = job.recipe.labeled.development
            assert development is not None
            changed = development.model_copy(update={"role": "test"})
            labeled = job.recipe.labeled.model_copy(update={"development": changed})
            table = read_labeled(labeled, job.removals, seed=job.recipe.seed).table
            rows = table.filter(pc.equal(table["role"], "test"))
        else:
            at = job.run.artifact("test").dir
            rows = usable(read_table(at / LABELED_FILE), read_table(at / FACES_FILE), job.removals)
        self.names = flow.label_names(job)
        self.labels = label_codes(rows["label"].to_pylist(), self.names)
        self.count = len(self.labels)
        self._rows, self._job, self._worker = rows, job, worker

    def judge(self, probs: np.ndarray, seconds: float, passes: float) -> dict[str, Any]:
        """Figures of probabilities (N, K)."""
        said = probs.argmax(1)
        confusion = confusion_matrix(said, self.labels, len(self.names))
        return {
            "accuracy": float(accuracy(confusion)),
            "macro_f1": float(macro_f1(confusion)),
            "seconds": round(seconds, 1),
            "passes": passes,
            "correct": pack(said == self.labels),
        }

    def model(self, trained: Any, seconds: float, passes: float) -> dict[str, Any]:
        """Figures of one network."""
        faces = exam.faces_of(self._rows, flow.handed(self._job), trained.config)
        logits = predict_logits(trained.to(self._worker.device), faces, self._worker)
        return self.judge(logits, seconds, passes)

    def teacher(self, members: Sequence[Any], temperature: float) -> np.ndarray:
        """Probabilities (N, K) of an ensemble."""
        parts = []
        for member in members:
            faces = exam.faces_of(self._rows, flow.handed(self._job), member.config)
            logits = predict_logits(member.to(self._worker.device), faces, self._worker)
            parts.append(torch.softmax(torch.from_numpy(logits / temperature), 1).numpy())
        return np.mean(parts, axis=0)


def _from_images(
    made: Distilled, identity: Mapping[str, Any], worker: Worker, test: TestSet, seed: int
) -> dict[str, Any]:
    """Networks that saw nothing but the set."""
    size = made.images.shape[-1]
    convnet = config_of(identity).net
    resnet = ModelConfig(
        name="compact_resnet", args={"widths": identity["resnet"]}, size=size, dropout=0
    )
    found = {}
    for name, net, soft in (
        ("convnet hard", convnet, False),
        ("convnet soft", convnet, True),
        ("resnet soft", resnet, True),
    ):
        config = SupervisedConfig(
            model=net, smoothing=0.0, ema=None, augment="weak", **identity["evaluate"]
        )
        own = seed_of(seed, "from images", name)
        trained = train_supervised(
            config, faces_of(made, soft=soft), made.label_names, worker, seed=own
        )
        fitted = trained.fitted
        found[name] = test.model(trained.model, fitted.seconds, fitted.passes)
    return found


def _tuned(
    job: Job,
    made: Distilled,
    faces: Faces,
    labels: np.ndarray,
    judge: Any,
    worker: Worker,
    test: TestSet,
    cell: Cell,
) -> dict[str, Any]:
    """The teacher, tuned on the distilled set, on as many random mined faces, and on the labels."""
    teacher = load_teacher(job.run.artifact("teach").dir / runs.TEACHER)
    config, names = TuneConfig.model_validate(cell.identity["settings"]), made.label_names
    random = config_of(cell.identity).model_copy(update={"method": "random"})
    labeled, _ = open_labeled(flow.handed(job), teacher.members[0].config)
    own_labels = mined_alone(labels, len(labeled.labels))
    drawn = distill(random, faces, own_labels, names, worker, seed=cell.seed + 1000, judge=judge)
    sets: dict[str, LabeledFaces] = {
        "distilled": faces_of(made, soft=True),
        "random hard": faces_of(drawn, soft=False),
        "random soft": faces_of(drawn, soft=True),
        "labels": LabeledFaces(labeled.faces, labeled.labels),
    }
    probs = test.teacher(teacher.members, teacher.temperature)
    facts = job.run.artifact("teach").facts
    found = {"teacher": test.judge(probs, facts["seconds"], facts["passes"])}
    for name, data in sets.items():
        members, seconds, passes = [], 0.0, 0.0
        for number, member in enumerate(teacher.members):
            own = SupervisedConfig(
                model=member.config,
                steps=config.steps,
                batch=config.batch,
                lr=config.lr,
                smoothing=0.0,
                ema=None,
            )
            seed = seed_of(cell.seed, "tune", number)
            trained = train_supervised(own, data, names, worker, seed=seed, start=member)
            members.append(trained.model)
            seconds += trained.fitted.seconds
            passes += trained.fitted.passes
        found[name] = test.judge(test.teacher(members, teacher.temperature), seconds, passes)
    return found
