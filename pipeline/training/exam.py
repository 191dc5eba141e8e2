"""What finished models say of faces they are judged on. No label is read here."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts import Teacher, is_complete, is_teacher, load_model, load_teacher, read_meta
from pipeline.models import ModelConfig
from pipeline.storage import Location
from pipeline.training.faces import Faces
from pipeline.training.handed import Handed, pack_rows
from pipeline.training.runs import TrainConfig
from pipeline.training.supervised import predict_logits
from pipeline.training.worker import Worker, local, precision, prepare_cpu

BATCH = 256


def examiner(config: TrainConfig) -> Worker:
    """The one worker that judges, on the device that trained."""
    prepare_cpu(config.threads)
    device = "cuda" if config.use_gpu else "cpu"
    return local(device, precision(config.bf16, device))


def probabilities(folder: Location, rows: pa.Table, handed: Handed, worker: Worker) -> np.ndarray:
    """Probabilities (N, K) float32 of a model, or of a teacher's members together.

    Averaged with the mirrored face; a teacher's members are calibrated with its temperature, a
    model's logits are taken as they are.
    """

    def say(model: torch.nn.Module, config: ModelConfig) -> np.ndarray:
        faces = faces_of(rows, handed, config)
        return predict_logits(model.to(worker.device), faces, worker)  # type: ignore[arg-type]

    members = [folder / str(number) for number in range(len(folder.children()))]
    if members and is_complete(members[0]):  # a teacher's members, tuned
        said = [
            (say(model := load_model(at), model.config), read_meta(at)["temperature"])
            for at in members
        ]
        parts = [torch.softmax(torch.from_numpy(logits / t), -1) for logits, t in said]
        return torch.stack(parts).mean(0).numpy()
    if not is_teacher(folder):
        model = load_model(folder)
        return torch.softmax(torch.from_numpy(say(model, model.config)), dim=-1).numpy()
    teacher = load_teacher(folder)
    each = [say(member, member.config) for member in teacher.members]
    return teacher.probs(torch.from_numpy(np.stack(each, axis=1))).numpy()


def embeddings(teacher: Teacher, rows: pa.Table, handed: Handed) -> np.ndarray:
    """Unit embeddings (N, D) float32 of faces (rows with id, image, box, landmarks)."""
    faces = faces_of(rows, handed, teacher.members[0].config)
    parts = []
    for start in range(0, len(faces), BATCH):
        index = np.arange(start, min(start + BATCH, len(faces)))
        parts.append(teacher.represent(torch.from_numpy(faces.take(index)))[0])
    return torch.cat(parts).numpy()


def faces_of(rows: pa.Table, handed: Handed, model: ModelConfig) -> Faces:
    """Judged faces as a model sees them."""
    return pack_rows(rows, "judged", handed.crop, handed.color, handed, model)
