"""The part of RESULTS.md that shows what a few images per class are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.active import unpack
from pipeline.metrics import paired_difference
from tests.bench import distill
from tests.bench.harness import Record, Records
from tests.bench.markdown import attempts, section, spread, table

MODELS = ("convnet hard", "convnet soft", "resnet soft")
UNTIMED = "(a)"
WITHOUT_EXPERTS = (
    "Without the training of the experts that the set follows: it was not timed when this was "
    "measured. It serves sets of any size."
)
TUNED = {
    "teacher": "teacher",
    "distilled": "teacher, tuned on the distilled set",
    "random hard": "teacher, tuned on as many random faces, hard labels",
    "random soft": "the same with the teacher's soft labels",
    "labels": "teacher, tuned for as many steps on the labels: equal time",
}


def lines() -> list[str]:
    """All of it."""
    return section(distill.BENCH, "a few images per class, judged on PublicTest", _body)


def _body(records: Records) -> list[str]:
    parts = [
        "Networks that saw nothing but the set: the ConvNet it was distilled for (width 32), with "
        "the class or the teacher's probabilities as targets, and a ResNet. Accuracy, then "
        "macro-F1.",
        "",
    ]
    for source, title in (("mined", "mined and labeled faces"), ("labeled", "labeled faces")):
        parts += [f"### From {title}", "", *_sets(records, source), ""]
    return [*parts, "### The teacher, tuned", "", *_tuned(records), "", *_developed()]


def _developed() -> list[str]:
    """The same tables of every attempt on the development set."""
    parts: list[str] = []
    for attempt, records in attempts(f"{distill.NAME}-dev").items():
        found = _sets(records, "mined")
        parts += [f"### On the development set: {attempt}", "", *found, ""]
    return parts


def _sets(records: Records, source: str) -> list[str]:
    rows = []
    for ipc in (1, 10, 50):
        for method in (*distill.CHOSEN, *distill.LEARNED):
            found = _of(records, source, method, ipc)
            if not found:
                continue
            figures = [
                f"{spread([r['metrics']['models'][m]['accuracy'] for r in found])} / "
                f"{100 * np.mean([r['metrics']['models'][m]['macro_f1'] for r in found]):.1f}"
                for m in MODELS
            ]
            training = np.mean([r["metrics"]["models"][MODELS[1]]["seconds"] for r in found])
            rows.append([str(ipc), method, *figures, _seconds(found), f"{training:,.0f}"])
    if not rows:
        return ["missing"]
    head = ("ipc", "method", *MODELS, "s distilling", "s training")
    untimed = any(UNTIMED in cell for row in rows for cell in row)
    return [*table(head, rows), *(["", f"{UNTIMED} {WITHOUT_EXPERTS}"] if untimed else [])]


def _seconds(records: Sequence[Record]) -> str:
    """What distilling took; experts, which serve all sets of a run, beside it."""
    metrics = [record["metrics"] for record in records]
    said = f"{np.mean([m['seconds_distilling'] for m in metrics]):,.0f}"
    if records[0]["method"] not in distill.FOLLOWING:
        return said
    if any("experts_seconds" not in m for m in metrics):
        return f"{said} {UNTIMED}"
    return f"{said} + experts {np.mean([m['experts_seconds'] for m in metrics]):,.0f}"


def _tuned(records: Records) -> list[str]:
    found = _of(records, "mined", "tune", 10)
    if not found:
        return ["missing"]
    rows = []
    for name, title in TUNED.items():
        models = [record["metrics"]["models"][name] for record in found]
        rows.append(
            [
                title,
                spread([model["accuracy"] for model in models]),
                f"{100 * np.mean([model['macro_f1'] for model in models]):.1f}",
                _over(found, name, "teacher"),
                f"{np.mean([model['passes'] for model in models]):,.0f}",
                f"{np.mean([model['seconds'] for model in models]):,.0f}",
            ]
        )
    head = ("model", "accuracy", "macro-F1", "minus the teacher", "image passes", "seconds")
    return table(head, rows)


def _over(records: Sequence[Record], model: str, other: str) -> str:
    """Paired difference of two models, averaged over seeds, points with a 95 % interval."""
    if model == other:
        return "-"
    right = {
        name: np.mean(
            [unpack(r["metrics"]["models"][name]["correct"], r["n"]) for r in records], axis=0
        )
        for name in (model, other)
    }
    gap = paired_difference(right[model], right[other], 2000, 0)
    return f"{100 * gap.value:+.2f} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"


def _of(records: Records, source: str, method: str, ipc: int) -> list[Record]:
    names = [f"{source}-{method}-ipc{ipc}-s{seed}" for seed in distill.SEEDS]
    return [records[name] for name in names if name in records]
