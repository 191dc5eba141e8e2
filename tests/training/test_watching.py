"""Proves that an online student's guesses are kept with its history and change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import NAMES, labeled

from pipeline.augment import plain
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training import loop
from pipeline.training.loop import Step, local
from pipeline.training.studying import train_student
from pipeline.training.watching import guesses_at, watcher
from training.test_semi import online, semi
from training.test_student import config, mined

WORKER = local(dtype=torch.float32)


def named() -> object:
    given = mined()
    return replace(given, ids=[f"m{i}" for i in range(len(given))])


@pytest.mark.parametrize("labeler", ["ema", "model"])
def test_guess__what_a_training_step_would_make_of_plain_views(labeler: str) -> None:
    settings = online({"rule": "fixed", "tau": 0.3}, labeler=labeler)
    objective, rows = semi(settings), np.array([3, 0, 7])
    model = objective.modules()["model"].train()
    average = semi(settings).modules().eval()
    with torch.no_grad():
        average["model"].net.fc.weight *= -1
    codes, weights = objective.guess(rows, Step(0, 9, 0, WORKER, average))
    asked = average["model"] if labeler == "ema" else model.eval()
    pixels = torch.from_numpy(mined().faces.take(rows))
    probs = asked(plain(pixels, asked.config.size, torch.Generator())).softmax(1).tolist()
    assert codes.tolist() == [row.index(max(row)) for row in probs]
    assert weights.tolist() == [float(max(row) >= 0.3) for row in probs]


def test_watcher__a_table_per_row_of_the_history_and_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    settings, faces = online({"rule": "fixed", "tau": 0.3}, steps=5, ema=0.9), named()
    hook = watcher(faces, NAMES, at := location(tmp_path))
    given = (settings, labeled(40), faces, NAMES, WORKER)
    watched = train_student(*given, seed=0, hooks=[hook])
    alone = train_student(*given, seed=0)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert watched.fitted.passes == alone.fitted.passes
    steps = [int(row["step"]) for row in watched.fitted.history]
    assert steps == [2, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [guesses_at(at, s).name for s in steps]
    last = read_table(guesses_at(at, 5))
    assert last["id"].to_pylist() == list(faces.ids)
    assert set(last["label"].to_pylist()) <= set(NAMES)
    assert set(last["weight"].to_pylist()) <= {0.0, 1.0}


def test_watcher__leaves_other_objectives_alone(tmp_path: Path) -> None:
    hook = watcher(named(), NAMES, location(tmp_path))
    train_student(config(steps=2), labeled(40), mined(), NAMES, WORKER, seed=0, hooks=[hook])
    assert list(tmp_path.iterdir()) == []
