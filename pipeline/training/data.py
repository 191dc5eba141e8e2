"""What training draws its batches from: sets of faces with targets, streams, chances.

What for: a batch is a pure function of (seed, step, stream, rank), so a killed run continues with
the very batch it would have drawn, and two workers see together what one would see. Cost: one
thread draws and decodes the next step's faces while this step computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Geometry, View
from pipeline.errors import ConfigError
from pipeline.training.faces import Faces, Flow


@dataclass(frozen=True)
class LabeledFaces:
    """Faces whose label is known."""

    faces: Faces
    labels: np.ndarray
    """Class codes (N,) int64."""
    soft: np.ndarray | None = None
    """Target probabilities (N, K) that training uses instead of the codes."""
    groups: Sequence[str] | None = None
    """Opaque group of each face (N,), kept within one fold; None: every face alone."""
    boxes: np.ndarray | None = None
    """Where the face lies in each packed image, x0 y0 x1 y1 (N, 4) float32 in shares of its side;
    parts may lie outside [0, 1]. See :mod:`pipeline.boxes`. None: nobody asked."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> np.ndarray:
        """What training aims at: probabilities (N, K) float32 if there are any, else the codes."""
        return self.labels if self.soft is None else self.soft.astype(np.float32)


@dataclass(frozen=True)
class MinedFaces:
    """Faces whose label a teacher has guessed."""

    faces: Faces
    soft: np.ndarray
    """The teacher's calibrated probabilities (M, K)."""
    weight: np.ndarray
    """Weight that selection gave each face (M,), (0, 1]."""
    source: Sequence[str]
    """The recipe's name of the source of each face (M,)."""
    ids: Sequence[str] = ()
    """Of each face (M,), where somebody asks."""

    def __len__(self) -> int:
        return len(self.soft)


