"""The part of RESULTS.md about learning from votes that disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.bench import weak
from tests.bench.harness import Record, Records
from tests.bench.markdown import attempts, section, spread, table
from tests.bench.weak_cells import ROWS

TITLES = {
    "ce": "cross entropy, most voted class",
    "smoothing": "the same with label smoothing",
    "votes": "cross entropy, shares of the votes",
    "proden": "candidates, PRODEN",
    "pico": "candidates, PiCO",
    "decoder": "candidates, decoder of labels",
    "mae": "reconstruction, then cross entropy (transformer)",
    "mae_decoder": "reconstruction, then decoder of labels (transformer)",
}
FACES = {"majority": "faces with a majority", "voted": "every voted face"}
PERCENT = ("accuracy", "macro_f1", "top2", "accuracy_agreed", "accuracy_disputed", "ece")
NATS = ("kl", "js", "brier")
HEADS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "top2": "top-2",
    "accuracy_agreed": "agreed",
    "accuracy_disputed": "disputed",
    "ece": "ECE",
    "kl": "KL",
    "js": "JS",
    "brier": "Brier",
}
MARKS = {weak.BETTER: " +", weak.WORSE: " -", weak.UNDECIDED: " ~", None: ""}


def lines() -> list[str]:
    """All of it."""
    return section(weak.BENCH, "votes that disagree, judged on PublicTest", _body)


def _body(records: Records) -> list[str]:
    parts = [
        f"{weak.PASSES:,} image passes for every row, reconstruction included. Judged on every "
        "voted face against the shares of its votes; agreed: the first class has four fifths of "
        "them. `+`: better than cross entropy on majority labels in all three seeds, of the same "
        "network; `-`: worse in all three; `~`: now this, now that; no mark: the baseline, or "
        "cells are missing. KL and JS in nats; percent elsewhere, but for Brier. The decoder's "
        "own answer stands below the head's that it taught.",
        "",
    ]
    for faces, title in FACES.items():
        parts += [f"### Learned from {title}", "", *_rows(records, faces, verdicts=True), ""]
    for attempt, found in attempts(f"{weak.NAME}-dev").items():
        for faces, title in FACES.items():
            if any(f"-{faces}-" in cell for cell in found):
                parts += [f"### On the development set: {attempt}, {title}", ""]
                parts += [*_rows(found, faces, verdicts=False), ""]
    return parts


def _rows(records: Records, faces: str, *, verdicts: bool) -> list[str]:
    rows = []
    for name in ROWS:
        there = [f"{name}-{faces}-s{seed}" for seed in weak.SEEDS]
        found = [records[cell] for cell in there if cell in records]
        if not found:
            continue
        cells = [TITLES[name]]
        for key in HEADS:
            judged = weak.verdict(records, name, faces, key) if verdicts else None
            cells.append(_value(found, key) + MARKS[judged])
        rows.append([*cells, str(len(found))])
        if all("decoder" in record["metrics"] for record in found):
            own = [{"metrics": record["metrics"]["decoder"]} for record in found]
            rows.append(["its decoder's own answer", *(_value(own, key) for key in HEADS), ""])
    return table(("row", *HEADS.values(), "n"), rows) if rows else ["missing"]


def _value(records: Sequence[Record], key: str) -> str:
    values = [weak.figure(record, key) for record in records]
    if key == "accuracy":
        return spread(values)
    return f"{100 * np.mean(values):.1f}" if key in PERCENT else f"{np.mean(values):.3f}"
