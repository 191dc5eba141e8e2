"""Every labeled format of the bench formats: faces of FER2013 in the layouts of other sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.labeled.codes import AFFWILD2, CKPLUS, FER2013, RAFDB
from pipeline.labeled.ferplus import VOTES
from pipeline.labeled.reader import LabeledData
from pipeline.schema import EMOTIONS, READ
from pipeline.synthetic import encode
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
    count = table.num_rows
    columns = {
        "id": table["id"],
        "position": pa.array(range(count), pa.int64()),
        "group": table["group"],
        "image": table["image"],
        "box": table["box"],
        "reason": pa.nulls(count, pa.string()),
    }
    reasons = decoded(pa.table(columns, schema=READ))
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
    made = (
        rafdb, affectnet_2017, affectnet_2021, fer2013, ferplus, sfew, expw, affwild2, kdef, ckplus,
        folder, table,
    )  # fmt: skip
    return {format.__name__: list(format(faces)) for format in made}


def _real(faces: Faces, write: Callable[[Path], Written]) -> Callable[[Path], Written]:
    """The same, but the writers are given real faces where they would draw some."""
    pixels = faces[0]

    def drawn(_: int, rows: np.ndarray, __: int) -> np.ndarray:
        return pixels[rows % len(pixels)]

    def written(at: Path) -> Written:
        with patch.object(sets, "draw", drawn):
            return write(at)

    return written


def _cases(
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
    whole = _real(faces, write)

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


def _gone(pattern: str) -> tuple[Callable[[Path], None], str]:
    return lambda at: next(iter(sorted(at.glob(pattern)))).unlink(), "no such file"


def _replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Other text in a file, once."""

    def spoil(at: Path) -> None:
        (at / name).write_text((at / name).read_text().replace(old, new, 1))

    return spoil


def _joined(name: str, number: int) -> Callable[[Path], None]:
    """A line that goes on into the next one."""

    def spoil(at: Path) -> None:
        lines = (at / name).read_text().splitlines(keepends=True)
        lines[number] = lines[number].rstrip("\n")
        (at / name).write_text("".join(lines))

    return spoil


