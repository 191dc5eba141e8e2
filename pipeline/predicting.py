"""predict: probabilities by class name for every image of a folder, a container or a pattern.

What is at a path is told as `inspect` tells it; labels beside the pictures are not looked at. No
Ray: one process, decode threads beside the forward pass. Memory is flat: a few hundred faces at a
time, however many there are; results are written as they come. A bad image is a row with its
reason. Faces are cropped as where the model learned, as far as a picture without box and landmarks
can be, and stretched to a square; `crop` says otherwise, and `detect` finds all faces of photos
first: rows are then faces, photo#0 to the left of photo#1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv
from pydantic import TypeAdapter

from pipeline.artifacts import CROP, Teacher, load_any, on_node, read_meta
from pipeline.config import parse
from pipeline.detection import DetectConfig, YuNet, find_faces
from pipeline.embedding import Decoder, EmbedConfig, Forward, spread
from pipeline.errors import ConfigError
from pipeline.images import Crop
from pipeline.parquet import Writer
from pipeline.posix import cores
from pipeline.recognizing import recognize_pool, suffix_of
from pipeline.schema import OK, QUARANTINED, READ
from pipeline.sources.extents import is_pattern
from pipeline.sources.reader import PoolSource, extents_of
from pipeline.storage import Location, location

CHUNK = 512  # faces read, scored and written at a time
PHOTOS = 32  # photos read and searched for faces at a time
SIDES = ("x0", "y0", "x1", "y1")


def predict(
    model_at: Location,
    path: Location,
    out: Path,
    *,
    abstain: float | None = None,
    crop: Crop | None = None,
    detect: DetectConfig | None = None,
    config: EmbedConfig | None = None,
) -> dict[str, int]:
    """Write one row per image: path, prob_<name>..., top1, top2, abstain, status, reason.

    With a detector one row per face, or photo without any, and behind the path the face's box in
    the photo: x0, y0, x1, y1.

    Args:
        model_at: model folder (a student) or teacher folder.
        path: one image, a folder of images, a container of any pool kind, a folder of those, or
            a numbered pattern such as `faces-{000..146}.tar`.
        out: `.parquet` or `.csv`; appears when everything is written.
        abstain: rows whose highest probability is below this are marked; None: no row. A teacher's
            probabilities are calibrated, each member's on labeled faces that it had not seen. A
            student's are not: it has seen all of them. The reliability diagram of a run's report
            shows what its probabilities are worth on the test faces.
        crop: which part of each picture is the face; None: the central fraction that the model
            learned from, if any; with a detector the box with its margin, or its alignment.
        detect: find the faces of photos first; None: every picture is a face.
        config: batch, precision, threads and device; None: what this machine has.

    Returns:
        counts: images (faces, where they are detected), quarantined, abstained.

    Raises:
        ConfigError: another suffix of `out`; aligning without a detector.
        ModelError: not a model.
        SourceError: nothing to read at `path`, or what its reader says.
    """
    if out.suffix not in _WRITERS:
        raise ConfigError(f"--out {out}: expected a name ending in {' or '.join(_WRITERS)}")
    aligning = crop is not None and crop.align is not None
    if aligning and detect is None:
        raise ConfigError("predict: aligning needs landmarks; find them with --detect YUNET.ONNX")
    model = on_node(model_at)
    teacher = load_any(model)
    meta = read_meta(model)
    config = config or _this_machine()
    forward = Forward(teacher, config)
    seen = teacher.members[0].config
    decoder = Decoder(seen.color, seen.size, config.batch, config.decode_threads)
    schema = _schema(teacher.label_names, detect is not None)
    crop = crop or learned_crop(meta.get(CROP, {}), detected=detect is not None)
    counts = {"images": 0, "quarantined": 0, "abstained": 0}
    with (
        tempfile.TemporaryDirectory(prefix="omnifer-") as work,
        location(out).replacing() as sink,
        _WRITERS[out.suffix](sink, schema) as writer,
    ):
        for table in _ahead(_tables(path, location(work), detect, config.decode_threads)):
            probs, reasons = [np.zeros((0, len(teacher.label_names)), np.float32)], []
            for pixels, found in decoder.batches(table, crop, "rgb"):
                probs.append(teacher.probs(forward(pixels)[1]).cpu().numpy()[: len(found)])
                reasons.extend(found)
            rows = _rows(table, np.concatenate(probs), reasons, teacher, abstain, schema)
            writer.write(rows)
            counts["images"] += rows.num_rows
            counts["quarantined"] += sum(reason is not None for reason in reasons)
            counts["abstained"] += sum(bool(v) for v in rows.column("abstain").to_pylist())
    return counts


def learned_crop(said: Mapping[str, Any], *, detected: bool) -> Crop:
    """The crop of a model's own faces, for pictures that have no boxes, or those of a detector."""
    own = parse(Crop, said, where="crop of the model")
    if not detected:
        return Crop(fraction=own.fraction)
    return Crop(box=True, margin=own.margin, align=own.align)


