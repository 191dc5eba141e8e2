"""What the ledger, the driver and S3 cost at scale, and where that first shows.

    python -m tests.bench.scale_model [--quick] [--only TEXT]

Cells `slices-10k`, `slices-100k`: what a slice costs when so many are there, on a local disk and in
requests to an S3 server. Cell `dispatch`: the driver's seconds per slice of a pass in which only
Ray works. Process: tests/bench/scale_costs.py. Cell `replay`: passes over 1 million to 1 billion
faces on 1 to 1,000 nodes with these costs, event by event (tests/bench/scale_replay.py), with
stragglers and preemptions; and one billion faces again with something changed.

Measured are core-seconds, memory and requests. Assumed are the speed of a GPU node, as in
infra/sizes.py, the wait for an answer of S3 and its limits, and how often nodes are slow or leave;
all of these are below.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.plan import GROUP
from pipeline.planning.costs import Cluster
from tests.bench.harness import ROOT, Bench, Cell, Context, Gate, Records, call, main, python
from tests.bench.scale_replay import Chance, Costs, shares
from tests.bench.selecting import SLICE
from tests.helpers.sizes import sizes

NAME = "scale_model"
FULL = {"slices-10k": 10_000, "slices-100k": 100_000}
QUICK = {"slices-10k": 150, "slices-100k": 300}
GROUP_ON_S3 = {False: 256, True: 16}
STREAMED = {False: 1_500, True: 60}
POOLS = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
NODES = (1, 3, 10, 30, 100, 300, 1000)
QUICK_POOLS, QUICK_NODES = (1_000_000, 10_000_000), (1, 30, 1000)

SLICE_FACES = 8_192
"""As recipes for GPUs cut."""
STREAMS = 2
"""Slices that an actor works on at a time: one is committed while another is computed."""
AT_A_TIME = 16
"""Requests that the ledger makes at a time where it has many."""
TABLES = 4
"""Tables that it reads at a time to pack a group."""
LEDGERS = 2
"""That a pass fills and seals: embeddings and scores."""
LATENCY = 0.05
"""Seconds until S3 answers; assumed, 20 to 100 ms are usual."""
WRITES, READS = 3_500.0, 5_500.0
"""Requests per second that S3 takes under one prefix, by its documentation."""
HEAD_MEMORY = 16 * 2**30
"""Bytes of the head in infra/sizes.py."""
CHANCE = Chance(
    seed=0,
    straggler_share=0.02,
    straggler_factor=3.0,
    lifetime=6 * 3600.0,
    away=Cluster.model_fields["node_start_seconds"].default,
)
"""Assumed: one slice in fifty takes three times as long, a spot node lives for six hours."""
MOST_BYTES = 100.0
"""That a slice may cost the driver at its largest, between the two sizes."""
MUCH = 0.1
"""Share of the run time from which a cost counts as too much."""
ALONE = "the driver seals alone"
"""As it was before tasks sealed the groups."""


def cells(options: argparse.Namespace) -> list[Cell]:
    """Two sizes, the driver, the replay."""
    counts = QUICK if options.quick else FULL
    group, streamed = GROUP_ON_S3[options.quick], STREAMED[options.quick]
    made = [
        Cell(name, "costs", 0, {"slices": count, "on_s3": group, "version": 2}, NAME)
        for name, count in counts.items()
    ]
    made.append(Cell("dispatch", "dispatch", 0, {"slices": streamed, "version": 1}, NAME))
    pools, nodes = (QUICK_POOLS, QUICK_NODES) if options.quick else (POOLS, NODES)
    grid = {"pools": pools, "nodes": nodes, "chance": asdict(CHANCE), "latency": LATENCY}
    made.append(Cell("replay", "replay", CHANCE.seed, {**grid, "version": 3}, NAME))
    return made


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """What the cell's processes print, or the replay of what was measured before."""
    home = context.cache / NAME
    home.mkdir(parents=True, exist_ok=True)
    if cell.method == "replay":
        found = replayed(cell, _costs_of(home))
    else:
        found = _measured(cell, context, home)
        (home / f"{cell.name}.json").write_text(json.dumps(found))
    return {**found, "command": f"python -m tests.bench.{NAME} --only {cell.name}"}


