"""Proves that the recipe's own trainings are timed step by step, and nothing is left changed."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from helpers.flow import tiny

from pipeline.planning import rehearsal
from pipeline.planning.rehearsal import STEPS, WARM, Rehearsed, rehearse
from pipeline.training.worker import local

CLASSES = ("neutral", "happiness", "sadness")


def test_rehearsed__rate_and_spread_of_known_steps() -> None:
    timed = Rehearsed(10, (1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0))
    assert timed.rate == pytest.approx(80 / 12)
    assert timed.spread == (pytest.approx(5), pytest.approx(10))


def test_rehearse__every_training_of_the_recipe_with_its_passes() -> None:
    threads = torch.get_num_threads()
    found = rehearse(tiny("train.threads=1"), CLASSES, steps=4)
    assert torch.get_num_threads() == threads
    assert {name: len(one.seconds) for name, one in found.items()} == {
        "teach": 4,
        "student": 4,
        "control": 4,
        "distill": 4,
    }
    assert all(second > 0 for one in found.values() for second in one.seconds)
    # as the helper's recipe says: batches 32, 16 + 32 and, per class, 1 learned and 4 seen at 1/3
    assert found["teach"].passes == 32
    assert found["student"].passes == found["control"].passes == 48
    assert found["distill"].passes == pytest.approx(3 * (1 + 4 / 3))


def test_rehearse__without_a_distilled_set() -> None:
    assert "distill" not in rehearse(tiny("distill=null", "tune=null"), CLASSES, steps=1)


def test_timed__leaves_out_the_first_steps_and_stops_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(hooks) -> None:  # type: ignore[no-untyped-def]
        at = SimpleNamespace(worker=local())
        for number in range(100):
            time.sleep(0.05 if number < WARM else 0.01)
            hooks[0](None, at)
        raise AssertionError("was not stopped")

    seconds = rehearsal._timed(train, STEPS)
    assert len(seconds) == STEPS
    assert sorted(seconds)[STEPS // 2] < 0.05  # the slow first ones are not among them
    monkeypatch.setattr(rehearsal, "BUDGET", 0.0)
    assert len(rehearsal._timed(train, STEPS)) == rehearsal.LEAST + 1
