"""embed: decode the faces of a slice and run the teacher over them.

One actor owns one teacher, one device and its decode threads; while a micro-batch is computed the
next ones are decoded. Micro-batches never cross slices and the last one is padded to the fixed
shape, so under one compute profile the bytes of a slice depend on the slice alone. Cost per face:
one decode and, with flip, two forward passes per teacher member.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from pipeline.artifacts import Teacher, load_teacher, on_node
from pipeline.config import Actors, Config
from pipeline.errors import ModelError, RecordError, ResourceError
from pipeline.images import DECODER, Color, Crop, face
from pipeline.ledger import Ledger
from pipeline.plan import Slice
from pipeline.schema import OK, QUARANTINED, embeddings_schema
from pipeline.screening import MOST_ATTEMPTS, screen
from pipeline.storage import Location

_AHEAD = 2  # micro-batches decoded ahead of the one that is computed; bounds memory


class EmbedConfig(Config):
    """How a pass embeds. Everything that changes bits is part of the stage identity."""

    batch: int = Field(default=64, ge=1)  # faces per micro-batch
    dtype: Literal["fp32", "bf16"] = "fp32"
    flip: bool = True  # average with the mirror image; twice the forward passes
    compile: bool = False  # torch.compile: needs a C++ compiler, 15 to 30 s per actor to start
    threads: int = Field(default=1, ge=1)  # torch threads of one forward stream
    streams: int = Field(default=2, ge=1)  # slices that one actor works on at a time
    decode_threads: int = Field(default=1, ge=1)  # of one actor
    read_in: Literal["task", "actor"] = "actor"  # task: Ray moves the encoded faces to the actor
    pool: Actors = (1, 1)  # fewest and most actors
    num_cpus: float = Field(default=1.0, gt=0)  # of one actor
    num_gpus: float = Field(default=0.0, ge=0)


def profile(config: EmbedConfig) -> dict[str, Any]:
    """Compute profile: with these equal, equal slices give equal bytes. Part of the identity."""
    return {
        "device": "cuda" if config.num_gpus > 0 else "cpu",
        "dtype": config.dtype,
        "batch": config.batch,
        "flip": config.flip,
        "compile": config.compile,
        "threads": config.threads,
        "decoder": DECODER,
        "torch": torch.__version__,
    }


def resolve_device(num_gpus: float) -> torch.device:
    """The device that was asked for; never a silent fall back to the CPU.

    Raises:
        ResourceError: a GPU was asked for and none is visible to this process.
    """
    if num_gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            f"num_gpus={num_gpus:g} was asked for, but torch {torch.__version__} sees no GPU in "
            "this process; set it to 0 to run on the CPU"
        )
    return torch.device("cuda", 0)


class Decoder:
    """Turns read records into fixed-shape uint8 micro-batches with its own threads."""

    def __init__(self, color: Color, size: int, batch: int, threads: int) -> None:
        """For a model that sees `color` faces of `size` pixels."""
        self._color: Color = color
        self._size = size
        self._batch = batch
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(
        self, table: pa.Table, crop: Crop, color: Color
    ) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        """Micro-batches of a READ table in row order.

        Args:
            table: schema READ.
            crop: what the source cuts out of its images.
            color: how the source is read; a gray source is gray for a color model too.

        Yields:
            pixels (batch, C, size, size) uint8, zero where a face is bad or the last batch ends,
            and for each real row its reason (None: good).
        """
        images, boxes = table.column("image"), table.column("box")
        landmarks = table.column("landmarks")
        reasons = table.column("reason").to_pylist()

        def one(row: int) -> np.ndarray | str:
            data = images[row].as_py()
            if reasons[row] is not None or data is None:
                return reasons[row] or "unreadable"
            try:
                return self._face(data, crop, color, boxes[row].as_py(), landmarks[row].as_py())
            except RecordError as err:
                return err.reason

        waiting: deque[list[Future[np.ndarray | str]]] = deque()
        for start in range(0, table.num_rows, self._batch):
            rows = range(start, min(start + self._batch, table.num_rows))
            waiting.append([self._threads.submit(one, row) for row in rows])
            if len(waiting) > _AHEAD:
                yield self._collect(waiting.popleft())
        while waiting:
            yield self._collect(waiting.popleft())

    def _face(
        self,
        data: bytes,
        crop: Crop,
        color: Color,
        box: list[float] | None,
        landmarks: list[float] | None,
    ) -> np.ndarray:
        seen: Color = "gray" if "gray" in (color, self._color) else "rgb"
        return face(data, crop=crop, color=seen, size=self._size, box=box, landmarks=landmarks)

    def _collect(
        self, decoding: list[Future[np.ndarray | str]]
    ) -> tuple[np.ndarray, list[str | None]]:
        channels = 1 if self._color == "gray" else 3
        pixels = np.zeros((self._batch, channels, self._size, self._size), np.uint8)
        reasons: list[str | None] = []
        for i, future in enumerate(decoding):
            result = future.result()
            if isinstance(result, str):
                reasons.append(result)
            else:
                pixels[i] = result  # one gray channel fills all three
                reasons.append(None)
        return pixels, reasons


class Forward:
    """A teacher on its device, ready for uint8 micro-batches."""

    def __init__(self, teacher: Teacher, config: EmbedConfig) -> None:
        """Move the teacher; `config.threads` becomes this process's torch thread count."""
        torch.set_num_threads(config.threads)
        self.device = resolve_device(config.num_gpus)
        self._teacher = teacher.to(self.device)
        self._flip = config.flip
        self._bf16 = config.dtype == "bf16"
        if config.compile:
            self._teacher.compile()
            self._warm_up(config.batch)

    def __call__(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, S, S) uint8 -> unit embedding (B, D) and logits (B, M, K), on the device."""
        x = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            x = x.pin_memory()  # from pageable memory a copy waits
        x = x.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return self._teacher.represent(x, flip=self._flip)

    def _warm_up(self, batch: int) -> None:
        """Compile now, in one thread, for the one shape that there will be."""
        seen = self._teacher.members[0].config
        self(np.zeros((batch, seen.channels, seen.size, seen.size), np.uint8))


class Embedder:
    """READ table of a slice -> committed embeddings of that slice."""

    def __init__(
        self,
        teacher_at: Location,
        ledger_at: Location,
        crops: Mapping[str, tuple[Crop, Color]],
        config: EmbedConfig,
    ) -> None:
        """Load the teacher once; `crops` holds each source's crop and color by its name."""
        teacher = load_teacher(on_node(teacher_at))
        seen = teacher.members[0].config
        self._ledger = Ledger(ledger_at)
        self._crops = dict(crops)
        self._forward = Forward(teacher, config)
        self._decoder = Decoder(seen.color, seen.size, config.batch, config.decode_threads)
        self._schema = embeddings_schema(
            teacher.width, len(teacher.members), len(teacher.label_names)
        )

    def __call__(self, slice: Slice, table: pa.Table) -> pa.Table:
        """Commit the slice, unless it is, and return what is committed.

        Where another attempt was first, its table is returned and ours is dropped: scores are
        computed from stored float16 values only.

        Raises:
            ModelError: the teacher gives values that are not finite.
        """
        if self._ledger.find(slice.key) is not None:
            return self._ledger.read(slice.key)
        began = time.perf_counter()
        crop, color = self._crops[slice.source]
        if self._ledger.attempt(slice) > MOST_ATTEMPTS:
            table = screen(table)
        reasons: list[str | None] = []
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pixels, found in self._decoder.batches(table, crop, color):
            embedding, logits = self._forward(pixels)
            outputs.append((embedding[: len(found)], logits[: len(found)]))
            reasons.extend(found)
        result = self._table(table.column("id"), reasons, outputs)
        self._ledger.commit(
            slice,
            result,
            quarantined=sum(reason is not None for reason in reasons),
            seconds=time.perf_counter() - began,
        )
        return self._ledger.read(slice.key)

    def _table(
        self,
        ids: pa.ChunkedArray,
        reasons: list[str | None],
        outputs: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> pa.Table:
        good = np.array([reason is None for reason in reasons], dtype=bool)
        columns = []
        for part, name in enumerate(("embedding", "logits")):
            kind = self._schema.field(name).type
            rows = np.zeros((0, kind.list_size), np.float32)
            if outputs:
                rows = torch.cat([output[part] for output in outputs]).flatten(1).cpu().numpy()
                rows = rows[good]
            if not np.isfinite(rows).all():
                raise ModelError(f"the teacher's {name} of a good face is not finite")
            columns.append(spread(rows, good, kind))
        status = [QUARANTINED if reason else OK for reason in reasons]
        return pa.Table.from_arrays(
            [ids, pa.array(status), pa.array(reasons, pa.string()), *columns], schema=self._schema
        )


def spread(rows: np.ndarray, good: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column of `kind` with `rows` (G,) or (G, W) at the places of `good` (N,), else null."""
    if rows.ndim == 2:
        flat = pa.array(rows.ravel()).cast(kind.value_type)
        values = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    else:
        values = pa.array(rows)
    # A null index takes a null: bad faces keep their place and have no values.
    return values.cast(kind).take(pa.array(np.cumsum(good) - 1, mask=~good))
