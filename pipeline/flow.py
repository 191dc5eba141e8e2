"""What stages hand to each other: labeled tables, the pool's plan, ledgers, training faces.

Artifacts are found through the run folder and read here, so that a stage function says what it
does and not where things lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import scoring, selection
from pipeline.artifacts import load_teacher
from pipeline.config import digest
from pipeline.job import Job, file_stamp
from pipeline.labeled.reader import read_labeled
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.ledger import Ledger
from pipeline.models import PRETRAINED, TIMM, ModelConfig
from pipeline.packs import content_digest
from pipeline.placement import Operator
from pipeline.plan import Plan, Slice
from pipeline.pool import grouped, ledger, plan_at, pool_plan
from pipeline.progress import console
from pipeline.run import IDENTITY, POINTS_FILE, TRUTH_FILE, Artifact, Stage
from pipeline.schema import label_names_of
from pipeline.sources.rows import labeled_rows_as_read
from pipeline.storage import Location, location
from pipeline.streaming import check_room, start_ray
from pipeline.survey import describe
from pipeline.tables import read_table, write_table
from pipeline.training import distillation, pretrain, pretraining, runs, student
from pipeline.training.handed import FACES_FILE, LABELED_FILE, Handed, labeled_rows
from pipeline.training.launch import launch, spread
from pipeline.training.loop import FORWARD
from pipeline.training.references import out_of_fold_scores
from pipeline.training.student import StudentConfig
from pipeline.training.supervised import SupervisedConfig
from pipeline.training.teacher import TeachConfig
from pipeline.weights import file_of, weights_sha256

Trains = TypeVar("Trains", TeachConfig, StudentConfig, SupervisedConfig)

MODEL = "model"
DISTILL_BOUNDS = ("distill.preview_every", "distill.memory_mb")
"""Settings of distill that no image depends on."""
PROBES = tuple(f"pretrain.{name}" for name in pretraining.PROBES)
"""Settings of pretrain that no weight depends on."""
SHARE = "student_share"
"""A student that sees a part of the mined faces."""
TUNED = "tuned"
"""The teacher, trained on from the distilled set."""
PLACES = ("score.run_in", "score.pool", "score.num_cpus")
TEST_FIELDS = ("labeled.test", "labeled.development.role")


def read_labels(job: Job) -> None:
    """Read, split and survey the labeled set; the test faces are an artifact of their own.

    Another test set leaves the training side as it is, and so does another removal list: faces
    removed later are left out wherever the stored rows are read.
    """
    files = _stamps(job.recipe.labeled)
    training_files = {name: stamp for name, stamp in files.items() if name != "test"}
    training = job.open("labeled", {"files": training_files}, hide=TEST_FIELDS)
    test = job.open("test", {"files": files}, retarget=TEST_FIELDS)
    if training.done is not None and test.done is not None:
        return
    found = read_labeled(job.recipe.labeled, job.removals, seed=job.recipe.seed)
    if not isinstance(job.recipe.labeled, SyntheticSet):  # drawn people are nobody, and come again
        for line in found.counts["parted_groups"]:
            console.print(f"warning: labeled: {line}", markup=False, soft_wrap=True)
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
    read = labeled_rows_as_read(table)
    return describe(read, config.crop, config.color, threads=job.recipe.survey.threads)


def _stamps(config: Any) -> dict[str, str]:
    """State of every file the labeled configuration names."""
    values = config.model_dump(mode="json")
    found = {"path": values["path"]} if values.get("path") else {}
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
    config, annotated = job.recipe.labeled, job.run.latest("annotated")
    return Handed(
        labeled=job.run.artifact("labeled").dir.uri,
        guard=job.run.artifact("guard").dir.uri,
        crop=config.crop,
        color=config.color,
        scratch=str(job.run.scratch),
        mined=job.run.artifact("mine").dir.uri if mined else None,
        plan=plan_at(job.run.artifact("survey").dir).uri if mined else None,
        views=job.views,
        removals=job.recipe.removals,
        annotated=None if annotated is None else annotated.dir.uri,
    )


def training_digest(job: Job) -> str:
    """Digest of the labeled faces that may train, whatever made them so, and of their crop."""
    config = job.recipe.labeled
    rows = labeled_rows(handed(job), ("train",))
    faces = content_digest(rows.select(["id", "label", "soft", "image", "box", "landmarks"]))
    added = job.run.latest("annotated")
    said = [faces, config.crop.model_dump(mode="json"), config.color]
    return digest(said if added is None else [*said, added.digest])


def embed_and_score(
    job: Job, teacher: Artifact, embedded: Location, scored: Location
) -> tuple[Callable[[Slice], pa.Table], list[Operator]]:
    """What read tasks read, and the actors of the pass: read, embed, score."""
    return scoring.embed_and_score(
        teacher.dir / runs.TEACHER,
        job.sources,
        job.removals,
        (job.recipe.embed, job.recipe.score),
        (embedded, scored),
    )


def scorer(job: Job, teacher: Artifact, embedded: Location, into: Location) -> Operator:
    """Actors that compare stored embeddings with prototypes and neighbors."""
    return scoring.scorer(teacher.dir / runs.TEACHER, embedded, into, job.recipe.score)


def open_scores(job: Job, embedded: Location, teacher: Artifact, plan: Plan) -> Stage:
    """The score stage that belongs to embeddings which may not be complete yet."""
    identity = (embedded / IDENTITY).read_json()
    inputs = {"embed": digest(identity), "teacher": teacher.digest}
    return job.open("score", inputs, hide=PLACES, plan=plan.digest)


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
    """Out-of-fold score rows of the labeled faces, with their `group` and teacher's `fold`."""
    rows = grouped(job.run, read_table(job.run.artifact("score").dir / POINTS_FILE))
    folds = read_table(job.run.artifact("teach").dir / runs.FOLDS_FILE, ["id", "fold"])
    return rows.append_column("fold", folds["fold"].take(pc.index_in(rows["id"], folds["id"])))


