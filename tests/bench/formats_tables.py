"""Labeled sets in class folders and tables, for the bench formats: real faces in their layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.labeled.codes import FER2013
from pipeline.labeled.ferplus import VOTES
from pipeline.synthetic import encode
from tests.bench.cases import Case, Row, cut
from tests.bench.formats_labeled import (
    BOX,
    Faces,
    Written,
    cases_of,
    gone,
    joined,
    replaced,
    split_of,
    with_real,
)
from tests.labeled import writers as sets


def cases(faces: Faces) -> dict[str, list[Case]]:
    """Format -> its cases."""
    made = (sfew, folder, fer2013, ferplus, table)
    return {format.__name__: list(format(faces)) for format in made}


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
        for i, (label, split) in enumerate(zip(labels, split_of(len(labels)), strict=True))
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

    yield from cases_of(faces, write, "", {"class is a number": (rename, "unknown class name '4'")})


# -- tables ---------------------------------------------------------------------------------------


def _usage(labels: Sequence[str]) -> list[str]:
    return ["Training" if split == "train" else "PublicTest" for split in split_of(len(labels))]


def _rows_of(faces: Faces, name: str) -> list[Row]:
    """Rows of a table with encoded faces."""
    pixels, labels = faces
    return [
        Row(f"{name}#{i}", encode(face), label, split)
        for i, (face, label, split) in enumerate(
            zip(pixels, labels, split_of(len(labels)), strict=True)
        )
    ]


def fer2013(faces: Faces) -> Iterator[Case]:
    """Text of pixels, in three shapes, Parquet, and folders."""
    _, labels = faces
    codes = [FER2013.index(label) for label in labels]

    def csv(header: str, name: str, usage: bool = True) -> Callable[[Path], Written]:
        def write(at: Path) -> Written:
            sets.fer2013_csv(at / name, codes, _usage(labels) if usage else None, header)
            rows = _rows_of(faces, name)
            if not usage:
                rows = [replace(row, role="train") for row in rows]
            return {"kind": "fer2013", "path": str(at)}, rows

        return with_real(faces, write)

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
        "newline missing": (joined("fer2013.csv", 1), "expected CSV"),
        "pixel missing": (replaced("fer2013.csv", " ", ""), "fer2013.csv row 0"),
        "unknown code": (replaced("fer2013.csv", "\n", "\n1"), "fer2013.csv row 0"),
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
    _, labels = faces
    usage = _usage(labels)
    order = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
    votes = [[9 if name == label else 0 for name in (*order, "", "")] for label in labels]

    def pictures(at: Path) -> Written:
        rows: list[Row] = []
        for part, split in (("FER2013Train", "train"), ("FER2013Valid", "test")):
            own = {i: v for i, v in enumerate(votes) if split_of(len(labels))[i] == split}
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
        config, rows = with_real(faces, pair)(at)
        file = at / "fer2013new.csv"
        file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
        return config, rows

    yield from cases_of(
        faces, pictures, "",
        {
            "picture missing": gone("FER2013Train/*.png"),
            "newline missing": (joined("FER2013Train/label.csv", 0), "expected CSV"),
        },
    )  # fmt: skip
    yield Case("whole, pair of csv files", with_real(faces, pair))
    yield Case("whole, Parquet", parquet)
    yield Case("votes lack a row", short, "fer2013new.csv")


def table(faces: Faces) -> Iterator[Case]:
    """CSV with paths and Parquet with bytes and boxes."""
    _, labels = faces
    splits = split_of(len(labels))

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
            config, rows = with_real(faces, csv)(at)
            spoil(at)
            return config, rows

        return written

    yield Case("whole, CSV of paths", with_real(faces, csv))
    yield Case("whole, Parquet with boxes and codes", parquet)
    yield Case("picture missing", spoiled(gone("faces/*")[0]), "no such file")
    yield Case("newline missing", spoiled(joined("t.csv", 1)), "expected CSV")
    yield Case("unknown class", spoiled(replaced("t.csv", f",{labels[0]},", ",glee,")), "glee")
    yield Case("list is no text", spoiled(lambda at: cut(at / "t.csv", 0)), "t.csv")
