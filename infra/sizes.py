"""How long and how much for 1 million to 1 billion faces: the arithmetic of `omnifer plan`.

    python -m infra.sizes      prints the table that infra/README.md holds

`omnifer plan` measures what a face costs on your machine and data. Here those costs are assumed, so
that sizes can be compared before anything is at hand. They are the constants below, and a real plan
replaces all of them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.planning.costs import Cluster, load_prices
from pipeline.planning.forecast import Spent
from pipeline.planning.foresight import Measured, foresee
from pipeline.planning.probing import Requests, Sealed
from pipeline.planning.renting import cluster_at
from pipeline.recipe import Recipe, load

RECIPE = Path(__file__).parents[1] / "jobs" / "recipes" / "omni-msceleb.yaml"
FACES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)

POOL = ("survey", "guard", "embed", "score", "mine")
"""Stages that look at every face."""

MICRO = 1e-6
CPU = {
    "read": 40, "survey": 700, "survey write": 30, "guard": 8, "decode": 120,
    "embed write": 30, "score": 60, "score write": 20,
}  # fmt: skip
"""Core-microseconds per face: 8 KB JPEGs of 112 px, one logical CPU."""
FORWARD = 20_000.0
"""ResNet-18 at 112 px in bf16: images per second of one A10G. An assumption, not a measurement."""
TRAIN = 4_000.0
"""The same, image passes of training."""
FACE_BYTES = 8_000.0
STORED = {"survey": 1_400.0, "embed": 1_100.0, "score": 260.0}
"""Bytes per face that stages leave: thumbnails and hashes, float16 embeddings, scores."""

SEALED = 0.09
"""Seconds of a node to pack, seal and sweep a slice of 8,192 faces on S3, 50 ms an answer: see the
bench scale_model."""

GPU_SPOT, READER_SPOT, HEAD = 0.50, 0.30, 0.20
"""Dollars per hour, examples: g5.2xlarge and c7i.4xlarge on spot, m7i.xlarge on demand."""


@dataclass(frozen=True)
class Size:
    """One line of the table."""

    faces: int
    gpus: int
    readers: int
    hours: dict[str, float]
    """Of every stage."""
    compute: float
    stored: float
    requests: float


def recipe() -> Recipe:
    """The recipe of the table, without its distilled set, whatever the pool: minutes either way."""
    for name in ("OMNIFER_LABELED", "OMNIFER_POOL"):  # places, which are not read
        os.environ.setdefault(name, "/assumed")
    return load(RECIPE, ["distill=null"])


def assumed(faces: int, plan: Recipe) -> Measured:
    """What a probe would have found."""
    views = plan.teach.folds * (2 if plan.embed.flip else 1)
    spent = {name: Spent(value * MICRO, value * MICRO) for name, value in CPU.items()}
    spent["forward"] = Spent(views / FORWARD, views / FORWARD)
    rate = (TRAIN, TRAIN, TRAIN)
    requests = {
        "read": Requests(0, 2), "survey": Requests(3, 1),
        "embed": Requests(3, 1), "score": Requests(2, 1),
    }  # fmt: skip
    return Measured(
        faces=faces,
        slices=-(-faces // plan.slice_faces),
        planning=60.0,
        spent=spent,
        variants=[spent],
        read_bytes=FACE_BYTES,
        stored=STORED,
        requests=requests,
        sealed=Sealed(SEALED, Requests(0.04, 4)),
        labeled_seconds=10.0,
        training_faces=12_000,
        labeled_faces=15_000,
        rates=dict.fromkeys(("teach", "student", "control", "distill", "pretrain"), rate),
        classes=7,
        start_cpu={"survey": 10.0, "embed": 30.0},
    )


def cluster(gpus: int, readers: int, plan: Recipe) -> Cluster:
    """Nodes of the large overlay and of cluster.yaml, as many as asked."""
    views = plan.teach.folds * (2 if plan.embed.flip else 1)
    head = {"name": "head", "min": 1, "max": 1, "cpus": 4, "network_gbit": 1.5}
    gpu = {"name": "gpu", "max": gpus, "cpus": 8, "gpus": 1, "network_gbit": 5}
    reader = {"name": "reader", "max": readers, "cpus": 16, "network_gbit": 6.25}
    groups = [
        {**head, "dollars_per_hour": HEAD},
        {**gpu, "dollars_per_hour": GPU_SPOT, "gpu_images_per_second": FORWARD / views},
        {**reader, "dollars_per_hour": READER_SPOT},
    ]
    return Cluster.model_validate({"groups": groups})


def size(faces: int, gpus: int, readers: int) -> Size:
    """What `omnifer plan` would say of such a pool on such a cluster."""
    plan, prices = recipe(), load_prices(None)
    pools = {"pool": (1, gpus)}
    embed, score = plan.embed.model_copy(update=pools), plan.score.model_copy(update=pools)
    plan = plan.model_copy(update={"embed": embed, "score": score})
    found = assumed(faces, plan)
    counts = {"head": 1, "gpu": gpus, "reader": readers}
    rows = foresee(found, plan, cluster_at(plan, found, cluster(gpus, readers, plan), counts))
    asked = [row.requests for row in rows]
    return Size(
        faces=faces,
        gpus=gpus,
        readers=readers,
        hours={row.stage: row.seconds / 3600 for row in rows},
        compute=sum(row.compute_dollars for row in rows),
        stored=sum(row.stored for row in rows),
        requests=prices.s3.requests(sum(r.puts for r in asked), sum(r.gets for r in asked)),
    )


SHAPES = {1_000_000: (1, 1), 10_000_000: (4, 2), 100_000_000: (8, 4), 1_000_000_000: (64, 32)}
"""GPU nodes and readers by faces."""


def table() -> str:
    """Markdown."""
    per_month = load_prices(None).s3.gb_month
    lines = [
        "| faces | GPUs | readers | pool, h | trainings, h | control B, h | compute | requests | "
        "stored | per month |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for faces in FACES:
        one = size(faces, *SHAPES[faces])
        gigabytes = one.stored / 1e9
        pool = sum(one.hours[stage] for stage in POOL)
        control = one.hours["control_b"]
        trained = sum(one.hours.values()) - pool - control
        lines.append(
            f"| {faces:,} | {one.gpus} | {one.readers} | {pool:,.1f} | {trained:,.1f} | "
            f"{control:,.1f} | ${one.compute:,.0f} | ${one.requests:,.2f} | {gigabytes:,.0f} GB | "
            f"${gigabytes * per_month:,.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
