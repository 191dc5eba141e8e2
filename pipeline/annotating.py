"""`omnifer annotate`: rounds in which a person labels the faces that teach the most.

Asking runs the flow up to score, chooses faces by an acquisition function and leaves a round with
its sheets; answering checks the filled sheet, stores the labels with the faces' bytes and trains
the teachers again. Everything after teach follows at the next `omnifer run`.

What a person has in hand is never overwritten: a round that waits is shown again as it is, and
copies that are there already stay.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import conduct, curve, images, sheets, twins
from pipeline.errors import ConfigError, SourceError
from pipeline.flow import label_names
from pipeline.job import Job
from pipeline.pool import pool_plan
from pipeline.progress import console
from pipeline.querying import AskConfig, choose, faces_of
from pipeline.recipe import Recipe
from pipeline.rounds import ANSWERS, HOME, SHEET, Round, closed, rounds, waiting
from pipeline.run import Run
from pipeline.schema import label_names_of
from pipeline.stages import STAGES
from pipeline.storage import Location, location
from pipeline.tables import read_table
from pipeline.training.data import seed_of
from pipeline.training.handed import LABELED_FILE

SIDE = 136
"""Side of a face on the sheet, pixels: large enough to be recognized."""
FILES = (f"{SHEET}.html", f"{SHEET}.csv")


def ask(
    recipe: Recipe,
    run_dir: str | None,
    config: AskConfig,
    *,
    suggest: bool = False,
    new: bool = False,
    fresh: bool = False,
    out: str | None = None,
) -> None:
    """Show the round that waits for answers, or ask a new one.

    Args:
        recipe: of the run.
        run_dir: its folder, as for `omnifer run`.
        config: how the faces of a new round are chosen.
        suggest: show the teacher's label in the sheets of a new round.
        new: ask although a round waits.
        fresh: start a new generation of stages whose settings changed.
        out: folder for copies of both sheets, named by the round.
    """
    home = conduct.root_of(recipe, run_dir) / HOME
    one = None if new else waiting(rounds(home))
    if one is None or not all((one.at / name).exists() for name in FILES):
        job = conduct.start(recipe, run_dir, fresh=fresh, show_faces=True)
        with conduct.driving(job):
            conduct.advance(job, _names("survey", "score"))
            one = _new_round(job, config) if one is None else one
            _write_sheets(job, one, suggest)
            _show_curve(job)
    elif unused := _unused(one, config, suggest):
        said = f"{one.name} waits as it was asked; {', '.join(unused)}: for a new round (--new)"
        console.print(said, markup=False, soft_wrap=True)
    _say_where(conduct.root_of(recipe, run_dir), one, out)


def answer(recipe: Recipe, run_dir: str | None, sheet: str, by: str | None) -> None:
    """Import a filled sheet and train the teachers with its labels; print the learning curve.

    Args:
        recipe: of the run.
        run_dir: its folder.
        sheet: the CSV file.
        by: who filled it in.

    Raises:
        SourceError: no round was asked, or the sheet is refused: see :func:`sheets.read_sheet`.
            Nothing is written then.
        ConfigError: the round was answered otherwise before.
    """
    root, at = conduct.root_of(recipe, run_dir), location(sheet)
    data = at.read_bytes()
    one = _round_of(rounds(root / HOME), sheets.known_ids(data, at.name), root)
    asked = one.queries()["id"].to_pylist()
    stored = Run(root).artifact("labeled").dir / LABELED_FILE
    names = label_names_of(read_table(stored, ["id"]).schema)
    filled = sheets.read_sheet(data, asked, names, at.name)
    before = one.answers()
    if before is not None:
        _require_same(one, before, filled)
    job = conduct.start(recipe, run_dir, fresh=False, show_faces=False)
    with conduct.driving(job):
        conduct.advance(job, ["survey"])  # a removal list may have grown since
        if before is None:
            one.answer(_answers(job, filled, by))
        gone = len(filled.labels) - one.labels().num_rows
        console.print(
            f"{one.name}: {len(filled.labels)} labels, {len(filled.skipped)} skipped, "
            f"{filled.empty} left empty{f', {gone} removed since' if gone else ''}",
            markup=False,
        )
        conduct.advance(job, _names("guard", "teach"))
        _show_curve(job)


def _unused(one: Round, config: AskConfig, suggest: bool) -> list[str]:
    """Options, no defaults, that say otherwise than the round that waits, as one types them."""
    queries, given = one.queries(), config.model_dump(exclude_defaults=True)
    shown = sheets.SUGGESTED.encode() in (one.at / FILES[1]).read_bytes().splitlines()[0]
    differ = {
        "budget": config.budget != queries.num_rows,
        "acquisition": config.acquisition not in queries["acquisition"].to_pylist(),
    }
    named = [f"--{name}" for name, other in differ.items() if other and name in given]
    return [*named, *(["--suggest"] if suggest and not shown else [])]


def _names(first: str, last: str) -> Sequence[str]:
    every = list(STAGES)
    return every[every.index(first) : every.index(last) + 1]


def _new_round(job: Job, config: AskConfig) -> Round:
    """Choose faces and open a round with them."""
    twins.confirm_twins(job, pool_plan(job))
    home = job.run.root / HOME
    every = rounds(home)
    one = Round(home, every[-1].number + 1 if every else 1)
    seed = seed_of(job.recipe.seed, HOME, one.number)
    one.ask(choose(job, config, closed(every), seed))
    return one


def _write_sheets(job: Job, one: Round, suggest: bool) -> None:
    """Both sheets of a round, from its queries; the CSV last."""
    queries, names = one.queries(), label_names(job)
    ids = queries["id"].to_pylist()
    suggested = queries["pseudo_label"].to_pylist() if suggest else None
    faces = {row["id"]: _uri(job, row) for row in faces_of(job, ids).to_pylist()}
    title = f"{job.recipe.name}, {one.name}"
    uris = [faces.get(face, "data:,") for face in ids]  # removed since: no picture
    written = {
        FILES[0]: sheets.page(title, ids, uris, names, suggested).encode(),
        FILES[1]: sheets.write_sheet(ids, suggested),
    }
    for name, data in written.items():
        (one.at / name).create(data)


def _uri(job: Job, row: dict[str, object]) -> str:
    """A face as the models see it cut, as a `data:` URI."""
    crop, color = job.views[str(row["source"])]
    pixels = images.face(
        row["image"],  # type: ignore[arg-type]
        crop=crop,
        color=color,
        size=SIDE,
        box=row["box"],  # type: ignore[arg-type]
        landmarks=row["landmarks"],  # type: ignore[arg-type]
    )
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0).squeeze()))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _say_where(root: Location, one: Round, out: str | None) -> None:
    places = [one.at / name for name in FILES]
    if out is not None:
        copies = [location(out) / f"{one.name}{name.removeprefix(SHEET)}" for name in FILES]
        for copy, place in zip(copies, places, strict=True):
            if not copy.exists():
                copy.write_bytes(place.read_bytes())
            elif copy.read_bytes() != place.read_bytes():
                console.print(f"{copy}: there already, left as it is", markup=False, soft_wrap=True)
        places = copies
    lines = (
        f"{one.name}: {one.queries().num_rows} faces wait for labels",
        f"look at {places[0]} (recognizable faces)",
        f"fill in {places[1]} (empty: ask again; skip: do not), then",
        f"omnifer annotate RECIPE --run {root} --sheet {places[1]} --by NAME",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _show_curve(job: Job) -> None:
    console.print(curve.table(curve.draw(job), label_names(job)))


def _round_of(every: Sequence[Round], ids: set[str], root: Location) -> Round:
    """The round that a sheet belongs to: most of its ids, then one that waits, then the newest.

    Raises:
        SourceError: there is no round.
    """
    if not every:
        raise SourceError(f"{root}: no round was asked yet; run `omnifer annotate` without --sheet")

    def fits(one: Round) -> tuple[int, bool, int]:
        shared = len(ids & set(one.queries()["id"].to_pylist()))
        return shared, not one.answered, one.number

    return max(every, key=fits)


def _require_same(one: Round, before: pa.Table, filled: sheets.Filled) -> None:
    """Raise ConfigError where a round was answered otherwise."""
    known = dict(zip(before["id"].to_pylist(), before["label"].to_pylist(), strict=True))
    now: dict[str, str | None] = {**filled.labels, **dict.fromkeys(filled.skipped)}
    differ = sorted(
        face
        for face in known.keys() | now.keys()
        if (face in known) != (face in now) or known[face] != now[face]
    )
    if differ:
        raise ConfigError(
            f"{one.at}: {one.name} was answered before, and {len(differ)} answers differ, such as "
            f"that of {differ[0]!r}; what was learned stays"
        )


def _answers(job: Job, filled: sheets.Filled, by: str | None) -> pa.Table:
    """ANSWERS rows: labeled faces with their bytes, in the order of the pool, then the others."""
    faces = faces_of(job, filled.labels.keys())
    there = set(faces["id"].to_pylist())
    bare = sorted((filled.skipped | filled.labels.keys()) - there)
    found = faces.select(["id", "image", "group", "box", "landmarks", "source"])
    without = pa.table({"id": pa.array(bare, pa.string())})
    found = pa.concat_tables([found, without], promote_options="default")
    labels = [filled.labels.get(face) for face in found["id"].to_pylist()]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    for name, values in (
        ("label", labels),
        ("by", [by] * len(labels)),
        ("when", [when] * len(labels)),
    ):
        found = found.append_column(name, pa.array(values, pa.string()))
    return found.select(ANSWERS.names).cast(ANSWERS)
