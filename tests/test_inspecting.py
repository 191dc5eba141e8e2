"""Proves that data is recognized by what it is, counted and audited, never guessed from numbers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
import torch
from labeled import writers as sets
from sources.writers import insightface, tar_bytes, tsv_line, write_lance, write_rec

from pipeline import synthetic
from pipeline.images import Crop
from pipeline.inspecting import (
    audit,
    contact_sheet,
    inspect,
    said,
)
from pipeline.labeled.records import Records, records_table
from pipeline.metrics import LabelOrder
from pipeline.models import ModelConfig
from pipeline.sources.rows import labeled_rows_as_read
from pipeline.storage import location

COUNT = 24
FACES = [synthetic.encode(pixels) for pixels in synthetic.draw(0, list(range(COUNT)))]


def folder(at: Path, names: list[str]) -> None:
    for name in names:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(FACES[0])


def zipped(at: Path) -> None:
    with zipfile.ZipFile(at, "w") as archive:
        for i, face in enumerate(FACES):
            archive.writestr(f"{i}.jpg", face)


WRITERS = {
    "msceleb_tsv": lambda at: (at / "a.tsv").write_bytes(b"\n".join(map(tsv_line, FACES)) + b"\n"),
    "recordio": lambda at: write_rec(at / "a.rec", insightface([FACES[:10], FACES[10:]])),
    "webdataset": lambda at: (at / "a.tar").write_bytes(
        tar_bytes([(f"{i}.jpg", face) for i, face in enumerate(FACES)])
    ),
    "zip": lambda at: zipped(at / "a.zip"),
    "parquet": lambda at: pq.write_table(pa.table({"image": FACES}), at / "a.parquet"),
    "lance": lambda at: write_lance(at / "a.lance", pa.table({"image": FACES}), 10),
    "folder": lambda at: folder(at, [f"person{i}/{i}.jpg" for i in range(COUNT)]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_inspect__pools_are_recognized_and_counted(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[kind](data)
    work = location(tmp_path / "work")
    seen = inspect(str(data), work)
    assert (seen.found.role, seen.found.config["kind"]) == ("pool", kind)
    assert seen.faces == (None if kind == "msceleb_tsv" else COUNT)
    assert seen.states == {"ok": COUNT}
    assert seen.sizes == [(48, 48, COUNT)]
    assert seen.sheet is not None
    assert seen.sheet.shape == (3 * 124, 8 * 96, 3)
    assert said(seen)[1].startswith(f"recipe: pool: [{{kind: {kind}, path: ")
    if kind != "folder":
        (file,) = (at for at in data.iterdir() if at.suffix != ".idx")
        assert inspect(str(file), work).found.config["kind"] == kind


def test_inspect__says_where_a_set_differs_from_the_published_one(tmp_path: Path) -> None:
    sets.rafdb(tmp_path, {"train_00001.jpg": 4, "test_0001.jpg": 7})
    lines = said(inspect(str(tmp_path), location(tmp_path / "work")))
    assert "train: 1 (happiness 1)" in lines
    assert "train: 1 faces; published: 12,271" in lines


def test_inspect__counts_classes_of_a_labeled_set(tmp_path: Path) -> None:
    folder(tmp_path, ["train/happy/a.jpg", "train/happy/b.jpg", "test/fear/a.jpg"])
    seen = inspect(str(tmp_path), location(tmp_path / "work"))
    assert seen.classes == {"train": {"happiness": 2}, "test": {"fear": 1}}
    lines = said(seen)
    assert lines[0].endswith("3 faces")
    assert "train: 2 (happiness 2)" in lines
    assert "test: 1 (fear 1)" in lines


def test_inspect__warns_of_people_on_both_sides_of_a_split(tmp_path: Path) -> None:
    rows = {
        "path": [f"{i}.jpg" for i in range(3)],
        "emotion": ["happy", "sad", "sad"],
        "subject": [7, 8, 7],
        "split": ["train", "train", "test"],
    }
    for name in rows["path"]:
        folder(tmp_path, [name])
    pcsv.write_csv(pa.table(rows), tmp_path / "faces.csv")
    lines = said(inspect(str(tmp_path / "faces.csv"), location(tmp_path / "work")))
    assert "group_column: subject" in lines[1]
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "1 group(s), such as '7', are in both train and test: 1 of 1 test faces" in warning


class Brightness:
    """A judge of three shades."""

    label_names = ("neutral", "happiness", "sadness")
    members = (SimpleNamespace(config=ModelConfig(size=16)),)

    def represent(self, pixels: torch.Tensor) -> tuple[None, torch.Tensor]:
        shade = (pixels.float().mean((1, 2, 3)) / 86).long()
        return None, torch.nn.functional.one_hot(shade, 3).float()

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@pytest.mark.parametrize("mixed_up", [False, True])
def test_audit__finds_names_that_were_exchanged(mixed_up: bool) -> None:
    names = Brightness.label_names
    order = names[1:] + names[:1] if mixed_up else names
    shades = [20 + 86 * (i % 3) for i in range(60)]
    images = [synthetic.encode(np.full((16, 16), shade, np.uint8)) for shade in shades]
    labels: list[str | None] = [order[i % 3] for i in range(60)]
    labels[:3] = ["surprise", None, "fear"]  # of no class of the model
    table = records_table([str(i) for i in range(60)], [None] * 60, labels, images)
    found = audit(Records(table, names, {}), Brightness(), Crop())  # type: ignore[arg-type]
    assert (found.accuracy, found.accuracy_permuted) == (0 if mixed_up else 1, 1)
    assert found.suspicious == mixed_up


def test_said__a_model_that_knows_nothing_judges_no_names(tmp_path: Path) -> None:
    classes = ("happiness", "sadness", "fear", "anger", "neutral")
    folder(tmp_path, [f"{name}/a.jpg" for name in classes])
    seen = inspect(str(tmp_path), location(tmp_path / "work"))
    told = {}
    for right in (0.27, 0.39, 0.41):
        seen.order = LabelOrder((), right, right)
        (told[right],) = (line for line in said(seen) if line.startswith("label order: "))
    assert told[0.27].startswith("label order: cannot be told, the model knows too little")
    assert told[0.39].startswith("label order: cannot be told")  # below twice chance
    assert told[0.41].startswith("label order: as named; the model agrees with 41.0%")


def test_contact_sheet__bad_faces_stay_dark(tmp_path: Path) -> None:
    seen = labeled_rows_as_read(
        records_table(["a", "b"], [None] * 2, [None] * 2, [FACES[0], b"no image"])
    )
    sheet = contact_sheet(seen, Crop(), ["good", "bad\nnot_an_image"])
    assert sheet[2:94, 2:94].std() > 10
    assert (sheet[2:94, 98:190] == 105).all()
