"""The part of RESULTS.md that shows what a search of the operating point finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.active import unpack
from pipeline.metrics import paired_difference
from tests.bench import search
from tests.bench.harness import Record, Records
from tests.bench.markdown import section, spread, table

TITLES = {
    search.FOUND: "found by the search",
    "random": "found among as many points at random",
    "one cut": "best single cut of the confidence",
    "rules": "default rules, precision 0.9",
    "recipe": "the recipe's own: all faces",
    "labels alone": "labels alone, no pool face",
}


def lines() -> list[str]:
    """All of it."""
    return section(search.BENCH, "operating points, judged on the half no trial saw", _body)


def _body(records: Records) -> list[str]:
    found = list(records.values())
    if not found:
        return ["missing", ""]
    each = [record["metrics"] for record in found]
    rows = []
    for name, title in TITLES.items():
        points = [metrics["points_judged"][name] for metrics in each]
        kept = [point["utilization"] for point in points if "utilization" in point]
        pure = [point["purity"] for point in points if "purity" in point]
        rows.append(
            [
                title,
                spread([point["accuracy_in_search"] for point in points]),
                spread([point["accuracy"] for point in points]),
                f"{100 * np.mean([p['accuracy_in_search'] - p['accuracy'] for p in points]):+.2f}",
                f"{100 * np.mean([point['macro_f1'] for point in points]):.1f}",
                f"{100 * np.mean(pure):.1f}" if pure else "-",
                f"{100 * np.mean(kept):.1f}" if kept else "-",
                "-" if name == search.FOUND else gap(found, name),
            ]
        )
    head = (
        "point",
        "accuracy in the search",
        "accuracy after it",
        "winner's curse",
        "macro-F1",
        "purity",
        "utilization",
        "found minus this",
    )
    seconds = [search.seconds(metrics) for metrics in each]
    deviation = np.mean([metrics["spread"] for metrics in each])
    return [
        "A point is worth the accuracy of logistic heads on stored embeddings; a face is judged in "
        "the space of the one teacher that never saw it. After the search: on the other half, with "
        "a 95 % interval of the paired difference. A negative difference is a loss.",
        "",
        *table(head, rows),
        "",
        f"{each[0]['points']} points through Ray Tune took {np.mean(seconds):.0f} s "
        f"({min(seconds):.0f} to {max(seconds):.0f}; {found[0]['host']}), "
        f"{each[0]['drawn_faces']:,} of {each[0]['pool_faces']:,} pool faces drawn; accuracy of "
        f"the points spreads by {100 * deviation:.2f} points (sd), that of "
        f"{found[0]['n']:,} faces by {100 * _error(found):.2f} by chance. {verdict(found)}",
        "",
    ]


def gap(found: Sequence[Record], other: str) -> str:
    """Paired difference over the faces of all seeds, points with a 95 % interval."""
    value = _difference(found, other)
    return f"{100 * value.value:+.2f} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


def verdict(found: Sequence[Record]) -> str:
    """What the found point won and lost against, in words."""
    said = {"wins against": [], "loses against": [], "is not told apart from": []}
    for name in search.COMPARED:
        value = _difference(found, name)
        kind = "wins against" if value.low > 0 else "loses against" if value.high < 0 else ""
        said[kind or "is not told apart from"].append(TITLES[name])
    parts = [f"{kind} {'; '.join(names)}" for kind, names in said.items() if names]
    return f"The found point {', '.join(parts)}."


def _difference(found: Sequence[Record], other: str):
    right = {
        name: np.concatenate(
            [unpack(r["metrics"]["points_judged"][name]["correct"], r["n"]) for r in found]
        ).astype(np.float64)
        for name in (search.FOUND, other)
    }
    return paired_difference(right[search.FOUND], right[other], 2000, 0)


def _error(found: Sequence[Record]) -> float:
    accuracy = found[0]["metrics"]["points_judged"][search.FOUND]["accuracy"]
    return float(np.sqrt(accuracy * (1 - accuracy) / found[0]["n"]))
