"""Folders, tables and archives, for the bench formats: real faces whole and damaged."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.schema import READ
from pipeline.sources.reader import PoolSource, plan_slices, read_slice
from pipeline.storage import location
from tests.bench.cases import Case, Row, cut, decoded, flip, overwrite
from tests.sources import writers as w

Face = tuple[bytes, str]
"""JPEG and group."""
Damage = Callable[[Path, list[Row]], list[Row]]
"""Spoils a file that holds the rows; the rows that must come back."""
SLICE = 16
BOX = (1.0, 2.0, 90.5, 100.0)


def read(config: Mapping[str, Any], work: Path) -> list[Row]:
    """Rows of a pool as survey sees them."""
    sources = {"pool": TypeAdapter(PoolSource).validate_python(config)}
    slices = list(plan_slices(sources, SLICE, location(work)))
    table = pa.concat_tables([read_slice(s, sources) for s in slices] or [READ.empty_table()])
    return [
        Row(
            row["id"].removeprefix("pool/"),
            row["image"],
            group=row["group"],
            box=row["box"] and tuple(row["box"]),
            reason=reason,
        )
        for row, reason in zip(table.to_pylist(), decoded(table), strict=True)
    ]


def cases(faces: Sequence[Face]) -> dict[str, list[Case]]:
    """Format -> its cases."""
    made = (folder, parquet, lance, webdataset, webdataset_gz, zipped)
    return {format.__name__: list(format(faces)) for format in made}


def spoiled_by(
    name: str,
    write: Callable[[Path], tuple[dict[str, Any], list[Row]]],
    damage: Damage,
    refused: str | None = None,
    prefix: bool = False,
) -> Case:
    def spoiled(at: Path) -> tuple[dict[str, Any], list[Row]]:
        config, rows = write(at)
        return config, damage(Path(config["path"]), rows)

    return Case(name, spoiled, refused, prefix)


def with_row(rows: list[Row], number: int, **changes: Any) -> list[Row]:
    return [replace(row, **changes) if i == number else row for i, row in enumerate(rows)]


def only(damage: Callable[[Path], None]) -> Damage:
    """Damage that leaves what must come back."""

    def spoil(at: Path, rows: list[Row]) -> list[Row]:
        damage(at)
        return rows

    return spoil


def _place(at: Path, image: bytes) -> int:
    """Where the middle of an image lies in a file."""
    middle = len(image) // 2
    return at.read_bytes().index(image[middle : middle + 64])


def flipped(at: Path, rows: list[Row], number: int) -> list[Row]:
    """One bit of one image, which nothing in the format tells: what is read is what is there."""
    image = rows[number].image
    assert image is not None
    flip(at, _place(at, image))
    other = bytearray(image)
    other[len(image) // 2] ^= 1
    table = pa.Table.from_pylist([{"id": "x", "position": 0, "image": bytes(other)}], READ)
    return with_row(rows, number, image=bytes(other), reason=decoded(table)[0])


# -- formats --------------------------------------------------------------------------------------


def folder(faces: Sequence[Face]) -> Iterator[Case]:
    """Files in folders by person."""

    def write(at: Path) -> tuple[dict[str, Any], list[Row]]:
        rows = []
        for i, (image, group) in enumerate(faces):
            name = f"{group}/{i:05d}.jpg"
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_bytes(image)
            rows.append(Row(name, image, group=group))
        config = {"kind": "folder", "path": str(at), "group_from": "parent"}
        return config, sorted(rows, key=lambda row: row.id.split("/"))

    def change(number: int, reason: str, spoil: Callable[[Path], None]) -> Damage:
        def damage(at: Path, rows: list[Row]) -> list[Row]:
            file = at / rows[number].id
            spoil(file)
            return with_row(rows, number, image=file.read_bytes(), reason=reason)

        return damage

    yield Case("whole", write)
    yield spoiled_by("file cut", write, change(3, "truncated", lambda at: cut(at, 3000)))
    yield spoiled_by(
        "wrong magic", write, change(4, "not_an_image", lambda at: overwrite(at, 0, b"??"))
    )
    yield spoiled_by("empty file", write, change(5, "empty", lambda at: cut(at, 0)))
    yield spoiled_by("bit flipped", write, lambda at, rows: _flipped_file(at, rows, 6))


def _flipped_file(at: Path, rows: list[Row], number: int) -> list[Row]:
    return flipped(at / rows[number].id, rows, number)


def _columns(faces: Sequence[Face], struct: bool) -> tuple[pa.Table, list[Row], dict[str, Any]]:
    """A table of images, groups and boxes; its rows without ids; names of its columns."""
    images: list[Any] = [image for image, _ in faces]
    if struct:
        images = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    table = pa.table(
        {
            "image": images,
            "who": [group for _, group in faces],
            "at": pa.array([BOX] * len(faces), pa.list_(pa.float32())),
        }
    )
    rows = [Row("", image, group=group, box=BOX) for image, group in faces]
    return table, rows, {"group_column": "who", "box_column": "at"}


def _numbered(name: str, rows: list[Row]) -> list[Row]:
    return [replace(row, id=f"{name}#{i}") for i, row in enumerate(rows)]


def parquet(faces: Sequence[Face]) -> Iterator[Case]:
    """Bytes, and structs as Hugging Face datasets writes them."""

    def write(at: Path, struct: bool = False) -> tuple[dict[str, Any], list[Row]]:
        table, rows, names = _columns(faces, struct)
        at.mkdir(parents=True)
        file = at / "a.parquet"
        pq.write_table(table, file, row_group_size=100, compression="NONE")
        return {"kind": "parquet", "path": str(file), **names}, _numbered("a.parquet", rows)

    broken = "a.parquet: broken Parquet"
    yield Case("whole", write)
    yield Case("whole, struct<bytes, path>", lambda at: write(at, True))
    yield spoiled_by("file cut", write, only(lambda at: cut(at, -1000)), broken)
    yield spoiled_by(
        "wrong magic",
        write,
        only(lambda at: overwrite(at, -4 + at.stat().st_size, b"PARX")),
        broken,
    )
    yield spoiled_by("bit flipped", write, lambda at, rows: flipped(at, rows, 7))


def lance(faces: Sequence[Face]) -> Iterator[Case]:
    """Fragments of 100 rows."""

    def write(at: Path) -> tuple[dict[str, Any], list[Row]]:
        table, rows, names = _columns(faces, struct=False)
        at.mkdir(parents=True)
        path = w.write_lance(at / "a.lance", table, 100)
        return {"kind": "lance", "path": path, **names}, _numbered("a.lance", rows)

    def file(at: Path, pattern: str) -> Path:
        return min(at.glob(pattern), key=lambda found: found.stat().st_mtime_ns)

    def flipped_in(at: Path, rows: list[Row], number: int) -> list[Row]:
        image = rows[number].image
        assert image is not None
        held = image[len(image) // 2 :][:64]
        data = next(found for found in at.glob("data/*") if held in found.read_bytes())
        return flipped(data, rows, number)

    broken = "a.lance: broken Lance dataset"
    yield Case("whole", write)
    yield spoiled_by("fragment cut", write, only(lambda at: cut(file(at, "data/*"), -1000)), broken)
    yield spoiled_by(
        "manifest cut", write, only(lambda at: cut(file(at, "_versions/*.manifest"), -20)), broken
    )
    yield spoiled_by("bit flipped", write, lambda at, rows: flipped_in(at, rows, 7))


def _members(faces: Sequence[Face], name: str) -> tuple[list[tuple[str, bytes]], list[Row]]:
    """Samples of a picture and a .json that names its group."""
    members, rows = [], []
    for i, (image, group) in enumerate(faces):
        members += [(f"{i:05d}.jpg", image), (f"{i:05d}.json", json.dumps({"who": group}).encode())]
        rows.append(Row(f"{name}/{i:05d}.jpg", image, group=group))
    return members, rows


def webdataset(faces: Sequence[Face]) -> Iterator[Case]:
    """A plain tar."""

    def write(at: Path) -> tuple[dict[str, Any], list[Row]]:
        members, rows = _members(faces, "a.tar")
        at.mkdir(parents=True)
        (at / "a.tar").write_bytes(w.tar_bytes(members))
        config = {"kind": "webdataset", "path": str(at / "a.tar"), "group_field": "who"}
        return config, rows

    def header(at: Path) -> None:
        data = at.read_bytes()
        flip(at, data.index(b"00020.jpg") + 100)

    yield Case("whole", write)
    yield spoiled_by(
        "file cut", write, only(lambda at: cut(at, at.stat().st_size // 2)), prefix=True
    )
    yield spoiled_by("header flipped", write, only(header), prefix=True)
    yield spoiled_by("bit flipped", write, lambda at, rows: flipped(at, rows, 8))
    yield spoiled_by(
        "wrong magic", write, only(lambda at: at.write_bytes(b"?" * 5000)), "expected a plain tar"
    )


def webdataset_gz(faces: Sequence[Face]) -> Iterator[Case]:
    """A compressed tar."""

    def write(at: Path) -> tuple[dict[str, Any], list[Row]]:
        members, rows = _members(faces, "a.tar.gz")
        at.mkdir(parents=True)
        (at / "a.tar.gz").write_bytes(gzip.compress(w.tar_bytes(members), 1))
        config = {"kind": "webdataset", "path": str(at / "a.tar.gz"), "group_field": "who"}
        return config, rows

    middle = lambda at: at.stat().st_size // 2  # noqa: E731
    yield Case("whole", write)
    yield spoiled_by(
        "bits flipped",
        write,
        only(lambda at: overwrite(at, 10, b"\xff")),
        "expected a compressed tar",
    )
    yield spoiled_by("file cut", write, only(lambda at: cut(at, middle(at))), prefix=True)
    yield spoiled_by(
        "wrong magic", write, only(lambda at: overwrite(at, 0, b"PK")), "expected a compressed tar"
    )


def zipped(faces: Sequence[Face]) -> Iterator[Case]:
    """Deflated members in folders by person."""

    def write(at: Path, method: int = zipfile.ZIP_DEFLATED) -> tuple[dict[str, Any], list[Row]]:
        at.mkdir(parents=True)
        rows = []
        with zipfile.ZipFile(at / "a.zip", "w", method) as archive:
            for i, (image, group) in enumerate(faces):
                archive.writestr(f"{group}/{i:05d}.jpg", image)
                rows.append(Row(f"a.zip/{group}/{i:05d}.jpg", image, group=group))
        return {"kind": "zip", "path": str(at / "a.zip"), "group_from": "parent"}, rows

    def member(at: Path, number: int) -> int:
        with zipfile.ZipFile(at) as archive:
            return archive.infolist()[number].header_offset

    def spoil(number: int, reason: str, damage: Callable[[Path, int], None]) -> Damage:
        def spoiled(at: Path, rows: list[Row]) -> list[Row]:
            damage(at, member(at, number))
            return with_row(rows, number, image=None, reason=reason)

        return spoiled

    def stored(at: Path) -> tuple[dict[str, Any], list[Row]]:
        return write(at, zipfile.ZIP_STORED)

    yield Case("whole", write)
    yield Case("whole, stored", stored)
    yield spoiled_by(
        "bit flipped", stored, spoil(9, "unreadable", lambda at, o: flip(at, o + 3000))
    )
    yield spoiled_by(
        "member's magic", write, spoil(9, "unreadable", lambda at, o: overwrite(at, o, b"XX"))
    )
    yield spoiled_by(
        "file cut", write, only(lambda at: cut(at, at.stat().st_size // 2)), "expected a zip file"
    )