def score_columns(job: Job, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some score columns of the pool, slice by slice."""
    for _, table in ledger(job, "score").tables(pool_plan(job), columns):
        yield table


def pool_rows(job: Job) -> selection.Pool:
    """Opens what select decides on, in plan order: scores, guard and survey side by side."""
    clusters = ("clusters",) if job.recipe.select.clusters is not None else ()
    stages = (ledger(job, name) for name in ("score", "twins", "survey", *clusters))
    return selection.Pool(pool_plan(job), *stages)


def checkpoints(stage: Stage) -> str:
    """Folder for a training's checkpoints."""
    return (stage.dir / "checkpoints").uri


def train(
    job: Job, name: str, function: Callable[..., dict[str, Any]], settings: Any, reads: bool = False
) -> dict[str, Any]:
    """Run a training function here or on Ray Train workers; with `reads` each reads the pool."""
    config, stream = job.recipe.train, job.recipe.stream
    workers = config.stage_workers.get(name, config.workers)
    if workers or reads:
        start_ray(stream)
    if reads:
        reading = max(1, workers) * stream.read_cpus
        check_room(name, workers * (config.threads or 1) + reading, stream)
    return launch(
        function,
        settings.model_dump(mode="json"),
        workers=workers,
        use_gpu=config.use_gpu,
        storage=job.run.root / "train",
        name=name,
        bf16=config.bf16,
        threads=config.threads,
        checkpoint_every=config.checkpoint_every,
        stream=stream,
    )


def backbone_input(job: Job, model: ModelConfig) -> dict[str, str]:
    """What a network that starts from the run's own backbone, or from a file, depends on."""
    if model.weights == PRETRAINED:
        return {"pretrain": job.run.artifact("pretrain").digest}
    if model.weights in (None, TIMM):
        return {}
    file = file_of(location(model.weights))
    return {"weights": weights_sha256(file, file.stamp())}


def started(job: Job, config: Trains) -> Trains:
    """A training's settings with the backbone's folder in place of its name."""
    if config.model.weights != PRETRAINED:
        return config
    made = job.run.artifact("pretrain")
    seen = f"{made.facts['faces']:,} faces of the run's pool, {made.facts['method']}"
    at = (made.dir / pretrain.BACKBONE).uri
    model = config.model.model_copy(update={"weights": at, "pretraining_data": seen})
    return config.model_copy(update={"model": model})


def study(
    job: Job, stage: Stage, model: str, own: SupervisedConfig | None = None
) -> dict[str, Any]:
    """Train a student into its stage, or a control, which has a configuration of its own."""
    learns = own is None
    settings = runs.StudentJob(
        handed=handed(job, mined=learns),
        model=model,
        student=started(job, job.recipe.student),
        control=own,
        teacher=job.run.artifact("teach").dir.uri,
        distilled=job.run.artifact("distill").dir.uri
        if learns and job.recipe.student.beside == "distilled"
        else None,
        share=job.recipe.mined_share if model == SHARE else None,
        out=(stage.dir / MODEL).uri,
        checkpoints=checkpoints(stage),
        seed=job.recipe.seed,
    )
    return train(job, model, runs.study, settings)


def spent(job: Job) -> float:
    """Image passes that a student needs before it is trained: of teachers, scoring and search."""
    before = ("teach", "embed", *(("pretrain",) if job.recipe.starts_pretrained else ()))
    passes = sum(job.run.artifact(name).facts["passes"] for name in before)
    if job.recipe.search is not None:  # of finalists
        passes += job.run.artifact("search").facts.get("passes", 0)
    if job.recipe.student.beside == "distilled":
        passes += distilled_passes(job.run.artifact("distill"))
    return float(passes)


def share(job: Job, inputs: Mapping[str, Any]) -> None:
    """Train the student once more on a part of the mined faces, where the recipe asks for it.

    Args:
        job: of this run.
        inputs: those of the student.
    """
    if job.recipe.mined_share is None:
        return
    stage = job.open(SHARE, inputs)
    if stage.done is None:
        facts = study(job, stage, SHARE)
        facts["passes"] += spent(job)
        stage.finish(facts.pop("sha256"), **facts)


def control(job: Job, model: str, passes: float | None) -> None:
    """Train a control in a stage of its own, unless it is there: it depends on no mined face."""
    config = student.control(job.recipe.student, passes, job.recipe.control)
    inputs = {
        "labeled": training_digest(job),
        "config": config.model_dump(mode="json"),
        **backbone_input(job, config.model),
    }
    stage = job.open(model, inputs)
    if stage.done is None:
        facts = study(job, stage, model, config)
        stage.finish(facts.pop("sha256"), **facts)


def experts(job: Job, mined: Artifact) -> Artifact | None:
    """The experts a distillation follows, trained as parallel tasks if they are not.

    They depend on the faces and on the network, not on the number of images, so sets of any size
    share them.
    """
    config = job.recipe.distill
    if config is None or config.method != "trajectory":
        return None
    own = {"net": config.net, "experts": config.experts}
    inputs: dict[str, Any] = {name: part.model_dump(mode="json") for name, part in own.items()}
    inputs |= {"labeled": training_digest(job), "mined": mined.digest, "siamese": config.siamese}
    stage = job.open("experts", inputs)
    if stage.done is None:
        settings = distillation.ExpertJob(
            handed=handed(job, mined=True),
            distill=config,
            number=0,
            out=stage.dir.uri,
            seed=job.recipe.seed,
        )
        each = [
            settings.model_copy(update={"number": number}).model_dump(mode="json")
            for number in range(config.experts.count)
        ]
        place = job.recipe.train
        made = spread(
            distillation.expert,
            each,
            use_gpu=place.use_gpu,
            name="experts",
            bf16=place.bf16,
            threads=place.threads,
            stream=job.recipe.stream,
        )
        passes = sum(one["passes"] for one in made)
        stage.finish(digest([one["sha256"] for one in made]), count=len(made), passes=passes)
    return job.run.artifact("experts")


def distilled_passes(made: Artifact) -> float:
    """Image passes of a distilled set, those of the experts it followed among them."""
    return float(made.facts["passes"] + made.facts.get("expert_passes", 0.0))


def tune(job: Job) -> None:
    """Train the teacher on from the distilled set, where the recipe asks for it."""
    if job.recipe.tune is None:
        return
    made, teacher = job.run.artifact("distill"), job.run.artifact("teach")
    stage = job.open(TUNED, {"distill": made.digest, "teacher": teacher.digest})
    if stage.done is None:
        settings = distillation.TuneJob(
            tune=job.recipe.tune,
            distilled=made.dir.uri,
            teacher=teacher.dir.uri,
            out=(stage.dir / MODEL).uri,
            checkpoints=checkpoints(stage),
            seed=job.recipe.seed,
        )
        facts = train(job, stage.name, distillation.tune, settings)
        facts["passes"] += teacher.facts["passes"] + distilled_passes(made)
        stage.finish(facts.pop("sha256"), **facts)
