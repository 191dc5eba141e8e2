"""Memory of the pass does not grow: with ten times the faces, or with ten times the slices.

    python -m tests.bench.memory [--quick]

Faces: 5,000 drawings as JPEG, used again under new ids until there are 100,000 and 1,000,000 of
them; each is really decoded, run through a small network, compared with 2,477 labeled faces and
committed. Slices: 10,000 and 100,000 of ten faces, in micro-batches of 16. Once a second the
resident memory of the driver and of all Ray processes is added up by a process of its own (shared
pages count in each of them). A plateau is the median of the samples after warm-up: of the whole
shorter run, and of the last fifth of the longer one.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import synthetic
from tests.bench import passes
from tests.bench.harness import Bench, Cell, Context, Gate, Records, main

NAME = "memory"
DRAWINGS = 5_000
MODEL = {
    "name": "convnet",
    "args": {"width": 16},
    "size": 32,
    "color": "gray",
    "dropout": 0.0,
}
WARM_UP = 20.0
"""Seconds until every process has imported what it needs."""
SMALL_BATCH = 16
"""Of slices with fewer faces, whose micro-batch is padded to it."""
MOST_GROWTH = 1.05
FIRST_COMMIT = 10.0
PAIRS = {"faces": ("faces-100k", "faces-1m"), "slices": ("slices-10k", "slices-100k")}
SIZES = {
    "faces-100k": (100_000, 1024),
    "faces-1m": (1_000_000, 1024),
    "slices-10k": (100_000, 10),
    "slices-100k": (1_000_000, 10),
}
QUICK = {
    "faces-100k": (20_000, 256),
    "faces-1m": (60_000, 256),
    "slices-10k": (4_000, 10),
    "slices-100k": (12_000, 10),
}


def cells(options: argparse.Namespace) -> list[Cell]:
    """Two sizes of each kind."""
    sizes = QUICK if options.quick else SIZES
    return [
        Cell(name, name.split("-")[0], 0, _identity(faces, slice_faces), NAME)
        for name, (faces, slice_faces) in sizes.items()
    ]


def _identity(faces: int, slice_faces: int) -> dict[str, int]:
    own = {"batch": SMALL_BATCH} if slice_faces < SMALL_BATCH else {}
    return {"faces": faces, "slice": slice_faces, **own}


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run the pass in a process of its own and read the samples."""
    home = context.cache / NAME
    images = home / "drawings"
    draw(images)
    work = home / cell.name
    shutil.rmtree(work, ignore_errors=True)
    samples = home / f"{cell.name}.rss"
    spec = passes.Spec(
        work=str(work),
        images=str(images),
        model=MODEL,
        slice_faces=int(cell.identity["slice"]),
        recycled=int(cell.identity["faces"]),
        embed={"batch": cell.identity.get("batch", 64), "flip": False},
        stream={"object_store_mb": 300},
        rss_log=str(samples),
    )
    found = passes.call(spec, home / f"{cell.name}.log", 3600)
    shutil.rmtree(work, ignore_errors=True)
    rows = np.loadtxt(samples)
    return {
        "n": found["faces"],
        **{key: found[key] for key in ("faces", "slices", "seconds", "rate", "first_commit")},
        "spilled_mb": found["spilled_mb"],
        **plateaus(rows),
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def draw(at: Path) -> None:
    """The drawings, JPEG, in one file."""
    if (at / "faces.parquet").exists():
        return
    at.mkdir(parents=True, exist_ok=True)
    images = []
    for face in synthetic.draw(7, np.arange(DRAWINGS), 48):
        out = io.BytesIO()
        Image.fromarray(face).save(out, "JPEG", quality=90)
        images.append(out.getvalue())
    pq.write_table(pa.table({"image": images}), at / "faces.parquet.partial")
    (at / "faces.parquet.partial").rename(at / "faces.parquet")


def plateaus(rows: np.ndarray) -> dict[str, float]:
    """MB of the driver and of all processes: medians after warm-up and at the end, largest."""
    warm = rows[rows[:, 0] > min(WARM_UP, rows[-1, 0] / 2)]
    late = rows[rows[:, 0] > 0.8 * rows[-1, 0]]
    return {
        "driver_mb": float(np.median(warm[:, 1])),
        "driver_late_mb": float(np.median(late[:, 1])),
        "total_mb": float(np.median(warm[:, 2])),
        "total_late_mb": float(np.median(late[:, 2])),
        "largest_mb": float(rows[:, 2].max()),
        "samples": len(rows),
    }


def growth(records: Records, pair: Sequence[str], key: str) -> float | None:
    """The longer run's last plateau over the shorter run's."""
    if any(name not in records for name in pair):
        return None
    short, long = (records[name]["metrics"] for name in pair)
    return float(long[f"{key}_late_mb"] / short[f"{key}_mb"])


def judge_whole(records: Records) -> list[str] | None:
    """Every face came out and nothing was spilled."""
    faults = []
    for name, record in records.items():
        found = record["metrics"]
        if found["spilled_mb"]:
            faults.append(f"{name}: Ray spilled {found['spilled_mb']} MB")
        if found["faces"] != record["n"]:
            faults.append(f"{name}: {found['faces']:,} of {record['n']:,} faces")
    return faults if records else None


def judge_flat(records: Records) -> list[str] | None:
    """Ten times the faces or slices, at most 5 % more memory; the first commit comes at once."""
    faces, slices = (
        growth(records, PAIRS["faces"], "total"),
        growth(records, PAIRS["slices"], "driver"),
    )
    if faces is None or slices is None:
        return None
    faults = []
    if faces > MOST_GROWTH:
        faults.append(f"all processes hold {faces:.3f} times as much at ten times the faces")
    if slices > MOST_GROWTH:
        faults.append(f"the driver holds {slices:.3f} times as much at ten times the slices")
    for name in PAIRS["slices"]:
        first = records[name]["metrics"]["first_commit"]
        if first > FIRST_COMMIT:
            faults.append(f"{name}: the first slice was committed after {first:.1f} s")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("every face, no spill", "always", judge_whole),
        Gate("flat memory", "full", judge_flat),
    ),
    folder=lambda options: NAME,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
