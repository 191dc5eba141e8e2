"""Checkpoints of a training run: one safetensors file each, the rest as JSON in its header.

What for: a killed run loses at most the steps since the last file. A file appears complete or not
at all (temporary name, fsync, rename); the newest two are kept. Cost: four times the weights (the
weights, their average, AdamW's two moments), written every few hundred steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, contiguous_format

KEPT = 2
_NAME = "step-{:010d}.safetensors"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the state after `step` steps and remove all but the newest two.

    Args:
        folder: made if missing.
        step: steps done.
        tensors: any device and memory layout.
        facts: JSON-able.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: value.detach().cpu().clone(memory_format=contiguous_format)
        for name, value in tensors.items()
    }
    partial = folder / f".{os.getpid()}.partial"
    save_file(plain, partial, metadata={"facts": json.dumps(dict(facts))})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(folder / _NAME.format(step))
    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and facts of the newest checkpoint; None where there is none."""
    files = _files(folder)
    if not files:
        return None
    with safe_open(files[-1], "pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


def _files(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; names sort by step."""
    return sorted(folder.glob("step-*.safetensors"))
