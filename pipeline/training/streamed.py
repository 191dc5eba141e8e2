"""Faces for training straight from the pool: Ray Data reads and decodes them in every pass anew.

What for: a pool that no node can hold, not even encoded, can still be learned from. Every worker
has a share of the pool's chunks, of some hundred faces each, and runs a Ray Data pipeline of its
own over them: in an order of its own in each pass, the faces of a few chunks mixed. All of it
follows from seed, rank, number of workers and step, so a killed training starts reading again at
the mixture that holds its next face and goes on with the very batches it would have seen.
Cost: reading and decoding in each pass, in tasks beside the training; memory of two mixtures.
Departs from packed faces: mixed within a few chunks, not over the whole pool; more workers see
other batches; and a pass ends for each worker where its own share does.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embedding import Decoder
from pipeline.errors import ConfigError, RunError, SourceError, told
from pipeline.images import Color, Crop
from pipeline.models import ModelConfig
from pipeline.plan import Slice
from pipeline.sources.reader import PoolSource, fetch
from pipeline.streaming import MOST_TASKS, StreamConfig, data_context, stalled, start_ray
from pipeline.training.data import seed_of

CHUNK_FACES, CHUNK_BYTES = 1024, 32 * 2**20
"""A chunk ends at one of the two; bytes are those of the decoded faces."""
MIXED = 8
"""Chunks whose faces are mixed."""
READERS = 2
"""Tasks of a worker at a time, where the recipe does not say."""
_DECODED = 64
Piece = tuple[np.ndarray, np.ndarray]
"""Positions (N,) and pixels (N, C, S, S) uint8 of some faces."""
_MAKING = threading.Lock()  # Ray's current DataContext is one for all threads


@dataclass(frozen=True)
class Chunk:
    """Neighboring faces of a slice."""

    slice: Slice
    positions: np.ndarray
    """In the shard, int64, rising."""


@dataclass(frozen=True)
class Reading:
    """How faces are read; travels to the tasks."""

    sources: Mapping[str, PoolSource]
    views: Mapping[str, tuple[Crop, Color]]
    model: ModelConfig

    def __call__(self, chunk: Chunk) -> np.ndarray:
        """Faces (N, C, S, S) uint8.

        Raises:
            SourceError: the shard changed, or a face cannot be decoded.
        """
        crop, color = self.views[chunk.slice.source]
        table = fetch(chunk.slice, chunk.positions.tolist(), self.sources)
        decoder = Decoder(self.model.color, self.model.size, _DECODED, 1)
        parts: list[np.ndarray] = []
        reasons: list[str | None] = []
        for pixels, found in decoder.batches(table, crop, color):
            parts.append(pixels[: len(found)])
            reasons += found
        for name, reason in zip(table["id"].to_pylist(), reasons, strict=True):
            if reason is not None:
                raise SourceError(f"face {name}: {reason}; survey should have kept it out")
        return np.concatenate(parts)


def cut(kept: Iterable[tuple[Slice, pa.Array]], model: ModelConfig) -> list[Chunk]:
    """Cut the positions that are kept of each slice into chunks for a model."""
    most = max(1, min(CHUNK_FACES, CHUNK_BYTES // (model.channels * model.size**2)))
    chunks = []
    for slice, positions in kept:
        whole = np.asarray(positions, np.int64)
        chunks += [Chunk(slice, whole[i : i + most]) for i in range(0, len(whole), most)]
    return chunks


class StreamedFaces:
    """One worker's endless sequence of faces, cut into the batches of its steps."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        reading: Reading,
        *,
        steps: int,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        stream: StreamConfig,
    ) -> None:
        """Choose this worker's chunks; nothing is read yet.

        Args:
            chunks: of the whole pool, the same for all workers.
            reading: how they are read.
            steps: of the training; nothing is read beyond.
            batch: faces per step over all workers together.
            seed: of all orders.
            rank: of this worker.
            world: number of workers.
            stream: CPUs of a read task and how many run at a time for this worker.

        Raises:
            ConfigError: fewer chunks than workers, or a batch that cannot be shared evenly.
        """
        if len(chunks) < world:
            raise ConfigError(
                f"pretrain.read streamed: {len(chunks)} chunks of faces for {world} workers"
            )
        if batch % world:
            raise ConfigError(f"pretrain.batch: {batch} cannot be shared evenly by {world} workers")
        order = np.random.default_rng(seed_of(seed, "shares")).permutation(len(chunks))
        self._chunks, self._reading, self._stream = chunks, reading, stream
        self._firsts = np.cumsum([0, *(len(chunk.positions) for chunk in chunks)])
        self._own = order[rank::world]
        self._part, self._last = batch // world, steps * (batch // world)
        self._seed, self._rank = seed, rank
        self._step = 0
        self._flow = self._mixtures(0)
        self._held: Piece | None = None

    def __len__(self) -> int:
        """Faces of all workers together."""
        return int(self._firsts[-1])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of the faces at positions (B,), one after the other: for pictures."""
        faces = []
        for number in index:
            i = int(np.searchsorted(self._firsts, number, side="right")) - 1
            place = int(number - self._firsts[i])
            chunk = self._chunks[i]
            faces.append(self._reading(Chunk(chunk.slice, chunk.positions[place : place + 1])))
        return np.concatenate(faces)

    def part(self, step: int) -> Piece:
        """This worker's faces of a step: positions (B,) and pixels (B, C, S, S).

        Steps asked for in order are read ahead; any other starts reading anew.

        Raises:
            RunError: reading failed or does not move. Errors of this package keep their class.
        """
        if step != self._step:
            self.close()
            self._flow = self._mixtures(step * self._part)
        self._step = step + 1
        pieces, missing = [], self._part
        while missing:
            index, pixels = self._held or next(self._flow)
            pieces.append((index[:missing], pixels[:missing]))
            rest = (index[missing:], pixels[missing:])
            missing -= len(pieces[-1][0])
            self._held = rest if len(rest[0]) else None
        if len(pieces) == 1:
            return pieces[0]
        index, pixels = (np.concatenate(both) for both in zip(*pieces, strict=True))
        return index, pixels

    def close(self) -> None:
        """Stop reading."""
        self._flow.close()
        self._held, self._step = None, -1

    def _mixtures(self, first: int) -> Generator[Piece, None, None]:
        """The faces from number `first` of the sequence on."""
        visits = self._visits(first)
        while span := list(itertools.islice(visits, MOST_TASKS // MIXED)):
            coming = self._read([self._chunks[i] for _, _, own in span for i in own])
            for seed, skip, own in span:
                pixels = np.concatenate(list(itertools.islice(coming, len(own))))
                index = np.concatenate([np.arange(*self._firsts[i : i + 2]) for i in own])
                mixed = np.random.default_rng(seed).permutation(len(index))[skip:]
                yield index[mixed], pixels[mixed]

    def _visits(self, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Mixtures from that of face `first` to the last step's.

        Yields:
            seed of the mixture, how many of its faces come before `first`, and its chunks.
        """
        sizes = np.diff(self._firsts)
        past, skip = divmod(first, int(sizes[self._own].sum()))
        seen = first - skip
        for epoch in itertools.count(past):
            said = (self._seed, "chunks", self._rank, epoch)
            order = np.random.default_rng(seed_of(*said)).permutation(self._own)
            for start in range(0, len(order), MIXED):
                if seen >= self._last:
                    return
                own = order[start : start + MIXED]
                count = int(sizes[own].sum())
                if skip < count:
                    yield seed_of(*said, start), skip, own
                skip = max(0, skip - count)
                seen += count

    def _read(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        """The faces of chunks in the order given, read ahead by tasks, one for each.

        Ray Data gives up where nobody takes its faces, too: after a pause of the training for so
        long, what is left of the chunks is read anew.
        """
        import ray
        from ray.data import TaskPoolStrategy
        from ray.data.exceptions import ExecutionTimeoutError

        start_ray(self._stream)
        context = data_context(self._stream)
        context.execution_options.preserve_order = True
        channels, size = self._reading.model.channels, self._reading.model.size
        with _MAKING, ray.data.DataContext.current(context):
            at = ray.put((chunks, self._reading))
            found = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map_batches(
                _read_one,
                fn_args=(at,),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=self._stream.read_cpus,
                compute=TaskPoolStrategy(size=self._stream.readers or READERS),
            )
        given, asked = 0, time.monotonic()
        try:
            for row in found.iter_batches(batch_size=1, batch_format="pyarrow"):
                if row["number"][0].as_py() != given:
                    raise RunError("pretrain: Ray Data gave the chunks in another order")
                flat = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8)
                given += 1
                yield flat.reshape(-1, channels, size, size)
                asked = time.monotonic()
        except ExecutionTimeoutError as error:
            if time.monotonic() - asked > self._stream.no_progress_seconds / 2:
                raise stalled(self._stream, "pretrain: reading") from error
            yield from self._read(chunks[given:])
        except ray.exceptions.RayTaskError as error:
            raise told(error.cause, "pretrain: reading failed") from error
        except ray.exceptions.RayError as error:
            raise RunError(f"pretrain: reading failed: {type(error).__name__}") from error


def _read_one(batch: pa.Table, at: Any) -> pa.Table:
    """Body of a read task: the faces of one chunk in one cell."""
    import ray

    chunks, reading = ray.get(at) if isinstance(at, ray.ObjectRef) else at
    number = batch["id"][0].as_py()
    pixels = reading(chunks[number]).tobytes()
    return pa.table({"number": [number], "pixels": pa.array([pixels], pa.large_binary())})
