"""`omnifer plan`: probe a few slices and some training steps, and say what a run will take.

Reads the recipe, the labeled set and some of the pool; writes to a temporary folder beside the run
folder, on the same storage, and removes it. Commits nothing and leaves the run as it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from pipeline import guard, posix
from pipeline.artifacts import Teacher, load_teacher, on_node
from pipeline.errors import RunError, SourceError
from pipeline.labeled.reader import LabeledSet, read_labeled
from pipeline.planning.costs import Cluster, Prices
from pipeline.planning.forecast import Spent, average
from pipeline.planning.foresight import Measured, Row, foresee
from pipeline.planning.probing import (
    Probe,
    Prober,
    Requests,
    Sealed,
    random_teacher,
    usable_cores,
)
from pipeline.planning.rehearsal import Rehearsed, rehearse
from pipeline.planning.renting import here, machines
from pipeline.planning.sampling import Pool, plan_pool, probed_slices
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.sources.removals import Removals
from pipeline.sources.rows import labeled_rows_as_read
from pipeline.storage import Location, location
from pipeline.survey import describe
from pipeline.tables import write_table
from pipeline.training import runs

TEST_FACES = 4000
"""Test faces that guard's cost is measured with, at most."""

FREE = 0.9  # share of the cores below which other work is worth a line
IMPORTED = {"survey": "ray.data, pipeline.survey", "embed": "ray.data, pipeline.scoring"}
"""What the workers of a pass import."""


@dataclass(frozen=True)
class Outlook:
    """Everything that was found out and predicted."""

    recipe: str
    machine: str
    pool: Pool
    probes: Sequence[Probe]
    measured: Measured
    rows: Sequence[Row]
    fewest: Sequence[Row]
    """With the cluster at its smallest; [] without a cluster."""
    quiet: Sequence[Row]
    """On this machine without other work; [] for a cluster, or where there is none."""
    honest: Sequence[str]
    on_s3: bool
    prices: Prices


def look_ahead(
    recipe: Recipe,
    run_dir: str | None,
    prices: Prices,
    *,
    probes: int = 4,
    cluster: Cluster | None = None,
    steps: int = 20,
) -> Outlook:
    """Probe and predict.

    Args:
        recipe: what would be run.
        run_dir: as in `omnifer run`; decides where writing is measured.
        prices: of requests and storage.
        probes: slices that are measured.
        cluster: what would be rented; None: this machine.
        steps: training steps that are timed of each kind.

    Raises:
        SourceError: as the sources and the labeled set.
        ResourceError: a pass would hang on that machine.
    """
    root = location(recipe.folder(run_dir))
    removals = Removals.load(location(recipe.removals) if recipe.removals else None)
    cores = posix.cores()
    free = [usable_cores(cores)]
    with tempfile.TemporaryDirectory(prefix="omnifer-plan-") as folder, scratch(root) as stored:
        work = location(folder)
        began = time.perf_counter()
        labeled = read_labeled(recipe.labeled, removals, seed=recipe.seed)
        labeled_seconds = time.perf_counter() - began
        write_table(work / "labeled.parquet", labeled.table)
        rest = work / "labeled.parquet"
        sources = recipe.sources()
        pool = plan_pool(sources, recipe.slice_faces, work, rest=rest, seed=recipe.seed)
        teacher, own = _teacher(recipe, root, labeled)
        known = _test_faces(recipe, labeled)
        prober = Prober(recipe, pool.sources, teacher, known, stored)
        found = []
        for slice in probed_slices(pool, probes, recipe.seed):
            found.append(prober.probe(slice))
            free.append(usable_cores(cores))
        sealed = prober.seal(work)
    trained = rehearse(recipe, labeled.label_names, steps=steps)
    rows: dict[str, list[int]] = defaultdict(list)
    for probe in found:
        rows[pool.owner[probe.source]].append(probe.faces)
    pool = pool.with_rows(rows)
    measured = _measured(pool, found, sealed, labeled, labeled_seconds, trained)
    usable = sum(free) / len(free)
    busy = cluster is None and usable < FREE * cores
    rented, smallest, name = machines(recipe, measured, cluster, cores, usable)
    return Outlook(
        recipe=recipe.name,
        machine=name,
        pool=pool,
        probes=found,
        measured=measured,
        rows=foresee(measured, recipe, rented),
        fewest=[] if smallest is None else foresee(measured, recipe, smallest),
        quiet=foresee(measured, recipe, here(recipe, cores, cores)) if busy else [],
        honest=honest(pool, found, trained, cluster, cores, usable, own_teacher=own),
        on_s3=not root.is_local or any(p.requests["read"].gets for p in found),
        prices=prices,
    )


@contextlib.contextmanager
def scratch(root: Location) -> Iterator[Location]:
    """A folder on the storage of a run that is not in the run; gone when the block ends.

    On S3 a prefix beside the run's, `<run>.plan-<8 hex>`; on disk a folder in the nearest parent
    of the run folder that exists and can be written to, else in the system's.
    """
    if not root.is_local:
        at = location(f"{root.uri}.plan-{secrets.token_hex(4)}")
        try:
            yield at
        finally:
            at.remove_tree()
        return
    parents = [path for path in root.local_path().parents if path.is_dir()]
    near = parents[0] if parents and os.access(parents[0], os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".omnifer-plan-", dir=near) as folder:
        yield location(folder)


