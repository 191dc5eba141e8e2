"""Proves which annotated faces join the training set: guard, classes and sources are obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import annotated, conduct, flow
from pipeline.config import parse
from pipeline.errors import RunError
from pipeline.images import Crop
from pipeline.job import Job
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.recipe import Recipe
from pipeline.rounds import ANSWERS, HOME, Round
from pipeline.schema import LABELED, READ, with_label_names
from pipeline.survey import describe
from pipeline.tables import write_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE, labeled_rows
from tests.test_rounds import queries

NAMES = ("neutral", "happiness")
RECIPE = {
    "name": "small",
    "labeled": {"kind": "synthetic", "count": 40},
    "pool": [{"kind": "synthetic", "name": "web", "count": 100}],
    "tracking": {"uri": "off"},
}
IMAGES = SyntheticSet(count=12, test_count=0).records("x").table["image"].to_pylist()


def stored(job: Job, stage: str, numbers: dict[int, str]) -> None:
    """A labeled stage of drawn faces with their roles."""
    rows = [
        {"id": f"set/{i}", "role": role, "label": NAMES[i % 2], "image": IMAGES[i]}
        for i, role in numbers.items()
    ]
    table = pa.Table.from_pylist(rows, schema=with_label_names(LABELED, NAMES))
    read = pa.Table.from_pylist([{**row, "position": 0} for row in rows], schema=READ)
    made = job.open(stage, {"faces": str(numbers)}, retarget=("inputs",))
    write_table(made.dir / LABELED_FILE, table)
    write_table(made.dir / FACES_FILE, describe(read, Crop(), "gray", threads=1))
    made.finish(f"{stage} {numbers}")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Faces 0-2 train, 3 is for validation and 4 a test face."""
    made = conduct.start(
        parse(Recipe, RECIPE), str(tmp_path / "run"), fresh=False, show_faces=False
    )
    stored(made, "labeled", {0: "train", 1: "train", 2: "train", 3: "validation"})
    stored(made, "test", {4: "test"})
    guard = made.open("guard", {})
    write_table(guard.dir / LABELED_FILE, pa.table({"twin_of": pa.nulls(4, pa.string())}))
    guard.finish("g")
    return made


def answered(job: Job, number: int, *given: tuple[int, str | None], source: str = "web") -> None:
    one = Round(job.run.root / HOME, number)
    one.ask(queries(*(f"web/{face}" for face, _ in given)))
    rows: list[dict[str, Any]] = [
        {"id": f"web/{face}", "label": label, "when": "now"}
        | ({"image": IMAGES[face], "source": source, "group": "g"} if label else {})
        for face, label in given
    ]
    one.answer(pa.Table.from_pylist(rows, schema=ANSWERS))


def trained(job: Job) -> dict[str, str]:
    rows = labeled_rows(flow.handed(job), ("train",))
    return dict(zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True))


OWN = {"set/0": "neutral", "set/1": "happiness", "set/2": "neutral"}


def test_join__without_labels_there_is_no_stage(job: Job) -> None:
    before = flow.training_digest(job)
    assert annotated.join(job) is None
    answered(job, 1, (5, None))
    assert annotated.join(job) is None
    assert annotated.labeled_ids(job) == set()
    assert flow.training_digest(job) == before
    assert trained(job) == OWN


def test_join__every_round_that_is_answered(job: Job) -> None:
    before = flow.training_digest(job)
    answered(job, 1, (5, "happiness"), (6, None))
    Round(job.run.root / HOME, 2).ask(queries("web/9"))
    assert trained(job) == OWN, "nobody has joined it yet"
    first = annotated.join(job)
    assert first is not None
    assert trained(job) == {**OWN, "web/5": "happiness"}
    assert annotated.labeled_ids(job) == {"web/5"}
    after = flow.training_digest(job)
    assert annotated.join(job) == first
    answered(job, 3, (7, "neutral"))
    second = annotated.join(job)
    assert second is not None
    assert second.facts["per_class"] == {"happiness": 1, "neutral": 1}
    assert trained(job) == {**OWN, "web/5": "happiness", "web/7": "neutral"}
    assert len({before, after, flow.training_digest(job)}) == 3


def test_join__twins_of_test_and_validation_faces_stay_out(job: Job) -> None:
    answered(job, 1, (3, "neutral"), (4, "neutral"), (5, "happiness"), (6, "happiness"))
    made = annotated.join(job)
    assert made is not None
    assert (made.facts["faces"], made.facts["twins"]) == (2, 2)
    assert trained(job) == {**OWN, "web/5": "happiness", "web/6": "happiness"}
    stored(job, "test", {6: "test"})  # another test set: face 4 is free, face 6 is not
    made = annotated.join(job)
    assert made is not None
    assert trained(job) == {**OWN, "web/4": "neutral", "web/5": "happiness"}


@pytest.mark.parametrize(
    ("label", "source", "said"),
    [
        ("neutral", "film", "source 'film' is not of this recipe; found: web"),
        ("fear", "web", "label 'fear' is not of this recipe; found: neutral, happiness"),
    ],
)
def test_join__what_the_recipe_lacks_is_named(job: Job, label: str, source: str, said: str) -> None:
    answered(job, 1, (5, label), source=source)
    with pytest.raises(RunError, match=said):
        annotated.join(job)
