"""Every format, whole and damaged: read back as written, rows with reasons, or one clear line.

    OMNIFER_DATA=... python -m tests.bench.formats [--quick] [--only pool-recordio]

Cells `pool-*` and `labeled-*` write real faces in one format, by the writers of the tests, spoil
them in the ways that the format can be spoiled, and compare ids, order, bytes, groups, boxes,
labels and splits, row by row; a damaged file must end in the rows and reasons that its damage calls
for, or be refused in one line. Cells `omni-*` run the paper's recipe on S3 (tests/bench/omni.py).
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections import Counter
from typing import Any

from pipeline.labeled.codes import FER2013
from tests.bench import formats_labeled, formats_pool, formats_records, formats_tables, omni
from tests.bench.cases import Case, Read, outcome
from tests.bench.harness import Bench, Cell, Context, Gate, Record, Records, main
from tests.helpers import real

NAME = "formats"
FACES = 200
QUICK = 40
POOL = (
    "folder", "parquet", "lance", "webdataset", "webdataset_gz", "zipped", "recordio",
    "msceleb_tsv",
)  # fmt: skip
LABELED = (
    "rafdb", "affectnet_2017", "affectnet_2021", "fer2013", "ferplus", "sfew", "expw", "affwild2",
    "kdef", "ckplus", "folder", "table",
)  # fmt: skip


def cells(options: argparse.Namespace) -> list[Cell]:
    """One cell per format, and the runs on S3."""
    faces = QUICK if options.quick else FACES
    names = [f"pool-{name}" for name in POOL] + [f"labeled-{name}" for name in LABELED]
    made = [Cell(name, name.partition("-")[0], 0, {"faces": faces}, NAME) for name in names]
    return [*made, *omni.cells(options.quick)]


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Write, spoil, read and compare every case of a format."""
    if real.missing():
        raise RuntimeError(f"skipped: {real.MISSING}")
    if cell.method == "omni":
        return omni.measure(cell, context)
    role, _, name = cell.name.partition("-")
    cases, read = _cases(role, name, cell.identity["faces"])
    found = {}
    for i, case in enumerate(cases):
        folder = context.cache / NAME / f"{cell.name}-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        found[case.name] = outcome(case, read, folder)
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "n": cell.identity["faces"],
        "cases": found,
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def _cases(role: str, name: str, count: int) -> tuple[list[Case], Read]:
    if role == "pool":
        faces = list(itertools.islice(real.lfw(), count))
        made = formats_pool.cases(faces) | formats_records.cases(faces)
        return made[name], formats_pool.read
    pixels, codes = real.fer2013("Training", count)
    labeled = pixels, tuple(FER2013[code] for code in codes)
    sets = formats_labeled.cases(labeled) | formats_tables.cases(labeled)
    return sets[name], formats_labeled.read


def totals(record: Record) -> dict[str, Any]:
    """Sums over the cases of a format: written, read, equal, reasons, refused, cases."""
    cases = record["metrics"]["cases"].values()
    reasons: Counter[str] = Counter()
    for case in cases:
        reasons.update(case["reasons"])
    sums = {
        key: sum(case[key] for case in cases) for key in ("written", "read", "equal", "refused")
    }
    return {**sums, "reasons": dict(reasons), "cases": len(cases)}


def judge_whole(records: Records) -> list[str] | None:
    """What was written whole came back whole, every row equal."""
    return _faults(records, whole=True)


def judge_damaged(records: Records) -> list[str] | None:
    """What was damaged ended as its damage calls for."""
    return _faults(records, whole=False)


def _faults(records: Records, whole: bool) -> list[str] | None:
    own = {name: r for name, r in records.items() if "cases" in r["metrics"]}
    found = [
        (f"{name}, {case}", outcome)
        for name, record in own.items()
        for case, outcome in record["metrics"]["cases"].items()
        if case.rpartition(": ")[2].startswith("whole") == whole
    ]
    faults = [f"{where}: {fault}" for where, outcome in found for fault in outcome["faults"]]
    if whole:
        faults += [
            f"{where}: {o['equal']:,} of {o['written']:,} equal"
            for where, o in found
            if not o["written"] == o["read"] == o["equal"]
        ]
    return faults if own else None


def judge_omni(records: Records) -> list[str] | None:
    """The recipe ran on S3 to its end, nothing was lost, and no secret came out."""
    own = {name: r for name, r in records.items() if "cases" not in r["metrics"]}
    return omni.judge(own) if own else None


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("what was written whole is read back equal", "always", judge_whole),
        Gate("damage ends as rows with its reason, or as one line", "always", judge_damaged),
        Gate("the recipe runs on S3, every face a row, no secret out", "always", judge_omni),
    ),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
