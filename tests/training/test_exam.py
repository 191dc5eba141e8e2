"""Proves what models say of judged faces against forward passes by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.tiny import NAMES, tiny_model, tiny_teacher

from pipeline.artifacts import save_model, save_teacher
from pipeline.images import Crop, face
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.storage import location
from pipeline.training.exam import embeddings, examiner, probabilities
from pipeline.training.handed import Handed
from pipeline.training.runs import TrainConfig

COUNT = 9
WORKER = examiner(TrainConfig(bf16=False, threads=1))


@pytest.fixture
def rows() -> pa.Table:
    return (
        SyntheticSet(count=COUNT, test_count=0)
        .records("set")
        .table.select(["id", "image", "box", "landmarks"])
    )


@pytest.fixture
def handed(tmp_path: Path) -> Handed:
    return Handed(
        labeled="", guard=None, crop=Crop(), color="gray", scratch=str(tmp_path / "cache")
    )


def pixels(rows: pa.Table) -> torch.Tensor:
    images = rows["image"].to_pylist()
    seen = [face(image, crop=Crop(), color="gray", size=16) for image in images]
    return torch.from_numpy(np.stack(seen))


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = x.float() / 255
        return (model(x) + model(x.flip(-1))) / 2


def test_probabilities__of_a_model(rows: pa.Table, handed: Handed, tmp_path: Path) -> None:
    model = tiny_model(4)
    save_model(model, location(tmp_path / "model"), {})
    found = probabilities(location(tmp_path / "model"), rows, handed, WORKER)
    expected = torch.softmax(logits(model, pixels(rows)), 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_probabilities__of_a_teacher(rows: pa.Table, handed: Handed, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    save_teacher(teacher, location(tmp_path / "teacher"))
    found = probabilities(location(tmp_path / "teacher"), rows, handed, WORKER)
    each = [torch.softmax(logits(m, pixels(rows)) / 1.7, 1) for m in teacher.members]
    assert found.shape == (COUNT, len(NAMES))
    np.testing.assert_allclose(found, torch.stack(each).mean(0).numpy(), atol=1e-5)


def test_embeddings__of_length_one_and_as_the_pool_is_seen(rows: pa.Table, handed: Handed) -> None:
    teacher = tiny_teacher()
    found = embeddings(teacher, rows, handed)
    assert found.shape == (COUNT, teacher.width)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, teacher.represent(pixels(rows))[0].numpy(), atol=1e-6)