@dataclass(frozen=True)
class Stream:
    """Where the batches of one name come from, and how faces are drawn and seen."""

    name: str
    faces: Faces
    batch: int
    """Faces per step over all workers together."""
    views: Mapping[str, View]
    """One float tensor per face and view."""
    size: int
    """Side of the views, pixels."""
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Arrays (N, ...) by position in the store, handed over beside the faces."""
    rows: np.ndarray | None = None
    """Positions to draw from (M,); None for the whole store."""
    probabilities: np.ndarray | None = None
    """Of each row (M,): drawn with replacement. None: every row once per epoch."""
    shared: bool = True
    """Whether workers share a batch; else each gets all of it."""
    geometry: Mapping[str, Geometry] = field(default_factory=dict)
    """Of the views whose maps are handed over beside them; has to be that of the view."""

    def __post_init__(self) -> None:
        if self.count == 0:
            raise ConfigError(f"stream {self.name}: no faces to draw from")
        if self.probabilities is not None and len(self.probabilities) != self.count:
            given = len(self.probabilities)
            raise ConfigError(f"stream {self.name}: {given} probabilities, {self.count} faces")

    @property
    def count(self) -> int:
        """Faces that may be drawn."""
        return len(self.faces) if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step's faces of one stream."""

    index: np.ndarray
    """Positions in the store (B,)."""
    views: Mapping[str, Tensor]
    """float32 (B, C, S, S) in [0, 1], channels last, on the worker's device."""
    targets: Mapping[str, Tensor]
    """(B, ...) on the worker's device."""
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the views that the stream has a geometry of: (B, 2, 3), see `augment.geometry`."""

    def __len__(self) -> int:
        return len(self.index)


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) from numbers and names; the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Batches:
    """Draws the batches of a run, the faces of the next step ahead of time.

    Owns one thread; use it as a context manager.
    """

    def __init__(self, seed: int, rank: int, world: int, device: torch.device) -> None:
        self._seed, self._rank, self._world, self._device = seed, rank, world, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[str, tuple[Stream, int, Future[tuple[np.ndarray, np.ndarray]]]] = {}
        self._shuffles: dict[str, tuple[int, np.ndarray]] = {}
        self._edges: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def at(self, streams: Sequence[Stream], step: int, last: bool) -> dict[str, Batch]:
        """This worker's part of the batches of a step, by stream name.

        Args:
            streams: may be other objects in another step, with other targets or chances.
            step: number of the step, from 0.
            last: nothing follows, so nothing is drawn ahead.
        """
        waiting = [self._pixels(stream, step) for stream in streams]
        batches = {
            stream.name: self._batch(stream, step, *future.result())
            for stream, future in zip(streams, waiting, strict=True)
        }
        if not last:
            for stream in streams:
                future = self._thread.submit(self._read, stream, step + 1)
                self._ahead[stream.name] = (stream, step + 1, future)
        return batches

    def _pixels(self, stream: Stream, step: int) -> Future[tuple[np.ndarray, np.ndarray]]:
        known = self._ahead.pop(stream.name, None)
        if known is not None and known[0] is stream and known[1] == step:
            return known[2]
        return self._thread.submit(self._read, stream, step)

    def _read(self, stream: Stream, step: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(stream.faces, Flow):
            return stream.faces.part(step)
        index = self.draw(stream, step)
        if not stream.shared:
            return index, stream.faces.take(index)
        part = len(index) // self._world
        if part * self._world != len(index):
            raise ConfigError(
                f"stream {stream.name}: a batch of {len(index)} cannot be shared evenly by "
                f"{self._world} workers"
            )
        index = index[self._rank * part : (self._rank + 1) * part]
        return index, stream.faces.take(index)

    def _batch(self, stream: Stream, step: int, index: np.ndarray, pixels: np.ndarray) -> Batch:
        faces = _to(pixels, self._device)
        views, maps = {}, {}
        for name, view in stream.views.items():
            seed = seed_of(self._seed, step, stream.name, name, self._rank)
            generator = torch.Generator(self._device).manual_seed(seed)
            seen = view(faces, stream.size, generator)
            views[name] = seen.contiguous(memory_format=torch.channels_last)
            if name in stream.geometry:
                again = torch.Generator(self._device).manual_seed(seed)
                maps[name] = stream.geometry[name](len(index), again)
        targets = {
            name: _to(values[index], self._device) for name, values in stream.targets.items()
        }
        return Batch(index, views, targets, maps)

    def draw(self, stream: Stream, step: int) -> np.ndarray:
        """Positions (batch,) that a stream shows at a step, over all workers together.

        Without probabilities the stream is one shuffle of all rows after another.
        """
        if stream.probabilities is None:
            numbers = np.arange(step * stream.batch, (step + 1) * stream.batch)
            epochs, places = np.divmod(numbers, stream.count)
            chosen = np.empty(stream.batch, np.int64)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                chosen[here] = self._shuffle(stream, int(epoch))[places[here]]
        else:
            rng = np.random.default_rng(seed_of(self._seed, stream.name, step))
            edges = self._cumulated(stream.name, stream.probabilities)
            chosen = np.searchsorted(edges, rng.random(stream.batch) * edges[-1], side="right")
        return chosen if stream.rows is None else stream.rows[chosen]

    def _shuffle(self, stream: Stream, epoch: int) -> np.ndarray:
        known = self._shuffles.get(stream.name)
        if known is None or known[0] != epoch or len(known[1]) != stream.count:
            rng = np.random.default_rng(seed_of(self._seed, stream.name, "epoch", epoch))
            known = (epoch, rng.permutation(stream.count))
            self._shuffles[stream.name] = known
        return known[1]

    def _cumulated(self, name: str, probabilities: np.ndarray) -> np.ndarray:
        known = self._edges.get(name)
        if known is None or known[0] is not probabilities:
            known = (probabilities, np.cumsum(probabilities, dtype=np.float64))
            self._edges[name] = known
        return known[1]


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


# -- chances of being drawn -----------------------------------------------------------------------


def class_chances(labels: np.ndarray, power: float) -> np.ndarray:
    """Chances (N,), summing to 1, of faces with codes (N,): each proportional to n_c^-power.

    0 draws faces alike, 1 draws classes alike.
    """
    counts = np.bincount(labels)
    rates = counts[labels].astype(np.float64) ** -power
    return rates / rates.sum()


def mass_chances(soft: np.ndarray, power: float, cap: float) -> np.ndarray:
    """Chances (M,), summing to 1, of faces with probabilities (M, K) in place of a label.

    A face's rate is its probabilities' mean of (soft class mass)^-power, cut at `cap` times the
    mean rate, so that a few doubtful faces of a rare class are not shown over and over.
    """
    mass = np.maximum(soft.sum(0, dtype=np.float64), 1.0)
    rates = soft @ mass**-power
    rates = np.minimum(rates / rates.mean(), cap)
    return np.asarray(rates / rates.sum())


def cap_shares(
    chances: np.ndarray, source: Sequence[str], largest: Mapping[str, float]
) -> np.ndarray:
    """Lower the chances of sources that would be drawn too often, and raise all others alike.

    Args:
        chances: (M,), summing to 1.
        source: name of the source of each face (M,).
        largest: largest share of all draws, [0, 1], by source name; a source without faces has
            nothing to lower.

    Returns:
        Chances (M,), summing to 1.

    Raises:
        ConfigError: every source is capped and the shares do not add up to 1.
    """
    names = np.asarray(source)
    result = chances.astype(np.float64)
    held: list[str] = []
    while True:
        over = [s for s in largest if s not in held and result[names == s].sum() > largest[s]]
        if not over:
            return result
        held += over
        free = ~np.isin(names, held)
        if not free.any():
            shares = ", ".join(f"{s} {largest[s]}" for s in held)
            raise ConfigError(f"source_share: {shares} leave a gap, no other source can fill it")
        for name in held:
            result[names == name] *= largest[name] / result[names == name].sum()
        result[free] *= (1 - sum(largest[s] for s in held)) / result[free].sum()