def _split(count: int) -> list[str]:
    """Two thirds train."""
    return ["train" if i < count * 2 // 3 else "test" for i in range(count)]


# -- lists of pictures ----------------------------------------------------------------------------


def rafdb(faces: Faces) -> Iterator[Case]:
    """Names and codes 1 to 7 in a list, aligned pictures."""
    _, labels = faces
    stems = [f"{split}_{i:05d}" for i, split in enumerate(_split(len(labels)))]

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
    yield from _cases(
        faces, write, "",
        {
            "picture missing": _gone("Image/aligned/*"),
            "newline missing": (_replaced(listed, "\n", " "), "no such file"),
            "unknown code": (_replaced(listed, ".jpg ", ".jpg 9"), "list_patition_label.txt line 1"),
            "list is no text": (lambda at: (at / listed).write_bytes(b"\xff\xfe\xff"), "expected text"),
        },
    )  # fmt: skip


def affectnet_2017(faces: Faces) -> Iterator[Case]:
    """Lists with boxes."""
    _, labels = faces
    splits = _split(len(labels))
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
    yield from _cases(
        faces, write, "",
        {
            "picture missing": _gone("Manually_Annotated_Images/*/*"),
            "other columns": (_replaced(listed, "expression", "emotion"), "expression"),
            "unknown code": (_replaced(listed, ",-2,", "7,-2,"), "training.csv row 0"),
            "newline missing": (_joined(listed, 1), "expected CSV"),
        },
    )  # fmt: skip


def affectnet_2021(faces: Faces) -> Iterator[Case]:
    """One array of text per face."""
    _, labels = faces
    splits = _split(len(labels))

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

    yield from _cases(
        faces, write, "",
        {
            "array missing": _gone("train_set/annotations/*"),
            "array's magic": (array(b"?" * 80), "expected one emotion code"),
            "array is a pickle": (array(b"\x80\x04K\x01."), "expected one emotion code"),
            "array cut": (lambda at: cut(at / "val_set/annotations" / _last(at), 100), "emotion code"),
        },
    )  # fmt: skip


def _last(at: Path) -> str:
    return max(file.name for file in (at / "val_set/annotations").iterdir())


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

    yield from _cases(
        faces, write, "",
        {
            "picture missing": _gone("origin/*"),
            "newline missing": (_replaced("label/label.lst", "\n", " "), "label.lst line 1"),
            "list cut": (lambda at: cut(at / "label/label.lst", -6), "label.lst line"),
        },
    )  # fmt: skip


def affwild2(faces: Faces) -> Iterator[Case]:
    """Frames of two videos."""
    _, labels = faces
    splits = _split(len(labels))

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
    yield from _cases(
        faces, write, "",
        {
            "unknown code": (_replaced(video, "\n", "\n99\n"), "v-train.txt line 2"),
            "newline missing": (_joined(video, 1), "v-train.txt line 2"),
            "unknown class": (_replaced(video, "Fear", "Fright"), "Fright"),
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

    yield from _cases(faces, write, "", {"unknown name": (rename, "expected a name such as")})


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
    yield from _cases(
        faces, write, "",
        {
            "unknown code": (lambda at: sets.text(at / code, "   9.0e+00\n"), "_emotion.txt line 1"),
            "code is no number": (lambda at: sets.text(at / code, "x"), "expected an emotion code"),
        },
    )  # fmt: skip


# -- class folders --------------------------------------------------------------------------------


def sfew(faces: Faces) -> Iterator[Case]:
    """Aligned faces in folders by class."""
    named = {"train": "Train_Aligned_Faces", "test": "Val_Aligned_Faces_new"}
    yield from _folders(faces, "sfew", named, str.capitalize)


def folder(faces: Faces) -> Iterator[Case]:
    """The plain layout."""
    yield from _folders(faces, "folder", {"train": "train", "test": "test"}, lambda name: name)


def _folders(
    faces: Faces, kind: str, named: Mapping[str, str], spelled: Callable[[str], str]
) -> Iterator[Case]:
    _, labels = faces
    names = [
        (f"{named[split]}/{spelled(label)}/{i:04d}.png", label, split)
        for i, (label, split) in enumerate(zip(labels, _split(len(labels)), strict=True))
    ]

    def write(at: Path) -> Written:
        images = sets.pictures(at, [name for name, _, _ in names])
        rows = [Row(name, images[name], label, split) for name, label, split in names]
        order = {split: i for i, split in enumerate(named.values())}
        if kind == "folder":
            order = {}
        rows.sort(key=lambda row: (order.get(row.id.partition("/")[0], 0), row.id.split("/")))
        return {"kind": kind, "path": str(at)}, rows

    def rename(at: Path) -> None:
        at = at / named["train"]
        next(at.iterdir()).rename(at / "4")

    yield from _cases(faces, write, "", {"class is a number": (rename, "unknown class name '4'")})


# -- tables ---------------------------------------------------------------------------------------


def _usage(labels: Sequence[str]) -> list[str]:
    return ["Training" if split == "train" else "PublicTest" for split in _split(len(labels))]


def _rows_of(faces: Faces, name: str) -> list[Row]:
    """Rows of a table with encoded faces."""
    pixels, labels = faces
    return [
        Row(f"{name}#{i}", encode(face), label, split)
        for i, (face, label, split) in enumerate(
            zip(pixels, labels, _split(len(labels)), strict=True)
        )
    ]


def fer2013(faces: Faces) -> Iterator[Case]:
    """Text of pixels, in three shapes, Parquet, and folders."""
    pixels, labels = faces
    codes = [FER2013.index(label) for label in labels]

    def csv(header: str, name: str, usage: bool = True) -> Callable[[Path], Written]:
        def write(at: Path) -> Written:
            sets.fer2013_csv(at / name, codes, _usage(labels) if usage else None, header)
            rows = _rows_of(faces, name)
            if not usage:
                rows = [replace(row, role="train") for row in rows]
            return {"kind": "fer2013", "path": str(at)}, rows

        return _real(faces, write)

    def parquet(at: Path) -> Written:
        rows = _rows_of(faces, "a.parquet")
        columns = {"usage": _usage(labels), "emotion": codes, "image": [r.image for r in rows]}
        at.mkdir(parents=True)
        pq.write_table(pa.table(columns), at / "a.parquet")
        return {"kind": "fer2013", "path": str(at / "a.parquet")}, rows

    plain = csv("emotion,pixels,Usage", "fer2013.csv")

    def spoiled(write: Callable[[Path], Written], spoil: Callable[[Path], None]) -> Any:
        def written(at: Path) -> Written:
            config, rows = write(at)
            spoil(at)
            return config, rows

        return written

    yield Case("whole, fer2013.csv", plain)
    yield Case("whole, icml_face_data.csv", csv("emotion, Usage, pixels", "icml_face_data.csv"))
    yield Case("whole, train.csv", csv("emotion,pixels", "train.csv", usage=False))
    yield Case("whole, Parquet", parquet)
    for case in _folders(faces, "fer2013", {"train": "train", "test": "test"}, lambda name: name):
        if case.name != "class is a number":
            yield replace(case, name=f"folders: {case.name}", write=_by_path(case.write))
    text = {
        "file cut": (lambda at: cut(at / "fer2013.csv", -3000), "fer2013.csv"),
        "newline missing": (_joined("fer2013.csv", 1), "expected CSV"),
        "pixel missing": (_replaced("fer2013.csv", " ", ""), "fer2013.csv row 0"),
        "unknown code": (_replaced("fer2013.csv", "\n", "\n1"), "fer2013.csv row 0"),
    }
    for name, (spoil, line) in text.items():
        yield Case(name, spoiled(plain, spoil), line)
    yield Case("Parquet cut", spoiled(parquet, lambda at: cut(at / "a.parquet", -500)), "a.parquet")


def _by_path(write: Callable[[Path], Written]) -> Callable[[Path], Written]:
    """The rows in the order of their paths, as the folder kind reads them."""

    def written(at: Path) -> Written:
        config, rows = write(at)
        return config, sorted(rows, key=lambda row: row.id.split("/"))

    return written


def ferplus(faces: Faces) -> Iterator[Case]:
    """Pictures with votes, the pair of csv files, and Parquet."""
    pixels, labels = faces
    usage = _usage(labels)
    order = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
    votes = [[9 if name == label else 0 for name in (*order, "", "")] for label in labels]

    def pictures(at: Path) -> Written:
        rows: list[Row] = []
        for part, split in (("FER2013Train", "train"), ("FER2013Valid", "test")):
            own = {i: v for i, v in enumerate(votes) if _split(len(labels))[i] == split}
            images = sets.ferplus_pictures(at, part, own)
            for i in own:
                name = f"{part}/fer{i:07d}.png"
                rows.append(Row(name, images[name], labels[i], split))
        return {"kind": "ferplus", "path": str(at)}, rows

    def pair(at: Path) -> Written:
        codes = [FER2013.index(label) for label in labels]
        sets.fer2013_csv(at / "fer2013.csv", codes, usage, "emotion,pixels,Usage")
        head = ",".join(["Usage", "Image name", *order, "unknown", "NF"])
        lines = [f"{u},x.png,{','.join(map(str, v))}" for u, v in zip(usage, votes, strict=True)]
        sets.text(at / "fer2013new.csv", "\n".join([head, *lines]) + "\n")
        return {"kind": "ferplus", "path": str(at)}, _rows_of(faces, "fer2013.csv")

    def parquet(at: Path) -> Written:
        rows = _rows_of(faces, "a.parquet")
        columns: dict[str, Any] = {"usage": usage, "image": [row.image for row in rows]}
        columns |= {name: [9 * (name == label) for label in labels] for name in VOTES}
        at.mkdir(parents=True)
        pq.write_table(pa.table(columns), at / "a.parquet")
        return {"kind": "ferplus", "path": str(at / "a.parquet")}, rows

    def short(at: Path) -> Written:
        config, rows = _real(faces, pair)(at)
        file = at / "fer2013new.csv"
        file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
        return config, rows

    yield from _cases(
        faces, pictures, "",
        {
            "picture missing": _gone("FER2013Train/*.png"),
            "newline missing": (_joined("FER2013Train/label.csv", 0), "expected CSV"),
        },
    )  # fmt: skip
    yield Case("whole, pair of csv files", _real(faces, pair))
    yield Case("whole, Parquet", parquet)
    yield Case("votes lack a row", short, "fer2013new.csv")


def table(faces: Faces) -> Iterator[Case]:
    """CSV with paths and Parquet with bytes and boxes."""
    pixels, labels = faces
    splits = _split(len(labels))

    def csv(at: Path) -> Written:
        names = [f"faces/{i:04d}.png" for i in range(len(labels))]
        images = sets.pictures(at, names)
        lines = [f"{n},{label},{s}" for n, label, s in zip(names, labels, splits, strict=True)]
        sets.text(at / "t.csv", "\n".join(["image,label,part", *lines]) + "\n")
        config = {"kind": "table", "path": str(at / "t.csv"), "split_column": "part"}
        rows = [
            Row(f"t.csv#{i}", images[name], label, split)
            for i, (name, label, split) in enumerate(zip(names, labels, splits, strict=True))
        ]
        return config, rows

    def parquet(at: Path) -> Written:
        x, y, width, height = BOX
        box = (x, y, x + width, y + height)
        rows = [
            replace(row, box=box, group=f"p{i % 7}")
            for i, row in enumerate(_rows_of(faces, "t.parquet"))
        ]
        columns = {
            "image": [row.image for row in rows],
            "label": [FER2013.index(label) for label in labels],
            "part": splits,
            "who": [row.group for row in rows],
            "at": pa.array([box] * len(rows), pa.list_(pa.float32())),
        }
        at.mkdir(parents=True)
        pq.write_table(pa.table(columns), at / "t.parquet")
        config = {
            "kind": "table", "path": str(at / "t.parquet"), "split_column": "part",
            "group_column": "who", "box_column": "at", "names": "fer2013",
        }  # fmt: skip
        return config, rows

    def spoiled(spoil: Callable[[Path], None]) -> Callable[[Path], Written]:
        def written(at: Path) -> Written:
            config, rows = _real(faces, csv)(at)
            spoil(at)
            return config, rows

        return written

    yield Case("whole, CSV of paths", _real(faces, csv))
    yield Case("whole, Parquet with boxes and codes", parquet)
    yield Case("picture missing", spoiled(_gone("faces/*")[0]), "no such file")
    yield Case("newline missing", spoiled(_joined("t.csv", 1)), "expected CSV")
    yield Case("unknown class", spoiled(_replaced("t.csv", f",{labels[0]},", ",glee,")), "glee")
    yield Case("list is no text", spoiled(lambda at: cut(at / "t.csv", 0)), "t.csv")
