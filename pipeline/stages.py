"""The flow, one short function per stage, in the order a face meets them. Start reading here.

    survey -> guard -> pretrain -> teach -> embed -> score -> search -> select -> mine
           -> distill -> student -> evaluate -> report

Every stage takes a job (recipe + run folder), reads artifacts of earlier stages, writes its own and
returns it. A stage whose identity was seen before is skipped or continued (pipeline/run.py); where
things lie and how a pass is run is in pipeline/flow.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from pipeline import (
    annotated,
    clustering,
    cuts,
    drawing,
    evaluation,
    finalists,
    flow,
    judged,
    pool,
    selection,
    twins,
)
from pipeline import search as searching
from pipeline.config import digest
from pipeline.embedding import profile
from pipeline.job import Job
from pipeline.ledger import Ledger
from pipeline.mining import Miner, read_selection
from pipeline.policy import SCORE_COLUMNS, OperatingPoint
from pipeline.report import collect, write_report
from pipeline.run import METRICS_FILE, POINT_FILE, PREDICTIONS_FILE, TRUTH_FILE, Artifact
from pipeline.schema import label_codes
from pipeline.scoring import nothing
from pipeline.sources.reader import read_slice
from pipeline.streaming import Operator, start_ray
from pipeline.survey import Surveyor
from pipeline.tables import read_table, write_table
from pipeline.training import distillation, runs
from pipeline.training import pretrain as pretraining

TRIALS = "trials"
FINALISTS = "finalists"
"""Folders of a search's finished trials and trainings, from which it continues."""


def survey(job: Job) -> Artifact:
    """Decode every face once: pixel hash, perceptual hash, thumbnail, quality, status."""
    flow.read_labels(job)
    stage, plan = pool.plan_pool(job)
    if stage.done is None:
        read = partial(read_slice, sources=job.sources, removals=job.removals)
        args = (stage.dir, job.views, job.recipe.survey.threads)
        operators = [Operator(Surveyor, args, "survey")]
        pool.stream_pool(job, "survey", plan, Ledger(stage.dir), read, operators)
        pool.write_truth(job, stage, plan)
        pool.seal(stage, plan, budget=job.recipe.error_budget)
    return pool.done(stage)


def guard(job: Job) -> Artifact:
    """Find twins of test and validation faces in the labeled set and the pool, and duplicates.

    Pool faces that people labeled pass it before they train.
    """
    plan = pool.pool_plan(job)
    inputs = {name: job.run.artifact(name).digest for name in ("labeled", "test", "survey")}
    stage = job.open("guard", inputs, hide=twins.LATER, plan=plan.digest)
    if stage.done is None:
        twins.guard_labeled(job, stage.dir)
        twins.guard_pool(job, stage, plan)
        pool.seal(stage, plan)
    annotated.join(job)
    return pool.done(stage)


def pretrain(job: Job) -> Artifact | None:
    """Train a backbone on the pool's faces, without labels."""
    if job.recipe.pretrain is None:
        return None
    inputs = {name: job.run.artifact(name).digest for name in ("survey", "guard")}
    inputs |= flow.backbone_input(job, job.recipe.pretrain.model)
    stage = job.open("pretrain", inputs, hide=flow.PROBES, plan=pool.pool_plan(job).digest)
    if stage.done is None:
        survey = job.run.artifact("survey").dir
        settings = pretraining.PretrainJob(
            handed=flow.handed(job),
            pretrain=job.recipe.pretrain,
            plan=pool.plan_at(survey).uri,
            survey=survey.uri,
            sources=job.sources,
            stream=job.recipe.stream,
            out=stage.dir.uri,
            checkpoints=flow.checkpoints(stage),
            seed=job.recipe.seed,
        )
        reads = job.recipe.pretrain.read == "streamed"
        facts = flow.train(job, stage.name, pretraining.pretrain, settings, reads=reads)
        stage.finish(facts.pop("sha256"), **facts)
    return pool.done(stage)


def teach(job: Job) -> Artifact:
    """Train the teachers crosswise; out-of-fold predictions give temperature and cuts."""
    config = job.recipe.teach
    inputs = {"labeled": flow.training_digest(job), **flow.backbone_input(job, config.model)}
    stage = job.open("teach", inputs)
    if stage.done is None:
        settings = runs.TeachJob(
            handed=flow.handed(job),
            teach=flow.started(job, config),
            out=stage.dir.uri,
            checkpoints=flow.checkpoints(stage),
            seed=job.recipe.seed,
        )
        facts = flow.train(job, stage.name, runs.teach, settings)
        stage.finish(facts.pop("sha256"), **facts)
    return pool.done(stage)


