"""Settings of the distillation bench: small enough for two cores, as in the literature, tiny."""

from __future__ import annotations

from typing import Any

CPU: dict[str, Any] = {
    "width": 32,
    "tune": {"steps": 100, "batch": 64, "lr": 3e-4},
    "evaluate": {"steps": 300, "batch": 64, "lr": 2e-3},
    "resnet": [16, 32, 64, 128],
    "distribution": {"steps": 300, "batch": 32},
    "gradient": {"steps": 100, "batch": 32, "inner": {"steps": 4, "outer": 10, "lr": 0.05}},
    "unrolled": {
        "steps": 80,
        "batch": 256,
        "learn_labels": True,
        "inner": {"steps": 10, "batch": 40, "lr": 0.05},
    },
    "window": {
        "steps": 80,
        "batch": 256,
        "learn_labels": True,
        "inner": {"steps": 30, "window": 8, "batch": 40, "lr": 0.05},
    },
    "trajectory": {
        "steps": 80,
        "learn_labels": True,
        "inner": {"steps": 8, "batch": 40, "lr": 0.05},
        "experts": {
            "count": 2,
            "epochs": 10,
            "epoch_steps": 40,
            "lr": 0.05,
            "ahead": 2,
            "latest": [2, 8],
        },
    },
}
"""Two cores, a whole grid in about two hours."""

LITERATURE: dict[str, Any] = {
    "width": 128,
    "tune": {"steps": 200, "batch": 64, "lr": 3e-4},
    "evaluate": {"steps": 10_000, "batch": 256, "lr": 1e-3},
    "resnet": [32, 64, 128, 256],
    "distribution": {"steps": 20_000, "batch": 256},
    "gradient": {"steps": 10_000, "batch": 256, "inner": {"steps": 50, "outer": 10, "lr": 0.01}},
    "unrolled": {
        "steps": 10_000,
        "batch": 1024,
        "learn_labels": True,
        "inner": {"steps": 30, "lr": 0.02},
    },
    "window": {
        "steps": 20_000,
        "batch": 1024,
        "learn_labels": True,
        "inner": {"steps": 200, "window": 60, "lr": 0.02},
    },
    "trajectory": {
        "steps": 5_000,
        "learn_labels": True,
        "inner": {"steps": 30, "batch": 256, "lr": 0.01},
        "experts": {"count": 100, "epochs": 50, "lr": 0.01, "ahead": 2, "latest": [2, 20]},
    },
}
"""Steps, batches and networks as the papers have them; hours on a GPU."""

TINY: dict[str, Any] = {
    "width": 8,
    "tune": {"steps": 4, "batch": 16},
    "evaluate": {"steps": 20, "batch": 16, "lr": 2e-3},
    "resnet": [8, 16],
    "distribution": {"steps": 3, "batch": 8},
    "gradient": {"steps": 3, "batch": 8, "inner": {"steps": 2, "outer": 2, "lr": 0.05}},
    "unrolled": {"steps": 2, "batch": 16, "inner": {"steps": 2, "lr": 0.05}},
    "window": {"steps": 2, "batch": 16, "inner": {"steps": 4, "window": 2, "lr": 0.05}},
    "trajectory": {
        "steps": 2,
        "inner": {"steps": 2, "lr": 0.05},
        "experts": {"count": 1, "epochs": 3, "epoch_steps": 2, "ahead": 1, "latest": [1, 2]},
    },
}
PROTOCOLS = {"cpu": CPU, "literature": LITERATURE, "tiny": TINY}
