"""A pool of any size as the ledger leaves it, and one process that selects from it.

    python -m tests.bench.selecting layout AT ROWS | select AT | check AT | write AT

Each prints one JSON object. `layout` packs and seals with the ledger's own code, a group at a time
(:meth:`pipeline.ledger.Ledger.pack`; tests/test_ledger.py proves that it leaves the bytes that
commits and a seal leave), and commits a few slices one by one to tell what that takes. What select
reads is random in every row; probabilities, neighbors, hashes and thumbnails, which it must not
read, are a few tables used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sealing
from pipeline.ledger import Ledger
from pipeline.packs import content_digest
from pipeline.plan import GROUP, Plan, Slice
from pipeline.policy import OperatingPoint, SelectConfig
from pipeline.schema import EMOTIONS, FACES, GUARD, scores_schema, with_label_names
from pipeline.selection import Pool, cut, operating_point, select, yield_by_class
from pipeline.storage import Location, location

SLICE = 1024
SHARD = 64 * SLICE
PEOPLE = 100_000
STAGES = ("score", "twins", "survey")
POLICY = SelectConfig(
    confidence=0.5, target_precision=0.9, group_cap=20, class_cap=400_000, weights="softmatch"
)
ONE_BY_ONE = 64
"""Slices that are committed one by one for comparison."""

_SHARE = np.array([0.3, 0.3, 0.1, 0.1, 0.05, 0.03, 0.1, 0.02])  # of the classes among pseudo-labels
_NAMES = pa.array(EMOTIONS, pa.string())


def slices(rows: int) -> Iterator[Slice]:
    """Slices of 1,024 rows; the last one has the rest."""
    for number in range(-(-rows // SLICE)):
        first = number * SLICE
        last = min(first + SLICE, rows)
        shard = f"part-{first // SHARD:05d}.parquet"
        key = f"s{number:07d}"
        yield Slice(key, number // GROUP, "pool", shard, first, last, "f", last - first)


class Faces:
    """Random tables of any slice; equal for equal slices."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.rows = rows
        noise = rng.integers(0, 256, (SLICE, 256), dtype=np.uint8)
        near = [f"labeled/train#{i:06d}" for i in rng.integers(0, 28709, 5 * SLICE)]
        probs = rng.dirichlet(np.ones(8), SLICE).astype(np.float32)
        self._often = {
            "thumbnail": pa.array([row.tobytes() for row in noise], pa.binary(256)),
            "sha256": pa.array([row[:32].tobytes() for row in noise], pa.binary(32)),
            "hash": pa.array(noise[:, :8].copy().view(np.uint64)[:, 0]),
            "real": pa.array(probs[:, 0]),
            "side": pa.array(np.full(SLICE, 48), pa.int32()),
            "probs": pa.FixedSizeListArray.from_arrays(pa.array(probs.reshape(-1)), 8),
            "near": pa.FixedSizeListArray.from_arrays(pa.array(near), 5),
        }

    def tables(self, slice: Slice) -> dict[str, pa.Table]:
        """Tables of a slice by stage."""
        count = slice.stop - slice.start
        rng = np.random.default_rng(slice.start + 1)
        often = {name: column.slice(0, count) for name, column in self._often.items()}
        ids = _named(f"pool/{slice.shard}#", np.arange(slice.start, slice.stop))
        good = rng.random(count) >= 0.01
        bad = pa.array(~good)
        status = pc.if_else(bad, "quarantined", "ok")
        reason = pc.if_else(bad, "blank", pa.scalar(None, pa.string()))

        def unless(column: pa.Array, out: np.ndarray) -> pa.Array:
            return pc.if_else(pa.array(out), pa.scalar(None, column.type), column)

        predicted = rng.choice(8, count, p=_SHARE)
        others = [
            np.where(rng.random(count) < 0.8, predicted, rng.integers(0, 8, count))
            for _ in range(2)
        ]
        label, prototype, neighbor = (
            unless(_NAMES.take(pa.array(codes)), ~good) for codes in (predicted, *others)
        )
        sure = 1 - rng.random(count) ** 2 * 0.8
        sure[rng.random(count) < 0.02] = 1  # what a float32 softmax says when it is certain
        confidence = unless(pa.array(sure.astype(np.float32)), ~good)
        share = unless(pa.array(rng.random(count).astype(np.float32)), ~good)
        scores = {
            "id": ids, "status": status, "reason": reason, "probs": often["probs"],
            "pseudo_label": label, "confidence": confidence, "margin": often["real"],
            "disagreement": often["real"], "prototype_label": prototype,
            "prototype_similarity": often["real"], "prototype_margin": often["real"],
            "neighbor_label": neighbor, "neighbor_agreement": share,
            "neighbor_similarity": often["real"], "neighbor_ids": often["near"],
        }  # fmt: skip
        twin = (rng.random(count) < 0.001) & good
        copy = (rng.random(count) < 0.08) & good
        of = rng.integers(0, max(self.rows // 30, 1), count)  # groups of 2.4 faces
        guard = {
            "id": ids,
            "twin_of": unless(_named("labeled/test#", of), ~twin),
            "twin_kind": unless(pa.array(["phash"] * count), ~twin),
            "twin_role": unless(pc.if_else(pa.array(of % 2 == 0), "test", "validation"), ~twin),
            "duplicate_group": unless(_named("pool/part-00000.parquet#", of), ~copy),
        }
        faces = {
            "id": ids, "position": pa.array(np.arange(slice.start, slice.stop)),
            "group": _named("m.", rng.integers(0, PEOPLE, count)), "status": status,
            "reason": reason, "sha256": often["sha256"], "pixel_sha256": often["sha256"],
            "phash": often["hash"], "phash_flip": often["hash"], "thumbnail": often["thumbnail"],
            "width": often["side"], "height": often["side"], "brightness": often["real"],
            "contrast": often["real"], "sharpness": often["real"],
            "detail": pa.nulls(count, pa.string()), "head": pa.nulls(count, pa.binary()),
        }  # fmt: skip
        scored = with_label_names(scores_schema(8, 5), EMOTIONS)
        return {
            "score": pa.table(scores, schema=scored),
            "twins": pa.table(guard, schema=GUARD),
            "survey": pa.table(faces, schema=FACES),
        }


def _named(prefix: str, numbers: np.ndarray) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    return pc.binary_join_element_wise(pa.scalar(prefix), digits, "")


def point() -> OperatingPoint:
    """Cuts from 2,500 labeled faces whose confidence is honest."""
    rng = np.random.default_rng(1)
    truth = rng.choice(8, 2500, p=_SHARE)
    confidence = rng.uniform(0.3, 1, 2500).astype(np.float32)
    predicted = np.where(rng.random(2500) < confidence, truth, rng.integers(0, 8, 2500))
    said = _NAMES.take(pa.array(predicted))
    columns = {
        "pseudo_label": said,
        "confidence": pa.array(confidence),
        "prototype_label": said,
        "neighbor_label": said,
        "neighbor_agreement": pa.array(np.ones(2500, np.float32)),
        "label": _NAMES.take(pa.array(truth)),
    }
    table = pa.table(columns)
    return operating_point(POLICY, table.cast(with_label_names(table.schema, EMOTIONS)))


def opened(at: Location) -> tuple[Plan, Pool]:
    """The plan, and what opens the chunks of the pool."""
    plan = Plan(at / "plan.parquet")
    return plan, Pool(plan, *(Ledger(at / stage) for stage in STAGES))


def layout(at: Location, rows: int) -> dict[str, Any]:
    """Write the pool; seconds of making tables are told apart from packing them."""
    plan = Plan.write(at / "plan.parquet", slices(rows))
    faces = Faces(rows)
    spent: Counter[str] = Counter()

    def made(stage: str) -> Iterator[pa.Table]:
        for slice in plan:
            began = time.perf_counter()
            table = faces.tables(slice)[stage]
            spent["making"] += time.perf_counter() - began
            yield table

    began = time.perf_counter()
    for stage in STAGES:
        Ledger(at / stage).pack(plan, made(stage))
    whole = time.perf_counter() - began
    return {
        "slices": len(plan),
        "groups": len(list(plan.groups())),
        "packing_seconds": round(whole - spent["making"], 1),
        "making_seconds": round(spent["making"], 1),
        "megabytes": round(sum(f.size() for s in STAGES for f in packs(at, s)) / 1e6),
        "one_by_one_ms": round(_one_by_one(at, plan, faces), 2),
    }


def _one_by_one(at: Location, plan: Plan, faces: Faces) -> float:
    """Milliseconds per slice and stage of committing, sealing and sweeping as a pass does."""
    few = Plan.write(at / "few.parquet", plan.slices(0, ONE_BY_ONE))
    tables = [(slice, faces.tables(slice)["score"]) for slice in few]
    began = time.perf_counter()
    ledger = Ledger(at / "few")
    for slice, table in tables:
        ledger.commit(slice, table)
    sealing.seal(ledger, few)
    sealing.sweep(ledger, few)
    return 1000 * (time.perf_counter() - began) / len(few)


def packs(at: Location, stage: str) -> list[Location]:
    """Packs of a stage."""
    return (at / stage / "packs").children()


def forget_pages(at: Location) -> None:
    """Have the packs read from the disk: they leave the page cache."""
    for stage in STAGES:
        for pack in packs(at, stage):
            file = os.open(pack.uri, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def once(at: Location) -> dict[str, Any]:
    """Select from the packs; seconds of both passes and the largest resident memory."""
    _, tables = opened(at)
    decide_by = point()
    forget_pages(at)
    before = largest_megabytes()
    began, worked, busy = time.perf_counter(), time.process_time(), busy_seconds()
    rows = selected = 0
    first = None
    for table in select(tables, decide_by, POLICY):
        first = first or time.perf_counter()
        rows, selected = rows + len(table), selected + pc.sum(table["selected"]).as_py()
    ended = time.perf_counter()
    worked, busy = time.process_time() - worked, busy_seconds() - busy
    return {
        "seconds": round(ended - began, 2),
        "learning_seconds": round((first or ended) - began, 2),
        "cpu_seconds": round(worked, 2),
        "others_cpu_seconds": round(max(busy - worked, 0), 2),
        "megabytes": largest_megabytes(),
        "megabytes_before": before,
        "rows": rows,
        "selected": selected,
    }


def check(at: Location) -> dict[str, Any]:
    """Digests of the selection with one thread and with four."""
    _, tables = opened(at)
    decide_by = point()

    def digest(found: Iterator[pa.Table]) -> str:
        whole = hashlib.sha256()
        for table in found:
            whole.update(content_digest(table).encode())
        return whole.hexdigest()

    return {
        "one": digest(select(tables, decide_by, POLICY, threads=1)),
        "four": digest(select(tables, decide_by, POLICY, threads=4)),
    }


def write(at: Location) -> dict[str, Any]:
    """Select and store: the whole of the stage."""
    plan, tables = opened(at)
    began = time.perf_counter()
    into = Ledger(at / "select")
    rows = (commit.rows for commit in Ledger(at / "score").committed(plan))
    into.pack(plan, cut(select(tables, point(), POLICY), rows))
    seconds, largest = time.perf_counter() - began, largest_megabytes()
    kept = yield_by_class(into.blocks(plan, ("label", "reason")))
    reasons: Counter[str] = Counter()
    for counts in kept.values():
        reasons.update(counts)
    return {
        "seconds": round(seconds, 1),
        "megabytes": largest,
        "rows": into.manifest(plan)["rows"],
        "reasons": dict(sorted(reasons.items())),
    }


def busy_seconds() -> float:
    """CPU-seconds that all processes of this machine have used."""
    user, nice, system, _, _, irq, soft, *_ = (
        int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def largest_megabytes() -> int:
    """Largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return round(int(line.split()[1]) / 1024)
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    what, where, *more = sys.argv[1:]
    steps: dict[str, Callable[..., dict[str, Any]]] = {
        "layout": lambda at: layout(at, int(more[0])), "select": once, "check": check,
        "write": write,
    }  # fmt: skip
    print(json.dumps(steps[what](location(where))))
