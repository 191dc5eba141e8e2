"""What stages hand to each other: labeled tables, the pool's plan, ledgers, training faces.

Artifacts are found through the run folder and read here, so that a stage function says what it
does and not where things lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import guard as guarding
from pipeline.artifacts import Teacher, load_teacher
from pipeline.config import digest
from pipeline.embedding import Embedder
from pipeline.errors import BudgetError, RunError
from pipeline.images import DECODER
from pipeline.job import Job, file_stamp
from pipeline.labeled.reader import read_labeled
from pipeline.ledger import Ledger
from pipeline.packs import content_digest
from pipeline.plan import Plan, Slice
from pipeline.progress import meter
from pipeline.run import Artifact, Stage
from pipeline.schema import FACES, GUARD, OK, label_codes, label_names_of
from pipeline.scoring import Scorer
from pipeline.selection import join
from pipeline.similarity import Neighbors, unit
from pipeline.sources.reader import Earlier, keyed, plan_slices
from pipeline.sources.removals import Removals
from pipeline.storage import Location, location, read_table, write_table
from pipeline.streaming import Operator, start_ray, stream
from pipeline.survey import describe
from pipeline.training import exam, runs
from pipeline.training.handed import (
    FACES_FILE,
    LABELED_FILE,
    Handed,
    labeled_rows,
    pack_labeled,
)
from pipeline.training.launch import launch
from pipeline.training.loop import FORWARD
from pipeline.training.references import out_of_fold_scores

TRUTH_FILE = "truth.parquet"
POINTS_FILE = "labeled.parquet"
PLAN_FILE = "plan.json"
TEST_FIELDS = ("labeled.test", "labeled.development.role", "inputs.files.test")


def done(stage: Stage) -> Artifact:
    """The artifact of a finished stage."""
    assert stage.done is not None
    return stage.done


# -- labeled faces ----------------------------------------------------------------------------------


def read_labels(job: Job) -> None:
    """Read, split and survey the labeled set; the test faces are an artifact of their own.

    Another test set leaves the training side as it is.
    """
    files = _stamps(job.recipe.labeled)
    training_files = {name: stamp for name, stamp in files.items() if name != "test"}
    removals = job.removals.digest
    training = job.open(
        "labeled", {"files": training_files, "removals": removals}, hide=TEST_FIELDS[:2]
    )
    test = job.open("test", {"files": files, "removals": removals}, retarget=TEST_FIELDS)
    if training.done is not None and test.done is not None:
        return
    found = read_labeled(job.recipe.labeled, job.removals, seed=job.recipe.seed)
    is_test = pc.equal(found.table["role"], "test")
    for stage, rows in ((training, pc.invert(is_test)), (test, is_test)):
        if stage.done is None:
            table = found.table.filter(rows)
            write_table(stage.dir / LABELED_FILE, table)
            write_table(stage.dir / FACES_FILE, _describe(job, table))
            if stage is training:
                write_table(stage.dir / TRUTH_FILE, found.truth)
            stage.finish(content_digest(table), rows=table.num_rows, **found.counts)


def _describe(job: Job, table: pa.Table) -> pa.Table:
    config = job.recipe.labeled
    count = table.num_rows
    read = pa.table(
        {
            "id": table["id"],
            "position": pa.array(np.arange(count), pa.int64()),
            "group": table["group"],
            "image": table["image"],
            "box": table["box"],
            "reason": pa.nulls(count, pa.string()),
        }
    )
    return describe(read, config.crop, config.color, threads=job.recipe.survey.threads)


def _stamps(config: Any) -> dict[str, str]:
    """State of every file the labeled configuration names."""
    values = config.model_dump(mode="json")
    found = {name: values[name] for name in ("path", "votes") if values.get(name)}
    test = values.get("test")
    if isinstance(test, str):
        found["test"] = test
    elif isinstance(test, dict) and test.get("path"):
        found["test"] = test["path"]
    return {name: file_stamp(path) for name, path in found.items()}


def label_names(job: Job) -> tuple[str, ...]:
    """Classes of the labeled set, the order of every probability vector of the run."""
    return label_names_of(read_table(job.run.artifact("labeled").dir / LABELED_FILE, ["id"]).schema)


def handed(job: Job, *, mined: bool = False) -> Handed:
    """What training functions get: places and crops."""
    config = job.recipe.labeled
    return Handed(
        labeled=job.run.artifact("labeled").dir.uri,
        guard=job.run.artifact("guard").dir.uri,
        crop=config.crop,
        color=config.color,
        scratch=str(job.run.scratch),
        mined=job.run.artifact("mine").dir.uri if mined else None,
        plan=_plan_at(job.run.artifact("survey").dir).uri if mined else None,
        views=job.views,
    )


def training_digest(job: Job) -> str:
    """Digest of the labeled faces that may train, whatever made them so."""
    found = handed(job)
    rows = labeled_rows(location(found.labeled), location(str(found.guard)), ("train",))
    return content_digest(rows.select(["id", "label", "soft", "image"]))


# -- the pool ---------------------------------------------------------------------------------------


def plan_pool(job: Job) -> tuple[Stage, Plan]:
    """Cut the pool into slices and open the survey stage that they belong to.

    A changed removal list makes another plan of the same stage, in which only the slices it
    touches have a new key.
    """
    labeled = job.run.artifact("labeled").dir / LABELED_FILE
    base = plan_slices(job.sources, job.recipe.slice_faces, job.run.root / "plan", rest=labeled)
    pool = digest([[s.source, s.shard, s.start, s.stop, s.fingerprint] for s in base])
    identity = {"pool": pool, "decoder": DECODER}
    earlier = _earlier(job.open("survey", identity))
    slices = [keyed(slice, job.removals, earlier) for slice in base]
    key = digest([slice.key for slice in slices])
    stage = job.open("survey", identity, plan=key)
    name = f"plan-{key[:8]}.parquet"
    plan = Plan.write(stage.dir / name, slices)
    (stage.dir / PLAN_FILE).write_json(
        {
            "file": name,
            "ids": sorted(job.removals.ids),
            "sha256": sorted(value.hex() for value in job.removals.sha256),
            "groups": sorted(job.removals.groups),
        }
    )
    return stage, plan


def _earlier(stage: Stage) -> Earlier | None:
    """What the last plan of this stage knows; None where there was none."""
    if not (stage.dir / PLAN_FILE).exists():
        return None
    last = (stage.dir / PLAN_FILE).read_json()
    removals = Removals(
        frozenset(last["ids"]),
        frozenset(bytes.fromhex(value) for value in last["sha256"]),
        frozenset(last["groups"]),
    )
    known = {s.key.split(".")[0]: s for s in Plan(stage.dir / last["file"]).slices()}
    ledger = Ledger(stage.dir)

    def surveyed(key: str) -> tuple[Slice, pa.Table] | None:
        slice = known.get(key)
        if slice is None or ledger.find(slice.key) is None:
            return None
        return slice, ledger.read(slice.key, ["id", "sha256", "group"])

    return Earlier(removals, surveyed)


def _plan_at(survey: Location) -> Location:
    return survey / str((survey / PLAN_FILE).read_json()["file"])


def pool_digest(job: Job) -> str:
    """What the pool is, whatever a removal list leaves out."""
    identity = (job.run.artifact("survey").dir / "identity.json").read_json()
    return str(identity["inputs"]["pool"])


def pool_plan(job: Job) -> Plan:
    """The plan of the pool that survey fixed."""
    return Plan(_plan_at(job.run.artifact("survey").dir))


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
    pending = into.pending(plan)
    if not pending:
        return
    start_ray(job.recipe.stream)
    yields: Counter[str] = Counter()
    with meter(what, sum(s.faces or 0 for s in pending)) as shown:
        rows = stream(plan, pending, read, operators, job.recipe.stream, job.run.root / "work")
        for slice, counts in rows:
            row = counts.to_pylist()[0]
            yields.update({k: n for k, n in row.items() if k not in ("rows", "quarantined", "key")})
            note = ", ".join(f"{name} {n:,}" for name, n in yields.items() if n)
            shown.advance(slice.faces or row["rows"], note)


def from_ledger(slice: Slice) -> None:
    """What a pass reads whose operators open ledgers themselves."""
    return None


def seal(stage: Stage, plan: Plan, *, budget: float | None = None, **facts: Any) -> Artifact:
    """Pack and seal a streaming stage; its digest is that of the canonical manifest.

    Raises:
        BudgetError: a larger share of the faces than `budget` is quarantined.
    """
    ledger = Ledger(stage.dir)
    ledger.seal(plan)
    manifest = ledger.manifest(plan)
    (stage.dir / "manifest.json").write_json(manifest)
    rows, bad = manifest["rows"], manifest["quarantined"]
    if budget is not None and bad > budget * max(rows, 1):
        first = _first_bad(ledger, plan)
        raise BudgetError(
            f"{stage.name}: {bad:,} of {rows:,} faces are quarantined, more than the budget of "
            f"{budget:.1%}; first: {first}"
        )
    return stage.finish(digest(manifest), rows=rows, quarantined=bad, **facts)


def _first_bad(ledger: Ledger, plan: Plan, count: int = 3) -> str:
    found: list[str] = []
    for _, table in ledger.tables(plan, ["id", "reason"]):
        bad = table.filter(pc.is_valid(table["reason"]))
        found += [f"{row['id']} ({row['reason']})" for row in bad.to_pylist()]
        if len(found) >= count:
            break
    return ", ".join(found[:count])


# -- guard ------------------------------------------------------------------------------------------


def guard_labeled(job: Job, into: Location) -> None:
    """Mark labeled faces that are twins of a test face."""
    known = guarding.reference({"test": _test_faces(job)})
    faces = read_table(job.run.artifact("labeled").dir / FACES_FILE)
    write_table(into / LABELED_FILE, guarding.find_twins(known, faces, job.recipe.guard))


def guard_pool(job: Job, stage: Stage, plan: Plan) -> None:
    """Mark pool faces that are twins of test or validation faces, and their duplicates."""
    config, known = job.recipe.guard, _reference(job)
    surveyed, into = ledger(job, "survey"), Ledger(stage.dir)
    duplicates = guarding.Duplicates(config)
    for _, faces in surveyed.tables(plan):
        duplicates.add(faces)
    groups = duplicates.groups()
    with meter("guard", sum(s.faces or 0 for s in plan.slices())) as shown:
        for slice, faces in surveyed.tables(plan):
            found = guarding.find_twins(known, faces, config)
            into.commit(slice, guarding.with_duplicates(found, groups))
            shown.advance(faces.num_rows)


def confirm_twins(job: Job, plan: Plan) -> None:
    """Add twins that the teacher's embeddings propose and thumbnails confirm: stage `twins`."""
    inputs = {name: job.run.artifact(name).digest for name in ("guard", "survey", "embed")}
    stage = job.open("twins", inputs, plan=plan.digest)
    if stage.done is None:
        _confirm(job, stage, plan)
        seal(stage, plan)


