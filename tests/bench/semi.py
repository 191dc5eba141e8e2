"""Which way of learning from unlabeled faces beats the labels alone, everything at equal compute.

    OMNIFER_DATA=... python -m tests.bench.semi --jobs 2
    OMNIFER_DATA=... python -m tests.bench.semi --on development --name warm --only fixmatch \
        --set student.mined_weight=3

Every row spends the same image passes, pre-training and the labeler's forwards included; rows that
need a transformer have a control with one. The pool is ferplus10's after its guard; nothing of a
teacher is used. The mining route has its rows, controls and three seeds in the table of ferplus10.
PublicTest is read once per cell; `--on development` judges on the 3,000 Training faces that the run
has left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.active import unpack
from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, settings
from pipeline.metrics import holm, paired_chance, paired_difference
from pipeline.recipe import load
from tests.bench import ferplus10
from tests.bench.harness import ROOT, Bench, Cell, Gate, Records, main
from tests.bench.semi_cells import ROWS, Row, changed, measure

NAME = "semi"
SCREENED = tuple(ROWS)
QUICK = ("control", "simclr", "mae", "fixmatch", "noisy_student", "ssfer")
FRACTIONS = {"10": 0.1, "5": 0.05}
SEEDS = (0, 1, 2)
REPEATED: tuple[str, ...] = ("control",)
"""Rows of three seeds: the control, and the best four once the screen has named them."""
NAMED: str | None = None
"""The row that the gate is about; named from the development set before PublicTest is read."""
PASSES, TINY_PASSES = 600_000, 3_000
UNTIL_GUARD = ("labeled", "survey", "guard")
"""Stages whose settings decide which faces there are."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--on", choices=("public", "development"), default="public")
    parser.add_argument("--name", default=None, help="of an attempt on the development set")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--passes", type=int, default=PASSES, help="of an attempt")
    parser.add_argument("--seeds", default="0", help="of an attempt, such as 0,1")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The screen at 10 % labels, three seeds of what is repeated, the control at 5 %."""
    developing = options.on == "development"
    if (options.sets or options.passes != PASSES) and not developing:
        raise SystemExit("--set, --passes: rows are varied with --on development only")
    if developing and not options.name:
        raise SystemExit("--on development: give the attempt a --name")
    if options.quick:
        return [_cell(options, row, "10", 0) for row in QUICK]
    if developing:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        return [_cell(options, row, "10", seed) for row in SCREENED for seed in seeds]
    found = [_cell(options, row, "10", 0) for row in SCREENED]
    found += [_cell(options, row, "10", seed) for row in REPEATED for seed in SEEDS if seed]
    best = REPEATED[:1] if NAMED is None else (REPEATED[0], NAMED)
    return found + [_cell(options, row, "5", seed) for row in best for seed in SEEDS]


def folder(options: argparse.Namespace) -> str:
    """Where results are kept."""
    return f"{NAME}-dev" if options.on == "development" else NAME


def _cell(options: argparse.Namespace, name: str, labels: str, seed: int) -> Cell:
    sets = [*ferplus10.sets_of("both", seed, quick=options.quick)]
    if not options.quick:
        sets.append(f"labeled.fraction={FRACTIONS[labels]}")
    with ferplus10.portable():
        recipe = load(ROOT / ferplus10.RECIPE, sets)
    row: Row = changed(ROWS[name], options.sets)
    if options.quick:
        row = row.tiny()
    passes = TINY_PASSES if options.quick else options.passes
    identity: dict[str, Any] = {stage: settings(recipe, stage) for stage in UNTIL_GUARD}
    ferplus10.drop_later(identity)
    identity |= {
        "schema": SCHEMA_VERSION,
        "on": options.on,
        "row": row.model_dump(mode="json", exclude_defaults=True),
        "passes": passes,
    }
    full = f"{name}-{labels}-s{seed}"
    whole = labels == "10"
    return Cell(
        name=f"{options.name}-{full}" if options.name else full,
        method=name,
        seed=seed,
        identity=identity,
        run=ferplus10.run_of("part", seed, developing=False) if whole else f"semi-{labels}-s{seed}",
        trainings={digest(identity): float(passes)},
        sets=tuple(sets),
    )


# -- gates ----------------------------------------------------------------------------------------


def judge_finite(records: Records) -> list[str] | None:
    """Accuracy and macro-F1 are numbers between 0 and 1, losses are numbers."""
    faults = [
        f"{cell}: {key} is {record['metrics'][key]}"
        for cell, record in records.items()
        for key in ("accuracy", "macro_f1")
        if not 0 <= record["metrics"][key] <= 1
    ]
    return faults if records else None


def judge_compute(records: Records) -> list[str] | None:
    """No row took more image passes than its budget, and none leaves 2 % of it."""
    faults = []
    for cell, record in records.items():
        took, budget = record["metrics"]["passes"], record["metrics"]["budget"]
        slack = 0.02 * budget + record["metrics"]["step_passes"]
        if not budget - slack <= took <= budget:
            faults.append(f"{cell}: {took:,.0f} passes of {budget:,.0f}")
    return faults if records else None


def judge_gain(records: Records) -> list[str] | None:
    """The named row: 1.5 points over its control in three seeds, with all that goes with it."""
    if NAMED is None:
        return None
    pair = over_seeds(records, NAMED)
    if pair is None or len(pair[0]) < len(SEEDS):
        return None
    ours, control = pair
    value, gaps = difference(records, NAMED)
    faults = []
    if value.value < 0.015:
        faults.append(f"{NAMED}: mean gain {100 * value.value:+.2f} points, not 1.5")
    if len({gap > 0 for gap in gaps}) > 1:
        faults.append(f"{NAMED}: the sign differs between seeds")
    if value.low <= 0:
        faults.append(f"{NAMED}: the interval from {100 * value.low:+.2f} does not exclude 0")
    f1 = [np.mean([record["metrics"]["macro_f1"] for record in side]) for side in (ours, control)]
    if f1[0] < f1[1]:
        faults.append(f"{NAMED}: macro-F1 {f1[0]:.4f}, lower than the control's {f1[1]:.4f}")
    return faults


def control_of(row: str) -> str:
    """The control with the same network."""
    return "control_vit" if ROWS[row].vit else "control"


def over_seeds(
    records: Records, row: str, labels: str = "10"
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] | None:
    """A row's records and its control's, of the seeds that both have; None where there is none."""
    names = [(f"{row}-{labels}-s{s}", f"{control_of(row)}-{labels}-s{s}") for s in SEEDS]
    both = [(a, b) for a, b in names if a in records and b in records]
    if not both:
        return None
    return [records[a] for a, _ in both], [records[b] for _, b in both]


def difference(records: Records, row: str, labels: str = "10") -> tuple[Any, list[float]]:
    """Row minus control: paired bootstrap of the seed-averaged correctness, and each seed's."""
    right = _correct(records, row, labels)
    gaps = (right[0].mean(1) - right[1].mean(1)).tolist()
    return paired_difference(right[0].mean(0), right[1].mean(0), 2000, 0), gaps


