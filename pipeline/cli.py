"""`omnifer`: one verb per stage, `run` for all of them. Thin: parse, call, exit code.

Exit codes: 0 ok, 1 the run failed, 2 the person's input or a setting is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline import __version__
from pipeline.errors import ConfigError, OmniferError, RunError
from pipeline.progress import console
from pipeline.verbs import VERBS

app = typer.Typer(
    name="omnifer",
    help="Few labels, many unlabeled faces: a better expression model, and the evidence for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArg = Annotated[Path, typer.Argument(help="recipe file, e.g. jobs/recipes/demo.yaml")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=V", help="replace one value; repeatable")
]
RunOpt = Annotated[
    str | None, typer.Option("--run", metavar="DIR", help="run folder or s3://...; resumed")
]
FreshOpt = Annotated[
    bool, typer.Option("--fresh", help="start a new generation of stages whose settings changed")
]
PartOpt = Annotated[
    str, typer.Option("--part", metavar="I/N", help="this driver's slices, where N share a pass")
]
FacesOpt = Annotated[bool, typer.Option("--show-faces", help="do not blur faces in the report")]


STAGES_PANEL = "One stage of a recipe"
LABELS_PANEL = "Labels"
CARRY_PANEL = "Look, ask and carry off"
PLACES_PANEL = "Machines"


def _version(asked: bool) -> None:
    if asked:
        console.print(f"omnifer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(
    recipe: RecipeArg,
    sets: SetOpt = None,
    run_dir: RunOpt = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    fresh: FreshOpt = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="resolve and list the stages; read nothing")
    ] = False,
    show_faces: FacesOpt = False,
) -> None:
    """Run every stage of a recipe; run it again to resume."""
    from pipeline import conduct

    conduct.require_stage(until)
    if dry_run:
        conduct.describe(_load(recipe, sets), run_dir, until)
        return
    job = conduct.start(_load(recipe, sets), run_dir, fresh=fresh, show_faces=show_faces)
    conduct.run_all(job, until)


def _stage_command(name: str, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArg,
        sets: SetOpt = None,
        run_dir: RunOpt = None,
        fresh: FreshOpt = False,
        show_faces: FacesOpt = False,
        part: PartOpt = "1/1",
    ) -> None:
        from pipeline import conduct

        own = conduct.part_of(name, part)
        loaded = _load(recipe, sets)
        job = conduct.start(loaded, run_dir, fresh=fresh, show_faces=show_faces, part=own)
        conduct.run_one(job, name)

    command.__doc__ = summary
    return command


STAGE_HELP = {
    "survey": "Decode every face once: hashes, thumbnail, quality, status.",
    "guard": "Find twins of test and validation faces, and duplicates.",
    "pretrain": "Train a backbone on the pool's faces, without labels.",
    "teach": "Train the cross-fit teachers on the labeled faces.",
    "embed": "Stream the pool through the teachers; scores are chained to it.",
    "score": "Compare embeddings with prototypes and labeled neighbors.",
    "search": "Search selection settings over the cached scores with Ray Tune.",
    "select": "Decide which faces are kept, and why the others are not.",
    "mine": "Fetch the selected faces' bytes and write the mined set.",
    "distill": "Learn a few synthetic images per class.",
    "student": "Train the student and its controls of equal compute.",
    "evaluate": "Judge every model on the test faces, once.",
    "report": "Write report.html.",
}
"""Verbs in the order a face meets them; a test compares them with stages.STAGES."""

for _name, _summary in STAGE_HELP.items():
    app.command(_name, rich_help_panel=STAGES_PANEL)(_stage_command(_name, _summary))


@app.command(rich_help_panel=LABELS_PANEL)
def annotate(
    recipe: RecipeArg,
    sets: SetOpt = None,
    run_dir: RunOpt = None,
    budget: Annotated[int, typer.Option(help="faces of a round")] = 200,
    acquisition: Annotated[str, typer.Option(help="how they are chosen, e.g. entropy")] = "badge",
    candidates: Annotated[
        int, typer.Option(help="faces looked at by functions that read embeddings")
    ] = 100_000,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="show the model's label; it may persuade")
    ] = False,
    new: Annotated[bool, typer.Option("--new", help="ask although a round waits")] = False,
    fresh: FreshOpt = False,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="copies of both sheets")
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(metavar="FILLED.CSV", help="import answers and learn them")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="who filled in the sheet")] = None,
) -> None:
    """Ask a person for labels of chosen pool faces; with --sheet, learn the answers."""
    from pipeline import annotating
    from pipeline.config import parse
    from pipeline.querying import AskConfig

    loaded = _load(recipe, sets)
    if sheet is not None:
        if not by:
            raise ConfigError("--sheet: expected --by NAME beside it, who filled it in")
        annotating.answer(loaded, run_dir, sheet, by)
        return
    values = {"budget": budget, "acquisition": acquisition, "candidates": candidates}
    config = parse(AskConfig, values, "omnifer annotate")
    annotating.ask(loaded, run_dir, config, suggest=suggest, new=new, fresh=fresh, out=out)


@app.command(rich_help_panel=PLACES_PANEL)
def submit(
    recipe: RecipeArg,
    sets: SetOpt = None,
    run_dir: RunOpt = None,
    stage: Annotated[str, typer.Option(help="one stage instead of the whole run")] = "run",
    part: PartOpt = "1/1",
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    fresh: FreshOpt = False,
    show_faces: FacesOpt = False,
    address: Annotated[
        str | None, typer.Option(help="job server; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="reserved for the driver; 0: on the head")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="the same, for train.workers: 0")] = 0,
    wait: Annotated[bool, typer.Option(help="follow the log; exit with the job's code")] = True,
) -> None:
    """Send a recipe to a Ray cluster as a job and follow it; again: resume or follow."""
    from pipeline import conduct, submitting
    from pipeline.recipe import variables

    if stage != "run":
        conduct.require_stage(stage, "--stage")
        if until is not None:
            raise ConfigError("--until: stops a whole run; with --stage there is one stage")
    conduct.require_stage(until)
    options = [f"--set={item}" for item in sets or ()]
    options += [f"--until={until}"] if until else []
    options += [name for name, on in (("--fresh", fresh), ("--show-faces", show_faces)) if on]
    loaded, own = _load(recipe, sets), conduct.part_of(stage, part)
    asked = submitting.ask(loaded, recipe, run_dir, stage, own, options)
    values = variables(recipe, sets or ())
    code = submitting.submit(asked, address, values, cpus=cpus, gpus=gpus, wait=wait)
    if code:
        raise typer.Exit(code)


@app.command(rich_help_panel=LABELS_PANEL)
def active(
    recipe: RecipeArg,
    sets: SetOpt = None,
    run_dir: RunOpt = None,
    fresh: FreshOpt = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="validate and count the trials; read nothing")
    ] = False,
) -> None:
    """Compare acquisition functions on a set whose labels are known, in parallel trials."""
    from pipeline import conduct

    loaded = _load(recipe, sets)
    if dry_run:
        conduct.describe_active(loaded, run_dir)
        return
    conduct.run_active(conduct.start(loaded, run_dir, fresh=fresh, show_faces=False))


@app.command(rich_help_panel=PLACES_PANEL)
def plan(
    recipe: RecipeArg,
    sets: SetOpt = None,
    run_dir: RunOpt = None,
    probes: Annotated[int, typer.Option("--probe", min=1, help="slices that are measured")] = 4,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="node groups to rent; else this machine")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="price table instead of the built-in one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="plan.json with every figure")] = None,
) -> None:
    """Probe a few slices; predict speed, bottleneck, wall time, storage and dollars."""
    from pipeline.planning import costs, outlook, timetable

    table = costs.load_prices(prices)
    rented = None if cluster is None else costs.load_cluster(cluster, table)
    found = outlook.look_ahead(_load(recipe, sets), run_dir, table, probes=probes, cluster=rented)
    console.print(timetable.table(found))
    for line in timetable.said(found):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        timetable.write_plan(found, out)
        console.print(f"plan: {out}", markup=False, soft_wrap=True)


@app.command(rich_help_panel=PLACES_PANEL)
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="also ask the tracking server that it names")
    ] = None,
) -> None:
    """Check Ray, CUDA, FAISS, shared memory, disk, tracking; exit 1 if something is missing."""
    from pipeline.doctor import checks

    table = Table("check", "state", "detail", box=None)
    findings = checks() if recipe is None else checks(_load(recipe, None).tracking.uri)
    for finding in findings:
        table.add_row(finding.name, "ok" if finding.ok else "PROBLEM", finding.detail)
    console.print(table, markup=False)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


for _verb in VERBS:
    app.command(rich_help_panel=CARRY_PANEL)(_verb)


def _load(path: Path, sets: list[str] | None):  # type: ignore[no-untyped-def]
    from pipeline.recipe import load

    return load(path, sets or ())


def main() -> None:
    """Entry point: one clear line for what a person can mend, a traceback for our own faults."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        try:
            app()
        except OSError as err:
            place = f"{err.filename}: " if err.filename else ""
            raise RunError(place + (err.strerror or " ".join(str(err).split()))) from err
    except OmniferError as err:
        for line in str(err).splitlines():
            print(f"omnifer: {line}", file=sys.stderr if err.exit_code else None)
        sys.exit(err.exit_code)


if __name__ == "__main__":
    main()