def _teacher(recipe: Recipe, root: Location, labeled: LabeledSet) -> tuple[Teacher, bool]:
    """The run's teacher if it has one of this recipe's kind, else one with random weights."""
    with contextlib.suppress(RunError, SourceError):
        at = Run(root).artifact("teach").dir / runs.TEACHER
        teacher = load_teacher(on_node(at))
        if [member.config for member in teacher.members] == [recipe.teach.model] * len(
            teacher.members
        ) and len(teacher.members) == recipe.teach.folds:
            return teacher, True
    return random_teacher(recipe, labeled.label_names, _training_faces(labeled)), False


def _training_faces(labeled: LabeledSet) -> int:
    return int(pc.sum(pc.equal(labeled.table["role"], "train")).as_py() or 0)


def _test_faces(recipe: Recipe, labeled: LabeledSet) -> guard.Reference:
    table = labeled.table.filter(pc.equal(labeled.table["role"], "test")).slice(0, TEST_FACES)
    read = labeled_rows_as_read(table)
    config = recipe.labeled
    faces = describe(read, config.crop, config.color, threads=recipe.survey.threads)
    return guard.reference({"test": faces})


# -- from probes to one set of figures ------------------------------------------------------------


def _measured(
    pool: Pool,
    probes: Sequence[Probe],
    sealed: Sealed,
    labeled: LabeledSet,
    labeled_seconds: float,
    trained: Mapping[str, Rehearsed],
) -> Measured:
    faces = {name: pool.faces(name) for name in pool.sampled}

    def mean(value: Mapping[str, float]) -> float:
        """Of a cost per face, by the key of the probe."""
        by_source: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for probe in probes:
            by_source[pool.owner[probe.source]].append((value[probe.key], float(probe.faces)))
        return average(by_source, faces)

    names = list(probes[0].spent)
    spent = {
        name: Spent(
            mean({p.key: p.spent[name].seconds for p in probes}),
            mean({p.key: p.spent[name].cpu for p in probes}),
        )
        for name in names
    }
    asked = {
        name: Requests(
            sum(p.requests[name].puts for p in probes) / len(probes),
            sum(p.requests[name].gets for p in probes) / len(probes),
        )
        for name in probes[0].requests
    }
    return Measured(
        faces=pool.count,
        slices=pool.slices,
        planning=pool.seconds,
        spent=spent,
        variants=[p.spent for p in probes],
        read_bytes=mean({p.key: p.read_bytes / max(1, p.faces) for p in probes}),
        stored={
            name: mean({p.key: p.stored[name] / max(1, p.faces) for p in probes})
            for name in probes[0].stored
        },
        requests=asked,
        sealed=sealed,
        labeled_seconds=labeled_seconds,
        training_faces=_training_faces(labeled),
        labeled_faces=labeled.table.num_rows,
        rates={name: (one.rate, *one.spread) for name, one in trained.items()},
        classes=len(labeled.label_names),
        start_cpu={stage: _start_cpu(modules) for stage, modules in IMPORTED.items()},
    )


def _start_cpu(modules: str) -> float:
    """Core-seconds until a new process has imported what a worker imports."""
    code = f"import resource, {modules}; u = resource.getrusage(resource.RUSAGE_SELF)"
    argv = [sys.executable, "-c", f"{code}; print(u.ru_utime + u.ru_stime)"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"a worker process could not start: {done.stderr.strip()[-200:]}")
    return float(done.stdout.split()[-1])


def honest(
    pool: Pool,
    probes: Sequence[Probe],
    trained: Mapping[str, Rehearsed],
    cluster: Cluster | None,
    cores: int,
    usable: float,
    *,
    own_teacher: bool,
) -> list[str]:
    """How far the prediction can be trusted, in a few lines."""
    rates = [1 / p.spent["forward"].seconds for p in probes]
    steps = min(len(one.seconds) for one in trained.values())
    counted = "; ".join(f"{name}: {one.said}" for name, one in pool.sampled.items())
    weights = "the run's teacher" if own_teacher else "random weights"
    lines = [
        f"{len(probes)} of {pool.slices:,} slices probed with {weights}; forward "
        f"{min(rates):,.0f}-{max(rates):,.0f} faces/s between probes; {steps} training steps timed "
        f"of each kind; {counted}; planning took {pool.seconds:.1f} s and a run pays it again.",
    ]
    if usable < FREE * cores:
        lines.append(
            f"Other work ran here: {usable:.1f} of {cores} cores were free. Waiting is taken out "
            f"of the steps, not out of the training rates; probe again on a quiet machine."
        )
    if cluster is not None:
        spot = ", ".join(group.name for group in cluster.groups if group.spot)
        leave = f"; spot nodes ({spot}) that leave cost their slice and are not modelled"
        lines.append(
            f"Extrapolated: GPU speed as the cluster file says, network as sold, efficiency "
            f"{cluster.efficiency:.0%} of several nodes, {cluster.node_start_seconds:g} s for "
            f"nodes to come{leave if spot else ''}."
        )
    lines.append(
        "Not modelled: search, select with its second look for twins, evaluate, report, packing of "
        "training faces, checkpoints, stragglers, throttling, traffic between regions; memory is "
        "not checked. Mining depends on what is selected: the row is the most it can be."
    )
    return lines
