"""What evaluate judges: a run's models, the test faces they sit, their protocol, their course."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import flow
from pipeline.errors import RunError
from pipeline.evaluation import CONTROLS, STUDENT, right_so_far
from pipeline.job import Job
from pipeline.packs import content_digest
from pipeline.storage import Location
from pipeline.tables import read_table
from pipeline.training import exam, runs, watching
from pipeline.training.handed import FACES_FILE, LABELED_FILE, usable


def judged_names(job: Job) -> tuple[str, ...]:
    """Stages whose models are judged, the teacher apart."""
    recipe = job.recipe
    asked = ((flow.SHARE, recipe.mined_share), (flow.TUNED, recipe.tune))
    return (*CONTROLS, STUDENT, *(name for name, value in asked if value is not None))


def judged_models(job: Job) -> dict[str, Location]:
    """Folders of the models that are judged."""
    trained = {name: job.run.artifact(name).dir / flow.MODEL for name in judged_names(job)}
    return {"teacher": job.run.artifact("teach").dir / runs.TEACHER, **trained}


def exam_faces(job: Job) -> pa.Table:
    """LABELED rows of the test faces that decode and may be read."""
    at = job.run.artifact("test").dir
    return usable(read_table(at / LABELED_FILE), read_table(at / FACES_FILE), job.removals)


def exam_input(job: Job) -> dict[str, str]:
    """What the exam depends on beside models and test set: the faces left of it by removals."""
    if job.recipe.removals is None:
        return {}
    return {"judged": content_digest(exam_faces(job).select(["id"]))}


def sit_exam(job: Job) -> tuple[dict[str, np.ndarray], pa.Table, tuple[str, ...]]:
    """Probabilities (N, K) of every model on the test faces; their id, label, soft; class names."""
    rows = exam_faces(job)
    names = flow.label_names(job)
    unknown = sorted(set(rows["label"].to_pylist()) - set(names))
    if unknown:
        raise RunError(f"test faces have classes the training set lacks: {', '.join(unknown)}")
    worker = exam.examiner(job.recipe.train)
    probs = {
        name: exam.probabilities(folder, rows, flow.handed(job), worker)
        for name, folder in judged_models(job).items()
    }
    return probs, rows.select(["id", "label", "soft"]), names


def course(job: Job, truth: pa.Table) -> list[dict[str, float]]:
    """How right the labels were that an online student gave its pool, step by step of its training.

    Args:
        job: whose student is trained.
        truth: TRUTH, the hidden one; empty where nobody knows it.

    Returns:
        rows of `step`, `purity` and `known`, those of :func:`pipeline.evaluation.right_so_far`;
        none for a student that was taught by teachers, or where no face's truth is known.
    """
    at = job.run.artifact(STUDENT).dir / flow.MODEL
    history, rows = at / runs.HISTORY_FILE, []
    for row in history.read_json() if history.exists() else ():
        said = watching.guesses_at(at / watching.GUESSES, int(row["step"]))
        purity, known = right_so_far(read_table(said), truth) if said.exists() else (None, 0)
        if purity is not None:
            rows.append({"step": row["step"], "purity": purity, "known": float(known)})
    return rows


def protocol_card(job: Job) -> dict[str, Any]:
    """What a number needs beside it to be compared."""
    recipe, teacher = job.recipe, job.run.artifact("teach")
    labeled, added = job.run.artifact("labeled").facts, job.run.latest("annotated")
    config = recipe.labeled.model_dump(mode="json")
    known = ("kind", "path", "rule", "fraction", "test", "development", "validation")
    said = {k: config[k] for k in known if config.get(k)}
    said["path"] = Path(said["path"]).name if "path" in said else None
    return {
        "split": ", ".join(f"{k} {v}" for k, v in said.items() if v),
        "labeled": labeled.get("roles"),
        **({} if added is None else {"annotated": added.facts["faces"]}),
        **({"candidates": teacher.facts["candidates"]} if "candidates" in teacher.facts else {}),
        "seeds": [recipe.seed],
        **({} if recipe.mined_share is None else {"mined_share": recipe.mined_share}),
        "sampler": f"labeled drawn by class count ^ -{recipe.student.labeled_power}",
        "views": {
            "student": f"labeled {recipe.student.labeled_augment}, mined "
            f"{recipe.student.mined_augment}",
            "controls": recipe.control.augment or recipe.student.labeled_augment,
        },
        "crop": recipe.labeled.crop.model_dump(mode="json", exclude_none=True),
        "passes": {
            **(
                {"pretrain": job.run.artifact("pretrain").facts["passes"]}
                if recipe.starts_pretrained
                else {}
            ),
            "teacher": teacher.facts["passes"],
            **{name: job.run.artifact(name).facts["passes"] for name in judged_names(job)},
        },
        "pretraining_data": flow.started(job, recipe.teach).model.pretraining_data or "none",
    }
