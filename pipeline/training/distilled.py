"""A distilled set on storage: images, soft labels, where they come from, how to train on them.

The folder is complete in itself: `images.safetensors` (images uint8, soft labels, class codes),
`labels.json`, `grid.png` with a row per class, `provenance.parquet`, `STATEMENT.md`, and
`train.py`, which trains a classifier from the folder with torch and safetensors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load, save

from pipeline.errors import SourceError
from pipeline.schema import label_codes
from pipeline.storage import Location
from pipeline.tables import write_table
from pipeline.training.distill import Distilled

IMAGES = "images.safetensors"
LABELS = "labels.json"
GRID = "grid.png"
PROVENANCE = "provenance.parquet"
STATEMENT = "STATEMENT.md"
SCRIPT = "train.py"


def save_distilled(
    at: Location,
    distilled: Distilled,
    provenance: pa.Table | None = None,
    facts: dict[str, Any] | None = None,
) -> str:
    """Write the folder; the labels last, which complete it.

    Args:
        at: the folder.
        distilled: the set.
        provenance: of :func:`provenance`.
        facts: for the statement: method, faces, teacher, ...

    Returns:
        hex sha256 of `images.safetensors`.
    """
    tensors = {"images": distilled.images, "soft": distilled.soft, "labels": distilled.labels}
    data = save(tensors)
    (at / IMAGES).write_bytes(data)
    (at / GRID).write_bytes(grid(distilled.images, len(distilled.label_names)))
    if provenance is not None:
        write_table(at / PROVENANCE, provenance)
    (at / STATEMENT).write_bytes(statement(distilled, facts or {}).encode())
    (at / SCRIPT).write_bytes((Path(__file__).parent / "from_distilled.py").read_bytes())
    names = [distilled.label_names[code] for code in distilled.labels]
    known = {"label_names": list(distilled.label_names), "labels": names, "rate": distilled.rate}
    (at / LABELS).write_json(known)
    return hashlib.sha256(data).hexdigest()


def load_distilled(at: Location) -> Distilled:
    """Inverse of :func:`save_distilled`, without origin, history, passes and seconds.

    Raises:
        SourceError: no distilled set, or images and labels of different numbers.
    """
    facts: dict[str, Any] = (at / LABELS).read_json()
    tensors = load((at / IMAGES).read_bytes())
    names, labels = tuple(facts["label_names"]), facts["labels"]
    if len(tensors["images"]) != len(labels):
        count = len(tensors["images"])
        raise SourceError(f"{at}: {count} images in {IMAGES}, {len(labels)} in {LABELS}")
    codes, nowhere = label_codes(labels, names), np.full(len(labels), -1)
    return Distilled(
        tensors["images"], codes, tensors["soft"], names, nowhere, [], 0.0, 0.0, facts["rate"]
    )


def provenance(
    distilled: Distilled,
    ids: Sequence[str],
    sources: Sequence[str],
    embeddings: np.ndarray,
    own: np.ndarray,
) -> pa.Table:
    """Which real faces a set comes from and which it looks like.

    Args:
        distilled: the set (n images).
        ids: of the real faces (N,), in the order that `origin` counts.
        sources: of the real faces (N,): `labeled`, or the pool source.
        embeddings: theirs (N, D), unit length.
        own: the images' (n, D).

    Returns:
        label, origin (id of the face an image is or started as), origin_source, nearest (id of the
        most similar real face), nearest_source, similarity (cosine of the teacher's embeddings).
    """
    nearest, similarity = np.empty(len(own), np.int64), np.empty(len(own), np.float32)
    for start in range(0, len(own), 64):  # never all pairs at once
        cosines = own[start : start + 64] @ embeddings.T
        nearest[start : start + 64] = cosines.argmax(1)
        similarity[start : start + 64] = cosines.max(1)
    taken = [distilled.label_names[code] for code in distilled.labels]
    return pa.table(
        {
            "label": taken,
            "origin": [ids[i] for i in distilled.origin.tolist()],
            "origin_source": [sources[i] for i in distilled.origin.tolist()],
            "nearest": [ids[i] for i in nearest.tolist()],
            "nearest_source": [sources[i] for i in nearest.tolist()],
            "similarity": similarity,
        }
    )


def statement(distilled: Distilled, facts: dict[str, Any]) -> str:
    """What the set is, from what, and what it must not be used for."""
    count, classes = len(distilled.images), len(distilled.label_names)
    side = distilled.images.shape[-1]
    lines = [
        "# Data statement",
        "",
        f"{count} images of {side} px, {count // classes} for each of {classes} perceived "
        f"expressions: {', '.join(distilled.label_names)}.",
        "",
        *(f"- {name.replace('_', ' ')}: {_said(value)}" for name, value in facts.items()),
        "",
        "Learned images started as real faces and may still resemble them or others; chosen ones",
        "are real faces. Either way the set is personal data of the people in it:",
        f"`{PROVENANCE}` names the face each image started as and the one it is most similar to,",
        "so that a removal request can be honored. Distilling does not make faces anonymous.",
        "",
        "The licenses of the faces it was made from apply. Labels are perceived expressions, not",
        "what a person felt; do not use the set to infer emotions at work or in education (EU",
        "Artificial Intelligence Act, article 5).",
        "",
        f"`{SCRIPT}` trains a classifier from this folder.",
        "",
    ]
    return "\n".join(lines)


def _said(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def grid(images: np.ndarray, rows: int) -> bytes:
    """PNG of images (N, C, S, S) uint8 in so many rows."""
    from torchvision.io import encode_png
    from torchvision.utils import make_grid

    per_row = max(1, len(images) // rows)
    picture = make_grid(torch.from_numpy(images), nrow=per_row, padding=2)
    data: bytes = encode_png(picture).numpy().tobytes()
    return data