def _confirm(job: Job, stage: Stage, plan: Plan) -> None:
    config, known = job.recipe.guard, _reference(job)
    wanted = {face: row for row, face in enumerate(known.ids)}
    rows, embedding = _reference_embeddings(job, wanted)
    index = Neighbors(embedding, [known.ids[row] for row in rows])
    into = Ledger(stage.dir)
    streams = zip(
        ledger(job, "guard").tables(plan),
        ledger(job, "survey").tables(plan),
        ledger(job, "embed").tables(plan, ["status", "embedding"]),
        strict=True,
    )
    for (slice, first), (_, faces), (_, embedded) in streams:
        good = np.flatnonzero(pc.equal(embedded["status"], OK).to_numpy())
        near = np.full((faces.num_rows, config.neighbors), -1, np.int64)
        if len(good):
            flat = embedded["embedding"].combine_chunks().take(pa.array(good)).flatten()
            x = unit(flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(good), -1))
            found, _ = index.search(x, config.neighbors)
            near[good, : found.shape[1]] = rows[found]
        second = guarding.find_twins_by_embedding(known, faces, near, config)
        into.commit(slice, guarding.merge(first, second))


def _test_faces(job: Job) -> pa.Table:
    return read_table(job.run.artifact("test").dir / FACES_FILE)


