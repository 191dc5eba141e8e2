"""Proves that data is recognized by its names and columns, never guessed from numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labeled import writers as sets
from test_inspecting import COUNT, FACES, WRITERS, folder

from pipeline import recognizing
from pipeline.errors import SourceError
from pipeline.inspecting import inspect
from pipeline.recognizing import Found, recognize, recognize_pool
from pipeline.storage import location

LABELED = {
    "rafdb": lambda at: sets.rafdb(at, {"train_00001.jpg": 4, "test_0001.jpg": 7}),
    "affectnet": lambda at: sets.affectnet_2017(at, "training", [("a/b.jpg", (0, 0, 9, 9), 1)]),
    "kdef": lambda at: sets.kdef(at, ["AF01AFS", "AF01HAS", "AM01SAS"]),
    "ckplus": lambda at: sets.ckplus(at, {"S005/001": (4, 3)}),
    "expw": lambda at: sets.expw(at, ["a.jpg 0 1 1 9 9 0.9 3"]),
    "affwild2": lambda at: sets.affwild2(at, "Train_Set", "v1", [0, 4], [1, 2]),
    "ferplus": lambda at: [
        sets.ferplus_pictures(at, folder, {row: [9, 1, 0, 0, 0, 0, 0, 0, 0, 0]})
        for row, folder in enumerate(("FER2013Train", "FER2013Valid"))
    ],
}


@pytest.mark.parametrize("kind", LABELED)
def test_recognize__labeled_sets_as_distributed(tmp_path: Path, kind: str) -> None:
    LABELED[kind](tmp_path)
    found = recognize(str(tmp_path))
    assert (found.role, found.config["kind"]) == ("labeled", kind)


@pytest.mark.parametrize("suffix", [".tsv", ".rec", ".tar", ".zip", ".parquet", ".lance"])
def test_inspect__numbered_patterns(tmp_path: Path, suffix: str) -> None:
    kind = next(kind for s, (_, kind) in recognizing.SUFFIXES.items() if s == suffix)
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[kind](data)
    for i in range(2):
        copy = shutil.copytree if suffix == ".lance" else shutil.copy
        copy(data / f"a{suffix}", data / f"b-{i:02d}{suffix}")
    pattern = str(data / f"b-{{00..01}}{suffix}")
    found = recognize(pattern)
    assert (found.role, found.config["kind"], found.config["path"]) == ("pool", kind, pattern)
    assert found.why.startswith("2 numbered files")
    seen = inspect(pattern, location(tmp_path / "work"))
    assert seen.faces == (None if kind == "msceleb_tsv" else 2 * COUNT)
    with pytest.raises(SourceError, match="no such file or folder"):
        recognize(str(data / f"c-{{00..01}}{suffix}"))


def test_recognize_pool__pictures_of_labeled_sets(tmp_path: Path) -> None:
    folder(tmp_path / "named", ["happy/a.jpg", "sad/a.jpg"])
    at = str(tmp_path / "named")
    assert recognize_pool(at).config == {"kind": "folder", "path": at}
    table = pa.table({"img": FACES[:2], "label": ["happiness", "fear"]})
    pq.write_table(table, tmp_path / "t.parquet")
    at = str(tmp_path / "t.parquet")
    both = tmp_path / "both"
    both.mkdir()
    for i in range(2):
        shutil.copy(at, both / f"{i}.parquet")
    config = {"kind": "parquet", "path": str(both), "image_column": "img"}
    assert recognize(str(both)).role == "labeled"
    assert recognize_pool(str(both)).config == config
    assert recognize_pool(at).config == {"kind": "parquet", "path": at, "image_column": "img"}


def test_recognize__class_folders_are_labeled_and_numbers_are_not(tmp_path: Path) -> None:
    folder(tmp_path / "named", [f"train/{name}/a.jpg" for name in ("happy", "sad", "Angry")])
    assert recognize(str(tmp_path / "named")).role == "labeled"
    folder(tmp_path / "numbers", [f"{code}/a.jpg" for code in range(7)])
    assert recognize(str(tmp_path / "numbers")) == Found(
        "pool",
        {"kind": "folder", "path": str(tmp_path / "numbers")},
        "image files, in 7 folders of no known class",
    )
    folder(tmp_path / "smile", [f"{name}/a.jpg" for name in ("smiling", "sad", "fear")])
    found = recognize(str(tmp_path / "smile"))
    assert found.role == "pool"
    assert found.why.startswith("image files; 2 of 3 folders are classes, not known: smiling; as ")


def test_inspect__a_class_other_is_counted_and_its_policy_written_down(tmp_path: Path) -> None:
    for part, video in (("Train_Set", "v1"), ("Validation_Set", "v2")):
        sets.affwild2(tmp_path, part, video, [0, 4, 7], [1, 2, 3])
    seen = inspect(str(tmp_path), location(tmp_path / "work"))
    assert seen.classes["train"]["other"] == 1
    assert seen.found.config["label_policy"] == "keep"


def test_inspect__csv_files_of_pixels_and_of_paths(tmp_path: Path) -> None:
    pixels = " ".join(["7"] * 48 * 48)
    for name, lines in {
        "fer/fer2013.csv": ["emotion,pixels,Usage", f"3,{pixels},Training"],
        "kaggle/train.csv": ["emotion,pixels", f"4,{pixels}"],
        "own/faces.csv": ["path,label,split", "a.png,happy,test"],
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("\n".join(lines))
    folder(tmp_path / "own", ["a.png"])
    work = location(tmp_path / "work")
    told = {
        name: inspect(str(tmp_path / name), work).classes
        for name in ("fer/fer2013.csv", "kaggle/train.csv", "kaggle", "own/faces.csv")
    }
    assert told["fer/fer2013.csv"] == {"train": {"happiness": 1}}
    assert told["kaggle/train.csv"] == told["kaggle"] == {"train": {"sadness": 1}}
    assert told["own/faces.csv"] == {"test": {"happiness": 1}}
    (tmp_path / "own" / "faces.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SourceError, match=r"no columns of pictures .* and labels .*; found: a, b"):
        recognize(str(tmp_path / "own" / "faces.csv"))
    (tmp_path / "own" / "faces.csv").write_text("image;label\na.png;sad\n")
    with pytest.raises(SourceError, match="columns are parted by ';', expected commas"):
        recognize(str(tmp_path / "own" / "faces.csv"))
    (tmp_path / "own" / "faces.csv").write_text("filename,emotion\na.png,sad\n")
    config = recognize(str(tmp_path / "own" / "faces.csv")).config
    assert (config["image_column"], config["label_column"]) == ("filename", "emotion")


def test_inspect__a_folder_of_labeled_parquet(tmp_path: Path) -> None:
    for part in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        table = pa.table({"image": FACES[:2], "label": ["happiness", "fear"]})
        pq.write_table(table, tmp_path / f"{part}.parquet")
    seen = inspect(str(tmp_path), location(tmp_path / "work"))
    assert (seen.found.config["kind"], seen.faces) == ("table", 6)
    assert {role: counts.total() for role, counts in seen.classes.items()} == {
        "train": 4,
        "test": 2,
    }


def test_recognize__fer2013_as_parquet(tmp_path: Path) -> None:
    table = pa.table({"usage": ["Training"], "image": FACES[:1], "emotion": [3]})
    pq.write_table(table, tmp_path / "fer.parquet")
    assert inspect(str(tmp_path / "fer.parquet"), location(tmp_path)).classes == {
        "train": {"happiness": 1}
    }


def test_recognize__parquet_by_its_columns(tmp_path: Path) -> None:
    label = pa.table({"img": FACES[:2], "label": ["happiness", "fear"]})
    votes = pa.table({"usage": ["Training"], "NF": [0], "neutral": [9], "contempt": [1]})
    for name, table in {"label": label, "votes": votes, "none": pa.table({"x": [1]})}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found = recognize(str(tmp_path / "label.parquet"))
    assert (found.role, found.config["kind"]) == ("labeled", "table")
    assert (found.config["image_column"], found.config["label_column"]) == ("img", "label")
    assert recognize(str(tmp_path / "votes.parquet")).config["kind"] == "ferplus"
    with pytest.raises(SourceError, match="no column of images; found: x"):
        recognize(str(tmp_path / "none.parquet"))


@pytest.mark.parametrize(
    ("names", "line"),
    [([], "it holds nothing"), (["notes.txt"], "it holds notes.txt"), (None, "no such file")],
)
def test_recognize__says_what_it_saw(tmp_path: Path, names: list[str] | None, line: str) -> None:
    at = tmp_path / "data"
    if names is not None:
        at.mkdir()
        folder(at, names)
    with pytest.raises(SourceError, match=line):
        recognize(str(at))