def embed(job: Job) -> Artifact:
    """Run the teachers over the pool; scoring is chained, so that the pool is read once."""
    plan, teacher = pool.pool_plan(job), job.run.artifact("teach")
    config = job.recipe.embed
    weights = teacher.facts["weights_sha256"]
    inputs = {"pool": pool.pool_digest(job), "weights": weights, "profile": profile(config)}
    stage = job.open("embed", inputs, plan=plan.digest, firm=["profile"])
    if stage.done is None:
        ledger = Ledger(stage.dir)
        scores = flow.open_scores(job, stage.dir, teacher, plan)
        read, operators = flow.embed_and_score(job, teacher, stage.dir, scores.dir)
        pool.stream_pool(job, "embed", plan, ledger, read, operators)
        pool.seal(stage, plan, passes=flow.forward_passes(job, plan, ledger))
    return pool.done(stage)


def score(job: Job) -> Artifact:
    """Compare stored embeddings with prototypes and labeled neighbors; no threshold here."""
    plan, teacher = pool.pool_plan(job), job.run.artifact("teach")
    embedded = job.run.artifact("embed")
    stage = flow.open_scores(job, embedded.dir, teacher, plan)
    if stage.done is None:
        ledger = Ledger(stage.dir)
        operators = [flow.scorer(job, teacher, embedded.dir, stage.dir)]
        pool.stream_pool(job, "score", plan, ledger, nothing, operators)
        flow.write_points(job, stage, teacher)
        pool.seal(stage, plan)
    return pool.done(stage)


def search(job: Job) -> Artifact | None:
    """Search the operating point over cached scores, judged on out-of-fold labeled faces.

    Where logistic heads or finalists judge, pool faces teach them: those that guard lets through.
    """
    if job.recipe.search is None:
        return None
    plan, config = pool.pool_plan(job), job.recipe.search
    config = config.model_copy(update={"seed": job.recipe.seed})
    inputs = {"score": job.run.artifact("score").digest}
    draws = config.objective == "head" or config.finalists is not None
    if draws:
        twins.confirm_twins(job, plan)
        inputs |= {name: job.run.artifact(name).digest for name in ("embed", "twins")}
        if (labels := job.run.latest(annotated.STAGE)) is not None:
            inputs["annotated"] = labels.digest
    if config.finalists is not None:
        inputs |= finalists.depends(job)
    stage = job.open("search", inputs)
    if stage.done is None:
        start_ray(job.recipe.stream)
        classes = len(flow.label_names(job))
        seen = [
            cuts.look(flow.score_columns(job, cuts.COLUMNS), classes, each.tau)
            for each in config.adaptive
        ]
        drawn, ids = drawing.spaces(job, plan, config.head) if draws else ([], [])
        final = None
        if config.finalists is not None:
            kept = stage.dir / FINALISTS
            final = finalists.Final(job, config.finalists, drawn, ids, kept)
        point = searching.search(
            flow.points(job),
            flow.score_columns(job, SCORE_COLUMNS),
            config,
            job.run.scratch / "tune",
            seen,
            drawn,
            stage.dir / TRIALS,
            partial(drawing.track, job),
            final,
        )
        point.save(stage.dir / POINT_FILE)
        stage.finish(point.digest, **point.estimates)
    return pool.done(stage)


def select(job: Job) -> Artifact:
    """Decide, face by face, from the score table; every face leaves with a reason."""
    plan, config = pool.pool_plan(job), job.recipe.select
    twins.confirm_twins(job, plan)
    inputs = {name: job.run.artifact(name).digest for name in ("score", "twins", "survey")}
    if job.recipe.search is not None:
        inputs["search"] = job.run.artifact("search").digest
    if config.clusters is not None:
        inputs["clusters"] = pool.cluster(job, plan, config.clusters.count).digest
    if (labels := job.run.latest(annotated.STAGE)) is not None:
        inputs["annotated"] = labels.digest
    stage = job.open("select", inputs, plan=plan.digest)
    if stage.done is None:
        if job.recipe.search is None:
            scored = flow.score_columns(job, cuts.COLUMNS)
            point = selection.operating_point(config, flow.points(job), scored)
        else:
            point = OperatingPoint.load(job.run.artifact("search").dir / POINT_FILE)
        if config.clusters is not None:
            at = job.run.artifact("clusters").dir
            point = clustering.with_clusters(point, config.clusters, at)
        point.save(stage.dir / POINT_FILE)
        ledger, tables = Ledger(stage.dir), flow.pool_rows(job)
        faces = (commit.rows for commit in pool.ledger(job, "score").committed(plan))
        decided = selection.select(tables, point, config, labeled=annotated.labeled_ids(job))
        ledger.pack(plan, selection.cut(decided, faces))
        kept = selection.yield_by_class(ledger.blocks(plan, ("label", "reason")))
        pool.seal(stage, plan, rule=point.digest, per_class=kept)
    return pool.done(stage)


