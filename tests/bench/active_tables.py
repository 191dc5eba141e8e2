"""The part of RESULTS.md about active learning: learning curves, and what acquisition costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.acquisition.functions import ACQUISITIONS
from pipeline.active import BASELINE
from pipeline.metrics import Interval
from tests.bench import acquisition_scale, active
from tests.bench.harness import Record, Records
from tests.bench.markdown import section, spread, table

PAPER = {
    "random": 63.15,
    "entropy": 65.86,
    "margin": 65.87,
    "least_confidence": 65.63,
    "badge": 64.91,
    "glister": 65.13,
    "coreset": 64.99,
    "bald": 65.58,
    "deepfool": 64.81,
}
"""FER13 after seven rounds without pre-training, arXiv 2307.02744, table I."""


def lines() -> list[str]:
    """All of it."""
    title = "whose label next, oracle labels, judged on PublicTest in every round"
    scale = "10,000 of 1,000,000 embeddings"
    return [
        *section(active.BENCH, title, _body),
        *section(acquisition_scale.BENCH, scale, _scale),
    ]


def _body(records: Records) -> list[str]:
    parts = [
        f"FER2013, 32 px, {active.EPOCHS} epochs over the labels in every round; mean over seeds, "
        "after the last round with sample sd. The paper trains a ResNet-18 of 48 px for 200 "
        "epochs. Intervals: paired bootstrap of the seed-averaged correctness.",
        "",
    ]
    for start in active.STARTS:
        parts += [f"### From {start} weights", "", *_curves(records, start), ""]
    return [*parts, _lift(records), ""]


def _curves(records: Records, start: str) -> list[str]:
    rows, labels = [], []
    for name in ACQUISITIONS:
        found = active.of(records, name, start)
        if not found:
            continue
        curves = [record["metrics"]["rounds"] for record in found]
        labels = [made["labels"] for made in curves[0]]
        count = len(labels)
        means = [_mean([c[number]["accuracy"] for c in curves]) for number in range(count - 1)]
        other = active.difference(records, (name, start), (BASELINE, start), count - 1)
        rows.append(
            [
                name,
                *means,
                spread([curve[-1]["accuracy"] for curve in curves]),
                "-" if name == BASELINE else _gap(other),
                f"{100 * np.mean([curve[-1]['macro_f1'] for curve in curves]):.1f}",
                _rarest(found),
                f"{PAPER[name]:.2f}" if start == "scratch" and name in PAPER else "-",
                f"{np.mean([r['metrics']['seconds_asking'] for r in found]):.1f}",
            ]
        )
    if not rows:
        return ["missing"]
    head = (
        "labels",
        *(f"{count:,}" for count in labels),
        "last minus random",
        "macro-F1",
        "rarest class: labels, recall",
        "paper",
        "seconds asking",
    )
    return table(head, rows)


def _rarest(found: Sequence[Record]) -> str:
    """Labels asked for of the class with fewest, and its recall, after the last round."""
    last = [record["metrics"]["rounds"][-1] for record in found]
    names = last[0]["class_counts"]
    counts = {name: np.mean([made["class_counts"][name] for made in last]) for name in names}
    rarest = min(counts, key=lambda name: counts[name])
    recall = np.mean([made["recall"][rarest] for made in last])
    return f"{rarest} {counts[rarest]:.0f}, {100 * recall:.0f}"


def _lift(records: Records) -> str:
    value = active.difference(records, (BASELINE, "pretrained"), (BASELINE, "scratch"), 0)
    if value is None:
        return "Pre-training: missing."
    return f"Pre-training changes the first round by {_gap(value)} points."


def _mean(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.2f}"


def _gap(value: Interval | None) -> str:
    if value is None:
        return "missing"
    return f"{100 * value.value:+.2f} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


def _scale(records: Records) -> list[str]:
    rows = [
        [
            name,
            f"{record['metrics']['candidates'] or record['metrics']['faces']:,}",
            f"{record['metrics']['seconds']:.1f}",
            f"{record['metrics']['extra_mb']:,.0f}",
            f"{record['metrics']['columns_mb']:,.0f}",
        ]
        for name, record in records.items()
    ]
    head = ("function", "candidates", "seconds", "extra MB", "MB of the columns")
    return [*table(head, rows), ""] if rows else ["missing", ""]
