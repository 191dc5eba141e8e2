"""Copies among labeled faces are found by their pictures and counted as by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import synthetic
from pipeline.guard import GuardConfig
from pipeline.images import Crop
from pipeline.report.copies import copies
from pipeline.report.facts import Copies
from pipeline.report.page import render
from pipeline.run import Run
from pipeline.schema import GUARD, READ
from pipeline.storage import location
from pipeline.survey import describe
from pipeline.tables import write_table
from report.invented import facts

# A picture a letter; `a` once more as JPEG, mirrored. What guard took out is no copy any more.
LABELED = (  # id, picture, role, label, fold, twin
    ("l#0", "a", "train", "fear", 0, None),
    ("l#1", "a jpeg", "train", "surprise", 1, None),
    ("l#2", "a mirrored", "validation", "fear", None, None),
    ("l#3", "b", "train", "anger", 0, None),
    ("l#4", "b jpeg", "train", "anger", 0, None),
    ("l#5", "c", "train", "anger", 1, None),
    ("l#6", "c", "train", "fear", None, "pixels"),
    ("l#7", "b", "rest", None, None, None),
    ("l#8", "d", "train", "neutral", 1, None),
    ("l#9", "e", "train", "neutral", 1, "phash"),
)


def _bytes(picture: str) -> bytes:
    letter, _, how = picture.partition(" ")
    pixels = synthetic.draw(4, np.arange("abcde".index(letter), "abcde".index(letter) + 1))[0]
    if not how:
        return synthetic.encode(pixels)
    buffer = io.BytesIO()
    pixels = pixels[:, ::-1] if how == "mirrored" else pixels
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(location(tmp_path))
    ids, pictures, roles, labels, folds, twins = (list(c) for c in zip(*LABELED, strict=True))
    count = len(ids)
    read = {name: pa.nulls(count, READ.field(name).type) for name in READ.names}
    read |= {"id": ids, "position": range(count), "image": [_bytes(p) for p in pictures]}
    labeled = run.open("labeled", {})
    faces = describe(pa.table(read, schema=READ), Crop(), "gray", threads=1)
    write_table(labeled.dir / "faces.parquet", faces)
    rows = pa.table({"id": ids, "role": roles, "label": pa.array(labels, pa.string())})
    write_table(labeled.dir / "labeled.parquet", rows)
    guard = run.open("guard", {"guard": GuardConfig(copies=0.9).model_dump(mode="json")})
    marked = [
        {"id": i, "twin_of": t and "t#1", "twin_kind": t, "twin_role": t and "test"}
        for i, t in zip(ids, twins, strict=True)
    ]
    write_table(guard.dir / "labeled.parquet", pa.Table.from_pylist(marked, schema=GUARD))
    teach = run.open("teach", {})
    seen = [(i, f) for i, f in zip(ids, folds, strict=True) if f is not None]
    held = pa.table({"id": [i for i, _ in seen], "fold": [f for _, f in seen]})
    write_table(teach.dir / "folds.parquet", held)
    for stage in (labeled, guard, teach):
        stage.finish("d" * 64)
    return run


def _of(run: Run, size: int = 24) -> Copies:
    labeled, guard, teach = (run.artifact(name) for name in ("labeled", "guard", "teach"))
    found = copies([labeled], guard, teach, size)
    assert found is not None
    return found


def test_copies__are_counted_by_picture_label_and_fold(run: Run) -> None:
    found = _of(run)
    assert (found.faces, found.pictures, found.copies) == (7, 2, 3)  # a three times, b twice
    assert (found.conflicting, found.across) == (1, 1)  # a, in both
    assert [(f.id, f.note) for f in found.shown] == [
        ("l#0", "picture 1, labeled fear"),
        ("l#1", "picture 1, labeled surprise"),
        ("l#2", "picture 1, labeled fear"),
    ]
    assert found.shown[0].pixels.shape == (16, 16)
    assert found.twins == {"phash": {"test": 1}, "pixels": {"test": 1}}
    assert len(_of(run, size=2).shown) == 2


def test_copies__without_folds_nothing_is_said_of_them(run: Run) -> None:
    labeled, guard = run.artifact("labeled"), run.artifact("guard")
    found = copies([labeled], guard, None, 0)
    assert found == replace(_of(run, size=0), across=0)
    assert copies([], guard, None, 0) is None


def test_copies__are_words_of_the_page(run: Run) -> None:
    text = render(facts(copies=_of(run)))
    assert "Of 7 labeled faces 3 show a picture again that is there already (2 pictures)" in text
    assert "1 of these pictures carry more than one label" in text
    assert "1 lie in more than one fold" in text
    assert text.count("picture 1, labeled fear") == 4  # alt text and caption of two faces
    # What guard took out of the pool and of the labeled faces, in one table.
    rows = [part.split("</tr>")[0] for part in text.split('<tr><th scope="row">')]
    assert sum("<td>test face</td>" in row and row.endswith(">1</td>") for row in rows) == 2
    none = replace(_of(run), pictures=0, copies=0, conflicting=0, across=0, shown=())
    assert "Of 7 labeled faces none shows the picture" in render(facts(copies=none, noise=None))
