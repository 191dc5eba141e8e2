"""Faces that people labeled, on their way into the training set: the stage `annotated`.

The answers of all rounds, described and compared with the test and validation faces as they are
now, whatever the pool was compared with when they were asked for. Where a round was answered since,
the stage has a new generation, the digest of the training faces changes, and teach starts over.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import guard as guarding
from pipeline import twins
from pipeline.config import digest
from pipeline.errors import RunError
from pipeline.flow import label_names
from pipeline.job import Job
from pipeline.packs import content_digest
from pipeline.rounds import HOME, Round, rounds
from pipeline.run import Artifact
from pipeline.schema import FACES, LABELED, OK, with_label_names
from pipeline.sources.rows import labeled_rows_as_read
from pipeline.survey import describe
from pipeline.tables import read_table, write_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

STAGE = "annotated"
SCHEMA = LABELED.append(pa.field("source", pa.string()))
"""LABELED rows of role train with the name of their pool source."""


def join(job: Job) -> Artifact | None:
    """The labeled faces of all rounds that guard lets pass; None where there never was one.

    Raises:
        RunError: the recipe lacks the source or the class of a labeled face.
    """
    answers = {one: one.labels() for one in rounds(job.run.root / HOME)}
    answers = {one: table for one, table in answers.items() if table.num_rows}
    if not answers and job.run.latest(STAGE) is None:
        return None
    _require_known(job, answers)
    views = {
        name: [crop.model_dump(mode="json"), color] for name, (crop, color) in job.views.items()
    }
    inputs = {
        "rounds": {one.name: content_digest(table) for one, table in answers.items()},
        "views": views,
        **{name: job.run.artifact(name).digest for name in ("labeled", "test")},
    }
    stage = job.open(STAGE, inputs, hide=twins.LATER)
    if stage.done is None:
        empty = with_label_names(SCHEMA, label_names(job)).empty_table()
        rows = pa.concat_tables([empty, *(_rows(table) for table in answers.values())])
        rows, faces, twin = _guarded(job, rows)
        write_table(stage.dir / LABELED_FILE, rows)
        write_table(stage.dir / FACES_FILE, faces)
        found = digest([content_digest(rows), views])
        per_class = Counter(rows["label"].to_pylist())
        stage.finish(found, faces=rows.num_rows, twins=twin, per_class=dict(per_class))
    return stage.done


def _require_known(job: Job, answers: dict[Round, pa.Table]) -> None:
    for column, known in (("source", list(job.sources)), ("label", list(label_names(job)))):
        for one, table in answers.items():
            strange = set(table[column].to_pylist()) - set(known)
            if strange:
                raise RunError(
                    f"{one.at}: {column} {sorted(strange)[0]!r} is not of this recipe; "
                    f"found: {', '.join(known)}"
                )


def _rows(answers: pa.Table) -> pa.Table:
    """SCHEMA rows of ANSWERS rows."""
    columns = [
        pa.repeat("train", answers.num_rows)
        if field.name == "role"
        else answers[field.name]
        if field.name in answers.column_names
        else pa.nulls(answers.num_rows, field.type)
        for field in SCHEMA
    ]
    return pa.table(columns, schema=SCHEMA)


def _guarded(job: Job, rows: pa.Table) -> tuple[pa.Table, pa.Table, int]:
    """The rows that decode and are no twin, their FACES rows, and how many were twins."""
    known = twins.reference(job)
    kept, described, twin = [rows.slice(0, 0)], [FACES.empty_table()], 0
    for name, (crop, color) in job.views.items():
        own = rows.filter(pc.equal(rows["source"], name))
        faces = describe(labeled_rows_as_read(own), crop, color, threads=job.recipe.survey.threads)
        found = guarding.find_twins(known, faces, job.recipe.guard)["twin_of"]
        good = pc.and_(pc.is_null(found), pc.equal(faces["status"], OK))
        twin += own.num_rows - found.null_count
        kept.append(own.filter(good))
        described.append(faces.filter(good))
    return pa.concat_tables(kept), pa.concat_tables(described), twin


def labeled_ids(job: Job) -> set[str]:
    """Ids of the faces that train under the label of a person."""
    found = job.run.latest(STAGE)
    if found is None:
        return set()
    return set(read_table(found.dir / LABELED_FILE, ["id"])["id"].to_pylist())
