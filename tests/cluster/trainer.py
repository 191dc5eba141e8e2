"""A driver of two Ray Train workers: trains a small network with slow steps and says what came out.

python tests/cluster/trainer.py FOLDER STEPS      PYTHONPATH=tests, RAY_ADDRESS
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training.test_loop import Toy, weights

from pipeline.storage import location
from pipeline.training.launch import launch
from pipeline.training.loop import Objective, Schedule, Step, Worker, fit

PAUSE = 0.3
"""Seconds after every step, which leave time to die."""


def slow(objective: Objective, at: Step) -> None:
    time.sleep(PAUSE)


def train(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Train from the newest checkpoint; every start of a worker leaves a file."""
    home = Path(config["at"])
    (home / f"start-{worker.rank}-{time.time_ns()}").touch()
    mine = replace(worker, checkpoint=home / "checkpoints")
    schedule = Schedule(steps=config["steps"], lr=1e-3)
    fitted = fit(Toy(), schedule, mine, seed=3, hooks=[slow])
    last = fitted.history[-1]
    return {"loss": last["loss"], "step": last["step"], "weights": weights(fitted).tolist()}


def main(at: str, steps: int) -> None:
    """Train on two workers."""
    torch.manual_seed(0)
    found = launch(
        train,
        {"at": at, "steps": steps},
        workers=2,
        use_gpu=False,
        storage=location(at),
        name="try",
        bf16=False,
        threads=1,
        checkpoint_every=2,
    )
    found["starts"] = len(list(Path(at).glob("start-0-*")))
    (Path(at) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from cluster import trainer  # workers import what they run by this name

    trainer.main(sys.argv[1], int(sys.argv[2]))
