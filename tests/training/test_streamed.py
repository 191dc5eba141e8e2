"""Proves what a worker sees of a streamed pool: each face once a pass, and the same when killed."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.workers import in_threads
from PIL import Image
from torch import Tensor

from pipeline.errors import ConfigError, SourceError
from pipeline.images import Crop
from pipeline.models import ModelConfig
from pipeline.placement import StreamConfig
from pipeline.schema import EMOTIONS
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import plan_slices
from pipeline.storage import location
from pipeline.streaming import data_context
from pipeline.training import streamed
from pipeline.training.loop import Step, fit, local
from pipeline.training.pretraining import Contrastive, PretrainConfig
from pipeline.training.streamed import Chunk, Reading, StreamedFaces, cut
from pipeline.training.supervised import new_model

MODEL = ModelConfig(size=16)
FACES = 230
STREAM = StreamConfig(read_cpus=0.5)
NET = ModelConfig(name="convnet", args={"width": 8}, size=16, dropout=0.0)
WORKER = local(dtype=torch.float32)


def _image(number: int) -> bytes:
    """A face whose pixels say its number: two gray values, one per half."""
    pixels = np.empty((16, 16), np.uint8)
    pixels[:8], pixels[8:] = number % 200, number // 200
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _number(face: np.ndarray) -> int:
    return int(face[0, 0, 0]) + 200 * int(face[0, 15, 0])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Chunk], Reading]:
    """230 faces in slices of 50, cut into chunks of at most 20; every tenth is left out."""
    root = tmp_path_factory.mktemp("pool")
    table = pa.table({"image": [_image(i) for i in range(FACES)]})
    pq.write_table(table, root / "faces.parquet", row_group_size=50)
    sources = {"pool": ParquetPool(path=str(root), color="gray")}
    slices = list(plan_slices(sources, 50, location(root / "index")))
    kept = [
        (slice, pa.array([p for p in range(slice.start, slice.stop) if p % 10])) for slice in slices
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "CHUNK_FACES", 20)
        chunks = cut(kept, MODEL)
    return chunks, Reading(sources, {"pool": (Crop(), "gray")}, MODEL)


def _streamed(
    pool: tuple[list[Chunk], Reading],
    *,
    rank: int = 0,
    world: int = 1,
    steps: int = 40,
    stream: StreamConfig = STREAM,
) -> StreamedFaces:
    chunks, reading = pool
    return StreamedFaces(
        chunks, reading, steps=steps, batch=24, seed=3, rank=rank, world=world, stream=stream
    )


def _seen(faces: StreamedFaces, steps: range) -> np.ndarray:
    """The numbers in the pixels, which must be those of the positions."""
    found = []
    kept = [i for i in range(FACES) if i % 10]
    for step in steps:
        index, pixels = faces.part(step)
        numbers = [_number(face) for face in pixels]
        assert numbers == [kept[i] for i in index]
        found.append(numbers)
    faces.close()
    return np.array(found)


def test_cut__by_faces_and_by_bytes(pool: tuple[list[Chunk], Reading]) -> None:
    chunks, _ = pool
    assert [len(chunk.positions) for chunk in chunks] == [20, 20, 5] * 4 + [20, 7]
    assert sum(len(chunk.positions) for chunk in chunks) == FACES - FACES // 10
    large = ModelConfig(size=2048, color="rgb")
    whole = [(chunks[0].slice, pa.array(range(10)))]
    assert [len(chunk.positions) for chunk in cut(whole, large)] == [2] * 5


def test_part__every_face_once_a_pass_and_mixed(
    pool: tuple[list[Chunk], Reading], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "MOST_TASKS", 16)  # two mixtures at a time, so three pipelines
    faces = _streamed(pool)
    assert len(faces) == 207
    seen = _seen(faces, range(20)).ravel()
    first, second = seen[:207], seen[207:414]
    assert len(set(first)) == len(set(second)) == 207
    assert (first != second).mean() > 0.9
    assert len(np.unique(first[:24] // 50)) > 1  # a batch is not of one slice


def test_part__goes_on_with_the_very_batches(
    pool: tuple[list[Chunk], Reading], local_ray: None
) -> None:
    whole = _seen(_streamed(pool, steps=12), range(12))
    for start in (3, 10):  # in the first pass and in the second
        faces = _streamed(pool, steps=12)
        assert np.array_equal(_seen(faces, range(start, 12)), whole[start:])
    assert np.array_equal(_seen(faces, range(5, 7)), whole[5:7])  # another step than the next


def test_part__a_training_that_pauses_sees_the_same_batches(
    pool: tuple[list[Chunk], Reading], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import ExecutionResources

    def narrow(config: StreamConfig) -> Any:
        context = data_context(config)  # a store that one chunk fills
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=1)
        return context

    read, reading = StreamedFaces._read, []

    def noted(self: StreamedFaces, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        reading.append(len(chunks))
        return read(self, chunks)

    monkeypatch.setattr(streamed, "MIXED", 2)
    whole = _seen(_streamed(pool, steps=8), range(8))
    monkeypatch.setattr(streamed, "data_context", narrow)
    monkeypatch.setattr(StreamedFaces, "_read", noted)
    faces = _streamed(pool, steps=8, stream=StreamConfig(read_cpus=0.5, no_progress_seconds=3))
    found = []
    for step in range(8):
        found.append([_number(face) for face in faces.part(step)[1]])
        if step == 0:
            time.sleep(8)
    faces.close()
    assert np.array_equal(found, whole)
    assert len(reading) == 2  # what was left was read anew
    assert 0 < reading[1] < reading[0]


def test_part__two_workers_share_a_pass(pool: tuple[list[Chunk], Reading], local_ray: None) -> None:
    both = [_streamed(pool, rank=rank, world=2) for rank in range(2)]
    own = [sum(len(pool[0][i].positions) for i in faces._own) for faces in both]
    assert sum(own) == 207
    halves = [
        _seen(faces, range(-(-count // 12))).ravel()[:count]
        for faces, count in zip(both, own, strict=True)
    ]
    assert sorted(np.concatenate(halves)) == [i for i in range(FACES) if i % 10]


class Killed(Exception):
    """In the middle of a pass."""


@pytest.mark.parametrize("world", [1, 2])
def test_fit__killed_in_mid_pass_and_continued_is_the_same(
    pool: tuple[list[Chunk], Reading], world: int, tmp_path: Path, local_ray: None
) -> None:
    """Nine steps of 24 are a pass of 207 faces; killed after the eleventh, resumed at the tenth."""
    steps = 12
    config = PretrainConfig(
        model=NET, steps=steps, batch=24, augment="plain", read="streamed", probe_every=None
    )

    def trained(at: Path, killed: int | None) -> list[dict[str, Tensor] | None]:
        found: list[dict[str, Tensor] | None] = [None] * world
        flows = [_streamed(pool, rank=rank, world=world, steps=steps) for rank in range(world)]
        made: list[Contrastive] = []
        for faces in flows:
            torch.manual_seed(0)
            made.append(Contrastive(new_model(NET, EMOTIONS, 0), config, faces))

        def hook(_: object, at: Step) -> None:
            if at.number + 1 == killed:
                raise Killed

        def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
            worker = replace(WORKER, checkpoint=str(at), checkpoint_every=5, rank=rank, world=world)
            if world > 1:
                worker = replace(worker, sum_over_workers=reduce)
            with contextlib.suppress(Killed):
                fitted = fit(made[rank], config, worker, seed=3, hooks=[hook])
                found[rank] = fitted.averaged.state_dict()
            flows[rank].close()

        in_threads(world, run)
        return found

    whole = trained(tmp_path / "whole", None)
    assert trained(tmp_path / "killed", 11) == [None] * world
    again = trained(tmp_path / "killed", None)
    for expected, found in zip(whole, again, strict=True):
        assert expected is not None
        assert found is not None
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_take__any_face(pool: tuple[list[Chunk], Reading]) -> None:
    found = _streamed(pool).take(np.array([0, 18, 206, 44]))
    kept = [i for i in range(FACES) if i % 10]
    assert [_number(face) for face in found] == [kept[0], kept[18], kept[206], kept[44]]


def test_part__a_broken_face_is_named(
    pool: tuple[list[Chunk], Reading], tmp_path: Path, local_ray: None
) -> None:
    pq.write_table(pa.table({"image": [_image(1), b"no picture"]}), tmp_path / "faces.parquet")
    sources = {"pool": ParquetPool(path=str(tmp_path), color="gray")}
    (slice,) = plan_slices(sources, 50, location(tmp_path / "index"))
    reading = Reading(sources, {"pool": (Crop(), "gray")}, MODEL)
    faces = _streamed((cut([(slice, pa.array([0, 1]))], MODEL), reading))
    with pytest.raises(SourceError, match=r"face pool/.*: not_an_image; survey should have"):
        faces.part(0)


def test_streamed__what_cannot_be_shared_is_refused(pool: tuple[list[Chunk], Reading]) -> None:
    with pytest.raises(ConfigError, match="14 chunks of faces for 24 workers"):
        _streamed(pool, world=24)
    with pytest.raises(ConfigError, match="24 cannot be shared evenly by 5 workers"):
        _streamed(pool, world=5)
