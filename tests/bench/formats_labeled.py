"""Labeled sets that list their pictures, for the bench formats: real faces in their layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from pydantic import TypeAdapter

from pipeline.labeled.codes import AFFWILD2, CKPLUS, FER2013, RAFDB
from pipeline.labeled.reader import LabeledData
from pipeline.schema import EMOTIONS
from pipeline.sources.rows import labeled_rows_as_read
from tests.bench.cases import Case, Row, cut, decoded, overwrite
from tests.labeled import writers as sets

Faces = tuple[np.ndarray, tuple[str, ...]]
"""Pixels uint8 (N, 48, 48) and emotions."""
Written = tuple[dict[str, Any], list[Row]]
KDEF = {
    "fear": "AF", "anger": "AN", "disgust": "DI", "happiness": "HA", "neutral": "NE",
    "sadness": "SA", "surprise": "SU",
}  # fmt: skip
BOX = (2, 3, 40, 41)  # x y width height


def read(config: Mapping[str, Any], work: Path) -> list[Row]:
    """Rows of a labeled set; reasons as survey finds them."""
    source: Any = TypeAdapter(LabeledData).validate_python(config)
    table = source.records("x").table
    reasons = decoded(labeled_rows_as_read(table))
    return [
        Row(
            row["id"].removeprefix("x/"),
            row["image"],
            row["label"],
            row["role"],
            row["group"],
            row["box"] and tuple(row["box"]),
            reason,
        )
        for row, reason in zip(table.to_pylist(), reasons, strict=True)
    ]


def cases(faces: Faces) -> dict[str, list[Case]]:
    """Format -> its cases."""
    made = (rafdb, affectnet_2017, affectnet_2021, expw, affwild2, kdef, ckplus)
    return {format.__name__: list(format(faces)) for format in made}


def with_real(faces: Faces, write: Callable[[Path], Written]) -> Callable[[Path], Written]:
    """The same, but the writers are given real faces where they would draw some."""
    pixels = faces[0]

    def drawn(_: int, rows: np.ndarray, __: int) -> np.ndarray:
        return pixels[rows % len(pixels)]

    def written(at: Path) -> Written:
        with patch.object(sets, "draw", drawn):
            return write(at)

    return written


def cases_of(
    faces: Faces,
    write: Callable[[Path], Written],
    pictures: str,
    damaged: Mapping[str, tuple[Callable[[Path], None], str]],
) -> Iterator[Case]:
    """Whole; with a picture that is cut, is none, or is missing; and what else there is.

    Args:
        faces: real ones.
        write: the set.
        pictures: folder that the paths in ids are relative to, below the set's.
        damaged: name of a case -> what is done to the folder, and what the refusal says.
    """
    whole = with_real(faces, write)

    def spoiled(reason: str, spoil: Callable[[Path], None]) -> Callable[[Path], Written]:
        def written(at: Path) -> Written:
            config, rows = whole(at)
            file = at / pictures / rows[1].id.partition("#")[0]
            spoil(file)
            image = file.read_bytes()
            return config, [
                replace(row, image=image, reason=reason)
                if row.id.partition("#")[0] == rows[1].id.partition("#")[0]
                else row
                for row in rows
            ]

        return written

    def refused(spoil: Callable[[Path], None]) -> Callable[[Path], Written]:
        def written(at: Path) -> Written:
            config, rows = whole(at)
            spoil(at)
            return config, rows

        return written

    yield Case("whole", whole)
    yield Case("picture cut", spoiled("truncated", lambda at: cut(at, -at.stat().st_size // 3)))
    yield Case("picture's magic", spoiled("not_an_image", lambda at: overwrite(at, 0, b"?" * 8)))
    for name, (spoil, line) in damaged.items():
        yield Case(name, refused(spoil), line)


def gone(pattern: str) -> tuple[Callable[[Path], None], str]:
    """A picture, or another file, is missing; and what the refusal says."""
    return lambda at: next(iter(sorted(at.glob(pattern)))).unlink(), "no such file"


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Other text in a file, once."""

    def spoil(at: Path) -> None:
        (at / name).write_text((at / name).read_text().replace(old, new, 1))

    return spoil


def joined(name: str, number: int) -> Callable[[Path], None]:
    """A line that goes on into the next one."""

    def spoil(at: Path) -> None:
        lines = (at / name).read_text().splitlines(keepends=True)
        lines[number] = lines[number].rstrip("\n")
        (at / name).write_text("".join(lines))

    return spoil


