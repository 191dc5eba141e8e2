"""Every pool format of the bench formats: real faces written whole and damaged, and read back."""

from __future__ import annotations

import base64
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
    made = (folder, parquet, lance, webdataset, webdataset_gz, zipped, recordio, msceleb_tsv)
    return {format.__name__: list(format(faces)) for format in made}


def _spoiled(
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


def _with(rows: list[Row], number: int, **changes: Any) -> list[Row]:
    return [replace(row, **changes) if i == number else row for i, row in enumerate(rows)]


def _only(damage: Callable[[Path], None]) -> Damage:
    """Damage that leaves what must come back."""

    def spoil(at: Path, rows: list[Row]) -> list[Row]:
        damage(at)
        return rows

    return spoil


def _place(at: Path, image: bytes) -> int:
    """Where the middle of an image lies in a file."""
    middle = len(image) // 2
    return at.read_bytes().index(image[middle : middle + 64])


def _flipped(at: Path, rows: list[Row], number: int) -> list[Row]:
    """One bit of one image, which nothing in the format tells: what is read is what is there."""
    image = rows[number].image
    assert image is not None
    flip(at, _place(at, image))
    other = bytearray(image)
    other[len(image) // 2] ^= 1
    table = pa.Table.from_pylist([{"id": "x", "position": 0, "image": bytes(other)}], READ)
    return _with(rows, number, image=bytes(other), reason=decoded(table)[0])


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
            return _with(rows, number, image=file.read_bytes(), reason=reason)

        return damage

    yield Case("whole", write)
    yield _spoiled("file cut", write, change(3, "truncated", lambda at: cut(at, 3000)))
    yield _spoiled(
        "wrong magic", write, change(4, "not_an_image", lambda at: overwrite(at, 0, b"??"))
    )
    yield _spoiled("empty file", write, change(5, "empty", lambda at: cut(at, 0)))
    yield _spoiled("bit flipped", write, lambda at, rows: _flipped_file(at, rows, 6))


def _flipped_file(at: Path, rows: list[Row], number: int) -> list[Row]:
    return _flipped(at / rows[number].id, rows, number)


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
    yield _spoiled("file cut", write, _only(lambda at: cut(at, -1000)), broken)
    yield _spoiled(
        "wrong magic",
        write,
        _only(lambda at: overwrite(at, -4 + at.stat().st_size, b"PARX")),
        broken,
    )
    yield _spoiled("bit flipped", write, lambda at, rows: _flipped(at, rows, 7))


def lance(faces: Sequence[Face]) -> Iterator[Case]:
    """Fragments of 100 rows."""

    def write(at: Path) -> tuple[dict[str, Any], list[Row]]:
        table, rows, names = _columns(faces, struct=False)
        at.mkdir(parents=True)
        path = w.write_lance(at / "a.lance", table, 100)
        return {"kind": "lance", "path": path, **names}, _numbered("a.lance", rows)

    def file(at: Path, pattern: str) -> Path:
        return min(at.glob(pattern), key=lambda found: found.stat().st_mtime_ns)

    broken = "a.lance: broken Lance dataset"
    yield Case("whole", write)
    yield _spoiled("fragment cut", write, _only(lambda at: cut(file(at, "data/*"), -1000)), broken)
    yield _spoiled(
        "manifest cut", write, _only(lambda at: cut(file(at, "_versions/*.manifest"), -20)), broken
    )


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
    yield _spoiled(
        "file cut", write, _only(lambda at: cut(at, at.stat().st_size // 2)), prefix=True
    )
    yield _spoiled("header flipped", write, _only(header), prefix=True)
    yield _spoiled("bit flipped", write, lambda at, rows: _flipped(at, rows, 8))
    yield _spoiled(
        "wrong magic", write, _only(lambda at: at.write_bytes(b"?" * 5000)), "expected a plain tar"
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
    yield _spoiled("file cut", write, _only(lambda at: cut(at, middle(at))), prefix=True)
    yield _spoiled(
        "wrong magic", write, _only(lambda at: overwrite(at, 0, b"PK")), "expected a compressed tar"
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
            return _with(rows, number, image=None, reason=reason)

        return spoiled

    def stored(at: Path) -> tuple[dict[str, Any], list[Row]]:
        return write(at, zipfile.ZIP_STORED)

    yield Case("whole", write)
    yield Case("whole, stored", stored)
    yield _spoiled("bit flipped", stored, spoil(9, "unreadable", lambda at, o: flip(at, o + 3000)))
    yield _spoiled(
        "member's magic", write, spoil(9, "unreadable", lambda at, o: overwrite(at, o, b"XX"))
    )
    yield _spoiled(
        "file cut", write, _only(lambda at: cut(at, at.stat().st_size // 2)), "expected a zip file"
    )


def recordio(faces: Sequence[Face]) -> Iterator[Case]:
    """As InsightFace and im2rec pack."""
    people: dict[str, list[bytes]] = {}
    for image, group in faces:
        people.setdefault(group, []).append(image)
    ordered = [(image, group) for group, images in people.items() for image in images]

    def pack(
        at: Path, records: Mapping[int, bytes], idx: bool, first: int, by: Sequence[Face]
    ) -> Any:
        offsets = w.write_rec(at / "a.rec", records, idx=idx)
        rows = [
            Row(f"a.rec#{offsets[i]}", image, group=group)
            for i, (image, group) in enumerate(by, start=first)
        ]
        return {"kind": "recordio", "path": str(at / "a.rec")}, rows

    def insightface(at: Path, idx: bool = True) -> Any:
        return pack(at, w.insightface(list(people.values())), idx, 1, ordered)

    def flat(at: Path, labels: int = 0, tail: bytes = b"") -> Any:
        by = [(image + tail, f"{i}") for i, (image, _) in enumerate(faces)]
        records = {
            i: w.payload(image, [float(i)] * labels if labels else float(i), i)
            for i, (image, _) in enumerate(by)
        }
        return pack(at, records, True, 0, by)

    def idx_of(at: Path) -> Path:
        return at.with_suffix(".idx")

    def offset(row: Row) -> int:
        return int(row.id.partition("#")[2])

    def bad_head(at: Path, rows: list[Row]) -> list[Row]:
        overwrite(at, offset(rows[10]), b"????")
        return _with(rows, 10, image=None, group=None, reason="unreadable")

    def last_cut(at: Path, rows: list[Row]) -> list[Row]:
        cut(at, offset(rows[-1]) + 500)
        return _with(rows, len(rows) - 1, image=None, group=None, reason="truncated")

    def shifted(at: Path) -> None:
        pairs = [line.split("\t") for line in idx_of(at).read_text().splitlines()]
        idx_of(at).write_text("".join(f"{key}\t{int(o) + 4}\n" for key, o in pairs))

    yield Case("whole, header and identities", insightface)
    yield Case("whole, without .idx", lambda at: insightface(at, False))
    yield Case("whole, im2rec (flag 0)", flat)
    yield Case("whole, label arrays (flag 2)", lambda at: flat(at, 2))
    yield Case("whole, split records", lambda at: flat(at, 0, bytes(8) + w.MAGIC * 6 + b"end"))
    yield _spoiled(
        ".idx is no text", insightface, _only(lambda at: idx_of(at).write_bytes(b"\xff\0?"))
    )
    yield _spoiled(".idx lacks lines", insightface, _only(lambda at: cut(idx_of(at), -40)))
    yield _spoiled(".idx shifted", insightface, _only(shifted))
    yield _spoiled("record's magic", flat, bad_head)
    yield _spoiled("record's magic, no .idx", lambda at: flat_without(flat, at), bad_head)
    yield _spoiled("file cut", flat, last_cut)
    yield _spoiled(
        "wrong magic", flat, _only(lambda at: overwrite(at, 0, b"RIFF")), "expected RecordIO"
    )
    yield _spoiled(
        "a pickle", flat, _only(lambda at: overwrite(at, 0, b"\x80\x04")), "never opened"
    )


def flat_without(flat: Callable[[Path], Any], at: Path) -> Any:
    """A flat file whose index is gone."""
    config, rows = flat(at)
    Path(config["path"]).with_suffix(".idx").unlink()
    return config, rows


def msceleb_tsv(faces: Sequence[Face]) -> Iterator[Case]:
    """Lines of 7 and of 6 columns."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(group for _, group in faces))}

    def write(at: Path, columns: int = 7, ends: Mapping[int, bytes] | None = None) -> Any:
        """`ends`: what stands behind a line in place of a newline."""
        at.mkdir(parents=True)
        rows, offset = [], 0
        with (at / "a.tsv").open("wb") as file:
            for i, (image, group) in enumerate(faces):
                line = w.tsv_line(image, numbers[group], i, columns)
                rows.append(Row(f"a.tsv#{offset}", image, group=group))
                offset += file.write(line + (ends or {}).get(i, b"\n"))
        return {"kind": "msceleb_tsv", "path": str(at / "a.tsv")}, rows

    def field(reason: str, change: Callable[[bytes], bytes]) -> Damage:
        """Another last column of line 11; the lines behind it move."""

        def damage(at: Path, rows: list[Row]) -> list[Row]:
            lines = at.read_bytes().split(b"\n")
            head, _, data = lines[11].rpartition(b"\t")
            lines[11] = head + b"\t" + change(data)
            at.write_bytes(b"\n".join(lines))
            moved = [
                replace(row, id=f"a.tsv#{offset}")
                for row, offset in zip(rows, w.offsets_of(lines[:-1]), strict=True)
            ]
            return _with(moved, 11, image=None, reason=reason)

        return damage

    def joined(at: Path) -> Any:
        config, rows = write(at, ends={11: b""})
        return config, [
            r
            for i, r in enumerate(_with(rows, 11, image=None, group=None, reason="unreadable"))
            if i != 12
        ]

    yield Case("whole, 7 columns", write)
    yield Case("whole, 6 columns", lambda at: write(at, 6))
    yield Case("no newline at the end", lambda at: write(at, ends={len(faces) - 1: b""}))
    yield Case("newline missing inside", joined)
    yield _spoiled("bad base64", write, field("unreadable", lambda data: b"!" + data[1:]))
    yield _spoiled(
        "base64 cut", write, field("truncated", lambda data: data[: len(data) // 4 * 4 - 5])
    )
    yield _spoiled("no image", write, field("empty", lambda data: b""))
    yield _spoiled(
        "other columns", write, _only(lambda at: at.write_bytes(b"a\tb\n" * 99)), "6 or 7 columns"
    )
    yield _spoiled("bit flipped", write, lambda at, rows: _flipped_text(at, rows, 12))


def _flipped_text(at: Path, rows: list[Row], number: int) -> list[Row]:
    """One bit of the base64 of an image."""
    image = rows[number].image
    assert image is not None
    text = base64.b64encode(image)
    start = at.read_bytes().index(text)
    middle = len(text) // 2
    flip(at, start + middle, 7)  # no letter of base64 has this bit
    return _with(rows, number, image=None, reason="unreadable")
