"""Runs the stages of a job: in order, each as a tracked child run, with a line when it is done.

Also what can be said of a recipe without running it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.claim import WHOLE, Part, claimed
from pipeline.config import digest, nearest
from pipeline.errors import ConfigError, ModelError, PartDone
from pipeline.evaluation import STUDENT
from pipeline.exporting import drawn, facts_of, load_ensemble, to_onnx
from pipeline.flow import MODEL, SHARE
from pipeline.job import COMMAND_FILE, SETTINGS, Job, settings
from pipeline.journal import require_whole
from pipeline.models import PRETRAINED
from pipeline.progress import console
from pipeline.recipe import Recipe
from pipeline.registering import Graph
from pipeline.report.collect import TIMED
from pipeline.run import METRICS_FILE, POINT_FILE, Artifact, Run
from pipeline.stages import STAGES, Stage
from pipeline.storage import Location, location, probe
from pipeline.strategies import CURVE_FILE, PICTURE, active
from pipeline.tracking import OFF, Child, Input, connect
from pipeline.training.distilled import GRID
from pipeline.training.pretrain import PROBES_FILE
from pipeline.training.runs import HISTORY_FILE, PREVIEWS
from pipeline.trials import required

logger = logging.getLogger(__name__)

SELECTED = "selected"
IN_A_LINE = 5
"""Facts of a stage that a terminal shows in a line."""
SHARED = ("survey", "embed", "score", "mine")
REPORT = "report"
TRACKED = "tracked"
"""Folder of a run's scratch for copies that wait for MLflow."""
BESIDE: Mapping[str, Stage] = {"active": active}
"""Verbs that no run of all stages includes."""
READERS: Mapping[str, tuple[str, ...]] = {
    "labeled": ("guard", "pretrain", "teach", "search", "distill", "student", "active"),
    "test": ("guard", "evaluate", "active"),
    "pool": ("survey", "pretrain", "embed", "search", "mine"),
}
"""Stages that read a data set's faces, or what is stored of them, for their tracked runs."""
MODELS = {
    "teacher": "teacher",
    "control_a": "control A",
    "control_b": "control B",
    SHARE: "student, share",
    "student": "student",
    "tuned": "teacher, tuned",
}
CAPTION = """\
teacher: cross-fit ensemble; student: labeled and mined faces; tuned: on the distilled set
control A: the student's network and steps, labeled faces only
control B: the same with all image passes of teachers, scoring and student"""
SHARE_CAPTION = "student, share: the student on a part of the mined faces (mined_share)"


def require_stage(name: str | None, option: str = "--until") -> None:
    """ConfigError with the nearest spelling if there is no such stage; before anything is made."""
    if name is not None and name not in STAGES:
        raise ConfigError(f"{option}: no stage {name!r}{nearest(name, list(STAGES))}")


def part_of(stage: str, text: str) -> Part:
    """The part of a pass that a driver asks for; only stages that stream can be shared."""
    part = Part.parse(text)
    if part != WHOLE and stage not in SHARED:
        raise ConfigError(f"--part: {stage} is one driver's work; shared are {', '.join(SHARED)}")
    return part


def root_of(recipe: Recipe, run_dir: str | None) -> Location:
    """The run folder of a recipe; nothing is made."""
    return location(recipe.folder(run_dir))


