"""detect: all faces of a folder or table of photos, once, into Parquet that is a pool like others.

A detector in the streaming pass would make the number of faces of a slice, and so their ids, depend
on a model; and it would run again wherever a face's bytes are fetched again. So detection is a step
before: its output has ids, boxes and landmarks, and is read by `kind: parquet` or, with a column of
labels added, by a labeled `kind: table`.

    {kind: parquet, path: OUT, id_column: id, group_column: group, box_column: box,
     landmarks_column: landmarks, reason_column: reason, crop: {align: {template: centered}}}

The output is a folder of parts of about a thousand photos. A part appears whole; what is there is
not made again, so a killed command continues. Rows without a face count as bad in a pool: raise
`error_budget` where many photos show nobody.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import digest
from pipeline.detection import DETECTED, DetectConfig, Detector, YuNet, find_faces
from pipeline.errors import IdentityError, SourceError
from pipeline.images import DECODER
from pipeline.parquet import Writer
from pipeline.posix import cores
from pipeline.predicting import Read, readers
from pipeline.progress import meter
from pipeline.storage import Location
from pipeline.tables import open_stored

PHOTOS = 32  # read at a time and written as one row group; bounds memory
READS = 32  # per part
ABOUT = "detect.json"
COUNTS = b"counts"


def detect(
    path: Location,
    out: Location,
    config: DetectConfig,
    *,
    detector: Detector | None = None,
    threads: int | None = None,
) -> dict[str, int]:
    """Write DETECTED rows of all photos at `path` below the folder `out`.

    Args:
        path: a photo, a folder of photos, a Parquet file with column `image` or a folder of those.
        out: folder; made, or continued if it is of the same photos, model and settings.
        config: the model and its thresholds.
        detector: another one than YuNet.
        threads: photos looked at together; None: one per core.

    Returns:
        counts: photos, faces, no_face, unreadable.

    Raises:
        IdentityError: `out` holds faces of other photos, or found with other settings.
        SourceError: nothing to read at `path`; `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out}: a file; expected a folder for the parts")
    detector = detector or YuNet(config)
    threads = threads or cores()
    with tempfile.TemporaryDirectory(prefix="omnifer-") as work:
        reads = list(readers(path, Location(work), PHOTOS))
        about = {**detector.identity, "decoder": DECODER, "photos": digest([r.mark for r in reads])}
        _require_same(out, about)
        schema = DETECTED.with_metadata({b"detector": json.dumps(about).encode()})
        total: Counter[str] = Counter()
        with meter("detect", sum(read.rows for read in reads), "photos") as shown:
            for number, own in enumerate(_parts(reads)):
                at = out / f"part-{number:05d}.parquet"
                if not at.exists():
                    _write(at, schema, (find_faces(r.table(), detector, config, threads=threads)
                                        for r in own))  # fmt: skip
                counts = _counts(at)
                total.update(counts)
                shown.advance(sum(r.rows for r in own), f"faces {total['faces']:,}")
    return {name: total[name] for name in ("photos", "faces", "no_face", "unreadable")}


def _require_same(out: Location, about: dict[str, Any]) -> None:
    if not (out / ABOUT).exists():
        (out / ABOUT).write_json(about)
        return
    there = (out / ABOUT).read_json()
    changed = [name for name in sorted({*there, *about}) if there.get(name) != about.get(name)]
    if changed:
        lines = [f"  {name}: {there.get(name)} -> {about.get(name)}" for name in changed]
        head = f"{out}: was made from other photos or settings (old -> new); name another --out:"
        raise IdentityError("\n".join([head, *lines]))


def _parts(reads: Sequence[Read]) -> Iterator[list[Read]]:
    rest = iter(reads)
    while part := list(itertools.islice(rest, READS)):
        yield part


def _write(at: Location, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    counts = Counter({"photos": 0, "faces": 0, "no_face": 0, "unreadable": 0})
    with at.replacing() as sink, Writer(sink, schema) as writer:
        for table in tables:
            writer.write(table.replace_schema_metadata(schema.metadata))
            reasons = table["reason"].to_pylist()
            counts["photos"] += len(set(table["photo"].to_pylist()))
            counts["faces"] += reasons.count(None)
            counts["no_face"] += reasons.count("no_face")
            counts["unreadable"] += len(reasons) - reasons.count(None) - reasons.count("no_face")
        writer.annotate({COUNTS: json.dumps(counts).encode()})


def _counts(at: Location) -> dict[str, int]:
    with open_stored(at) as file:
        return json.loads(file.schema.metadata[COUNTS])
