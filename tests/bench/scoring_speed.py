"""How fast the pass embeds and scores, against a bare loop and against what people write first.

    OMNIFER_DATA=... python -m tests.bench.scoring_speed [--quick] [--faces N] [--rounds N]

JPEG faces of 112 px, resnet18, one forward pass a face. A cell is one round: every row runs once,
in a process of its own, in an order that turns from round to round; figures are medians over the
rounds. Short rounds compare all rows; long ones run the ceiling and the workstation's layout over
60,000 faces, minutes each, and the gate on the ceiling is theirs. Rates are steady ones: neither
start nor tail counts. Nothing else may run beside.

Rows named `pass` are OmniFER's pass, with where reading and scoring run and streams x threads;
`bare` is the ceiling: the same decoder, network and precision, no Ray, no scores, no commits.
The precision is the one that training would take: bfloat16 with AMX, else float32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.embedding import EmbedConfig, Forward
from pipeline.images import Crop, face
from pipeline.training.worker import precision
from tests.bench import passes
from tests.bench.harness import Bench, Cell, Context, Gate, OutOfTime, Records, main

NAME = "scoring_speed"
DATA = "OMNIFER_DATA"
SIZE = 112
MODEL = {"name": "resnet18", "size": SIZE, "color": "rgb", "dropout": 0.0}
SMALL = {"name": "convnet", "args": {"width": 16}, "size": 48, "color": "rgb", "dropout": 0.0}
LONG_FACES = 60_000
LEAST_ROUNDS = 3
"""Of each length, or the gate says nothing."""
SLICE = 128
PASSES: Mapping[str, dict[str, Any]] = {
    "pass: task, actor, 1x2": {"read_in": "task", "run_in": "actor", "streams": 1, "threads": 2},
    "pass: actor, embed, 2x1": {"read_in": "actor", "run_in": "embed", "streams": 2, "threads": 1},
    "pass: actor, embed, 2 actors": {
        "read_in": "actor",
        "run_in": "embed",
        "streams": 1,
        "threads": 1,
        "pool": [2, 2],
        "num_cpus": 0.5,
    },
    "pass: actor, embed, 2x1, compiled": {
        "read_in": "actor",
        "run_in": "embed",
        "streams": 2,
        "threads": 1,
        "compile": True,
    },
}
BARE: Mapping[str, list[str]] = {
    "bare: 1x2": ["--streams", "1"],
    "bare: 2x1": ["--streams", "2"],
    "bare: 2x1, compiled": ["--streams", "2", "--compile"],
}
PEERS = ("naive", "loader")
OURS, CEILING = "pass: actor, embed, 2x1", "bare: 2x1"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--faces", type=int, default=4_000, help="per row of a round")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Rounds, and the long run."""
    faces = 1_200 if options.quick else options.faces
    base = {
        "faces": faces,
        "slice": 64 if options.quick else SLICE,
        "passes": dict(PASSES),
        "small": options.quick,
    }
    rounds = 1 if options.quick else options.rounds
    made = [Cell(f"round{i}", "rows", i, {**base, "round": i}, NAME) for i in range(rounds)]
    if not options.quick:
        long = {**base, "faces": LONG_FACES}
        made += [Cell(f"long{i}", "long", i, long, NAME) for i in range(rounds)]
    return made


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Run the rows of a cell in turn."""
    quick, faces = context.options.quick, int(cell.identity["faces"])
    home = context.cache / NAME
    pool = home / f"pool-{faces}"
    write_pool(pool, faces, cell.identity["slice"])
    model = SMALL if quick else MODEL
    (home / "model.json").write_text(json.dumps(model))
    rows = [OURS, CEILING]
    if cell.method == "rows":
        rows = [OURS, CEILING, *PEERS] if quick else [*BARE, *PASSES, *PEERS]
    turn = cell.seed % len(rows)
    found: dict[str, Any] = {}
    for name in (*rows[turn:], *rows[:turn]):
        if context.left() <= 0:
            raise OutOfTime
        found[name] = one(name, pool, home, model, cell.identity["slice"])
        print(f"  {name}: {found[name]['rate']:.0f} img/s", flush=True)
    return {
        "n": faces,
        "rows": found,
        "model": model["name"],
        "dtype": dtype(),
        "amx": "AMX" if torch.cpu.get_capabilities().get("amx_bf16") else "no AMX",
        "cosine": cosine(pool, model) if cell.method == "rows" else None,
        "command": f"python -m tests.bench.{NAME} --only {cell.name}",
    }


def one(
    name: str, pool: Path, home: Path, model: Mapping[str, Any], slice_faces: int
) -> dict[str, Any]:
    """One row, in a process of its own."""
    log, seconds = home / f"{''.join(c for c in name if c.isalnum())}.log", 1800.0
    if name in PASSES:
        chosen = dict(PASSES[name])
        score = {"run_in": chosen.pop("run_in")}
        work = home / "pass"
        shutil.rmtree(work, ignore_errors=True)
        spec = passes.Spec(
            work=str(work),
            images=str(pool),
            model=dict(model),
            slice_faces=slice_faces,
            embed={"batch": 64, "flip": False, "dtype": dtype(), "decode_threads": 1, **chosen},
            score=score,
            stream={"object_store_mb": 500},
        )
        return passes.call(spec, log, seconds)
    said = [name, str(pool), str(home / "model.json"), "--dtype", dtype()]
    if name in BARE:
        said = ["bare", *said[1:], *BARE[name]]
    return passes.run_json(["tests.bench.peers", *said], log, seconds)


def dtype() -> str:
    """The faster precision of this machine."""
    return "bf16" if precision(None, "cpu") == torch.bfloat16 else "fp32"


def write_pool(at: Path, count: int, group: int) -> None:
    """Faces of the real pool as 112 px JPEG, used again under new ids until there are enough."""
    if (at / "_done").exists():
        return
    if DATA not in os.environ:
        raise RuntimeError(f"{DATA} is not set: the folder with faces/")
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    known: list[bytes] = []
    for file in sorted((Path(os.environ[DATA]) / "faces").glob("*.parquet")):
        for data in pq.read_table(file, columns=["image"])["image"].to_pylist():
            if len(known) < count:
                known.append(small(data))
    per_file = 64 * group
    for part, start in enumerate(range(0, count, per_file)):
        numbers = range(start, min(start + per_file, count))
        images = [known[i % len(known)] for i in numbers]
        table = pa.table({"id": [f"face{i}" for i in numbers], "image": images})
        pq.write_table(table, at / f"faces-{part:04}.parquet", row_group_size=group)
    (at / "_done").touch()


def small(data: bytes) -> bytes:
    """The face of a pool photo, 112 px, JPEG quality 90."""
    pixels = face(data, crop=Crop(fraction=0.5), color="rgb", size=SIZE)
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "JPEG", quality=90)
    return out.getvalue()


def cosine(pool: Path, model: Mapping[str, Any], count: int = 256) -> dict[str, float]:
    """Smallest cosine with eager float32 over some faces: of bfloat16, and compiled."""
    pixels = np.zeros((count, 3, model["size"], model["size"]), np.uint8)
    for i, data in enumerate(passes.pictures(str(pool))[:count]):
        pixels[i] = face(data, crop=Crop(), color="rgb", size=model["size"])
    base = EmbedConfig(batch=count, flip=False, threads=len(os.sched_getaffinity(0)))
    known = passes.teacher(model)
    want = Forward(known, base)(pixels)[0]
    kinds = {"bf16": {"dtype": "bf16"}, "compiled": {"compile": True}}
    return {
        name: float(
            (Forward(passes.teacher(model), base.model_copy(update=kind))(pixels)[0] * want)
            .sum(1)
            .min()
        )
        for name, kind in kinds.items()
    }


def rates(records: Records, name: str, kind: str = "rows") -> list[float]:
    """img/s of a row in each short round, or each `long` one."""
    return [
        r["metrics"]["rows"][name]["rate"]
        for r in records.values()
        if r["method"] == kind and name in r["metrics"]["rows"]
    ]


def ratios(records: Records, name: str, over: str, kind: str = "rows") -> list[float]:
    """Row over row, round by round."""
    pairs = zip(rates(records, name, kind), rates(records, over, kind), strict=True)
    return [a / b for a, b in pairs]


def best(records: Records, names: Sequence[str]) -> str:
    """The row with the largest median."""
    return max(names, key=lambda name: float(np.median(rates(records, name) or [0.0])))


def judge_whole(records: Records) -> list[str] | None:
    """Every face came out, nothing was spilled, precision changes no embedding."""
    faults = []
    for cell, record in records.items():
        for name, row in record["metrics"]["rows"].items():
            if not row["rate"] > 0:
                faults.append(f"{cell}: {name} ran at {row['rate']} img/s")
            if name in PASSES and row["faces"] != record["n"]:
                faults.append(f"{cell}: {name} scored {row['faces']} of {record['n']} faces")
            if name in PASSES and row["spilled_mb"]:
                faults.append(f"{cell}: {name} spilled {row['spilled_mb']} MB")
        for kind, value in (record["metrics"]["cosine"] or {}).items():
            if value < 0.999:
                faults.append(f"{cell}: cosine of {kind} with float32 is {value:.5f}")
    return faults if records else None


def judge_speed(records: Records) -> list[str] | None:
    """0.90 of the ceiling over 60,000 faces, and twice what people write first."""
    names = [name for name in PASSES if rates(records, name)]
    if min(len(rates(records, CEILING, kind)) for kind in ("rows", "long")) < LEAST_ROUNDS:
        return None
    fastest = best(records, names)
    faults = []
    for name, over, kind, least in (
        (OURS, CEILING, "long", 0.90),
        (fastest, "naive", "rows", 2.0),
        (fastest, "loader", "rows", 2.0),
    ):
        value = float(np.median(ratios(records, name, over, kind)))
        if value < least:
            faults.append(f"{name} runs at {value:.2f} of {over}, not {least:.2f}")
    return faults


BENCH = Bench(
    name=NAME,
    cells=cells,
    measure=measure,
    gates=(
        Gate("every face, no spill, same embeddings", "always", judge_whole),
        Gate("near the bare loop, twice the naive ones", "full", judge_speed),
    ),
    folder=lambda options: NAME,
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(main(BENCH))