def _reference(job: Job) -> guarding.Reference:
    """Test faces and validation faces."""
    at = job.run.artifact("labeled").dir
    roles, faces = read_table(at / LABELED_FILE, ["role"]), read_table(at / FACES_FILE)
    validation = faces.filter(pc.equal(roles["role"], "validation"))
    return guarding.reference({"test": _test_faces(job), "validation": validation})


def _reference_embeddings(job: Job, wanted: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reference that decode, and their embeddings (R, D)."""
    tables = [read_table(job.run.artifact(name).dir / LABELED_FILE) for name in ("test", "labeled")]
    faces = pa.concat_tables([t.select(["id", "image", "box"]) for t in tables])
    faces = faces.filter(pc.is_in(faces["id"], pa.array(list(wanted))))
    teacher = load_teacher(job.run.artifact("teach").dir / runs.TEACHER)
    embedding = exam.embeddings(teacher, faces, handed(job))
    return np.array([wanted[face] for face in faces["id"].to_pylist()], np.int64), embedding


# -- embed, score, select ---------------------------------------------------------------------------


def embedder(job: Job, teacher: Artifact, into: Location) -> Operator:
    """Actors that decode and run the teacher."""
    config = job.recipe.embed
    return Operator(
        Embedder,
        (teacher.dir / runs.TEACHER, into, job.views, config),
        "embed",
        pool=config.pool,
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )


def scorer(job: Job, teacher: Artifact, embedded: Location, into: Location) -> Operator:
    """Actors that compare with prototypes and neighbors."""
    config = job.recipe.score
    return Operator(
        Scorer,
        (teacher.dir / runs.TEACHER, into, embedded, config),
        "score",
        pool=config.pool,
        num_cpus=config.num_cpus,
    )


def open_scores(job: Job, embedded: Location, teacher: Artifact, plan: Plan) -> Stage:
    """The score stage that belongs to embeddings which may not be complete yet."""
    identity = (embedded / "identity.json").read_json()
    inputs = {"embed": digest(identity), "teacher": teacher.digest}
    return job.open("score", inputs, plan=plan.digest)


def forward_passes(job: Job, plan: Plan, into: Ledger) -> float:
    """Image passes that embedding the pool took."""
    manifest = into.manifest(plan)
    views = job.recipe.teach.folds * (2 if job.recipe.embed.flip else 1)
    return float((manifest["rows"] - manifest["quarantined"]) * views * FORWARD)


def write_points(job: Job, stage: Stage, teacher: Artifact) -> None:
    """Score the labeled faces out of fold: what thresholds are chosen on."""
    table = out_of_fold_scores(
        load_teacher(teacher.dir / runs.TEACHER),
        read_table(teacher.dir / runs.FOLDS_FILE),
        job.recipe.score,
        sub_prototypes=job.recipe.teach.sub_prototypes,
        seed=job.recipe.seed,
    )
    write_table(stage.dir / POINTS_FILE, table)


def points(job: Job) -> pa.Table:
    """Out-of-fold score rows of the labeled faces."""
    return read_table(job.run.artifact("score").dir / POINTS_FILE)


def score_columns(job: Job, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some score columns of the pool, slice by slice."""
    for _, table in ledger(job, "score").tables(pool_plan(job), columns):
        yield table


def pool_rows(job: Job) -> Iterator[pa.Table]:
    """What select decides on, one table per slice: scores, guard and survey side by side."""
    plan = pool_plan(job)
    streams = zip(
        ledger(job, "score").tables(plan),
        ledger(job, "twins").tables(plan, GUARD.names),
        ledger(job, "survey").tables(plan, FACES.names),
        strict=True,
    )
    for (_, scores), (_, guard), (_, faces) in streams:
        yield join(scores, guard, faces)


# -- training and judging ---------------------------------------------------------------------------


def checkpoints(stage: Stage, model: str = "") -> str:
    """Folder for a training's checkpoints."""
    at = stage.dir / "checkpoints" / model if model else stage.dir / "checkpoints"
    return str(at.local_path())


def train(
    job: Job, name: str, function: Callable[..., dict[str, Any]], settings: Any
) -> dict[str, Any]:
    """Run a training function in this process or on Ray Train workers."""
    config = job.recipe.train
    if config.workers:
        start_ray(job.recipe.stream)
    return launch(
        function,
        settings.model_dump(mode="json"),
        storage=job.run.root / "train",
        name=name,
        **config.model_dump(),
    )


def judged_models(job: Job) -> dict[str, Location]:
    """Folders of the models that are judged."""
    at = job.run.artifact("student").dir
    folders = {name: at / name for name in ("control_a", "control_b", "student")}
    return {"teacher": job.run.artifact("teach").dir / runs.TEACHER, **folders}


def sit_exam(job: Job) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[str, ...]]:
    """Probabilities (N, K) of every model on the test faces, their labels (N,), class names."""
    at = job.run.artifact("test").dir
    keep = pc.equal(read_table(at / FACES_FILE, ["status"])["status"], OK)
    rows = read_table(at / LABELED_FILE).filter(keep)
    names = label_names(job)
    unknown = sorted(set(rows["label"].to_pylist()) - set(names))
    if unknown:
        raise RunError(f"test faces have classes the training set lacks: {', '.join(unknown)}")
    worker = exam.examiner(job.recipe.train)
    probs = {
        name: exam.probabilities(folder, rows, handed(job), worker)
        for name, folder in judged_models(job).items()
    }
    return probs, label_codes(rows["label"].to_pylist(), names), names


def protocol_card(job: Job) -> dict[str, Any]:
    """What a number needs beside it to be compared."""
    recipe, teacher = job.recipe, job.run.artifact("teach")
    labeled, student = job.run.artifact("labeled").facts, job.run.artifact("student").facts
    config = recipe.labeled.model_dump(mode="json")
    known = ("kind", "path", "rule", "fraction", "test", "development", "validation")
    said = {k: config[k] for k in known if config.get(k)}
    said["path"] = Path(said["path"]).name if "path" in said else None
    return {
        "split": ", ".join(f"{k} {v}" for k, v in said.items() if v),
        "labeled": labeled.get("roles"),
        "seeds": [recipe.seed],
        "sampler": f"labeled drawn by class count ^ -{recipe.student.labeled_power}",
        "crop": recipe.labeled.crop.model_dump(mode="json", exclude_none=True),
        "passes": {"teacher": teacher.facts["passes"], **student["passes"]},
        "pretraining_data": recipe.teach.model.pretraining_data or "none",
    }
