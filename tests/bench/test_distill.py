"""Proves what the bench distill times and what its tables and gates say of it."""

import json

import numpy as np
import pytest

from pipeline.training.distilling import DistillConfig
from pipeline.training.faces import ArrayFaces
from pipeline.training.worker import local
from tests.bench import distill_cells, distill_tables
from tests.bench.harness import Cell

NAMES = ("neutral", "happiness")
FOLLOWING = {
    "method": "trajectory",
    "net": {"name": "convnet", "args": {"width": 4, "depth": 1}, "size": 8},
    "experts": {"count": 2, "epochs": 2, "epoch_steps": 1, "batch": 4, "latest": [0, 0]},
}


def _record(method, seed=0, accuracy=0.5, **metrics):
    models = {
        name: {"accuracy": accuracy, "macro_f1": accuracy, "seconds": 20.0}
        for name in distill_tables.MODELS
    }
    metrics = {"seconds_distilling": 100.0, "models": models, **metrics}
    return {"method": method, "seed": seed, "n": 100, "metrics": metrics}


def test_experts_of__are_trained_once_with_figures_of_their_own(tmp_path):
    config = DistillConfig.model_validate(FOLLOWING)
    labels = np.arange(8) % 2
    faces = ArrayFaces(np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), np.uint8))
    cell = Cell("trajectory-s0", "trajectory", 0, {"source": "mined"}, "run")

    def trained():
        return distill_cells.experts_of(config, faces, labels, NAMES, local(), tmp_path, cell)

    made, took = trained()
    again, known = trained()
    assert took["experts_seconds"] >= 0
    assert took["experts_passes"] == 2 * 2 * 1 * 4
    assert known == took
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    for at in (tmp_path / "bench-experts").glob("*.json"):  # trained by an earlier bench
        assert json.loads(at.read_text())["seconds"] > 0
        at.unlink()
    assert trained()[1] == {}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (_record("window"), "100"),
        (_record("trajectory", experts_seconds=40.0), "100 + experts 40"),
        (_record("trajectory"), "100 (a)"),
    ],
)
def test_tables__seconds_of_experts_stand_beside_or_are_said_to_lack(record, said):
    records = {f"mined-{record['method']}-ipc10-s0": record}
    lines = distill_tables._sets(records, "mined")
    assert f"| {said} |" in lines[2]
    assert any("it was not timed" in line for line in lines) == ("(a)" in said)