def start(
    recipe: Recipe, run_dir: str | None, *, fresh: bool, show_faces: bool, part: Part = WHOLE
) -> Job:
    """Open or continue the run folder of a recipe."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    root = root_of(recipe, run_dir)
    if not root.is_local:
        probe(root)
    require_whole(root)
    run = Run(root, fresh=fresh)
    run.recipe(recipe.model_dump(mode="json"))
    own = "" if part == WHOLE else part.name
    tracker = connect(recipe.tracking.uri, recipe.tracking.experiment, root, own)
    return Job(recipe, run, tracker, show_faces, part)


def run_all(job: Job, until: str | None) -> None:
    """Every stage up to and including `until`; ends with the results table."""
    names = list(STAGES)
    names = names if until is None else names[: names.index(until) + 1]
    with driving(job):
        advance(job, [name for name in names if name != REPORT])
        # Now it is known that this command makes the run: nothing of it was refused.
        if REPORT in names or not (job.run.root / COMMAND_FILE).exists():
            job.note_command()
        advance(job, [name for name in names if name == REPORT])
    if until in (None, "evaluate", "report"):
        show_results(job)


def run_one(job: Job, name: str) -> None:
    """One stage; those before it must be finished."""
    _conduct(job, [name])


def run_active(job: Job) -> None:
    """Compare acquisition functions, after what they need: guard, and a backbone if one is asked.

    Raises:
        ConfigError: the recipe has no `active`.
    """
    starts = required(job.recipe).starts
    before = ("survey", "guard", *(("pretrain",) if PRETRAINED in starts else ()))
    _conduct(job, [*before, "active"])


def _conduct(job: Job, names: Sequence[str]) -> None:
    with driving(job):
        advance(job, names)


def advance(job: Job, names: Sequence[str]) -> None:
    """Some stages of a job that this process drives, each tracked and with a line."""
    for name in names:
        _run(job, name)


@contextmanager
def driving(job: Job) -> Iterator[None]:
    """Hold the run while the block works on it; its tracked run ends as the block does."""
    with claimed(job.run.root, job.part):
        ok = False
        job.tracker.open()
        try:
            yield
            ok = True
        except PartDone:
            ok = True
            raise
        finally:
            job.tracker.close(ok)


def _run(job: Job, name: str) -> None:
    chosen = settings(job.recipe, name) if name in SETTINGS else {}
    with job.tracker.stage(name, _flat(chosen), watched=True) as child:
        artifact = {**STAGES, **BESIDE}[name](job)
        if artifact is not None:
            _track(job, child, artifact)
            child.inputs(_read_by(job, name))
            if name == STUDENT:
                _keep_student(job, child, artifact)
    if artifact is not None:
        show_facts(f"{name:<9} {artifact.digest[:12]}", artifact.facts)
        if name == "select":
            console.print(_yield(artifact.facts["per_class"]))


def _track(job: Job, child: Child, artifact: Artifact) -> None:
    at = artifact.dir
    numbers = {k: float(v) for k, v in artifact.facts.items() if isinstance(v, int | float)}
    child.metrics(numbers)
    for file in (at / HISTORY_FILE, at / MODEL / HISTORY_FILE, at / PROBES_FILE):
        for row in file.read_json() if file.exists() else ():
            numbers = {name: value for name, value in row.items() if name != "step"}
            child.metrics(numbers, step=int(row["step"]))
    if job.tracker.place == OFF:
        return
    named = [at / name for name in (METRICS_FILE, POINT_FILE, CURVE_FILE, PICTURE, GRID)]
    for file in [*named, *(at / PREVIEWS).children()]:
        if file.exists():
            child.file(_on_disk(file, job.run.scratch))


def _on_disk(file: Location, scratch: Path) -> Path:
    """The file, or a copy of what lies on S3: MLflow sends what has a path."""
    if file.is_local:
        return file.local_path()
    copy = scratch / TRACKED / digest(file.uri)[:16] / file.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(file.read_bytes())
    return copy


def _read_by(job: Job, name: str) -> list[Input]:
    """The data sets that a stage read, with the digests that the run knows them by."""
    found = []
    labeled = job.recipe.labeled
    place = str(getattr(labeled, "path", labeled.kind))
    for stage in ("labeled", "test"):
        made = job.run.latest(stage) if name in READERS[stage] else None
        if made is not None:
            role = "training" if stage == "labeled" else "test"
            found.append(Input(f"{labeled.kind} {role}", made.digest, place, role))
    made = job.run.latest("survey") if name in READERS["pool"] else None
    if made is not None:
        for source, pool in job.sources.items():
            at = str(getattr(pool, "path", pool.kind))
            found.append(Input(f"pool {source}", made.digest, at, "pool"))
    return found


def _keep_student(job: Job, child: Child, artifact: Artifact) -> None:
    """The student's graph where the run is tracked, and in the registry if the recipe says so."""
    if not job.tracker.on:
        return
    at, config = artifact.dir / MODEL, job.recipe.tracking
    model = load_ensemble(at)
    try:
        data, _ = to_onnx(model, facts_of(at))
    except (ConfigError, ModelError) as err:
        logger.warning("the student is not kept in MLflow: %s", err)
        return
    graph = Graph("student", data, drawn(model), len(model.label_names), artifact.digest)
    child.model(graph, config.register_as, config.alias)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{path}.{name}" if path else name)
    return found


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """What a stage came to: a line, or on a terminal a table where the facts are many."""
    said = {
        name: f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        for name, value in facts.items()
        if isinstance(value, int | float) and name != "seconds"
    }
    seconds = f"{facts.get('seconds', 0.0):.1f} s"
    if not console.is_terminal or len(said) <= IN_A_LINE:
        line = ", ".join([*(f"{name} {value}" for name, value in said.items()), seconds])
        console.print(f"{title}  {line}", markup=False, soft_wrap=True)
        return
    table = Table("fact", title=f"{title}  {seconds}", title_justify="left", box=None)
    table.add_column("value", justify="right")
    for name, value in said.items():
        table.add_row(name.replace("_", " "), value)
    console.print(table)


def _yield(per_class: Mapping[str, Any]) -> Table:
    """What each class got from the pool, of select's faces by class and reason."""
    table = Table("class", box=None, padding=(0, 2))
    for column in ("pool", "kept", "share", "most left out for"):
        table.add_column(column, justify="left" if column.startswith("most") else "right")
    for name, reasons in per_class.items():
        total, kept = sum(reasons.values()), reasons.get(SELECTED, 0)
        left = {reason: n for reason, n in reasons.items() if reason != SELECTED}
        most = max(left, key=lambda reason: left[reason], default=None)
        why = "" if most is None else f"{most.replace('_', ' ')} ({left[most]:,})"
        table.add_row(name or "none", f"{total:,}", f"{kept:,}", f"{kept / total:.1%}", why)
    return table


