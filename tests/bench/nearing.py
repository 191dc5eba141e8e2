"""Near copies planted among clustered embeddings, found by one process, and brute force.

    python -m tests.bench.nearing AT ROWS

The embeddings go through a ledger's packs (float16, 512 numbers), are read from them a row group at
a time and held as float16. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import copies
from pipeline.ledger import Ledger
from pipeline.plan import GROUP, Plan, Slice
from pipeline.ranking import stable_hash
from pipeline.schema import embeddings_schema
from pipeline.similarity import unit
from pipeline.storage import Location, location
from tests.bench.selecting import largest_megabytes

WIDTH = 512
CUT = 0.95
PLANTED = (0.999, 0.99, 0.98, 0.97, 0.96)  # cosines of the copies
ALMOST = (0.94, 0.92)  # of rows that are none
SHARE = 0.05
CENTERS = 2000
QUERIES = 2000  # half of them rows that were planted near others
SLICE = 8192
_SCHEMA = embeddings_schema(WIDTH, 1, 8)


def vectors(rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Unit rows in blocks, clusters of several widths, and which are near another of the block."""
    rng = np.random.default_rng(0)
    centers = unit(rng.standard_normal((CENTERS, WIDTH), np.float32))
    width = rng.uniform(0.4, 1.5, CENTERS).astype(np.float32)  # cosine of members 0.86 to 0.31
    for first in range(0, rows, SLICE):
        count = min(SLICE, rows - first)
        of = rng.integers(0, CENTERS, count)
        noise = rng.standard_normal((count, WIDTH), np.float32) / WIDTH**0.5
        x = unit(centers[of] + width[of, None] * noise)
        chosen = rng.permutation(count)
        copied = chosen[: round(SHARE * count)]
        models = x[chosen[len(copied) : 2 * len(copied)]]
        cosine = rng.choice([*PLANTED, *ALMOST], len(copied)).astype(np.float32)[:, None]
        away = rng.standard_normal((len(copied), WIDTH), np.float32)
        away = unit(away - (away * models).sum(1, keepdims=True) * models)
        x[copied] = cosine * models + np.sqrt(1 - cosine**2) * away
        yield x.astype(np.float16), copied


def layout(at: Location, rows: int) -> tuple[Plan, np.ndarray]:
    """Pack the embeddings; the plan and the rows that were planted near others."""
    bounds = [(n, a, min(a + SLICE, rows)) for n, a in enumerate(range(0, rows, SLICE))]
    slices = [Slice(f"s{n:07d}", n // GROUP, "p", "x", a, b, "f", b - a) for n, a, b in bounds]
    plan = Plan.write(at / "plan.parquet", slices)

    planted: list[np.ndarray] = []

    def tables() -> Iterator[pa.Table]:
        for slice, (x, copied) in zip(slices, vectors(rows), strict=True):
            planted.append(slice.start + copied)
            ids = pa.array([f"pool/part.parquet#{i:08d}" for i in range(slice.start, slice.stop)])
            flat = pa.array(x.reshape(-1))
            columns = {
                "id": ids,
                "status": pa.repeat("ok", len(x)),
                "reason": pa.nulls(len(x), pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, WIDTH),
                "logits": pa.nulls(len(x), _SCHEMA.field("logits").type),
            }
            yield pa.table(columns, schema=_SCHEMA)

    Ledger(at / "embed").pack(plan, tables())  # made again where it is sealed, to know the planted
    return plan, np.concatenate(planted)


def read(at: Location, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, 512) float16 and hashes of the ids, from the packs."""
    x = np.empty((plan.faces, WIDTH), np.float16)
    keys = np.empty(len(x), np.uint64)
    first = 0
    for table in Ledger(at / "embed").blocks(plan, ("id", "embedding")):
        last = first + len(table)
        for chunk in table["embedding"].chunks:
            x[first : first + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, WIDTH)
            first += len(chunk)
        keys[last - len(table) : last] = stable_hash(table["id"])
    return x, keys


def brute_force(x: np.ndarray, queries: np.ndarray) -> set[tuple[int, int]]:
    """(query, row) at or above the cut, rounded as the method does."""
    found: set[tuple[int, int]] = set()
    q = x[queries].astype(np.float32)
    for first in range(0, len(x), SLICE):
        block = x[first : first + SLICE].astype(np.float32)
        i, j = np.nonzero(q @ block.T >= CUT - 1e-3)
        a, b = queries[i], first + j
        exact = np.einsum("pd,pd->p", x[a].astype(np.float64), x[b].astype(np.float64))
        near = (np.round(exact, copies.DECIMALS) >= CUT) & (a != b)
        found |= set(zip(a[near].tolist(), b[near].tolist(), strict=True))
    return found


def near_copies(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """First member by key of each row's group of copies."""
    order, place = np.argsort(keys), np.argsort(np.argsort(keys))
    return order[copies.components(len(x), place[copies.near_pairs(x, keys, CUT)])][place]


def run(at: Location, rows: int) -> dict[str, Any]:
    """Seconds, memory, recall on a sample, and whether another order of rows changes a group."""
    plan, planted = layout(at, rows)
    small = min(rows, 20_000)
    began = time.perf_counter()
    x, keys = read(at, plan)
    reading = time.perf_counter() - began
    before = largest_megabytes()
    began, worked = time.perf_counter(), time.process_time()
    pairs = copies.near_pairs(x, keys, CUT)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    largest = largest_megabytes()

    rng = np.random.default_rng(1)
    chosen = rng.choice(planted, min(QUERIES // 2, len(planted)), replace=False)
    others = np.setdiff1d(np.arange(rows), chosen)
    queries = np.append(chosen, rng.choice(others, QUERIES - len(chosen), replace=False))
    wanted = brute_force(x, queries)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.isin(both[:, 0], queries)]
    found = set(map(tuple, both.tolist()))
    shuffled = np.random.default_rng(2).permutation(small)
    groups = near_copies(x[:small], keys[:small])
    again = near_copies(x[shuffled], keys[shuffled])
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "reading_seconds": round(reading, 1),
        "largest_mb": largest,
        "before_mb": before,
        "pairs": len(pairs),
        "queries": len(queries),
        "true_pairs": len(wanted),
        "recall": len(found & wanted) / max(len(wanted), 1),
        "wrong": len(found - wanted),
        "orders_agree": bool((shuffled[again] == groups[shuffled]).all()),
        "probes": copies.PROBES,
    }


if __name__ == "__main__":
    print(json.dumps(run(location(sys.argv[1]), int(sys.argv[2]))))
