"""Proves what the bench distill times and what its tables and gates say of it."""

import json

import numpy as np
import pytest

from pipeline.active import pack
from pipeline.training.distilling import DistillConfig
from pipeline.training.faces import ArrayFaces
from pipeline.training.worker import local
from tests.bench import distill, distill_cells, distill_tables
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


def _judged(share, seconds=50.0):
    right = pack(np.arange(1000) < round(share * 1000))
    return {
        "accuracy": share, "macro_f1": share, "passes": 9.0, "seconds": seconds, "correct": right
    }  # fmt: skip


def _tunes(monkeypatch, student=0.8, seconds=50.0, seeds=distill.SEEDS, host="here"):
    """Tuned teachers of all seeds, beside students of some."""
    names = [name for name in distill_tables.TUNED if name != distill_tables.MINED]
    models = {name: _judged(0.7) for name in names} | {"distilled": _judged(0.75, seconds)}
    own = {
        "models": {"student": _judged(student)},
        "student_steps": 10,
        "student_batch": 5,
        "seconds_per_stage": {"student": 2000.0},
    }
    students = {
        seed: {"seed": seed, "n": 1000, "host": host, "method": "both", "metrics": own}
        for seed in seeds
    }
    monkeypatch.setattr(distill, "students", lambda: students)
    return {
        f"mined-tune-ipc10-s{seed}": {
            "cell": f"tune-s{seed}", "method": "tune", "seed": seed, "n": 1000, "host": "here",
            "metrics": {"models": models},
        }
        for seed in distill.SEEDS
    }  # fmt: skip


def test_mined_alone__labeled_faces_stand_in_where_none_was_mined():
    labels = np.array([0, 1, 2, 2, 0, 1, 0])
    assert distill_cells.mined_alone(labels, 4).tolist() == [-1, -1, 2, 2, 0, 1, 0]


def test_tuned__labeled_and_mined_stand_beside_with_the_share_that_is_kept(monkeypatch):
    lines = distill_tables._tuned(_tunes(monkeypatch))
    (row,) = (line for line in lines if "student on labeled + mined" in line)
    assert "| +10.00 (" in row
    assert row.endswith("| 50 | 2,000 |")
    assert lines[-1].endswith("(labeled + mined - teacher): 50% (3 of 3 seeds).")
    assert sum("(b)" in line for line in lines) == 3  # two rows and the note
    lines = distill_tables._tuned(_tunes(monkeypatch, student=0.7))
    assert "none is given" in lines[-1]
    lines = distill_tables._tuned(_tunes(monkeypatch, seeds=()))
    assert any("labeled + mined" in line and "missing" in line for line in lines)


def test_judge_quick__compares_seconds_of_one_machine(monkeypatch):
    assert distill.judge_quick(_tunes(monkeypatch)) == []
    assert distill.judge_quick(_tunes(monkeypatch, host="elsewhere")) is None
    assert distill.judge_quick(_tunes(monkeypatch, seeds=(0, 1))) is None
    faults = distill.judge_quick(_tunes(monkeypatch, seconds=101.0, seeds=(0,)))
    assert faults == ["tune-s0: 101 s, 5.1% of 2,000 s"]


def test_against__every_learned_method_beside_both_kinds_of_random_faces():
    records = {}
    for seed in distill.SEEDS:
        for method, accuracy in (("random", 0.4), ("window", 0.5), ("gradient", 0.4)):
            record = _record(method, seed, accuracy + seed / 100)
            records[f"mined-{method}-ipc10-s{seed}"] = record
    lines = distill_tables._against(records)
    for method, said in (("window", "+10.00, beyond"), ("gradient", "+0.00, within")):
        found = [line for line in lines if line.startswith(f"| {method}")]
        assert len(found) == len(distill.OWN)
        assert all(line.count(f"{said} the spread") == 2 for line in found)
