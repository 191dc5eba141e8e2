"""Checkpoints of a training run: one safetensors file each, the rest as JSON in its header.

What for: a killed run loses at most the steps since the last file, wherever it goes on: the folder
may lie on S3. A file appears complete or not at all; the newest two are kept. Cost: four times the
weights (the weights, their average, AdamW's two moments), written every few hundred steps, and once
more in memory meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, contiguous_format

from pipeline.storage import Location, location

Folder = str | os.PathLike[str]
"""Where checkpoints lie: a path, or s3://bucket/key."""

KEPT = 2
_NAME = "step-{:010d}.safetensors"


def save(
    folder: Folder, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the state after `step` steps and remove all but the newest two.

    Args:
        folder: made if missing.
        step: steps done.
        tensors: any device and memory layout.
        facts: JSON-able.
    """
    plain = {
        name: value.detach().cpu().clone(memory_format=contiguous_format)
        for name, value in tensors.items()
    }
    data = save_tensors(plain, metadata={"facts": json.dumps(dict(facts))})
    at = location(folder)
    (at / _NAME.format(step)).write_bytes(data)
    for old in _files(at)[:-KEPT]:
        old.remove_tree()


def latest(folder: Folder) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and facts of the newest checkpoint; None where there is none."""
    files = _files(location(folder))
    if not files:
        return None
    data = files[-1].read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load_tensors(data), json.loads(header["__metadata__"]["facts"])


def _files(folder: Location) -> list[Location]:
    """Checkpoints, oldest first; names sort by step."""
    return [at for at in folder.children() if at.name.startswith("step-")]
