"""How fast the training loop is, against a plain PyTorch loop that does the same.

    python -m tests.bench.training_speed [--quick] [--steps N] [--rounds N]

compact_resnet and invented 48 px faces in memory, the same views, precision, clipping, AdamW and
average of the weights on both sides; the plain loop is written out below and uses torch's own
`AveragedModel`. A cell is one round: both run once, each in its own process, in an order that turns
from round to round; figures are medians over the rounds. Nothing else may run beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.augment import VIEWS
from pipeline.models import ModelConfig
from pipeline.training.data import LabeledFaces
from pipeline.training.faces import ArrayFaces
from pipeline.training.loop import Objective, Step, fit, local, precision, prepare_cpu
from pipeline.training.supervised import Supervised, SupervisedConfig, new_model
from tests.bench.harness import Bench, Cell, Context, Gate, Records, main
from tests.bench.passes import run_json

NAME = "training_speed"
ROWS = ("loop", "plain")
LEAST = 0.95
FACES, CLASSES, WARM = 4096, 8, 10
NAMES = tuple(f"c{i}" for i in range(CLASSES))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--steps", type=int, default=200, help="that are timed, after some others")
    parser.add_argument("--rounds", type=int, default=3)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Rounds."""
    rounds, steps = (1, 10) if options.quick else (options.rounds, options.steps)
    base = {"steps": steps, "batch": 128, "faces": FACES}
    return [Cell(f"round{i}", "rows", i, {**base, "round": i}, NAME) for i in range(rounds)]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run both in turn."""
    home = context.cache / NAME
    home.mkdir(parents=True, exist_ok=True)
    turn = cell.seed % len(ROWS)
    found = {}
    for name in (*ROWS[turn:], *ROWS[:turn]):
        said = ["tests.bench.training_speed", "row", name, str(cell.identity["steps"])]
        found[name] = run_json(said, home / f"{name}.log", 1800.0)
        print(f"  {name}: {found[name]['rate']:.0f} img/s", flush=True)
    return {
        "rows": found,
        "trained_in": str(precision(None, "cpu")).removeprefix("torch."),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def config_of(steps: int) -> SupervisedConfig:
    """What both train."""
    return SupervisedConfig(model=ModelConfig(), steps=steps, batch=128, imbalance="none")


def data() -> LabeledFaces:
    """Faces of noise: their content takes no time."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (FACES, 1, 48, 48), np.uint8)
    return LabeledFaces(ArrayFaces(pixels), np.arange(FACES) % CLASSES)


def loop(steps: int) -> dict[str, float]:
    """The project's loop."""
    config, marks = config_of(WARM + steps), []
    objective = Supervised(new_model(config.model, NAMES, 0), config, data())

    def mark(_: Objective, at: Step) -> None:
        marks.append(time.perf_counter())

    worker = local("cpu", precision(None, "cpu"))
    fitted = fit(objective, config, worker, seed=0, hooks=[mark])
    rate = steps * config.batch / (marks[-1] - marks[WARM - 1])
    return {"rate": rate, "loss": fitted.history[-1]["loss"]}


def plain(steps: int) -> dict[str, float]:
    """What one writes by hand."""
    config, faces = config_of(WARM + steps), data()
    model = new_model(config.model, NAMES, 0).to(memory_format=torch.channels_last).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    pixels = torch.from_numpy(faces.faces.take(np.arange(FACES)))
    labels = torch.from_numpy(faces.labels)
    generator, marks, total = torch.Generator().manual_seed(0), [], 0.0
    dtype = precision(None, "cpu")
    for _ in range(config.steps):
        index = torch.randint(FACES, (config.batch,), generator=generator)
        x = VIEWS[config.augment](pixels[index], 48, generator)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=config.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        total += loss.item()
        marks.append(time.perf_counter())
    rate = steps * config.batch / (marks[-1] - marks[WARM - 1])
    return {"rate": rate, "loss": total / config.steps}


def ratios(records: Records) -> list[float]:
    """Loop over plain, round by round."""
    rows = [record["metrics"]["rows"] for record in records.values()]
    return [row["loop"]["rate"] / row["plain"]["rate"] for row in rows]


def judge_trained(records: Records) -> list[str] | None:
    """Both trained: finite losses near those of chance."""
    faults = [
        f"{cell}: {name} has loss {row['loss']:.3f} at {row['rate']:.0f} img/s"
        for cell, record in records.items()
        for name, row in record["metrics"]["rows"].items()
        if not (0 < row["loss"] < 4 and row["rate"] > 0)
    ]
    return faults if records else None


def judge_speed(records: Records) -> list[str] | None:
    """At least 0.95 of the plain loop."""
    if not records:
        return None
    value = float(np.median(ratios(records)))
    return [] if value >= LEAST else [f"the loop runs at {value:.3f} of a plain one, not {LEAST}"]


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("both trained", "always", judge_trained),
        Gate("0.95 of a plain loop", "full", judge_speed),
    ),
    folder=lambda options: NAME,
    arguments=arguments,
)


if __name__ == "__main__":
    if sys.argv[1:2] == ["row"]:
        prepare_cpu(len(os.sched_getaffinity(0)))
        made = {"loop": loop, "plain": plain}[sys.argv[2]](int(sys.argv[3]))
        print(json.dumps(made))
    else:
        sys.exit(main(BENCH))
