"""Real faces of OMNIFER_DATA, for what is written in the formats of data sets and read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

DATA = "OMNIFER_DATA"
MISSING = f"{DATA} is not set, or lacks faces/ or fer2013/"


def missing() -> bool:
    """Whether the real faces are not at hand."""
    root = os.environ.get(DATA)
    return not (root and (Path(root) / "faces").is_dir() and (Path(root) / "fer2013").is_dir())


def lfw() -> Iterator[tuple[bytes, str]]:
    """JPEG and group of every face of the pool."""
    for file in sorted((Path(os.environ[DATA]) / "faces").glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(256, columns=["image", "group"]):
            yield from zip(batch["image"].to_pylist(), batch["group"].to_pylist(), strict=True)


@cache
def fer2013(usage: str, count: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The first `count` different faces of a usage: uint8 (N, 48, 48), and FER2013's codes."""
    file = Path(os.environ[DATA]) / "fer2013" / "fer2013.parquet"
    faces: dict[bytes, int] = {}
    for batch in pq.ParquetFile(file).iter_batches(1024, columns=["usage", "image", "emotion"]):
        for row in batch.to_pylist():
            if row["usage"] == usage and len(faces) < count:
                faces.setdefault(row["image"], row["emotion"])
    pixels = [np.asarray(Image.open(BytesIO(data)).convert("L")) for data in faces]
    return np.stack(pixels), tuple(faces.values())
