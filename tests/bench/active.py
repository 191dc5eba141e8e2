"""Which faces to have annotated next: 13 acquisition functions on real faces, oracle labels.

    OMNIFER_DATA=... python -m tests.bench.active --jobs 2

The recipe activefer at the size of two cores: FER2013's Training faces, 10 % of the labels first,
5 % a round, seven rounds, three seeds, from random weights and from a backbone that SimCLR made of
the Training faces. PublicTest is judged in every round and nothing is chosen on it. Every training
is four epochs over the labels there are, faces of 32 px as they are: 11,000 to 44,000 image passes,
13 s of one core on average; rate, batch and views were chosen on 3,000 Training faces. Strategies
of a seed and start share the first round's model; all seeds share the backbone. DeepFool looks at
4,000 faces in at most three steps, GLISTER at 5,000. Everything is float32, so that cells of
several machines stand beside one another. A cell is one strategy, start and seed; a call that was
stopped continues after the last finished round. The grid takes 4 to 5 core hours.

The paper trains a ResNet-18 of 48 px for 200 epochs, so its column is another size of experiment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.acquisition.functions import ACQUISITIONS
from pipeline.active import BASELINE, ActiveConfig, unpack
from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, settings
from pipeline.metrics import Interval, paired_difference
from pipeline.recipe import Recipe, load
from pipeline.trials import trial_name
from tests.bench import ferplus10
from tests.bench.active_cells import measure, rate
from tests.bench.harness import ROOT, Bench, Cell, Gate, Record, Records, main

NAME = "active"
RECIPE = "jobs/recipes/activefer.yaml"
SEEDS = (0, 1, 2)
STARTS = ("scratch", "pretrained")
UNSURE = ("entropy", "margin", "least_confidence")
"""Functions that beat random by the most in the paper, where they need no more than answers."""
EPOCHS, BATCH, PRETRAIN_STEPS = 4, 64, 600
NET = "{name: compact_resnet, args: {widths: [16, 32, 64, 128]}, size: 32, dropout: %s}"
SMALL = (
    "train={bf16: false}",
    "stream.object_store_mb=300",
    f"pretrain={{method: simclr, steps: {PRETRAIN_STEPS}, batch: 256, lr: 2e-3, temperature: 0.2, "
    f"probe_every: null, model: {NET % 0}}}",
    f"active.epochs={EPOCHS}",
    f"active.train={{batch: {BATCH}, lr: 1e-2, ema: null, smoothing: 0, augment: plain, "
    f"model: {NET % 0.2}}}",
    "active.look={passes: 10, boundary_faces: 4000, boundary_steps: 3}",
    "active.settings.glister={candidates: 5000}",
)
"""What is set in the recipe for two cores: half the widths, 32 px, a third of the time."""
FACES, QUICK_FACES = 27_570, 290
"""Training faces that are no twins of test faces, about; only for the estimate."""
TINY_NET = "{name: compact_resnet, args: {widths: [8, 16]}, size: 24, dropout: %s}"
QUICK = (
    "labeled={kind: synthetic, count: 300, test_count: 100}",
    "pool=[{kind: synthetic, name: faces, count: 100}]",
    f"pretrain={{steps: 5, batch: 32, probe_every: null, model: {TINY_NET % 0}}}",
    f"active.train={{batch: 16, ema: null, model: {TINY_NET % 0.3}}}",
    "active.rounds=3",
)
QUICK_STRATEGIES = (BASELINE, "bald")
UNTIL_PRETRAIN = ("labeled", "survey", "guard", "pretrain")
"""Stages whose settings decide which faces and which backbone there are."""


def cells(options: argparse.Namespace) -> list[Cell]:
    """One per start, seed and strategy; those of a start and seed run one after another."""
    recipe = recipe_of(quick=options.quick)
    seeds, strategies = (SEEDS[:1], QUICK_STRATEGIES) if options.quick else (SEEDS, ACQUISITIONS)
    return [
        _cell(recipe, strategy, start, seed, quick=options.quick)
        for start in STARTS
        for seed in seeds
        for strategy in strategies
    ]


def sets_of(*, quick: bool) -> tuple[str, ...]:
    """What is set in the recipe."""
    return (*SMALL, *QUICK) if quick else SMALL


def recipe_of(*, quick: bool) -> Recipe:
    """The recipe at the size of two cores, the data's folder by its variable."""
    with ferplus10.portable():
        return load(ROOT / RECIPE, sets_of(quick=quick))


def config_of(recipe: Recipe) -> ActiveConfig:
    """What the recipe compares."""
    assert recipe.active is not None
    return recipe.active


