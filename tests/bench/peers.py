"""What the pass is compared with: a bare loop, a naive Ray Data job, a PyTorch DataLoader.

    python -m tests.bench.peers bare|naive|loader FOLDER MODEL.json [--dtype bf16] [--streams N]

All read the same Parquet files and run the same network once per face. `bare` decodes and computes
as the pass does and does nothing else: no Ray, no scores, no commits; it is the ceiling. The other
two are what people write first: Pillow, float32. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.embedding import EmbedConfig, Forward
from pipeline.images import Crop, face
from tests.bench import passes

BATCH = 64


def groups(folder: str) -> Iterator[list[bytes]]:
    """The images of each row group."""
    for path in sorted(Path(folder).glob("*.parquet")):
        file = pq.ParquetFile(path)
        for i in range(file.num_row_groups):
            yield file.read_row_group(i, columns=["image"])["image"].to_pylist()


def bare(folder: str, model: dict[str, Any], dtype: str, streams: int, compiled: bool) -> float:
    """img/s of one process with `streams` threads that decode and compute a row group each."""
    cores = len(os.sched_getaffinity(0))
    config = EmbedConfig(
        batch=BATCH, dtype=dtype, flip=False, threads=max(1, cores // streams), compile=compiled
    )
    forward = Forward(passes.teacher(model), config)
    size = model["size"]
    todo: queue.Queue[list[bytes] | None] = queue.Queue(2 * streams)
    stamps: list[float] = []
    rows: list[int] = []

    def work() -> None:
        while (images := todo.get()) is not None:
            for start in range(0, len(images), BATCH):
                part = images[start : start + BATCH]
                pixels = np.zeros((BATCH, 3, size, size), np.uint8)
                for i, data in enumerate(part):
                    pixels[i] = face(data, crop=Crop(), color="rgb", size=size)
                forward(pixels)
                rows.append(len(part))
                stamps.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for images in groups(folder):
        todo.put(images)
    for _ in threads:
        todo.put(None)
    for thread in threads:
        thread.join()
    return passes.steady(stamps, rows)


class Naive:
    """What a first Ray Data job does with a batch."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._teacher = passes.teacher(model)
        self._size = model["size"]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = np.stack([pillow(data, self._size) for data in batch["image"]])
        embedding, logits = self._teacher.represent(torch.from_numpy(x), flip=False)
        return {
            "id": batch["id"],
            "embedding": embedding.numpy(),
            "logits": logits[:, 0].numpy(),
            "at": np.full(len(x), time.monotonic()),  # batches come out in bursts, not as made
        }


def pillow(data: bytes, size: int) -> np.ndarray:
    """float32 (3, size, size) in [0, 1]."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((size, size))
        return np.asarray(small, np.float32).transpose(2, 0, 1) / 255


def naive(folder: str, model: dict[str, Any]) -> float:
    """img/s of read_parquet, one actor, float32."""
    import ray.data

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=500_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.data.read_parquet(folder).map_batches(
        Naive,
        fn_constructor_args=(model,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    stamps, rows = [], []
    for batch in found.iter_batches(batch_size=None):
        for at, count in zip(*np.unique(batch["at"], return_counts=True), strict=True):
            stamps.append(float(at))
            rows.append(int(count))
    ray.shutdown()
    order = np.argsort(stamps)
    return passes.steady([stamps[i] for i in order], [rows[i] for i in order])


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """Encoded images in memory, decoded where they are asked for."""

    def __init__(self, folder: str, size: int) -> None:
        self._images, self._size = passes.pictures(folder), size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(pillow(self._images[index], self._size))


def loader(folder: str, model: dict[str, Any]) -> float:
    """img/s of a DataLoader with one worker per core, float32, all cores in the network."""
    cores = len(os.sched_getaffinity(0))
    known = passes.teacher(model)
    pictures = Pictures(folder, model["size"])
    batches = torch.utils.data.DataLoader(pictures, BATCH, num_workers=cores)
    stamps, rows = [], []
    for x in batches:
        known.represent(x, flip=False)
        stamps.append(time.monotonic())
        rows.append(len(x))
    return passes.steady(stamps, rows)


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=("bare", "naive", "loader"))
    parser.add_argument("folder")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    model = json.loads(given.model.read_text())
    if given.row == "bare":
        rate = bare(given.folder, model, given.dtype, given.streams, given.compile)
    else:
        rate = {"naive": naive, "loader": loader}[given.row](given.folder, model)
    print(json.dumps({"rate": rate}))


if __name__ == "__main__":
    sys.exit(main())
