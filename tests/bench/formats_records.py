"""RecordIO and MS-Celeb TSV, for the bench formats: real faces whole and damaged."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.cases import Case, Row, cut, flip, overwrite
from tests.bench.formats_pool import Damage, Face, only, spoiled_by, with_row
from tests.sources import writers as w


def cases(faces: Sequence[Face]) -> dict[str, list[Case]]:
    """Format -> its cases."""
    return {format.__name__: list(format(faces)) for format in (recordio, msceleb_tsv)}


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
        return with_row(rows, 10, image=None, group=None, reason="unreadable")

    def last_cut(at: Path, rows: list[Row]) -> list[Row]:
        cut(at, offset(rows[-1]) + 500)
        return with_row(rows, len(rows) - 1, image=None, group=None, reason="truncated")

    def shifted(at: Path) -> None:
        pairs = [line.split("\t") for line in idx_of(at).read_text().splitlines()]
        idx_of(at).write_text("".join(f"{key}\t{int(o) + 4}\n" for key, o in pairs))

    yield Case("whole, header and identities", insightface)
    yield Case("whole, without .idx", lambda at: insightface(at, False))
    yield Case("whole, im2rec (flag 0)", flat)
    yield Case("whole, label arrays (flag 2)", lambda at: flat(at, 2))
    yield Case("whole, split records", lambda at: flat(at, 0, bytes(8) + w.MAGIC * 6 + b"end"))
    yield spoiled_by(
        ".idx is no text", insightface, only(lambda at: idx_of(at).write_bytes(b"\xff\0?"))
    )
    yield spoiled_by(".idx lacks lines", insightface, only(lambda at: cut(idx_of(at), -40)))
    yield spoiled_by(".idx shifted", insightface, only(shifted))
    yield spoiled_by("record's magic", flat, bad_head)
    yield spoiled_by("record's magic, no .idx", lambda at: flat_without(flat, at), bad_head)
    yield spoiled_by("file cut", flat, last_cut)
    yield spoiled_by(
        "wrong magic", flat, only(lambda at: overwrite(at, 0, b"RIFF")), "expected RecordIO"
    )
    yield spoiled_by(
        "a pickle", flat, only(lambda at: overwrite(at, 0, b"\x80\x04")), "never opened"
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
            return with_row(moved, 11, image=None, reason=reason)

        return damage

    def joined(at: Path) -> Any:
        config, rows = write(at, ends={11: b""})
        return config, [
            r
            for i, r in enumerate(with_row(rows, 11, image=None, group=None, reason="unreadable"))
            if i != 12
        ]

    yield Case("whole, 7 columns", write)
    yield Case("whole, 6 columns", lambda at: write(at, 6))
    yield Case("no newline at the end", lambda at: write(at, ends={len(faces) - 1: b""}))
    yield Case("newline missing inside", joined)
    yield spoiled_by("bad base64", write, field("unreadable", lambda data: b"!" + data[1:]))
    yield spoiled_by(
        "base64 cut", write, field("truncated", lambda data: data[: len(data) // 4 * 4 - 5])
    )
    yield spoiled_by("no image", write, field("empty", lambda data: b""))
    yield spoiled_by(
        "other columns", write, only(lambda at: at.write_bytes(b"a\tb\n" * 99)), "6 or 7 columns"
    )
    yield spoiled_by("bit flipped", write, lambda at, rows: _flipped_text(at, rows, 12))


def _flipped_text(at: Path, rows: list[Row], number: int) -> list[Row]:
    """One bit of the base64 of an image."""
    image = rows[number].image
    assert image is not None
    text = base64.b64encode(image)
    start = at.read_bytes().index(text)
    middle = len(text) // 2
    flip(at, start + middle, 7)  # no letter of base64 has this bit
    return with_row(rows, number, image=None, reason="unreadable")
