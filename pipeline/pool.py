"""The pool in a run: cut into a plan, streamed through operators, packed and sealed.

A run has one plan at a time. Another removal list makes another plan of the same survey, in which
only the slices it touches have a new key; what is committed under the other keys stays.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import clustering, sealing
from pipeline.claim import WHOLE
from pipeline.clustering import Inputs
from pipeline.config import digest
from pipeline.errors import BudgetError, IdentityError, PartDone
from pipeline.images import DECODER
from pipeline.job import Job
from pipeline.ledger import Ledger
from pipeline.ordered import in_order
from pipeline.parquet import Writer
from pipeline.plan import CHUNK, Plan, Slice, number_of
from pipeline.progress import meter
from pipeline.run import IDENTITY, PLAN_FILE, TRUTH_FILE, Artifact, Run, Stage
from pipeline.schema import QUARANTINE
from pipeline.sources.reader import Earlier, extent_of, keyed, plan_slices
from pipeline.sources.removals import Removals
from pipeline.sources.synthetic import SyntheticPool
from pipeline.storage import Location
from pipeline.streaming import Operator, start_ray, stream
from pipeline.tables import read_table, write_table
from pipeline.telemetry import Counted
from pipeline.training.handed import LABELED_FILE

QUARANTINE_FILE = "quarantine.parquet"
NO_YIELD = ("rows", "quarantined", "key")
"""What operators return beside counts per class."""
READERS = 16
"""Slices of an earlier plan that are looked up at a time."""


def done(stage: Stage) -> Artifact:
    """The artifact of a finished stage."""
    assert stage.done is not None
    return stage.done


def plan_pool(job: Job) -> tuple[Stage, Plan]:
    """Cut the pool into slices and open the survey stage that they belong to.

    A changed removal list makes another plan of the same stage, in which only the slices it
    touches have a new key.

    Raises:
        IdentityError: the pool's files, or the decoder, are not those of the survey that was begun;
            the message names the first shard that changed.
    """
    labeled = job.run.artifact("labeled").dir / LABELED_FILE
    home = job.run.root / "plan"
    cut = plan_slices(job.sources, job.recipe.slice_faces, home, rest=labeled)
    base = Plan.write(home / "base.parquet", cut)
    identity = {"pool": base.digest, "decoder": DECODER}
    earlier = _earlier(job.run.find("survey", job.identity("survey", identity)))
    # Without a list as well, if the last plan had one or still has slices that one renamed.
    if job.removals or (earlier and (earlier.removals or earlier.digest != base.digest)):
        base = Plan.write(home / "keyed.parquet", renamed(base, job.removals, earlier))
    try:
        stage = job.open("survey", identity, plan=base.digest, firm=["pool", "decoder"])
    except IdentityError as err:
        raise IdentityError(f"{err}{_changed(job, base)}") from err
    name = f"plan-{base.digest[:8]}.parquet"
    plan = Plan.write(stage.dir / name, base)
    (stage.dir / PLAN_FILE).write_json(
        {
            "file": name,
            # Not the list itself: a run may have to forget whom it left out.
            "removed": sorted(value.hex() for value in job.removals.all_blinded),
        }
    )
    return stage, plan


def renamed(base: Plan, removals: Removals, earlier: Earlier | None) -> Iterator[Slice]:
    """The slices under the keys that a removal list gives them; some are looked up at a time."""
    return in_order(partial(keyed, removals=removals, earlier=earlier), base, READERS)


def write_truth(job: Job, stage: Stage, plan: Plan) -> None:
    """Hidden truth of the pool, in a file that only evaluate and report open."""
    tables = [read_table(job.run.artifact("labeled").dir / TRUTH_FILE)]
    for slice in plan:
        source = job.sources[slice.source]
        if isinstance(source, SyntheticPool):
            table = source.truth(extent_of(slice))
            ids = pc.binary_join_element_wise(f"{slice.source}/", table["id"], "")
            tables.append(table.set_column(0, table.schema.field("id"), ids))
    write_table(stage.dir / TRUTH_FILE, pa.concat_tables(tables))


def _earlier(at: Location | None) -> Earlier | None:
    """What the last plan of this survey knows; None where there was none.

    It may be asked by many threads: on S3 every slice asked for is three or four requests.
    """
    if at is None or not (at / PLAN_FILE).exists():
        return None
    last = (at / PLAN_FILE).read_json()
    plan, ledger = Plan(at / last["file"]), Ledger(at)
    chunk: list[Slice] = []

    def planned(key: str) -> Slice | None:
        nonlocal chunk
        number = number_of(key)  # every plan of a pool numbers its slices without a gap
        held = chunk  # other threads replace it
        if not held or not 0 <= number - number_of(held[0].key) < len(held):
            first = number // CHUNK * CHUNK
            chunk = held = plan.slices(first, first + CHUNK)
        return held[number % CHUNK] if number % CHUNK < len(held) else None

    def faces(key: str) -> pa.Table | None:
        if ledger.find(key) is None:
            return None
        return ledger.read(key, ["id", "sha256", "group"])

    return Earlier(removed_by(last), plan.digest, planned, faces)


def _changed(job: Job, base: Plan) -> str:
    """A line that says where the pool is not the one of the last plan; "" if it is."""
    planned = [at for at in job.run.folders("survey") if (at / PLAN_FILE).exists()]
    before = Plan(plan_at(planned[-1])) if planned else base
    for old, new in itertools.zip_longest(before, base):
        if old is None or new is None or replace(old, key=new.key) != new:
            slice = new or old
            return f"\nthe plans differ, first at slice {slice.key}: {slice.source}, {slice.shard}"
    return ""


def removed_by(plan: dict[str, Any]) -> Removals:
    """The removal list that a stored plan obeyed."""
    return Removals(blinded=frozenset(map(bytes.fromhex, plan["removed"])))


def plan_at(survey: Location) -> Location:
    return survey / str((survey / PLAN_FILE).read_json()["file"])


def pool_digest(job: Job) -> str:
    """What the pool is, whatever a removal list leaves out."""
    identity = (job.run.artifact("survey").dir / IDENTITY).read_json()
    return str(identity["inputs"]["pool"])


def pool_plan(job: Job) -> Plan:
    """The plan of the pool that survey fixed."""
    return Plan(plan_at(job.run.artifact("survey").dir))


def ledger(job: Job, stage: str) -> Ledger:
    """Ledger of a finished streaming stage."""
    return Ledger(job.run.artifact(stage).dir)


def stream_pool(
    job: Job,
    what: str,
    plan: Plan,
    into: Ledger,
    read: Callable[[Slice], pa.Table],
    operators: Sequence[Operator],
) -> None:
    """One pass over the slices that `into` lacks, with a meter in faces and the live yield."""
    open_slices = (s for s in into.pending(plan) if job.part.owns(number_of(s.key)))
    name = f"pass-{what}-{job.part.name}.parquet"
    pending = Plan.write(job.run.root / "work" / name, open_slices)
    if len(pending):
        start_ray(job.recipe.stream)
        yields: Counter[str] = Counter()
        counted = Counted(what)
        with meter(what, pending.faces) as shown:
            for slice, counts in stream(pending, read, operators, job.recipe.stream):
                row = counts.to_pylist()[0]
                labels = {k: n for k, n in row.items() if k not in NO_YIELD}
                counted.add(row["rows"], row.get("quarantined", 0), labels)
                yields.update(labels)
                note = ", ".join(f"{name} {n:,}" for name, n in yields.items() if n)
                shown.advance(slice.faces or row["rows"], note)
    if job.part != WHOLE and next(into.pending(plan), None) is not None:
        raise PartDone(
            f"{what}: part {job.part} is done; other parts are not, and the last one completes it"
        )


def cluster(job: Job, plan: Plan, count: int) -> Artifact:
    """Find clusters of the pool's embeddings and give every face its own: stage `clusters`."""
    names = ("embed", "score", "twins")
    inputs: dict[str, Any] = {name: job.run.artifact(name).digest for name in names}
    stage = job.open("clusters", {**inputs, "count": count}, plan=plan.digest)
    if stage.done is None:
        found = Inputs(plan, *(ledger(job, name) for name in names))
        counts = clustering.cluster(found, count, job.recipe.seed, Ledger(stage.dir))
        clustering.save_counts(counts, stage.dir)
        seal(stage, plan, clusters=len(counts))
    return done(stage)


