"""Facts of a run that never was, for the report's tests and for looking at the page."""

from __future__ import annotations

import numpy as np

from pipeline.metrics import Interval
from pipeline.report.facts import (
    Bin,
    Calibration,
    Copies,
    Course,
    Explorer,
    Face,
    Gain,
    Gallery,
    Level,
    ModelRow,
    Noise,
    ReportFacts,
    Subgroup,
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
                Face(
                    f"pool/shard-0{i}.parquet#{17 * j}",
                    0.98 - j / 100,
                    picture(i * 50 + j),
                    f"near {name} 0.{90 - j}",
                )
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


def level(threshold: float) -> Level:
    """What a threshold keeps of 20,000 faces, half of them of the first class."""
    share = (1 - threshold) ** 0.5
    kept, right = int(20_000 * share), 0.6 + 0.39 * threshold
    rest = [(kept // 2 // (i + 2), right - 0.05 * i) for i in range(1, len(NAMES))]
    return Level(
        threshold,
        kept,
        share,
        0.7 + 0.29 * threshold if kept else None,
        kept // 3,
        right if kept else None,
        int(3000 * share),
        (
            (kept - sum(n for n, _ in rest), right),
            *((n, right if n else None) for n, right in rest),
        ),
    )


def explorer(faces: int) -> Explorer:
    """All thresholds in hundredths, and faces evenly over the confidence."""
    return Explorer(
        NAMES,
        tuple(level(i / 100) for i in range(101)),
        0.62,
        tuple(
            Face(f"pool/x.parquet#{i}", i / faces, picture(i, 16), NAMES[i % 7])
            for i in range(faces)
        ),
    )


def noise(faces: int) -> Noise:
    """A labeled set in which fear and surprise are mixed up."""
    counts = np.diag([400, 350, 200, 180, 60, 40, 150]) + 4
    counts[4, 3] = 30
    suspects = tuple(
        Face(f"labeled/a#{i}", 0.02 + i / 100, picture(i, 16), "labeled fear, seems surprise 0.93")
        for i in range(faces)
    )
    return Noise(NAMES, 2500, 0.71, counts, suspects)


def subgroups() -> tuple[Subgroup, ...]:
    """Two traits, one of a picture and one of people."""
    groups = {
        "brightness": (
            "lowest third, up to 93",
            "middle third, to 130",
            "highest third, above 130",
        ),
        "perceived_age": ("0-3", "20-39", "70+"),
    }
    return tuple(
        Subgroup(
            trait,
            group,
            1000 - 300 * i,
            Interval(0.73 - i / 50, 0.70 - i / 50, 0.76 - i / 50),
            Interval(0.75 - i / 50, 0.72 - i / 50, 0.78 - i / 50),
            Interval(0.02, 0.004, 0.036),
            0.03 + i / 5,
        )
        for trait, names in groups.items()
        for i, group in enumerate(names)
    )


def facts(**changes: object) -> ReportFacts:
    """Every section filled."""
    rng = np.random.default_rng(0)
    confusion = np.diag([300, 280, 150, 140, 60, 40, 110]) + rng.integers(0, 25, (7, 7))
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
        "models": tuple(
            ModelRow(*row, times, kl, 0.41)
            for row, times, kl in (
                (
                    ("teacher", 0.701, (0.685, 0.717), 0.556, 0.548, 0.061, 77_000, recall),
                    188,
                    0.61,
                ),
                (
                    ("control_a", 0.718, (0.702, 0.734), 0.571, 0.566, 0.048, 23_000, recall),
                    90,
                    0.6,
                ),
                (
                    ("control_b", 0.732, (0.716, 0.748), 0.586, 0.58, 0.07, 460_000, recall),
                    3700,
                    0.6,
                ),
                (
                    ("student", 0.749, (0.734, 0.764), 0.611, 0.606, 0.039, 460_000, better),
                    240,
                    0.5,
                ),
            )
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
            "control_a": 90.0,
            "control_b": 3700.0,
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
        "levels": tuple(level(t) for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
        "explorer": explorer(40),
        "noise": noise(6),
        "copies": Copies(
            2500,
            12,
            14,
            2,
            3,
            tuple(
                Face(f"labeled/b#{i}", None, picture(i // 2, 16), f"picture {i // 2}, labeled {n}")
                for i, n in enumerate(("fear", "surprise", "anger", "disgust"), 2)
            ),
            {"phash": {"test": 2}, "flip": {"test": 1}},
        ),
        "subgroups": subgroups(),
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
            {
                "trial": i,
                "confidence": 0.5 + i / 20,
                "purity": 0.9 + i / 200,
                "utilization": 0.6 - i / 30 - (0.1 if i == 3 else 0.0),
                "objective": 0.5 + i / 90,
                "pareto": i != 3,
            }
            for i in range(6)
        ),
        "confusion": {"control_b": confusion.T, "student": confusion},
        "reliability": {"control_b": bins, "student": bins},
        "calibration": Calibration(
            1.8,
            2500,
            bins,
            tuple(Bin(b.confidence, b.confidence**1.02, b.n) for b in bins),
            0.094,
            0.012,
        ),
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
