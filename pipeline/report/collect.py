"""From a run folder to the facts of its report. What a run has not made yet is left out.

Cost: one pass over narrow columns of the decided pool (see :mod:`pipeline.report.pool`); if faces
are shown the slices of the mined set that a kept face of a gallery lies in; and what
:mod:`pipeline.report.noise`, :mod:`pipeline.report.copies` and :mod:`pipeline.report.subgroups` say
of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import __version__
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.evaluation import STUDENT, right_so_far
from pipeline.images import decode
from pipeline.report.calibration import bins_of, calibration, out_of_fold
from pipeline.report.copies import copies
from pipeline.report.decided import decided, truth_of
from pipeline.report.facts import Course, Gain, ModelRow, ReportFacts
from pipeline.report.noise import noise
from pipeline.report.pool import COLUMNS
from pipeline.report.subgroups import subgroups
from pipeline.run import METRICS_FILE, POINT_FILE, Artifact, Run
from pipeline.tables import read_table
from pipeline.training.distilled import GRID
from pipeline.training.watching import GUESSES, guesses_at

STAGES = (
    "labeled", "test", "survey", "guard", "annotated", "pretrain", "teach", "embed", "score",
    "search", "twins", "clusters", "select", "mine", "distill", "student", "student_share",
    "control_a", "control_b", "tuned", "evaluate",
)  # fmt: skip
"""What the page reads, in the order of the flow. The time of experts is in that of distill."""
TIMED = tuple(name for name in STAGES if name != "test")
"""Whose times add up: labeled and test are read at once, on one clock."""
MODELS = ("teacher", "control_a", "control_b", "student_share", "student", "tuned")
HISTORY_FILE = "model/history.json"  # of student: rows of pipeline.training.loop
GUESSES_FOLDER = f"model/{GUESSES}"  # of an online student: what it said of watched faces
CUT = "cut_"  # before a class, in those rows


class ReportConfig(Config):
    """What the report shows."""

    gallery: int = Field(default=12, ge=0, le=48)  # faces per class, and per class and reason
    suspects: int = Field(default=24, ge=0, le=200)
    """Labeled faces that the teachers doubt, and those with a copy of another label."""


def collect(
    run: Run, recipe_name: str, command: str, show_faces: bool, config: ReportConfig | None = None
) -> ReportFacts:
    """Read what a run has made.

    Args:
        run: the run folder; stages that are not finished are left out.
        recipe_name: title of the page.
        command: what to type to make the run again.
        show_faces: whether the page may hold recognizable faces.
        config: size of the galleries.

    Raises:
        RunError: no stage is finished.
    """
    config = config or ReportConfig()
    done = {stage: found for stage in STAGES if (found := run.latest(stage)) is not None}
    if not done:
        raise RunError(f"{run.root}: no finished stage to report; run `omnifer run` first")
    metrics = _json(done.get("evaluate"), METRICS_FILE)
    point = _json(done.get("select"), POINT_FILE) or _json(done.get("search"), POINT_FILE)
    facts: dict[str, Any] = {
        "seconds": _seconds(done),
        "lineage": {stage: artifact.digest for stage, artifact in done.items()},
        "operating_point": _point(point),
        "trials": tuple(point.get("trials", ())),
        **_evaluation(metrics, _training_seconds(run)),
        **_distilled(done.get("distill")),
        "course": _course(done.get("student"), truth_of(done.get("survey"))),
    }
    homes = [done[name] for name in ("labeled", "annotated") if name in done]
    if "teach" in done and (said := out_of_fold(done["teach"], homes)) is not None:
        facts["calibration"] = calibration(said)
        facts["noise"] = noise(said, homes, config.suspects, show_faces)
    if "guard" in done:
        facts["copies"] = copies(homes, done["guard"], done.get("teach"), config.suspects)
    gain = facts.get("gain")
    if gain is not None and STUDENT in metrics["models"] and "test" in done:
        facts["subgroups"] = subgroups(done["evaluate"], done["test"], gain.against)
    if all(stage in done for stage in COLUMNS):
        truth = truth_of(done.get("survey"))
        facts |= decided(done, point, truth, config.gallery, show_faces)
    return ReportFacts(
        recipe=recipe_name,
        command=command,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        run=run.root.uri,
        show_faces=show_faces,
        **facts,
    )


def _seconds(done: Mapping[str, Artifact]) -> dict[str, float]:
    """What each stage took."""
    timed = {name: done[name].facts for name in TIMED if name in done}
    return {name: float(facts["seconds"]) for name, facts in timed.items() if "seconds" in facts}


def _json(artifact: Artifact | None, name: str) -> dict[str, Any]:
    if artifact is None or not (artifact.dir / name).exists():
        return {}
    return dict((artifact.dir / name).read_json())


def _evaluation(metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Models, gain, protocol, confusion and reliability of the better control and the student."""
    if not metrics:
        return {}
    models = metrics["models"]
    names = [*(n for n in MODELS if n in models), *sorted(n for n in models if n not in MODELS)]
    gain = metrics.get("gain")
    compared = [n for n in (gain["over"] if gain else "teacher", "student") if n in models]
    return {
        "label_names": tuple(metrics["label_names"]),
        "models": tuple(_model(n, models[n], seconds.get(n)) for n in names),
        "gain": _gain(gain, metrics["protocol"]),
        "protocol": {k: v for k, v in metrics["protocol"].items() if k != "passes"},
        "confusion": {n: np.array(models[n]["confusion"], dtype=np.int64) for n in compared},
        "reliability": {n: bins_of(models[n]["reliability"]) for n in compared},
    }


