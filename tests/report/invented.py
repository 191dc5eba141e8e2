"""Facts of a run that never was, for the report's tests and for looking at the page."""

from __future__ import annotations

import numpy as np

from pipeline.report.facts import (
    Bin,
    Course,
    Face,
    Gain,
    Gallery,
    Level,
    ModelRow,
    ReportFacts,
    Yield,
)
from pipeline.schema import EMOTIONS

NAMES = EMOTIONS[:7]


def picture(seed: int, side: int = 48) -> np.ndarray:
    """A disc with eyes and a mouth on a ramp, uint8 (side, side); no person."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    gray = 90 + 40 * x * rng.uniform(-1, 1)
    gray[(x / 0.7) ** 2 + (y / 0.85) ** 2 < 1] = rng.uniform(140, 220)
    for side_of in (-1, 1):
        gray[(x - 0.28 * side_of) ** 2 + (y + 0.2) ** 2 < 0.012] = 30
    curve = rng.uniform(-0.5, 0.5)
    gray[(abs(y - 0.4 - curve * (0.09 - x**2)) < 0.05) & (abs(x) < 0.35)] = 40
    return np.clip(gray + rng.normal(0, 4, gray.shape), 0, 255).astype(np.uint8)


def galleries(faces: int) -> tuple[Gallery, ...]:
    """Seven classes kept, three classes rejected for each of three reasons."""
    kept = [
        Gallery(
            name,
            "selected",
            1200 // (i + 1),
            tuple(
                Face(f"pool/shard-0{i}.parquet#{17 * j}", 0.98 - j / 100, picture(i * 50 + j))
                for j in range(faces)
            ),
        )
        for i, name in enumerate(NAMES)
    ]
    rejected = [
        Gallery(
            name,
            reason,
            310,
            tuple(
                Face(f"pool/shard-07.parquet#{j}", 0.4 + j / 100, picture(900 + j, 16))
                for j in range(faces)
            ),
        )
        for reason in ("below_confidence", "prototype_disagrees", "duplicate")
        for name in NAMES[:3]
    ]
    return (*kept, *rejected)


def facts(**changes: object) -> ReportFacts:
    """Every section filled."""
    rng = np.random.default_rng(0)
    confusion = np.diag([300, 280, 150, 140, 60, 40, 110]) + rng.integers(0, 25, (7, 7))
    levels = [
        Level(t, int(20000 * (1 - t) ** 0.5), (1 - t) ** 0.5, 0.7 + 0.29 * t)
        for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    ]
    bins = tuple(Bin(c, c**1.3, int(1000 * c**3)) for c in np.linspace(0.15, 0.95, 9).tolist())
    recall = {name: float(rng.uniform(0.3, 0.9)) for name in NAMES}
    better = {name: value + float(rng.uniform(-0.04, 0.1)) for name, value in recall.items()}
    grid = np.vstack([np.hstack([picture(100 * r + c) for c in range(10)]) for r in range(7)])
    values: dict[str, object] = {
        "recipe": "invented",
        "command": "omnifer run jobs/recipes/demo.yaml --set seed=3",
        "made": "2026-01-02 03:04 UTC",
        "version": "0.1.0",
        "run": "/data/runs/invented",
        "label_names": NAMES,
        "models": (
            ModelRow("teacher", 0.701, (0.685, 0.717), 0.556, 0.548, 0.061, 77_000, recall),
            ModelRow("control_a", 0.718, (0.702, 0.734), 0.571, 0.566, 0.048, 230_000, recall),
            ModelRow("control_b", 0.732, (0.716, 0.748), 0.586, 0.580, 0.070, 460_000, recall),
            ModelRow("student", 0.749, (0.734, 0.764), 0.611, 0.606, 0.039, 460_000, better),
        ),
        "gain": Gain(0.017, 0.006, 0.028, "control_b", 3199),
        "purity": 0.912,
        "purity_known": 5120,
        "utilization": 0.394,
        "pool": {"faces": 37972, "usable": 37210, "kept": 14946},
        "seconds": {
            "survey": 31.2,
            "guard": 4.4,
            "teach": 188.0,
            "embed": 42.0,
            "score": 6.1,
            "search": 21.0,
            "select": 1.3,
            "mine": 3.2,
            "distill": 66.0,
            "student": 240.0,
            "evaluate": 9.0,
        },
        "protocol": {
            "test": "FERPlus PublicTest, majority votes, n 3,199",
            "classes": ", ".join(NAMES),
            "metric": "accuracy, last step, no choice of epochs",
            "seeds": "0",
            "sampler": "class counts to the power -0.5",
            "crop": "none, 48 px gray",
            "pre-training data": "none",
        },
        "yields": tuple(
            Yield(name, p, k, t, u, k // 3)
            for name, p, k, t, u in zip(
                NAMES,
                (14000, 12100, 3000, 3900, 420, 130, 2100),
                (6208, 7282, 577, 1177, 60, 12, 217),
                (0.82, 0.9, 0.6, 0.74, 0.41, 0.33, 0.66),
                (0.9, 0.97, 0.71, 0.9, 0.66, 0.5, 0.81),
                strict=True,
            )
        ),
        "levels": tuple(levels),
        "operating_point": {"confidence": 0.62, "agree": True, "class_cap": None},
        "course": Course(
            tuple(range(50, 2001, 50)),
            tuple(0.2 + 0.5 * i / 40 for i in range(40)),
            {
                n: tuple(0.9 - 0.02 * k - 0.1 / (i + 1) for i in range(40))
                for k, n in enumerate(NAMES)
            },
            tuple(0.6 + 0.3 * i / 40 for i in range(40)),
            312,
        ),
        "trials": tuple(
            {"trial": i, "confidence": 0.5 + i / 20, "purity": 0.9 + i / 200, "value": 0.5 + i / 90}
            for i in range(6)
        ),
        "confusion": {"control_b": confusion.T, "student": confusion},
        "reliability": {"control_b": bins, "student": bins},
        "galleries": galleries(3),
        "reasons": {
            "selected": 14946,
            "below_confidence": 15000,
            "prototype_disagrees": 6000,
            "duplicate": 1100,
            "twin_of_test": 280,
            "quarantined": 646,
        },
        "guard": {"pixels": {"test": 280, "validation": 31}, "phash": {"test": 11}},
        "duplicates": 1100,
        "quarantine": {"truncated": 300, "not_an_image": 240, "blank": 106},
        "distilled_grid": grid,
        "distilled": {"ipc": 10, "steps": 2000, "method": "distribution matching"},
        "lineage": {"survey": "a" * 64, "teach": "0b" * 32},
    }
    return ReportFacts(**{**values, **changes})  # type: ignore[arg-type]