def _this_machine() -> EmbedConfig:
    gpu = torch.cuda.is_available()
    return EmbedConfig(
        batch=256 if gpu else 64,
        dtype="bf16" if gpu else "fp32",
        threads=cores(),
        decode_threads=cores(),
        num_gpus=1 if gpu else 0,
    )


class Read(NamedTuple):
    """Some pictures that can be read: how many, what tells them from others, and the reading."""

    rows: int
    mark: str
    table: Callable[[], pa.Table]
    """READ; the id is the path below what was named, or file#row or #byte."""


def readers(path: Location, work: Location, count: int) -> Iterator[Read]:
    """The pictures of a path, about `count` at a time; an index of them may be made in `work`.

    Raises:
        SourceError: nothing to read at `path`, or what its reader says.
    """
    one = not is_pattern(path.uri) and suffix_of(path.name) is None
    if one and path.exists() and not path.is_dir():
        row = {"id": path.name, "position": 0, "image": path.read_bytes()}
        alone = pa.Table.from_pylist([row], schema=READ)
        yield Read(1, path.stamp(), lambda: alone)
        return
    source: Any = TypeAdapter(PoolSource).validate_python(recognize_pool(path.uri).config)
    for extent in extents_of("pool", source, count, work):
        yield Read(extent.faces or 0, extent.fingerprint, partial(source.read, extent))


def _tables(
    path: Location, work: Location, detect: DetectConfig | None, threads: int
) -> Iterator[pa.Table]:
    """Faces with id, image, box, landmarks and reason."""
    if detect is None:
        yield from (read.table() for read in readers(path, work, CHUNK))
        return
    detector = YuNet(detect)
    for read in readers(path, work, PHOTOS):
        yield find_faces(read.table(), detector, detect, threads=threads)


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables; the next one is read while the last one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        following = reader.submit(next, tables, None)
        while (table := following.result()) is not None:
            following = reader.submit(next, tables, None)
            yield table


def _schema(label_names: tuple[str, ...], detected: bool) -> pa.Schema:
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            *(pa.field(side, pa.float32()) for side in SIDES if detected),
            *(pa.field(f"prob_{name}", pa.float32()) for name in label_names),
            pa.field("top1", pa.string()),
            pa.field("top2", pa.string()),
            pa.field("abstain", pa.bool_()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
        ]
    )


def _rows(
    faces: pa.Table,
    probs: np.ndarray,
    reasons: list[str | None],
    teacher: Teacher,
    abstain: float | None,
    schema: pa.Schema,
) -> pa.Table:
    names = np.array(teacher.label_names, dtype=object)
    good = np.array([reason is None for reason in reasons], dtype=bool)
    probs = probs[good]
    ranked = np.argsort(-probs, axis=1, kind="stable")
    below = probs.max(axis=1, initial=0) < (abstain or 0)
    found = [*probs.T, names[ranked[:, 0]], names[ranked[:, 1]], below]
    kinds = [field.type for field in schema if field.name not in (*SIDES, *_AROUND)]
    sides = []
    if SIDES[0] in schema.names:
        boxes = [box or [None] * 4 for box in faces["photo_box"].to_pylist()]
        sides = [pa.array(side, pa.float32()) for side in zip(*boxes, strict=True)]
    columns = [spread(values, good, kind) for values, kind in zip(found, kinds, strict=True)]
    status = [OK if reason is None else QUARANTINED for reason in reasons]
    return pa.Table.from_arrays(
        [
            faces["id"],
            *sides,
            *columns,
            pa.array(status, pa.string()),
            pa.array(reasons, pa.string()),
        ],
        schema=schema,
    )


_AROUND = ("path", "status", "reason")


def _csv_writer(sink: IO[bytes], schema: pa.Schema) -> Any:
    return csv.CSVWriter(sink, schema)


_WRITERS: dict[str, Callable[[IO[bytes], pa.Schema], Any]] = {
    ".parquet": Writer,
    ".csv": _csv_writer,
}
