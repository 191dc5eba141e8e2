"""Proves that recipes of papers have the papers' arithmetic: epochs, weights, draws, thresholds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from labeled import writers

from pipeline.labeled.affectnet import OFFICIAL as AFFECTNET
from pipeline.labeled.rafdb import OFFICIAL as RAFDB
from pipeline.labeled.rafdb import RafdbSet
from pipeline.recipe import Recipe, load

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


@pytest.fixture(autouse=True)
def _data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMNIFER_LABELED", "OMNIFER_POOL"):
        monkeypatch.setenv(name, "unused")


def shipped(name: str, *sets: str) -> Recipe:
    return load(RECIPES / f"{name}.yaml", sets)


def head(name: str) -> str:
    """What a recipe says of itself, one line."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def epochs(counts: dict[str, int], share: float, classes: tuple[str, ...]) -> tuple[int, int]:
    """Steps of SSFER's 100 and 50 epochs: four fifths of the labels by 32, the rest by 64."""
    labels = sum(int(share * counts[name] + 0.5) for name in classes)
    rest = sum(counts[name] for name in classes) - labels
    return 100 * (labels * 4 // 5 // 32), 50 * (rest // 64)


CLASSES = tuple(AFFECTNET["validation"])
SEVEN = tuple(name for name in CLASSES if name != "contempt")


@pytest.mark.parametrize(
    ("kind", "classes", "share", "counts"),
    [
        *(("rafdb", SEVEN, share, RAFDB["train"]) for share in (0.05, 0.1, 0.25)),
        *(("affectnet", SEVEN, share, AFFECTNET["train"]) for share in (0.01, 0.05, 0.1)),
        *(("affectnet", CLASSES, share, AFFECTNET["train"]) for share in (0.01, 0.05, 0.1)),
    ],
)
def test_ssfer__steps_are_the_papers_epochs(
    kind: str, classes: tuple[str, ...], share: float, counts: dict[str, int]
) -> None:
    teach, student = epochs(counts, share, classes)
    between = "(, student.steps=| --set student.steps=| and )"
    assert re.search(rf"\b{teach}{between}{student}\b", head("ssfer")), (teach, student)
    more = [f"labeled.classes={len(classes)}"] if kind == "affectnet" else []
    sets = (f"labeled.kind={kind}", f"labeled.fraction={share}", *more)
    assert shipped("ssfer", *sets).labeled.fraction == share


def test_ssfer__as_written_are_ten_percent_of_rafdb() -> None:
    recipe = shipped("ssfer")
    assert recipe.labeled.fraction == 0.1
    assert (recipe.teach.steps, recipe.student.steps) == epochs(RAFDB["train"], 0.1, SEVEN)
    assert (recipe.teach.batch, recipe.student.mined_batch) == (32, 64)


def test_ssfer__launches_with_the_folder_that_the_reader_takes(tmp_path: Path) -> None:
    found = re.search(r"OMNIFER_LABELED=\.\.\./RAF-DB(\S*)", head("ssfer"))
    assert found
    top = tmp_path / "RAF-DB"
    writers.rafdb(top / "basic", {"train_00001.jpg": 5, "test_0001.jpg": 7})
    assert len(RafdbSet(path=f"{top}{found[1]}").records("rafdb").table) == 2


@pytest.mark.parametrize("name", ["ssfer", "dtm", "dtm-affwild2"])
def test_students__learn_plain_cross_entropy_from_faces_drawn_alike(name: str) -> None:
    student = shipped(name).student
    assert (student.smoothing, student.labeled_power, student.mined_power) == (0, 0, 0)


def test_ssfer__labels_are_smoothed_where_faces_are_mixed_and_nobody_draws_by_class() -> None:
    teach = shipped("ssfer").teach
    assert (teach.mix, teach.smoothing, teach.imbalance) == ("facemix", 0.1, "none")


@pytest.mark.parametrize("name", ["dtm", "dtm-affwild2"])
def test_dtm__thresholds_rise_in_twenty_epochs_as_ada_cms(name: str) -> None:
    student = shipped(name).student
    assert student.online is not None
    assert (student.online.thresholds.rule, student.online.epoch_steps) == ("dtm", 800)
    assert student.steps == 20 * 800


@pytest.mark.parametrize("name", ["dtm", "dtm-affwild2"])
def test_dtm__losses_are_to_each_other_as_ada_cms(name: str) -> None:
    student = shipped(name).student
    assert student.online is not None
    assert (student.mined_weight * 0.5, student.online.low_weight * 0.5) == (1, 0.1)
    assert (student.ramp, student.online.low) == (0, "contrastive")
