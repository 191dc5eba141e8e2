"""What records of students and their controls must show: gains over seeds, and their gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.active import unpack
from pipeline.evaluation import EvaluateConfig, gain
from tests.bench.harness import Records

MODELS = ("teacher", "control_a", "control_b", "student")
HEADLINE = (
    "accuracy",
    "mean_class_accuracy",
    "macro_f1",
    "mean_class_accuracy_large",
    "macro_f1_large",
    "ece",
)
GATED = ("both-s0", "both-s1", "both-s2")


def seed_averaged_gain(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Student minus the better control over several seeds' records, as evaluate defines it.

    None where the seeds were not judged on the same faces.
    """
    if len({record["metrics"]["faces"] for record in records}) != 1:
        return None
    count = records[0]["n"]
    stacks = {}
    for name in MODELS:
        packed = [record["metrics"]["models"][name]["correct"] for record in records]
        right = np.stack([unpack(text, count) for text in packed]).astype(np.float64)
        stacks[name] = np.stack([right, 1 - right], axis=2)
    return gain(stacks, np.zeros(count, np.int64), EvaluateConfig())


def mean_over(records: Sequence[Mapping[str, Any]], model: str, key: str) -> float:
    """Mean of a headline figure of a model over records."""
    return float(np.mean([record["metrics"]["models"][model][key] for record in records]))


def judge_finite(records: Records) -> list[str] | None:
    """Every headline figure of every model is a number."""
    return (
        [
            f"{cell}: {model} {key} is {value}"
            for cell, record in records.items()
            for model, said in record["metrics"]["models"].items()
            for key in (*HEADLINE, "passes")
            if (value := said[key]) is None or not math.isfinite(value)
        ]
        if records
        else None
    )


def judge_compute(records: Records) -> list[str] | None:
    """Control A: the student's steps and batch; control B: all its passes, within 1 %."""
    faults = []
    for cell, record in records.items():
        found = record["metrics"]
        passes = {name: found["models"][name]["passes"] for name in MODELS}
        want = found["student_steps"] * found["student_batch"]
        if passes["control_a"] != want:
            faults.append(f"{cell}: control A took {passes['control_a']:,.0f} passes, not {want:,}")
        if abs(passes["control_b"] / passes["student"] - 1) > 0.01:
            faults.append(
                f"{cell}: control B took {passes['control_b']:,.0f} passes, the student with "
                f"teachers and scoring {passes['student']:,.0f}"
            )
    return faults if records else None


def judge_sharing(records: Records) -> list[str] | None:
    """No teacher is trained twice, and a call that finds everything done makes nothing."""
    faults, trained = [], set()
    for cell, record in records.items():
        found, seed = record["metrics"], record["seed"]
        key = (seed, record["method"] == "omni", found["teacher"])
        if "teach" in found["made"]:
            if key in trained:
                faults.append(f"{cell}: trained teacher {found['teacher']} of seed {seed} again")
            trained.add(key)
        if found.get("made_again"):
            faults.append(f"{cell}: a second call made {', '.join(found['made_again'])}")
    return faults if records else None


def judge_gain(records: Records) -> list[str] | None:
    """The claim: a point or more over the better control, in each of three seeds."""
    if any(name not in records for name in GATED):
        return None
    chosen = [records[name] for name in GATED]
    found = seed_averaged_gain(chosen)
    if found is None:
        return ["the seeds were judged on different faces"]
    faults, value = [], found["accuracy"]
    if value["value"] < 0.01:
        faults.append(f"mean gain {100 * value['value']:+.2f} points over {found['over']}, not 1.0")
    if not found["same_sign"]:
        signs = ", ".join(f"{100 * gap:+.2f}" for gap in found["per_seed"])
        faults.append(f"the sign differs between seeds: {signs}")
    if value["low"] <= 0:
        faults.append(f"95 % interval from {100 * value['low']:+.2f} points does not exclude 0")
    for key in ("macro_f1", "macro_f1_large"):
        student, control = (mean_over(chosen, m, key) for m in ("student", found["over"]))
        if student < control:
            faults.append(f"{key}: {student:.4f}, lower than {control:.4f} of {found['over']}")
    return faults