def seal(stage: Stage, plan: Plan, *, budget: float | None = None, **facts: Any) -> Artifact:
    """Pack and seal a streaming stage; its digest is that of the canonical manifest.

    With a budget the bad faces are written to a table of their own first.

    Raises:
        BudgetError: a larger share of the faces than `budget` is quarantined.
    """
    ledger = Ledger(stage.dir)
    sealing.seal(ledger, plan)
    sealing.sweep(ledger, plan)
    manifest = ledger.manifest(plan)
    (stage.dir / "manifest.json").write_json(manifest)
    rows, bad = manifest["rows"], manifest["quarantined"]
    if budget is not None:
        _write_quarantine(ledger, plan, stage.dir / QUARANTINE_FILE)
    if budget is not None and bad > budget * max(rows, 1):
        first = _first_bad(ledger, plan)
        raise BudgetError(
            f"{stage.name}: {bad:,} of {rows:,} faces are quarantined, more than the budget of "
            f"{budget:.1%}; first: {first}; all: {stage.dir / QUARANTINE_FILE}"
        )
    return stage.finish(digest(manifest), rows=rows, quarantined=bad, **facts)


def _write_quarantine(ledger: Ledger, plan: Plan, at: Location) -> None:
    """QUARANTINE rows of all slices, one slice in memory at a time."""
    columns = [name for name in QUARANTINE.names if name not in ("source", "shard")]
    with at.replacing() as sink, Writer(sink, QUARANTINE) as writer:
        for slice, table in ledger.tables(plan, columns):
            bad = table.filter(pc.is_valid(table["reason"]))
            if bad.num_rows:
                named = {"source": slice.source, "shard": slice.shard}
                for name, value in named.items():
                    bad = bad.append_column(name, pa.array([value] * bad.num_rows, pa.string()))
                writer.write(bad.select(QUARANTINE.names).cast(QUARANTINE))


def _first_bad(ledger: Ledger, plan: Plan) -> str:
    found: list[str] = []
    for _, table in ledger.tables(plan, ["id", "reason"]):
        bad = table.filter(pc.is_valid(table["reason"]))
        found += [f"{row['id']} ({row['reason']})" for row in bad.to_pylist()]
        if len(found) >= 3:
            break
    return ", ".join(found[:3])


def grouped(run: Run, rows: pa.Table) -> pa.Table:
    """Rows of labeled faces, told by `id`, with the `group` that their set names, or null."""
    made = [run.latest(stage) for stage in ("labeled", "annotated")]
    known = pa.concat_tables(
        read_table(one.dir / LABELED_FILE, ["id", "group"]) for one in made if one is not None
    )
    return rows.append_column("group", known["group"].take(pc.index_in(rows["id"], known["id"])))
