"""The part of RESULTS.md about learning from unlabeled faces at equal compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.bench import semi, streamed, training_speed
from tests.bench.harness import Records
from tests.bench.markdown import attempts, seconds, section, spread, table
from tests.bench.semi_cells import ROWS

TITLES = {
    "control": "labels alone",
    "control_vit": "labels alone, transformer",
    "simclr": "SimCLR, then labels",
    "mae": "masked reconstruction, then labels (transformer)",
    "fixmatch": "FixMatch",
    "dtm": "dynamic thresholds (DTM)",
    "freematch": "FreeMatch",
    "softmatch": "SoftMatch",
    "fixmatch_warm": "labels, then FixMatch",
    "noisy_student": "labels, then their guesses for a new student",
    "noisy_students": "the same with three teachers",
    "ssfer": "SSFER: reconstruction, FaceMix, EMA labels (transformer)",
}


def lines() -> list[str]:
    """All of it."""
    return [
        *section(semi.BENCH, "unlabeled faces at equal compute, judged on PublicTest", _body),
        *section(streamed.BENCH, "a backbone from a pool that is not stored", _streamed),
        *section(training_speed.BENCH, "the loop against a plain one", _speed),
    ]


def _streamed(records: Records) -> list[str]:
    rows = []
    for way in streamed.WAYS:
        if knn := streamed.accuracies(records, way):
            loss = streamed.losses(records, way)
            told = f"{np.mean(loss):.3f} ({min(loss):.3f} to {max(loss):.3f})"
            rows.append([way, str(len(knn)), spread(knn), told])
    if not rows:
        return []
    faces = next(iter(records.values()))["n"]
    head = ("way", "seeds", "nearest-neighbor accuracy", "loss")
    return [f"SimCLR on {faces:,} faces, a ConvNet of width 16.", "", *table(head, rows), ""]


def _speed(records: Records) -> list[str]:
    if not records:
        return []
    rates = {
        name: [record["metrics"]["rows"][name]["rate"] for record in records.values()]
        for name in training_speed.ROWS
    }
    rows = [[name, seconds(values)] for name, values in rates.items()]
    rows.append(
        ["ratio, round by round", ", ".join(f"{r:.3f}" for r in training_speed.ratios(records))]
    )
    return [*table(("row", "img/s, median (smallest to largest)"), rows), ""]


def _body(records: Records) -> list[str]:
    parts = [
        f"{semi.PASSES:,} image passes for every row, pre-training and the labeler's forwards "
        "included; the difference is to the control with the same network. p: exact, by the faces "
        "on which one of the two is right more often; that of the row named beforehand stands "
        "alone, those of all others carry Holm's correction.",
        "",
    ]
    for labels in semi.FRACTIONS:
        parts += [f"### {labels} % labels", "", *_rows(records, labels), ""]
    for attempt, found in attempts(f"{semi.NAME}-dev").items():
        parts += [f"### On the development set: {attempt}", "", *_rows(found, "10"), ""]
    return parts


def _rows(records: Records, labels: str) -> list[str]:
    rows, chances = [], semi.chances(records, labels)
    for name in ROWS:
        there = [f"{name}-{labels}-s{seed}" for seed in semi.SEEDS]
        found = [records[cell]["metrics"] for cell in there if cell in records]
        if not found:
            continue
        gap = "-"
        if name != semi.control_of(name) and semi.over_seeds(records, name, labels):
            value, _ = semi.difference(records, name, labels)
            low, high = 100 * value.low, 100 * value.high
            gap = f"{100 * value.value:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append(
            [
                TITLES[name],
                spread([m["accuracy"] for m in found]),
                f"{100 * np.mean([m['macro_f1'] for m in found]):.1f}",
                gap,
                _chance(name, chances),
                f"{np.mean([m['passes'] for m in found]):,.0f}",
                f"{np.mean([m['seconds'] for m in found]):,.0f}",
            ]
        )
    head = ("row", "accuracy", "macro-F1", "minus its control", "p", "image passes", "seconds")
    return table(head, rows) if rows else ["missing"]


def _chance(row: str, chances: Mapping[str, float]) -> str:
    if row not in chances:
        return "-"
    said = "<0.001" if chances[row] < 0.001 else f"{chances[row]:.3f}"
    return f"{said} (named)" if row == semi.NAMED else said