def _measured(cell: Cell, context: Context, home: Path) -> dict[str, Any]:
    count, work = cell.identity["slices"], home / cell.name
    if cell.method == "dispatch":
        found = _child(context, work, "dispatch", str(work), str(count))
        return {"n": count, **found}
    disk = _child(context, work, "disk", str(work), str(count))
    asked = _child(context, work, "requests", str(cell.identity["on_s3"]), str(count))
    return {"n": count, "disk": disk, "s3": asked}


def _child(context: Context, work: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a process of ours printed last; its folder is removed."""
    log = work.with_suffix(".log")
    shutil.rmtree(work, ignore_errors=True)
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        call(python("-m", "tests.bench.scale_costs", *arguments), context, log, env)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dict(json.loads(log.read_text().strip().splitlines()[-1]))


def _costs_of(home: Path) -> dict[str, Any]:
    """What the cells before found."""
    found = {}
    for name in (*FULL, "dispatch"):
        at = home / f"{name}.json"
        if not at.exists():
            raise RuntimeError(f"{name} was not measured here; run it before the replay")
        found[name] = json.loads(at.read_text())
    return found


# -- from measurements to costs -------------------------------------------------------------------


@cache
def work_seconds(faces: int) -> float:
    """Seconds of a GPU node for a slice, as infra/sizes.py assumes."""
    plan = sizes().recipe()
    return faces * plan.teach.folds * (2 if plan.embed.flip else 1) / float(sizes().FORWARD)


def costs(found: Mapping[str, Any], faces: int) -> Costs:
    """Costs of a slice of so many faces on S3.

    Core-seconds of commits and seals were measured with 1,024 faces and grow with them; requests do
    not. A commit is hidden behind the forward of the actor's other slice while it is shorter.
    Sealing is that of one process; see `spread`.
    """
    measured = found["slices-100k"]
    cpu = {name: 1e-6 * value for name, value in measured["disk"]["cpu_microseconds"].items()}
    asked = {name: sum(each.values()) for name, each in measured["s3"]["requests"].items()}
    each, rows = measured["s3"]["requests"]["slice"], faces / SLICE
    commit = commit_seconds(found, faces)
    work = work_seconds(faces)
    of_tables, beside = asked["seal"] - 1, 1 + asked["sweep"]
    sealing = rows * cpu["seal"] + cpu["sweep"] + cpu["manifest"]
    sealing += LATENCY * (of_tables / TABLES + beside / AT_A_TIME + asked["manifest"])
    return Costs(
        listing=cpu["pending"] + LATENCY * asked["pending"],
        dispatch=found["dispatch"]["driver_ms"] / 1000,
        commit=max(0.0, (work + commit) / STREAMS - work),
        sealing=LEDGERS * sealing,
        writes=each["PUT"],
        write_rate=WRITES,
        reads=each["GET"] + each["HEAD"],
        read_rate=READS,
    )


def spread(one: Costs, slices: int, nodes: int) -> Costs:
    """The same where every node seals groups of slices, as many at a time as there are groups."""
    return replace(one, sealing=one.sealing / min(nodes, math.ceil(slices / GROUP)))


def memory_per_slice(found: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that each step's largest memory grows by per slice, between the two sizes."""
    few, many = (found[name]["disk"] for name in FULL)
    more = many["slices"] - few["slices"]
    return {
        name: round(1e6 * (many["memory_mb"][name] - few["memory_mb"][name]) / more, 1)
        for name in ("plan", "pending", "committed", "account")
    }


def replayed(cell: Cell, found: Mapping[str, Any]) -> dict[str, Any]:
    """All passes of the grid, and the largest again with something changed."""
    one, work = costs(found, SLICE_FACES), work_seconds(SLICE_FACES)
    pools, nodes = cell.identity["pools"], cell.identity["nodes"]
    grid, alone = (
        [
            _pass(faces, SLICE_FACES, count, one, driver_seals=driver_seals)
            for faces in pools
            for count in nodes
        ]
        for driver_seals in (False, True)
    )
    memory = memory_per_slice(found)
    most = max(*memory.values(), 1.0)  # the byte that the pass keeps, at the least
    largest, many = max(pools), max(nodes)
    return {
        "n": len(grid),
        "costs": asdict(one) | {"write_rate": WRITES, "read_rate": READS},
        "work_seconds": round(work, 3),
        "commit_unhidden": round(commit_seconds(found, SLICE_FACES), 3),
        "memory_bytes_per_slice": memory,
        "faces_at_much_memory": round(MUCH * HEAD_MEMORY / most) * SLICE_FACES,
        "grid": grid,
        "first": first(grid),
        "first_if_the_driver_seals": first(alone),
        "changed": {
            name: _pass(largest, faces, many, changed, driver_seals=name == ALONE)
            for name, (faces, changed) in changes(found).items()
        },
    }


def commit_seconds(found: Mapping[str, Any], faces: int) -> float:
    """Seconds of a commit of so many faces, both ledgers', whatever hides it."""
    measured = found["slices-100k"]
    cpu = 1e-6 * measured["disk"]["cpu_microseconds"]["commit"] * faces / SLICE
    return LEDGERS * cpu + LATENCY * sum(measured["s3"]["requests"]["slice"].values())


def changes(found: Mapping[str, Any]) -> dict[str, tuple[int, Costs]]:
    """What could be changed for a billion faces: faces per slice, and costs."""
    now, large = costs(found, SLICE_FACES), costs(found, 4 * SLICE_FACES)
    return {
        "as it is": (SLICE_FACES, now),
        ALONE: (SLICE_FACES, now),
        "four drivers (--part i/4)": (SLICE_FACES, replace(now, dispatch=now.dispatch / 4)),
        "four drivers, slices of 32,768": (
            4 * SLICE_FACES,
            replace(large, dispatch=large.dispatch / 4),
        ),
        "slices of 2,048, as cut for small machines": (
            SLICE_FACES // 4,
            costs(found, SLICE_FACES // 4),
        ),
    }


def _pass(
    faces: int, slice_faces: int, nodes: int, one: Costs, *, driver_seals: bool
) -> dict[str, Any]:
    slices, work = math.ceil(faces / slice_faces), work_seconds(slice_faces)
    each = one if driver_seals else spread(one, slices, nodes)
    whole, parts = shares(slices, work, nodes, 1, each, CHANCE)
    return {
        "faces": faces,
        "slices": slices,
        "nodes": nodes,
        "seconds": round(whole.seconds, 1),
        "streamed": round(whole.streamed, 1),
        "deaths": whole.deaths,
        "lost": whole.lost,
        "ideal": round(slices * work / nodes, 1),
        "shares": {name: round(share, 4) for name, share in parts.items()},
        "writes_per_second": round(slices * each.writes / whole.streamed, 1),
    }


def first(grid: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """By cost and pool: the fewest nodes at which it takes more than MUCH; None: never does."""
    found: dict[str, dict[str, int | None]] = {}
    for row in grid:
        for name, share in row["shares"].items():
            of = found.setdefault(name, {})
            if of.setdefault(str(row["faces"]), None) is None and share > MUCH:
                of[str(row["faces"])] = row["nodes"]
    return found


# -- gates ----------------------------------------------------------------------------------------


def judge_flat(records: Records) -> list[str] | None:
    """Ten times the slices ask for no more requests per slice, and for few bytes of memory."""
    if any(name not in records for name in FULL):
        return None
    few, many = (records[name]["metrics"]["s3"]["requests"] for name in FULL)
    faults = []
    for name in few:
        before, after = sum(few[name].values()), sum(many[name].values())
        if after > 1.05 * before + 0.01:
            faults.append(f"{name}: {after:g} requests per slice, {before:g} with fewer slices")
    for name, bytes_each in memory_per_slice({n: records[n]["metrics"] for n in FULL}).items():
        if bytes_each > MOST_BYTES:
            faults.append(f"{name}: memory grows by {bytes_each:g} bytes per slice")
    return faults


def judge_replay(records: Records) -> list[str] | None:
    """Every slice counts, no pass beats its nodes, and the costs are those that were measured."""
    if "replay" not in records:
        return None
    found, faults = records["replay"]["metrics"], []
    for row in found["grid"]:
        if row["seconds"] < row["ideal"]:
            faults.append(f"{row['faces']:,} faces on {row['nodes']} nodes are too fast")
    own = {name: records[name]["metrics"] for name in (*FULL, "dispatch") if name in records}
    if len(own) == len(FULL) + 1:
        now = costs(own, SLICE_FACES)
        if not math.isclose(now.sealing, found["costs"]["sealing"], rel_tol=1e-9):
            faults.append("the costs were measured again since; replay again")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("requests per slice do not grow", "always", judge_flat),
        Gate("the replay is of these costs", "always", judge_replay),
    ),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
