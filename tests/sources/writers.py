"""Small writers of container files, good and broken, as the formats' own tools write them."""

from __future__ import annotations

import base64
import io
import itertools
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

MAGIC = struct.pack("<I", 0xCED7230A)
JPEG = b"\xff\xd8\xff"


def random_images(count: int, seed: int = 0, largest: int = 3000) -> list[bytes]:
    """Bytes that begin like JPEG files, of random sizes; no two are equal."""
    rng = np.random.default_rng(seed)
    return [JPEG + b"%06d" % i + rng.bytes(int(rng.integers(1, largest))) for i in range(count)]


# -- MS-Celeb-1M ----------------------------------------------------------------------------------


def tsv_line(image: bytes, person: int = 0, rank: int = 0, columns: int = 7) -> bytes:
    """One line without its end; 6 columns as in the development set."""
    rectangle = base64.b64encode(struct.pack("<4f", 0.1, 0.2, 0.7, 0.9))
    mid, url = b"m.0%05d" % person, b'http://x/"a b"'
    middle = (b"%d" % rank, url, url) if columns == 7 else (b"A Name", url)
    return b"\t".join([mid, *middle, b"FaceId-0", rectangle, base64.b64encode(image)])


def offsets_of(lines: Sequence[bytes], end: bytes = b"\n") -> list[int]:
    """First byte of each line of a file that joins them."""
    return [0, *itertools.accumulate(len(line) + len(end) for line in lines)][: len(lines)]


# -- RecordIO -------------------------------------------------------------------------------------


def payload(image: bytes, label: float | Sequence[float], key: int = 0) -> bytes:
    """Header, labels and image of one record; a sequence of labels is stored as an array."""
    if isinstance(label, float | int):
        return struct.pack("<IfQQ", 0, label, key, 0) + image
    labels = np.asarray(label, "<f4")
    return struct.pack("<IfQQ", len(labels), 0, key, 0) + labels.tobytes() + image


def record(data: bytes) -> bytes:
    """A physical record: split where an aligned word of `data` is the magic, which is left out."""
    cuts = [i for i in range(0, len(data) - 3, 4) if data[i : i + 4] == MAGIC]
    begins = [0, *(cut + 4 for cut in cuts)]
    parts = [data[a:b] for a, b in zip(begins, [*cuts, len(data)], strict=True)]
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )


def write_rec(
    at: Path, records: Mapping[int, bytes], order: Iterable[int] | None = None, idx: bool = True
) -> dict[int, int]:
    """A .rec of payloads by key, in `order`, and its .idx; returns the offsets."""
    offsets, size = {}, 0
    at.parent.mkdir(parents=True, exist_ok=True)
    with at.open("wb") as file:
        for key in order or records:
            offsets[key] = size
            size += file.write(record(records[key]))
    if idx:
        lines = "".join(f"{key}\t{offsets[key]}\n" for key in records)
        at.with_suffix(".idx").write_text(lines)
    return offsets


def insightface(people: Sequence[Sequence[bytes]]) -> dict[int, bytes]:
    """Payloads by key as InsightFace packs them: header 0, faces 1 to N, one record per person."""
    faces = [(person, image) for person, images in enumerate(people) for image in images]
    behind = len(faces) + 1
    records = {0: payload(b"", [behind, behind + len(people)])}
    for key, (person, image) in enumerate(faces, start=1):
        records[key] = payload(image, float(person), key)
    first = 1
    for person, images in enumerate(people):
        records[behind + person] = payload(b"", [first, first + len(images)], behind + person)
        first += len(images)
    return records


# -- tar ------------------------------------------------------------------------------------------


def tar_bytes(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return file.getvalue()


# -- Lance ----------------------------------------------------------------------------------------


def write_lance(at: Path, table: pa.Table, rows: int, mode: str = "create") -> str:
    """A Lance dataset in fragments of `rows`; returns its path."""
    import lance

    lance.write_dataset(table, str(at), mode=mode, max_rows_per_file=rows)
    return str(at)