def _cell(recipe: Recipe, strategy: str, start: str, seed: int, *, quick: bool) -> Cell:
    stages = UNTIL_PRETRAIN if start == "pretrained" else UNTIL_PRETRAIN[:-1]
    config = config_of(recipe)
    own = config.model_dump(mode="json", exclude={"strategies", "seeds", "starts", "settings"})
    for name, value in ferplus10.SCHEDULE_LATER:
        if own["train"][name] == value:
            del own["train"][name]
    identity: dict[str, Any] = {stage: settings(recipe, stage) for stage in stages}
    ferplus10.drop_later(identity)
    identity |= {"schema": SCHEMA_VERSION, "active": own, "start": start, "seed": seed}
    identity["bf16"] = recipe.train.bf16
    each = [passes_of(config, number, quick=quick) for number in range(config.rounds)]
    trainings = {digest(identity): each[0]}
    identity |= {"strategy": strategy, "settings": config.settings.get(strategy, {})}
    trainings[digest(identity)] = sum(each[1:])
    return Cell(
        name=trial_name(strategy, start, seed),
        method=strategy,
        seed=seed,
        identity=identity,
        run=f"{NAME}-{start}-s{seed}",
        trainings=trainings,
        sets=sets_of(quick=quick),
    )


def passes_of(config: ActiveConfig, number: int, *, quick: bool) -> float:
    """About how many image passes the training of a round takes."""
    assert config.epochs is not None
    faces = QUICK_FACES if quick else FACES
    return config.epochs * faces * (config.start + number * config.step)


# -- what records say -----------------------------------------------------------------------------


def of(records: Records, strategy: str, start: str) -> list[Record]:
    """Records of a strategy and start, by seed."""
    names = (trial_name(strategy, start, seed) for seed in SEEDS)
    return [records[name] for name in names if name in records]


def right(found: Sequence[Record], number: int) -> np.ndarray:
    """Share of seeds that are right after a round, by test face (T,)."""
    each = [unpack(r["metrics"]["rounds"][number]["correct"], r["n"]) for r in found]
    return np.mean(each, axis=0)


def difference(
    records: Records, one: tuple[str, str], other: tuple[str, str], number: int
) -> Interval | None:
    """One (strategy, start) minus another after a round, over the seeds that both have."""
    pairs = [
        (records[a], records[b])
        for seed in SEEDS
        if (a := trial_name(*one, seed)) in records and (b := trial_name(*other, seed)) in records
    ]
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    return paired_difference(right(ours, number), right(theirs, number))


# -- gates ----------------------------------------------------------------------------------------


def judge_finite(records: Records) -> list[str] | None:
    """Accuracy and macro-F1 of every round are between 0 and 1."""
    faults = [
        f"{cell} round {made['number']}: {key} is {made[key]}"
        for cell, record in records.items()
        for made in record["metrics"]["rounds"]
        for key in ("accuracy", "macro_f1")
        if not 0 <= made[key] <= 1
    ]
    return faults if records else None


def judge_labels(records: Records) -> list[str] | None:
    """Every strategy had the same number of labels in every round, none of them twice."""
    faults = []
    for cell, record in records.items():
        said = record["metrics"]
        first, budget = said["first"], said["budget"]
        for made in said["rounds"]:
            wanted, number = first + made["number"] * budget, made["number"]
            if made["labels"] != wanted or sum(made["class_counts"].values()) != wanted:
                faults.append(f"{cell} round {number}: {made['labels']} labels, not {wanted}")
    return faults if records else None


def judge_shared(records: Records) -> list[str] | None:
    """Strategies of a seed and start have the same first round."""
    firsts: dict[tuple[str, int], set[str]] = {}
    for record in records.values():
        key = (record["metrics"]["start"], record["seed"])
        firsts.setdefault(key, set()).add(record["metrics"]["rounds"][0]["correct"])
    several = {key: len(found) for key, found in firsts.items() if len(found) > 1}
    faults = [f"{start}, seed {seed}: {n} first rounds" for (start, seed), n in several.items()]
    return faults if records else None


def judge_unsure(records: Records) -> list[str] | None:
    """As in the paper: from scratch, asking for the unsure beats random after the last round."""
    values = [difference(records, (name, "scratch"), (BASELINE, "scratch"), -1) for name in UNSURE]
    if any(len(of(records, name, "scratch")) < len(SEEDS) for name in (*UNSURE, BASELINE)):
        return None
    said = [
        f"{name} {100 * v.value:+.2f} ({100 * v.low:+.2f} to {100 * v.high:+.2f})"
        for name, v in zip(UNSURE, values, strict=True)
        if v is not None
    ]
    beats = any(value is not None and value.low > 0 for value in values)
    return [] if beats else [f"minus random: {', '.join(said)}"]


def judge_start(records: Records) -> list[str] | None:
    """Pre-training lifts the first round."""
    if any(len(of(records, BASELINE, start)) < len(SEEDS) for start in STARTS):
        return None
    value = difference(records, (BASELINE, "pretrained"), (BASELINE, "scratch"), 0)
    assert value is not None
    low, high = 100 * value.low, 100 * value.high
    return [] if low > 0 else [f"by {100 * value.value:+.2f} points ({low:+.2f} to {high:+.2f})"]


def speed(threads: int) -> float:
    """img/s of 20 training steps on invented faces."""
    recipe = recipe_of(quick=False)
    return rate(config_of(recipe).train, threads, recipe.train)


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures", "always", judge_finite),
        Gate("labels as planned", "always", judge_labels),
        Gate("one first round per seed and start", "always", judge_shared),
        Gate("asking for the unsure beats random", "full", judge_unsure),
        Gate("pre-training lifts the first round", "full", judge_start),
    ),
    folder=lambda options: NAME,
    speed=speed,
)

if __name__ == "__main__":
    sys.exit(main(BENCH))