def mine(job: Job) -> Artifact:
    """Fetch the selected faces' bytes once more and write the mined set."""
    plan, selected = pool.pool_plan(job), job.run.artifact("select")
    stage = job.open("mine", {"select": selected.digest}, plan=plan.digest)
    if stage.done is None:
        ledger = Ledger(stage.dir)
        inputs = [job.run.artifact(name).dir for name in ("select", "score", "survey")]
        teacher = job.run.artifact("teach").digest
        args = (stage.dir, *inputs, job.sources, teacher, selected.facts["rule"])
        read = partial(read_selection, selected.dir)
        pool.stream_pool(job, "mine", plan, ledger, read, [Operator(Miner, args, "mine")])
        pool.seal(stage, plan)
    return pool.done(stage)


def distill(job: Job) -> Artifact | None:
    """Learn a few synthetic images per class from the labeled and the mined faces."""
    if job.recipe.distill is None:
        return None
    teacher, mined = job.run.artifact("teach"), job.run.artifact("mine")
    inputs = {
        "labeled": flow.training_digest(job),
        "mined": mined.digest,
        "teacher": teacher.digest,
    }
    stage = job.open("distill", inputs, hide=flow.DISTILL_BOUNDS)
    if stage.done is None:
        experts = flow.experts(job, mined)
        settings = distillation.DistillJob(
            handed=flow.handed(job, mined=True),
            distill=job.recipe.distill,
            teacher=teacher.dir.uri,
            experts=None if experts is None else experts.dir.uri,
            out=stage.dir.uri,
            checkpoints=flow.checkpoints(stage),
            seed=job.recipe.seed,
        )
        facts = flow.train(job, stage.name, distillation.distill, settings)
        if experts is not None:
            facts["expert_passes"] = experts.facts["passes"]
        stage.finish(facts.pop("sha256"), **facts)
    return pool.done(stage)


def student(job: Job) -> Artifact:
    """Train the student and, beside it, the controls of equal compute.

    The controls, and a student that sees a share of the mined faces, are stages of their own: a
    student that sees the mined faces otherwise, for the same passes, finds the controls trained.
    """
    teacher = job.run.artifact("teach")
    inputs = {
        "labeled": flow.training_digest(job),
        "mined": job.run.artifact("mine").digest,
        "teacher": teacher.digest,
        **flow.backbone_input(job, job.recipe.student.model),
    }
    if job.recipe.student.beside == "distilled":
        inputs["distilled"] = job.run.artifact("distill").digest
    stage = job.open("student", inputs)
    if stage.done is None:
        facts = flow.study(job, stage, "student")
        facts["passes"] += flow.spent(job)
        stage.finish(facts.pop("sha256"), **facts)
    flow.share(job, inputs)
    flow.control(job, "control_a", passes=None)
    flow.control(job, "control_b", passes=pool.done(stage).facts["passes"])
    flow.tune(job)
    return pool.done(stage)


def evaluate(job: Job) -> Artifact:
    """Judge every model on the test faces; the only stage that reads their labels."""
    before = ("teach", *judged.judged_names(job), "test", "select")
    inputs = {name: job.run.artifact(name).digest for name in before} | judged.exam_input(job)
    stage = job.open("evaluate", inputs)
    if stage.done is None:
        probs, faces, names = judged.sit_exam(job)
        labels = label_codes(faces["label"].to_pylist(), names)
        protocol = judged.protocol_card(job)
        votes = evaluation.votes_of(faces)
        metrics = evaluation.evaluate(probs, labels, names, protocol, job.recipe.evaluate, votes)
        decided = (t for _, t in pool.ledger(job, "select").tables(pool.pool_plan(job)))
        truth = read_table(job.run.artifact("survey").dir / TRUTH_FILE)
        metrics["pool"] = evaluation.purity(decided, truth)
        if course := judged.course(job, truth):
            (stage.dir / runs.HISTORY_FILE).write_json(course)
        write_table(stage.dir / PREDICTIONS_FILE, evaluation.predictions(probs, faces, names))
        (stage.dir / METRICS_FILE).write_json(metrics)
        stage.finish(digest(metrics))
    return pool.done(stage)


def report(job: Job) -> Artifact | None:
    """Write report.html into the run folder."""
    facts = collect(job.run, job.recipe.name, job.command, job.show_faces, job.recipe.report)
    write_report(job.run.root / "report.html", facts)
    return None


Stage = Callable[[Job], Artifact | None]

STAGES: Mapping[str, Stage] = {
    "survey": survey,
    "guard": guard,
    "pretrain": pretrain,
    "teach": teach,
    "embed": embed,
    "score": score,
    "search": search,
    "select": select,
    "mine": mine,
    "distill": distill,
    "student": student,
    "evaluate": evaluate,
    "report": report,
}