def chances(records: Records, labels: str = "10") -> dict[str, float]:
    """P-value of a row's difference from its control, of all rows but the controls.

    That of the named row, which was chosen before, stands alone; those of all others that were
    looked at are corrected for their number.
    """
    rows = [row for row in ROWS if row != control_of(row) and over_seeds(records, row, labels)]
    alone = {}
    for row in rows:
        ours, control = _correct(records, row, labels)
        alone[row] = paired_chance(ours.mean(0), control.mean(0))
    others = [row for row in rows if row != NAMED]
    return alone | dict(zip(others, holm([alone[row] for row in others]), strict=True))


def _correct(records: Records, row: str, labels: str) -> list[np.ndarray]:
    """Correctness (S, N) of a row and of its control, of the seeds that both have."""
    pair = over_seeds(records, row, labels)
    assert pair is not None
    return [
        np.stack([unpack(r["metrics"]["correct"], r["n"]) for r in side]).astype(float)
        for side in pair
    ]


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures", "always", judge_finite),
        Gate("equal compute", "always", judge_compute),
        Gate("the named row gains 1.5 points", "full", judge_gain),
    ),
    folder=folder,
    arguments=arguments,
    speed=ferplus10.speed,
)

if __name__ == "__main__":
    sys.exit(main(BENCH))
