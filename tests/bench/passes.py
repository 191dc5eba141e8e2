"""One pass that embeds and scores, in a process of its own; what scoring_speed and memory measure.

    python -m tests.bench.passes SPEC.json

The pass is the one that `omnifer embed` runs: the same operators, ledgers and Ray. Only the teacher
is invented (random weights, random bank), since neither speed nor memory depends on what it says.
Prints one JSON line.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import scoring, streaming
from pipeline.artifacts import Teacher, load_teacher, save_teacher
from pipeline.embedding import EmbedConfig
from pipeline.ledger import Ledger
from pipeline.models import ModelConfig, create
from pipeline.placement import StreamConfig
from pipeline.plan import Plan
from pipeline.schema import EMOTIONS, READ
from pipeline.scoring import ScoreConfig
from pipeline.similarity import Neighbors
from pipeline.sources.extents import Extent
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import plan_slices
from pipeline.sources.removals import Removals
from pipeline.sources.synthetic import SyntheticPool
from pipeline.storage import Location, location
from tests.bench import watch

TICKS = os.sysconf("SC_CLK_TCK")
BANK = 2_477
"""Labeled faces that the pool is compared with: a tenth of FERPlus."""


@dataclass(frozen=True)
class Spec:
    """A pass."""

    work: str
    """Folder that is empty or not there."""
    images: str
    """Folder of Parquet files with a column `image`."""
    model: dict[str, Any]
    slice_faces: int
    recycled: int = 0
    """Faces of the pool, made of the images again and again; 0: the images as they are."""
    embed: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    rss_log: str | None = None
    """File that gets a line per second: seconds, MB of the driver, MB of all processes."""


class Recycled(SyntheticPool):
    """A pool of any size with few pictures: every face has an id of its own."""

    images: str

    def read(self, extent: Extent, positions: Sequence[int] | None = None) -> pa.Table:
        """READ rows of an extent."""
        numbers = np.arange(extent.start, extent.stop) if positions is None else positions
        known = pictures(self.images)
        rows = len(numbers)
        return pa.table(
            [
                pa.array([f"face{i}" for i in numbers], pa.string()),
                pa.array(numbers, pa.int64()),
                pa.nulls(rows, pa.string()),
                pa.array([known[i % len(known)] for i in numbers], pa.large_binary()),
                *(pa.nulls(rows, READ.field(name).type) for name in READ.names[4:]),
            ],
            schema=READ,
        )


@functools.lru_cache(maxsize=1)
def pictures(folder: str) -> list[bytes]:
    """The encoded images of a folder of Parquet files."""
    return list(pq.read_table(folder, columns=["image"])["image"].to_pylist())


def call(spec: Spec, log: Path, seconds: float) -> dict[str, Any]:
    """Run a pass in a process of its own; RuntimeError with its last lines where it fails."""
    work = Path(spec.work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "spec.json").write_text(json.dumps(asdict(spec)))
    return run_json(["tests.bench.passes", str(work / "spec.json")], log, seconds)


def run_json(module: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """The JSON line that a module of ours prints last; its other output goes to a log."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=seconds,
        )
    lines = done.stdout.decode().strip().splitlines()
    if done.returncode or not lines:
        end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"{module[0]}: exit code {done.returncode}; {end}")
    return dict(json.loads(lines[-1]))


def teacher(model: Mapping[str, Any], seed: int = 0) -> Teacher:
    """One member with random weights, a prototype per class and a bank of labeled faces."""
    torch.manual_seed(seed)
    config = ModelConfig(**model)
    member = create(config, EMOTIONS).eval()

    def rows(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, member.embed_dim), dim=-1)

    return Teacher(
        members=[member],
        label_names=EMOTIONS,
        temperature=1.0,
        prototypes=rows(len(EMOTIONS)),
        prototype_labels=torch.arange(len(EMOTIONS)),
        bank=rows(BANK),
        bank_labels=torch.arange(BANK) % len(EMOTIONS),
        bank_ids=tuple(f"labeled/{i}" for i in range(BANK)),
    )


