"""Proves a learning curve by hand: the same faces in every round, whatever each teacher learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import conduct, curve
from pipeline.config import parse
from pipeline.job import Job
from pipeline.recipe import Recipe
from pipeline.rounds import HOME, Round
from pipeline.schema import LABELED, with_label_names
from pipeline.tables import write_table
from pipeline.training import exam, runs
from pipeline.training.handed import FACES_FILE, LABELED_FILE
from pipeline.training.references import FOLDS
from tests.test_rounds import answers, queries

NAMES = ("neutral", "happiness")
TRUTH = {"t0": 0, "t1": 1, "t2": 0, "t3": 1, "p1": 1, "p2": 0, "p3": 1, "o1": 0, "o2": 1}
RECIPE = {
    "name": "small",
    "labeled": {"kind": "synthetic", "count": 40},
    "pool": [{"kind": "synthetic", "count": 100}],
    "tracking": {"uri": "off"},
}


def labeled(roles: Mapping[str, str]) -> pa.Table:
    rows = [
        {"id": face, "role": role, "label": NAMES[TRUTH.get(face, 0)]}
        for face, role in roles.items()
    ]
    return pa.Table.from_pylist(rows, schema=with_label_names(LABELED, NAMES))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Four training faces, two rounds: p1 and p2, then p3."""
    made = conduct.start(parse(Recipe, RECIPE), str(tmp_path / "run"), fresh=True, show_faces=False)
    stage = made.open("labeled", {})
    write_table(stage.dir / LABELED_FILE, labeled(dict.fromkeys(("t0", "t1", "t2", "t3"), "train")))
    stage.finish("l" * 64)
    for number, given in enumerate(({"p1": 1, "p2": 0}, {"p3": 1}), 1):
        one = Round(made.run.root / HOME, number)
        one.ask(queries(*given))
        one.answer(answers({face: NAMES[code] for face, code in given.items()}))
    return made


def taught(job: Job, said: Mapping[str, int], steps: int = 3) -> None:
    """A finished teacher that says these classes of the faces it learned."""
    identity = {"teach": {"steps": steps}, "inputs": {"labeled": str(sorted(said.items()))}}
    stage = job.run.open("teach", identity, retarget=("inputs",))
    rows = [
        {"id": face, "label": NAMES[TRUTH[face]], "fold": 0, "logits": np.eye(2)[code].tolist()}
        for face, code in said.items()
    ]
    write_table(stage.dir / runs.FOLDS_FILE, pa.Table.from_pylist(rows, schema=FOLDS))
    stage.finish(f"{len(said)}" * 64)


def test_draw__by_hand(job: Job) -> None:
    taught(job, {"t0": 1, "t1": 1, "t2": 1}, steps=9)  # other settings: no point
    taught(job, {"t0": 1, "t1": 1, "t2": 0, "t3": 0})
    taught(job, {"t0": 0, "t1": 1, "t2": 1, "p1": 0, "p2": 0})  # t3 was removed meanwhile
    taught(job, {"t0": 0, "t1": 1, "t2": 0, "p1": 0, "p2": 1, "p3": 0})
    points = curve.draw(job)
    assert [(p["round"], p["labels"], p["faces"]) for p in points] == [
        (0, 0, 3),
        (1, 2, 3),
        (2, 3, 3),
    ]
    assert [p["accuracy"] for p in points] == pytest.approx([2 / 3, 2 / 3, 1])
    # Truth 0 1 0; said 1 1 0, then 0 1 1: F1 of one class 2/3, of the other 2/3 as well.
    assert [p["macro_f1"] for p in points] == pytest.approx([2 / 3, 2 / 3, 1])
    assert [p["per_class"] for p in points] == [
        {},
        {"happiness": 1, "neutral": 1},
        {"happiness": 2, "neutral": 1},
    ]
    assert {p["validation"] for p in points} == {None}
    home = job.run.root / HOME
    stored = (home / curve.CURVE_FILE).read_json()
    assert stored == {"label_names": list(NAMES), "points": points}
    drawn = (home / curve.FIGURE_FILE).read_text()
    assert drawn.count("<circle") == 6
    table = curve.table(points, NAMES)
    assert [column.header for column in table.columns] == [
        "round",
        "labels",
        "neutral",
        "happiness",
        "accuracy",
        "macro-F1",
    ]


def test_draw__the_newest_teacher_of_a_round_counts(job: Job) -> None:
    taught(job, {"t0": 1, "t1": 0, "t2": 1, "t3": 0})
    taught(job, {"t0": 0, "t1": 1, "t2": 1})
    (point,) = curve.draw(job)
    assert (point["round"], point["faces"]) == (0, 3)
    assert point["accuracy"] == pytest.approx(2 / 3)


def test_draw__teachers_of_another_labeled_set_are_no_point(job: Job) -> None:
    taught(job, {"o1": 0, "o2": 1})
    taught(job, {"t0": 0, "t1": 1, "p1": 1})
    (point,) = curve.draw(job)
    assert (point["round"], point["labels"], point["faces"]) == (1, 1, 2)


def test_draw__validation_faces_are_judged_once_per_teacher(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = job.run.artifact("labeled").dir
    roles = {"t0": "train", "t1": "train", "v0": "validation", "v1": "validation"}
    write_table(at / LABELED_FILE, labeled(roles))
    write_table(at / FACES_FILE, pa.table({"status": ["ok"] * 4}))
    guard = job.open("guard", {})
    write_table(guard.dir / LABELED_FILE, pa.table({"twin_of": pa.nulls(4, pa.string())}))
    guard.finish("g" * 64)
    asked: list[str] = []

    def say(folder: object, rows: pa.Table, *_: object) -> np.ndarray:
        asked.append(str(folder))
        assert rows["id"].to_pylist() == ["v0", "v1"]
        return np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)

    monkeypatch.setattr(exam, "probabilities", say)
    taught(job, {"t0": 0, "t1": 1})
    first = curve.draw(job)
    assert first[0]["validation"]["accuracy"] == 0.5  # both are neutral
    taught(job, {"t0": 0, "t1": 1, "p1": 1})
    assert [p["validation"]["faces"] for p in curve.draw(job)] == [2, 2]
    assert len(asked) == 2
    assert "validation" in [c.header for c in curve.table(curve.draw(job), NAMES).columns]