def show_results(job: Job) -> None:
    """The table a run ends with, and where the report is."""
    at = job.run.artifact("evaluate").dir / METRICS_FILE
    metrics = at.read_json()
    shared = SHARE in metrics["models"]
    caption = f"{CAPTION}\n{SHARE_CAPTION}" if shared else CAPTION
    table = Table("model", title="on the test faces", caption=caption, caption_justify="left")
    for column in ("accuracy", "95 %", "mean class", "macro-F1", "image passes"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, title in MODELS.items():
        model = metrics["models"].get(name)
        if model is None:
            continue
        table.add_row(
            title,
            f"{model['accuracy']['value']:.2%}",
            "{:.1f}-{:.1f}".format(*(100 * model["accuracy"][end] for end in ("low", "high"))),
            f"{model['mean_class_accuracy']['value']:.2%}",
            f"{model['macro_f1']['value']:.3f}",
            f"{model['passes']:,.0f}",
        )
    console.print(table)
    gain, pool = metrics["gain"], metrics["pool"]
    purity = "unknown" if pool["purity"] is None else f"{pool['purity']:.1%}"
    facts = Table.grid(padding=(0, 2))
    if gain is not None:
        facts.add_row("gain", _gain_line(gain))
    facts.add_row("purity", f"{purity} of {pool['known']:,} mined faces whose truth is known")
    facts.add_row("utilization", f"{pool['utilization']:.1%} of {pool['pool']:,} faces")
    console.print(facts, markup=False)
    console.print(_stages(job))
    console.print(f"report: {job.run.root / 'report.html'}", markup=False, soft_wrap=True)


def _gain_line(gain: dict[str, Any]) -> str:
    value, over = gain["accuracy"], MODELS[gain["over"]]
    verdict = "" if gain["real"] else "; one seed is a hint, not a finding"
    if len(gain["per_seed"]) > 1 and not gain["real"]:
        verdict = "; not shown to be real"
    return (
        f"student minus {over}, the better control: {100 * value['value']:+.2f} points "
        f"(95 % {100 * value['low']:+.2f} to {100 * value['high']:+.2f}){verdict}"
    )


def _stages(job: Job) -> Table:
    """What every finished stage took: controls and tuning, too."""
    table = Table("stage", title="stages", title_justify="left", box=None, padding=(0, 2))
    for column in ("rows", "quarantined", "image passes", "seconds"):
        table.add_column(column, justify="right")
    for name in TIMED:
        made = job.run.latest(name)
        if made is None:
            continue
        facts = made.facts
        counts = [facts.get(key) for key in ("rows", "quarantined", "passes")]
        said = ["" if count is None else f"{count:,.0f}" for count in counts]
        table.add_row(name, *said, f"{facts.get('seconds', 0.0):,.1f}")
    return table


def describe(recipe: Recipe, run_dir: str | None, until: str | None) -> None:
    """Print the stages of a recipe and digests of the settings each depends on; reads nothing."""
    table = Table("stage", "settings", "digest", title=f"{recipe.name}: nothing is read or written")
    for name in STAGES:
        if name in SETTINGS:
            chosen = settings(recipe, name)
            table.add_row(name, ", ".join(chosen) or "-", digest(chosen)[:12])
        else:
            table.add_row(name, "-", "-")
        if name == until:
            break
    console.print(table)
    root = recipe.folder(run_dir)
    pool = ", ".join(f"{name} ({source.kind})" for name, source in recipe.sources().items())
    console.print(f"run folder: {root}\npool: {pool}", markup=False, soft_wrap=True)


def describe_active(recipe: Recipe, run_dir: str | None) -> None:
    """Print the trials of a recipe's active learning; reads nothing."""
    config = required(recipe)
    each = len(config.strategies) * (config.rounds - 1) + 1  # the first round is shared
    count = len(config.seeds) * len(config.starts)
    table = Table("setting", "value", title=f"{recipe.name}: nothing is read or written")
    table.add_row("strategies", ", ".join(config.strategies))
    table.add_row("seeds", ", ".join(map(str, config.seeds)))
    table.add_row("starts", ", ".join(config.starts))
    last = config.start + (config.rounds - 1) * config.step
    table.add_row("labels", f"{config.start:.0%} to {last:.0%} in {config.rounds} rounds")
    trials = len(config.strategies) * count
    table.add_row("trials", f"{trials}, {each * count} trainings")
    table.add_row("digest", digest(settings(recipe, "active"))[:12])
    console.print(table)
    console.print(f"run folder: {recipe.folder(run_dir)}", markup=False, soft_wrap=True)
