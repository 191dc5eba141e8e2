"""The learning curve of annotation: what each round's labels brought, on the same faces each time.

A point is a finished generation of teach, so a curve can be drawn of any run, however it got where
it is: rounds learned by `omnifer annotate` or by `omnifer run`, one by one or several at once. The
faces are the originally labeled ones that every teacher of the curve has learned, each judged by
the member that has not seen it; the validation faces, if there are any, by all members together.
Test faces are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from pipeline import metrics
from pipeline.flow import handed, label_names
from pipeline.job import Job
from pipeline.packs import content_digest
from pipeline.report.figures import Curve, learning_curves, standalone
from pipeline.rounds import HOME, labels, rounds
from pipeline.run import IDENTITY, Artifact
from pipeline.schema import label_codes
from pipeline.tables import read_table
from pipeline.training import exam, runs
from pipeline.training.handed import LABELED_FILE, labeled_rows

CURVE_FILE = "curve.json"
FIGURE_FILE = "curve.svg"

Point = dict[str, Any]
"""round, labels and per_class (of people, learned so far), faces, accuracy, macro_f1, validation
(faces, accuracy, macro_f1 and a digest of the faces, or None) and teacher (digest)."""


def draw(job: Job) -> list[Point]:
    """The points of a run, by round; also written to annotate/ as JSON and SVG, and tracked."""
    points = _points(job)
    home = job.run.root / HOME
    (home / CURVE_FILE).write_json({"label_names": label_names(job), "points": points})
    lines = [
        Curve(title, tuple((float(point["labels"]), point[name]) for point in points))
        for title, name in (("accuracy", "accuracy"), ("macro-F1", "macro_f1"))
    ]
    (home / FIGURE_FILE).write_text(standalone(learning_curves(lines)))
    with job.tracker.stage(HOME, {}) as child:
        for point in points:
            numbers = {name: float(point[name]) for name in ("accuracy", "macro_f1")}
            child.metrics(numbers, step=point["labels"])
    return points


def table(points: Sequence[Point], names: Sequence[str]) -> Table:
    """The points as they are printed."""
    shown = [name for name in names if any(point["per_class"].get(name) for point in points)]
    said = f"the teacher on the same {points[-1]['faces']:,} labeled faces, out of fold"
    found = Table("round", title="what labels brought", caption=said, caption_justify="left")
    judged = points[-1]["validation"] is not None
    for column in ("labels", *shown, "accuracy", "macro-F1", *(("validation",) if judged else ())):
        found.add_column(column, justify="right")
    for point in points:
        seen = point["validation"]
        found.add_row(
            str(point["round"]),
            f"{point['labels']:,}",
            *(f"{point['per_class'].get(name, 0):,}" for name in shown),
            f"{point['accuracy']:.2%}",
            f"{point['macro_f1']:.3f}",
            *((f"{seen['accuracy']:.2%}",) if judged else ()),
        )
    return found


def _points(job: Job) -> list[Point]:
    given, names = labels(rounds(job.run.root / HOME)), label_names(job)
    stored = read_table(job.run.artifact("labeled").dir / LABELED_FILE, ["id"])
    known_ids = given.keys() | set(stored["id"].to_pylist())
    folds: dict[int, tuple[Artifact, pa.Table]] = {}  # the newest teacher of each round
    for made in _alike(job):
        known = read_table(made.dir / runs.FOLDS_FILE, ["id", "label", "logits"])
        if known_ids >= set(known["id"].to_pylist()):  # else of another labeled set
            learned = given.keys() & set(known["id"].to_pylist())
            folds[max((given[face][0] for face in learned), default=0)] = (made, known)
    ids = [set(known["id"].to_pylist()) - given.keys() for _, known in folds.values()]
    same = pa.array(sorted(set.intersection(*ids)), pa.string())
    judge = _validation(job)
    points = []
    for number, (made, known) in sorted(folds.items()):
        own = known.filter(pc.is_in(known["id"], value_set=same))
        said = np.stack(own["logits"].to_numpy(zero_copy_only=False)).argmax(1)
        learned = given.keys() & set(known["id"].to_pylist())
        points.append(
            {
                "round": number,
                "labels": len(learned),
                "per_class": dict(Counter(given[face][1] for face in sorted(learned))),
                **_judged(said, own["label"].to_pylist(), names),
                "validation": judge(made),
                "teacher": made.digest,
            }
        )
    return points


def _alike(job: Job) -> list[Artifact]:
    """Teachers that differ from the current one in their labeled faces alone, oldest first."""

    def settings(made: Artifact) -> Any:
        found = (made.dir / IDENTITY).read_json()
        found["inputs"].pop("labeled")
        return found

    wanted = settings(job.run.artifact("teach"))
    return [made for made in job.run.generations("teach") if settings(made) == wanted]


def _judged(said: np.ndarray, labels: list[str], names: Sequence[str]) -> dict[str, Any]:
    matrix = metrics.confusion_matrix(said, label_codes(labels, names), len(names))
    return {
        "faces": len(labels),
        "accuracy": float(metrics.accuracy(matrix)),
        "macro_f1": float(metrics.macro_f1(matrix)),
    }


def _validation(job: Job) -> Callable[[Artifact], dict[str, Any] | None]:
    """Judges teachers on the validation faces; what the last curve knows is not computed again."""
    stored = read_table(job.run.artifact("labeled").dir / LABELED_FILE, ["role"])
    if "validation" not in stored["role"].to_pylist():
        return lambda made: None
    faces, names = labeled_rows(handed(job), ("validation",)), label_names(job)
    of = content_digest(faces.select(["id", "label"]))[:12]
    last = job.run.root / HOME / CURVE_FILE
    before = last.read_json()["points"] if last.exists() else []
    known = {point["teacher"]: point["validation"] for point in before}

    def judge(made: Artifact) -> dict[str, Any]:
        if (found := known.get(made.digest)) is not None and found["of"] == of:
            return dict(found)
        worker = exam.examiner(job.recipe.train)
        probs = exam.probabilities(made.dir / runs.TEACHER, faces, handed(job), worker)
        return {**_judged(probs.argmax(1), faces["label"].to_pylist(), names), "of": of}

    return judge