def run(spec: Spec) -> dict[str, Any]:
    """The pass, and what it took."""
    at = location(spec.work)
    torch.set_num_threads(1)
    save_teacher(teacher(spec.model), at / "teacher")
    source = (
        Recycled(count=spec.recycled, images=spec.images, color="gray")
        if spec.recycled
        else ParquetPool(path=spec.images, color="rgb")
    )
    sources = {"pool": source}
    plan = Plan.write(at / "plan.parquet", plan_slices(sources, spec.slice_faces, at / "index"))
    embed, score = EmbedConfig(**spec.embed), ScoreConfig(**spec.score)
    ledgers = (at / "embed", at / "score")
    read, operators = scoring.embed_and_score(
        at / "teacher", sources, Removals(), (embed, score), ledgers
    )
    config = StreamConfig(**spec.stream)
    with RssLog(spec.rss_log):
        began = time.monotonic()
        streaming.start_ray(config)
        ready = time.monotonic()
        stamps: list[float] = []
        rows: list[int] = []
        for _, counts in streaming.stream(plan, read, operators, config):
            stamps.append(time.monotonic())
            rows.append(counts["rows"][0].as_py())
            if len(rows) == 3:
                before, since = cpu_seconds(), stamps[-1]
        now = cpu_seconds()
    window = stamps[-1] - since
    found = {
        "faces": sum(rows),
        "slices": len(rows),
        "ray_start": ready - began,
        "first_commit": stamps[0] - ready,
        "seconds": stamps[-1] - ready,
        "rate": steady(stamps, rows),
        "cores_busy": {name: (now[name] - before[name]) / window for name in now},
        "spilled_mb": spilled_mb(),
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    return {**found, **parts(at, plan, score)}


def steady(stamps: Sequence[float], rows: Sequence[int]) -> float:
    """img/s between an early and a late slice, so that neither start nor tail counts."""
    first, last = max(2, len(stamps) // 10), len(stamps) - 3
    if last <= first:
        return sum(rows) / (stamps[-1] - stamps[0]) if len(stamps) > 1 else float("nan")
    return sum(rows[first + 1 : last + 1]) / (stamps[last] - stamps[first])


def parts(at: Location, plan: Plan, score: ScoreConfig, repeats: int = 8) -> dict[str, float]:
    """Seconds per slice of scoring and of the two commits, measured alone, with nothing beside."""
    slices = plan.slices(0, repeats)
    known = load_teacher(at / "teacher")
    neighbors = Neighbors(known.bank.numpy(), known.bank_ids)
    embedded, scored = Ledger(at / "embed"), Ledger(at / "score")
    tables = [embedded.read(slice.key) for slice in slices]
    began = time.perf_counter()
    for table in tables:
        scoring.score_table(table, known, neighbors, score.neighbors, score.neighbor_tau)
    took = {"score_per_slice": (time.perf_counter() - began) / len(slices)}
    again = Ledger(at / "again")
    pairs = [(slice, ledger.read(slice.key)) for ledger in (embedded, scored) for slice in slices]
    began = time.perf_counter()
    for number, (slice, table) in enumerate(pairs):
        Ledger(again.at / str(number)).commit(slice, table)
    took["commit_per_slice"] = (time.perf_counter() - began) / len(slices)
    return took


# -- processes ------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[str, float]]:
    """This process and all below it: command line and CPU seconds so far, by pid."""
    known, todo, found = watch.children(), [os.getpid()], {}
    while todo:
        pid = todo.pop()
        todo += known.get(pid, [])
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            args = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        found[pid] = (args, (int(stat[11]) + int(stat[12])) / TICKS)
    return found


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of the driver, of actors and tasks, and of Ray's own processes."""
    took = dict.fromkeys(("driver", "workers", "raylet", "gcs", "others"), 0.0)
    for pid, (args, cpu) in processes().items():
        if pid == os.getpid():
            took["driver"] += cpu
        elif args.startswith("ray::Map"):
            took["workers"] += cpu
        elif "/raylet/raylet" in args:
            took["raylet"] += cpu
        elif "gcs_server" in args:
            took["gcs"] += cpu
        else:
            took["others"] += cpu
    return took


class RssLog:
    """Writes the resident memory of the driver and of all its processes, once a second."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        if self._path is not None:
            argv = [sys.executable, "-m", "tests.bench.watch", str(os.getpid()), self._path]
            self._watcher = subprocess.Popen(argv, start_new_session=True)

    def __exit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.terminate()
            self._watcher.wait()


def spilled_mb() -> float:
    """What Ray wrote to disk because its object store was full."""
    import ray
    from ray._private.internal_api import memory_summary

    said = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    for line in said.splitlines():
        if line.startswith("Spilled"):
            return float(line.split()[1])
    return 0.0


if __name__ == "__main__":
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    # Ray's workers import the recycled pool by the name of this module.
    from tests.bench import passes

    print(json.dumps(passes.run(passes.Spec(**asdict(spec)))))
