"""Faces for training, packed once per node and read by index.

What for: a batch is a choice of positions, so a killed run continues with the very faces it would
have drawn. A store is one memory-mapped uint8 array while that takes at most a quarter of the
memory, else the encoded bytes in one file, decoded by threads whenever they are drawn; both give
the same pixels. Cost: an array takes 2.3 KB per gray 48 px face and microseconds to read it; packs
take what the files take, and about 0.1 to 0.5 ms of one core per face and draw.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.alignment import NUMBERS
from pipeline.errors import RecordError, SourceError
from pipeline.images import DECODER, Color, Crop, face
from pipeline.posix import cores

MEMORY_SHARE = 0.25  # of the machine's memory that an array store may take
META = "faces.json"
ARRAY = "faces.npy"
PACK = "faces.bin"
OFFSETS = "offsets.npy"
WHERE = "where.npy"
THREADS = min(cores(), 16)

Row = tuple[bytes, Sequence[float] | None, Sequence[float] | None]
"""Encoded bytes of a face, its box and its landmarks (schema.BOX, LANDMARKS), each or None."""


class Faces(Protocol):
    """Faces of one size, read by position."""

    def __len__(self) -> int: ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of the faces at positions (B,): uint8 (B, C, S, S)."""
        ...


@runtime_checkable
class Flow(Protocol):
    """Faces that come in an order of their own, a step's after the step's before."""

    def __len__(self) -> int: ...

    def part(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This worker's faces of a step: positions (B,) and pixels (B, C, S, S)."""
        ...


@dataclass(frozen=True)
class ArrayFaces:
    """Decoded faces in memory or in a memory-mapped file."""

    pixels: np.ndarray
    """uint8 (N, C, S, S)."""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of the faces at positions (B,): uint8 (B, C, S, S)."""
        # numpy, not torch: torch would start a second team of OpenMP threads in the thread that
        # draws ahead, and the two teams would wait for each other on busy cores.
        return np.ascontiguousarray(self.pixels[index])


@dataclass(frozen=True)
class ChosenFaces:
    """Some faces of a store."""

    store: Faces
    rows: np.ndarray
    """Their positions there (M,)."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Faces (B, C, S, S) uint8 at the positions (B,) among the chosen."""
        return self.store.take(self.rows[index])


@dataclass(frozen=True)
class GrayAsColor:
    """A gray store for a network that sees color: its channel stands for all three."""

    store: Faces

    def __len__(self) -> int:
        return len(self.store)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of the faces at positions (B,): uint8 (B, 3, S, S)."""
        return np.repeat(self.store.take(index), 3, axis=1)


class PackedFaces:
    """Encoded faces in one file, decoded by threads when taken."""

    def __init__(self, at: Path, crop: Crop, color: Color, size: int) -> None:
        self._crop, self._color, self._size = crop, color, size
        self._bytes = np.memmap(at / PACK, np.uint8, mode="r")
        self._offsets = np.load(at / OFFSETS, mmap_mode="r", allow_pickle=False)
        self._where = np.load(at / WHERE, mmap_mode="r", allow_pickle=False)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="faces")

    def __len__(self) -> int:
        return len(self._where)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of the faces at positions (B,): uint8 (B, C, S, S)."""
        return np.stack(list(self._threads.map(self._one, index.tolist())))

    def _one(self, position: int) -> np.ndarray:
        start, stop = self._offsets[position : position + 2]
        where = self._where[position]
        box, landmarks = (
            None if np.isnan(known[0]) else known.tolist() for known in (where[:4], where[4:])
        )
        row = (self._bytes[start:stop].tobytes(), box, landmarks)
        return _decode(row, position, self._crop, self._color, self._size)


def pack_faces(
    rows: Iterable[Row],
    count: int,
    *,
    crop: Crop,
    color: Color,
    size: int,
    at: Path,
    memory: int | None = None,
) -> Faces:
    """Store faces in a folder, or open the folder if it is there already.

    The name of the folder should hold a digest of which faces these are; what else decides over
    pixels (crop, color, size, decoder) is checked. The folder appears complete or not at all.

    Args:
        rows: the faces, in the order of their positions; not touched if the folder exists or
            another process of the node has just packed it.
        count: how many.
        crop: which part of the image is the face.
        color: gray or rgb.
        size: side, pixels.
        at: the folder, on a local disk.
        memory: largest array, bytes; None for a quarter of the machine's memory.

    Raises:
        SourceError: a face cannot be decoded, their number is not `count`, or the folder was packed
            with other settings.
    """
    made_of = {
        "count": count,
        "crop": crop.model_dump(mode="json"),
        "color": color,
        "size": size,
        "decoder": DECODER,
    }
    if not (at / META).exists():
        channels = 1 if color == "gray" else 3
        limit = int(MEMORY_SHARE * machine_memory()) if memory is None else memory
        shape = (count, channels, size, size)
        with _only_packer(at) as partial:
            if partial is not None:
                if count * channels * size * size <= limit:
                    _write_array(_decoded(rows, crop, color, size), shape, partial)
                else:
                    _write_pack(rows, count, partial)
                (partial / META).write_text(json.dumps(made_of), encoding="utf-8")
                _publish(partial, at)
    found = json.loads((at / META).read_text(encoding="utf-8"))
    for name, value in made_of.items():
        if found[name] != value:
            raise SourceError(f"{at}: packed with {name} {found[name]}, expected {value}")
    if (at / ARRAY).exists():
        return ArrayFaces(np.load(at / ARRAY, mmap_mode="r", allow_pickle=False))
    return PackedFaces(at, crop, color, size)


@contextmanager
def _only_packer(at: Path) -> Iterator[Path | None]:
    """A new folder to pack into, while others on the node wait; None: another one has packed."""
    at.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(at.parent, os.O_RDONLY)  # a lock on the folder itself leaves no file behind
    own = _unfinished(at)
    partial = at.with_name(f"{own}-{uuid.uuid4().hex[:8]}")
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if (at / META).exists():
            yield None
            return
        for left in at.parent.glob(f"{own}-????????"):  # of packers that were killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def _unfinished(at: Path) -> str:
    """How folders begin that this node packs into.

    A folder that nodes share may know a lock per node only, so a node sweeps nobody else's.
    """
    return f".{at.name}-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}"


def _decode(row: Row, position: int, crop: Crop, color: Color, size: int) -> np.ndarray:
    try:
        return face(row[0], crop=crop, color=color, size=size, box=row[1], landmarks=row[2])
    except RecordError as err:
        raise SourceError(
            f"training face {position}: {err}; survey should have kept it out"
        ) from err


def _decoded(rows: Iterable[Row], crop: Crop, color: Color, size: int) -> Iterator[np.ndarray]:
    """Decode in order on a few threads, never far ahead of who takes the faces."""
    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[Future[np.ndarray]] = deque()
        for position, row in enumerate(rows):
            waiting.append(threads.submit(_decode, row, position, crop, color, size))
            if len(waiting) >= 64 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_array(faces: Iterator[np.ndarray], shape: tuple[int, ...], at: Path) -> None:
    array = np.lib.format.open_memmap(at / ARRAY, mode="w+", dtype=np.uint8, shape=shape)
    seen = 0
    for pixels in faces:
        if seen < len(array):
            array[seen] = pixels
        seen += 1
    _check_count(seen, len(array))
    array.flush()


def _write_pack(rows: Iterable[Row], count: int, at: Path) -> None:
    new = np.lib.format.open_memmap
    offsets = new(at / OFFSETS, mode="w+", dtype=np.int64, shape=(count + 1,))
    where = new(at / WHERE, mode="w+", dtype=np.float32, shape=(count, 4 + NUMBERS))
    seen = 0
    with (at / PACK).open("wb") as file:
        for data, box, landmarks in rows:
            if seen < count:
                offsets[seen + 1] = offsets[seen] + file.write(data)
                where[seen, :4] = np.nan if box is None else box
                where[seen, 4:] = landmarks or np.nan
            seen += 1
    _check_count(seen, count)
    offsets.flush()
    where.flush()


def _check_count(seen: int, count: int) -> None:
    if seen != count:
        raise SourceError(f"training faces: {seen:,} were given, expected {count:,}")


def _publish(partial: Path, at: Path) -> None:
    """Rename a finished folder; another process that was faster has written the same."""
    try:
        partial.rename(at)
    except OSError:
        if not (at / META).exists():
            raise


def machine_memory() -> int:
    """Bytes of memory this process may count on: the machine's, or its control group's if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))
