"""The demo's recipe, so small that tests can run it several times; reads of the pool are logged."""

import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from pipeline import conduct
from pipeline.job import Job
from pipeline.recipe import Recipe, load
from pipeline.run import Run
from pipeline.sources.reader import PoolSource

from .logged import LoggedParquet, LoggedSynthetic

DEMO = Path(__file__).parents[2] / "jobs" / "recipes" / "demo.yaml"
TEACHER = "{name: convnet, args: {width: 16}, size: 32, dropout: 0.0}"
STUDENT = "{name: compact_resnet, args: {widths: [8, 16]}, size: 32, dropout: 0.0}"
TINY = (
    "labeled.count=400",
    "labeled.test_count=120",
    "pool.0.count=600",
    "slice_faces=64",
    "stream.object_store_mb=300",
    "train.stage_workers={}",
    "teach.steps=80",
    "teach.batch=32",
    "teach.lr=0.003",
    "teach.ema=null",
    "teach.augment=plain",
    f"teach.model={TEACHER}",
    "search={trials: 4, batch: 2, target_purity: 0.3, min_utilization: 0.3}",
    "distill.steps=5",
    "distill.ipc=1",
    "distill.batch=4",
    "distill.net={name: convnet, args: {width: 8}, size: 32, dropout: 0}",
    "tune={steps: 3, batch: 16}",
    "student.steps=20",
    "student.labeled_batch=16",
    "student.mined_batch=32",
    f"student.model={STUDENT}",
    "evaluate.draws=200",
)
UNTRACKED = 'tracking.uri="off"'


class LoggedJob(Job):
    """A job whose sources log what they read."""

    @cached_property
    def sources(self) -> dict[str, PoolSource]:
        log = str(log_of(self.run))
        kinds = {"synthetic": LoggedSynthetic, "parquet": LoggedParquet}
        return {
            name: kinds[source.kind](**source.model_dump(), log=log)
            for name, source in self.recipe.sources().items()
        }


def tiny(*sets: str) -> Recipe:
    """The demo's recipe, shrunk and changed."""
    return load(DEMO, [*TINY, *sets])


def start(recipe: Recipe, root: Path, *, fresh: bool = False) -> LoggedJob:
    """Open or continue a run whose reads are logged."""
    job = conduct.start(recipe, str(root), fresh=fresh, show_faces=False)
    return LoggedJob(job.recipe, job.run, job.tracker)


def log_of(run: Run) -> Path:
    """The log lies beside the run folder, so that copies of a run start with an empty one."""
    return Path(f"{run.root.local_path()}.reads")


def reads(job: Job) -> list[str]:
    """`start-stop` of every slice that was read whole, in the order of the reads."""
    log = log_of(job.run)
    return log.read_text().split() if log.exists() else []


def copy(root: Path, to: Path, without: Sequence[str] = ()) -> Path:
    """A copy of a finished run, less some stages."""
    drop = ("cache", "mlflow.db", "mlruns", "train", "report.html", *without)
    shutil.copytree(root, to, ignore=lambda at, names: drop if at == str(root) else ())
    return to


def finished(root: Path) -> dict[str, int]:
    """When each done file below a run folder was written, in ns, by its place in the folder."""
    found = root.glob("*/g*/done*.json")
    return {str(at.relative_to(root)): at.stat().st_mtime_ns for at in sorted(found)}


def digests(job: Job, stages: Sequence[str]) -> dict[str, str]:
    """Content digests of finished stages."""
    return {stage: job.run.artifact(stage).digest for stage in stages}


def altered(pixels: np.ndarray, number: int) -> np.ndarray:
    """A copy as pools hold them: mirrored, moved by two pixels, or of another brightness."""
    change: Callable[[np.ndarray], np.ndarray] = (
        lambda p: p[:, ::-1],
        lambda p: np.pad(p, ((0, 0), (2, 0)), mode="edge")[:, :-2],
        lambda p: np.pad(p, ((2, 0), (0, 0)), mode="edge")[:-2],
        lambda p: np.clip(p.astype(np.int64) + 6, 0, 255).astype(np.uint8),
    )[number % 4]
    return np.ascontiguousarray(change(pixels))


class SharedRay:
    """One local Ray for all tests that name `local_ray`: each start costs them ten seconds."""

    on = False

    @classmethod
    def start(cls) -> None:
        """Start it, unless a Ray runs already; its workers can import what tests import."""
        import ray

        from pipeline.streaming import start_ray

        if not ray.is_initialized():
            with pytest.MonkeyPatch.context() as patch:  # Ray's processes inherit it
                patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
                # Workers that wait for the next test need not import everything again.
                patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "600000")
                # Ray's processes are nice by default, to tests beside them as well.
                patch.setenv("RAY_worker_niceness", "0")
                start_ray(tiny().stream)
            cls.on = True

    @classmethod
    def end(cls) -> None:
        """End it, if it runs: a test starts its own, or all tests are done."""
        if cls.on:
            import ray

            ray.shutdown()
            cls.on = False
