"""Which way of learning from votes that disagree is nearer to the raters, at equal compute.

    OMNIFER_DATA=... python -m tests.bench.weak --jobs 2
    OMNIFER_DATA=... python -m tests.bench.weak --on development --name slower --only proden \
        --set partial.momentum=0.95

FERPlus, all of Training less the development faces and twins of test faces: the faces with a
majority, or every voted face. All rows spend the same image passes, reconstruction included: four
epochs of the voted faces by small networks of 32 px, so that the grid fits two cores. They are
judged on every voted face of PublicTest against the shares of its votes. The baseline of every
row is cross entropy on the majority label of the faces that have one, of its network and, for
transformers, from the same reconstruction. PublicTest is read once per cell; `--on development`
judges on 3,000 Training faces of the same kind as those that train.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.config import digest
from pipeline.job import SCHEMA_VERSION, settings
from pipeline.recipe import load
from tests.bench import ferplus10
from tests.bench.harness import ROOT, Bench, Cell, Gate, Records, main
from tests.bench.semi import judge_compute
from tests.bench.weak_cells import ROWS, Row, changed, measure

NAME = "weak"
SETS = ("majority", "voted")
SEEDS = (0, 1, 2)
QUICK = ("ce", "pico", "decoder", "mae_decoder")
PASSES, TINY_PASSES = 100_000, 2_000
LOWER = ("ece", "kl", "js", "brier")
"""Metrics of which less is better."""
HIGHER = ("accuracy", "macro_f1", "top2", "accuracy_agreed", "accuracy_disputed")
WEAK = ("proden", "pico", "decoder", "mae_decoder")
"""Rows that learn from candidates; shares of the votes as soft labels are a baseline."""
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
UNTIL_GUARD = ("labeled", "survey", "guard")
TEST = {
    "kind": "ferplus",
    "path": "$OMNIFER_DATA/fer2013/fer2013.parquet",
    "rule": "voted",
    "split": "PublicTest",
}
POOL = {"kind": "synthetic", "name": "faces", "count": 128}
"""A recipe needs one; nothing of it is used."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--on", choices=("public", "development"), default="public")
    parser.add_argument("--name", default=None, help="of an attempt on the development set")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--passes", type=int, default=PASSES, help="of an attempt")
    parser.add_argument("--seeds", default="0", help="of an attempt, such as 0,1")


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every row on both sets of faces, three seeds each."""
    developing = options.on == "development"
    if (options.sets or options.passes != PASSES) and not developing:
        raise SystemExit("--set, --passes: rows are varied with --on development only")
    if developing and not options.name:
        raise SystemExit("--on development: give the attempt a --name")
    if options.quick:
        return [_cell(options, row, "voted", 0) for row in QUICK]
    if not developing:
        return [
            _cell(options, row, faces, seed) for row in ROWS for faces in SETS for seed in SEEDS
        ]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    named = [(row, faces, seed) for row in ROWS for faces in SETS for seed in seeds]
    # What is set need not fit the rows that are left out.
    wanted = options.only or ""
    return [_cell(options, *one) for one in named if wanted in _name(options, *one)]


def folder(options: argparse.Namespace) -> str:
    """Where results are kept."""
    return f"{NAME}-dev" if options.on == "development" else NAME


def _name(options: argparse.Namespace, row: str, faces: str, seed: int) -> str:
    full = f"{row}-{faces}-s{seed}"
    return f"{options.name}-{full}" if options.name else full


def _cell(options: argparse.Namespace, name: str, faces: str, seed: int) -> Cell:
    sets = _sets(faces, quick=options.quick)
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
        "seed": seed,
    }
    trainings = {digest(identity): passes * (1 - row.pretrain_share)}
    if row.pretrain is not None:
        trainings[f"backbone {faces} {seed} {passes}"] = passes * row.pretrain_share
    return Cell(
        name=_name(options, name, faces, seed),
        method=name,
        seed=seed,
        identity=identity,
        run=f"{NAME}-{faces}",
        trainings=trainings,
        sets=tuple(sets),
    )


def _sets(faces: str, *, quick: bool) -> list[str]:
    """What is set in the recipe; the faces are the same for every seed."""
    shared = [f"pool={json.dumps([POOL])}", "student.source_share={}"]
    if quick:
        labeled = f"{{kind: synthetic, count: 500, test_count: 200, rule: {faces}}}"
        return [*ferplus10.QUICK, f"labeled={labeled}", *shared]
    test = json.dumps(TEST)
    return ["labeled.fraction=null", f"labeled.rule={faces}", f"labeled.test={test}", *shared]


# -- gates ----------------------------------------------------------------------------------------


def judge_finite(records: Records) -> list[str] | None:
    """Shares are between 0 and 1, divergences are numbers of at least 0."""
    faults = [
        f"{cell}: {key} is {record['metrics'][key]}"
        for cell, record in records.items()
        for key in (*LOWER, *HIGHER)
        if not 0 <= record["metrics"][key] <= (float("inf") if key == "kl" else 2)
    ]
    return faults if records else None


def judge_votes(records: Records) -> list[str] | None:
    """Learning from candidates in one way is nearer to the votes than from majority labels."""
    there = [(row, faces) for row in WEAK for faces in SETS]
    verdicts = [
        [verdict(records, row, faces, key) for key in ("kl", "brier")] for row, faces in there
    ]
    if [BETTER, BETTER] in verdicts:
        return []
    if any(None in pair for pair in verdicts):
        return None
    return ["no row is, on both KL and Brier in all seeds"]


def baseline_of(row: str) -> str:
    """The row of majority labels with the same network."""
    return "mae" if ROWS[row].vit else "ce"


def verdict(records: Records, row: str, faces: str, key: str) -> str | None:
    """Whether a row is better or worse than its baseline in all seeds, or undecided.

    None: cells are missing, or the row is the baseline.
    """
    found = gaps(records, row, faces, key)
    if len(found) < len(SEEDS) or (row, faces) == (baseline_of(row), SETS[0]):
        return None
    gains = [-gap if key in LOWER else gap for gap in found]
    if all(gain > 0 for gain in gains):
        return BETTER
    return WORSE if all(gain < 0 for gain in gains) else UNDECIDED


def gaps(records: Records, row: str, faces: str, key: str) -> list[float]:
    """Row minus baseline, of every seed that both have."""
    names = [(f"{row}-{faces}-s{s}", f"{baseline_of(row)}-{SETS[0]}-s{s}") for s in SEEDS]
    return [
        figure(records[ours], key) - figure(records[theirs], key)
        for ours, theirs in names
        if ours in records and theirs in records
    ]


def figure(record: Mapping[str, Any], key: str) -> float:
    """A metric of a cell."""
    return float(record["metrics"][key])


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("finite figures", "always", judge_finite),
        Gate("equal compute", "always", judge_compute),
        Gate("candidates beat majority labels on KL and Brier in all seeds", "full", judge_votes),
    ),
    folder=folder,
    arguments=arguments,
    speed=ferplus10.speed,
)

if __name__ == "__main__":
    sys.exit(main(BENCH))