def _course(student: Artifact | None, truth: pa.Table) -> Course | None:
    """Thresholds over the training of a student that labels for itself, and how right it was."""
    if student is None or not (student.dir / HISTORY_FILE).exists():
        return None
    rows = [row for row in (student.dir / HISTORY_FILE).read_json() if "used" in row]
    names = [key for key in (rows[0] if rows else {}) if key.startswith(CUT)]
    if not names:
        return None
    steps = tuple(int(row["step"]) for row in rows)
    at = student.dir / GUESSES_FOLDER
    judged = [
        right_so_far(read_table(guess), truth) if guess.exists() else (None, 0)
        for guess in (guesses_at(at, step) for step in steps)
    ]
    return Course(
        steps=steps,
        purity=tuple(purity for purity, _ in judged),
        known=max(known for _, known in judged),
        used=tuple(row["used"] for row in rows),
        cuts={key.removeprefix(CUT): tuple(row[key] for row in rows) for key in names},
    )


def _training_seconds(run: Run) -> dict[str, float]:
    """What each judged model's own training took."""
    found = {name: run.latest("teach" if name == "teacher" else name) for name in MODELS}
    return {
        name: float(artifact.facts["seconds"])
        for name, artifact in found.items()
        if artifact is not None and "seconds" in artifact.facts
    }


def _model(name: str, found: Mapping[str, Any], seconds: float | None) -> ModelRow:
    accuracy, votes = found["accuracy"], found.get("votes", {})
    return ModelRow(
        key=name,
        accuracy=accuracy["value"],
        interval=(accuracy["low"], accuracy["high"]),
        mean_class=found["mean_class_accuracy"]["value"],
        macro_f1=found["macro_f1"]["value"],
        ece=found["ece"]["value"],
        kl=votes["kl"]["value"] if votes else None,
        brier=votes["brier"]["value"] if votes else None,
        passes=found["passes"],
        seconds=seconds,
        recall={r["class"]: r["recall"] for r in found["per_class"] if r["recall"] is not None},
    )


def _gain(gain: Mapping[str, Any] | None, protocol: Mapping[str, Any]) -> Gain | None:
    if gain is None:
        return None
    accuracy = gain["accuracy"]
    return Gain(
        accuracy["value"],
        accuracy["low"],
        accuracy["high"],
        against=gain["over"],
        n=protocol["n"],
        seeds=max(1, len(gain["per_seed"])),
        real=gain["real"],
    )


def _point(point: Mapping[str, Any]) -> dict[str, Any]:
    """The rules; names, counts, tables and trials stand elsewhere on the page."""
    elsewhere = ("label_names", "labeled", "table", "trials", "estimates", "cuts", "clusters")
    shown = {name: value for name, value in point.items() if name not in elsewhere}
    clusters = point.get("clusters")
    if clusters is not None:
        trusted = sum(label is not None for label in clusters)
        shown["clusters"] = f"{trusted:,} of {len(clusters):,} are pure enough"
    else:
        shown.pop("relabel", None)
    estimates = {f"estimated {k}": v for k, v in point.get("estimates", {}).items()}
    return {**shown, **estimates}


def _distilled(artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None or not (artifact.dir / GRID).exists():
        return {}
    facts = artifact.facts
    return {
        "distilled_grid": decode((artifact.dir / GRID).read_bytes()),
        "distilled_size": int(facts.get("size", ReportFacts.distilled_size)),
        "distilled": {k: v for k, v in facts.items() if k != "seconds"},
    }