def split_of(count: int) -> list[str]:
    """Two thirds train."""
    return ["train" if i < count * 2 // 3 else "test" for i in range(count)]


# -- lists of pictures ----------------------------------------------------------------------------


def rafdb(faces: Faces) -> Iterator[Case]:
    """Names and codes 1 to 7 in a list, aligned pictures."""
    _, labels = faces
    stems = [f"{split}_{i:05d}" for i, split in enumerate(split_of(len(labels)))]

    def write(at: Path) -> Written:
        codes = {f"{stem}.jpg": 1 + RAFDB.index(n) for stem, n in zip(stems, labels, strict=True)}
        images = sets.rafdb(at, codes)
        names = [f"Image/aligned/{stem}_aligned.jpg" for stem in stems]
        rows = [
            Row(name, images[name], label, name.split("/")[-1].partition("_")[0])
            for name, label in zip(names, labels, strict=True)
        ]
        return {"kind": "rafdb", "path": str(at)}, rows

    listed = "EmoLabel/list_patition_label.txt"
    yield from cases_of(
        faces, write, "",
        {
            "picture missing": gone("Image/aligned/*"),
            "newline missing": (replaced(listed, "\n", " "), "no such file"),
            "unknown code": (replaced(listed, ".jpg ", ".jpg 9"), "label.txt line 1"),
            "list is no text": (lambda at: sets.text(at / listed, b"\xff\xfe"), "expected text"),
        },
    )  # fmt: skip


def affectnet_2017(faces: Faces) -> Iterator[Case]:
    """Lists with boxes."""
    _, labels = faces
    splits = split_of(len(labels))
    x, y, width, height = BOX

    def write(at: Path) -> Written:
        rows: list[Row] = []
        for part, role in (("training", "train"), ("validation", "test")):
            own = {f"{i % 5}/{i}.jpg": label for i, label in enumerate(labels) if splits[i] == role}
            lines = [(path, BOX, EMOTIONS.index(label)) for path, label in own.items()]
            images = sets.affectnet_2017(at, part, lines)
            for path, label in own.items():
                name = f"Manually_Annotated_Images/{path}"
                box = (x, y, x + width, y + height)
                rows.append(Row(name, images[name], label, role, box=box))
        return {"kind": "affectnet", "path": str(at)}, rows

    listed = "Manually_Annotated_file_lists/training.csv"
    yield from cases_of(
        faces, write, "",
        {
            "picture missing": gone("Manually_Annotated_Images/*/*"),
            "other columns": (replaced(listed, "expression", "emotion"), "expression"),
            "unknown code": (replaced(listed, ",-2,", "7,-2,"), "training.csv row 0"),
            "newline missing": (joined(listed, 1), "expected CSV"),
        },
    )  # fmt: skip


def affectnet_2021(faces: Faces) -> Iterator[Case]:
    """One array of text per face."""
    _, labels = faces
    splits = split_of(len(labels))

    def write(at: Path) -> Written:
        rows: list[Row] = []
        for part, role in (("train_set", "train"), ("val_set", "test")):
            own = {f"{i:05d}": label for i, label in enumerate(labels) if splits[i] == role}
            codes = {face: str(EMOTIONS.index(label)) for face, label in own.items()}
            images = sets.affectnet_2021(at, part, codes)
            names = {face: f"{part}/images/{face}.jpg" for face in own}
            rows += [Row(names[f], images[names[f]], label, role) for f, label in own.items()]
        return {"kind": "affectnet", "path": str(at)}, rows

    def array(data: bytes) -> Callable[[Path], None]:
        return lambda at: (at / "train_set/annotations/00000_exp.npy").write_bytes(data)

    yield from cases_of(
        faces, write, "",
        {
            "array missing": gone("train_set/annotations/*"),
            "array's magic": (array(b"?" * 80), "expected one emotion code"),
            "array is a pickle": (array(b"\x80\x04K\x01."), "expected one emotion code"),
            "array cut": (lambda at: cut(_last(at), 100), "expected one emotion code"),
        },
    )  # fmt: skip


def _last(at: Path) -> Path:
    return max((at / "val_set/annotations").iterdir())


def expw(faces: Faces) -> Iterator[Case]:
    """Two faces in each picture."""
    _, labels = faces

    def write(at: Path) -> Written:
        lines, rows = [], []
        for i, label in enumerate(labels):
            name, top, left = f"p{i // 2}.jpg", 1 + i % 2, 4
            lines.append(f"{name} {i % 2} {top} {left} 40 44 0.9 {FER2013.index(label)}")
            box = (left, top, 40, 44)
            rows.append(Row(f"origin/{name}#{i % 2}", None, label, "train", name, box))
        images = sets.expw(at, lines)
        rows = [replace(row, image=images[row.id.partition("#")[0]]) for row in rows]
        return {"kind": "expw", "path": str(at)}, rows

    yield from cases_of(
        faces, write, "",
        {
            "picture missing": gone("origin/*"),
            "newline missing": (replaced("label/label.lst", "\n", " "), "label.lst line 1"),
            "list cut": (lambda at: cut(at / "label/label.lst", -6), "label.lst line"),
        },
    )  # fmt: skip


def affwild2(faces: Faces) -> Iterator[Case]:
    """Frames of two videos."""
    _, labels = faces
    splits = split_of(len(labels))

    def write(at: Path) -> Written:
        rows: list[Row] = []
        for part, role in (("Train_Set", "train"), ("Validation_Set", "test")):
            own = [label for i, label in enumerate(labels) if splits[i] == role]
            codes = [AFFWILD2.index(label) for label in own]
            images = sets.affwild2(at, part, f"v-{role}", codes, range(1, len(own) + 1))
            for k, label in enumerate(own, start=1):
                name = f"cropped_aligned/v-{role}/{k:05d}.jpg"
                rows.append(Row(name, images[name], label, role, f"v-{role}"))
        return {"kind": "affwild2", "path": str(at), "label_policy": "drop"}, rows

    video = "EXPR_Recognition_Challenge/Train_Set/v-train.txt"
    yield from cases_of(
        faces, write, "",
        {
            "unknown code": (replaced(video, "\n", "\n99\n"), "v-train.txt line 2"),
            "newline missing": (joined(video, 1), "v-train.txt line 2"),
            "unknown class": (replaced(video, "Fear", "Fright"), "Fright"),
        },
    )  # fmt: skip


def kdef(faces: Faces) -> Iterator[Case]:
    """Names that tell person and emotion; each person shows an emotion once per session."""
    _, labels = faces
    taken: dict[str, str] = {}
    for label in labels:
        free = (f"{s}F{p:02d}{KDEF[label]}S" for s in "AB" for p in range(1, 36))
        taken[next(name for name in free if name not in taken and name not in ("AF31V",))] = label

    def write(at: Path) -> Written:
        images = sets.kdef(at, list(taken))
        rows = [
            Row(f"{n[:4]}/{n}.JPG", images[f"{n[:4]}/{n}.JPG"], label, "train", n[1:4])
            for n, label in taken.items()
        ]
        return {"kind": "kdef", "path": str(at)}, sorted(rows, key=lambda row: row.id.split("/"))

    def rename(at: Path) -> None:
        file = next(at.glob("*/*.JPG"))
        file.rename(file.with_name("AF01XXS.JPG"))

    yield from cases_of(faces, write, "", {"unknown name": (rename, "expected a name such as")})


def ckplus(faces: Faces) -> Iterator[Case]:
    """Sequences of four frames, the last three of which count."""
    _, labels = faces
    own = {f"S{i:03d}/001": label for i, label in enumerate(labels[: len(labels) // 4], start=1)}

    def write(at: Path) -> Written:
        images = sets.ckplus(at, {s: (4, CKPLUS.index(label)) for s, label in own.items()})
        rows = []
        for sequence, label in own.items():
            for k in (2, 3, 4):
                file = f"{sequence.replace('/', '_')}_{k:08d}.png"
                name = f"cohn-kanade-images/{sequence}/{file}"
                rows.append(Row(name, images[name], label, "train", sequence[:4]))
        return {"kind": "ckplus", "path": str(at)}, rows

    code = "Emotion/S001/001/S001_001_00000004_emotion.txt"
    yield from cases_of(
        faces, write, "",
        {
            "unknown code": (lambda at: sets.text(at / code, "   9.0e+00\n"), "emotion.txt line 1"),
            "code is no number": (lambda at: sets.text(at / code, "x"), "expected an emotion code"),
        },
    )  # fmt: skip
