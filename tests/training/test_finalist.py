"""Proves whose labels teach a finalist, what it learns beside them, and who judges it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import RunError
from pipeline.images import Crop
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.models import ModelConfig
from pipeline.schema import LABELED, with_label_names
from pipeline.storage import location
from pipeline.survey import describe
from pipeline.tables import write_table
from pipeline.training import finalist, student
from pipeline.training.finalist import Contest, contest
from pipeline.training.handed import FACES_FILE, LABELED_FILE, Handed, open_labeled
from pipeline.training.loop import local
from pipeline.training.student import StudentConfig
from pipeline.training.supervised import predict_logits

COUNT, DRAWN, NAMES = 60, 30, ("neutral", "happiness", "fear")
MODEL = ModelConfig(name="convnet", args={"width": 4}, size=16, dropout=0)
STUDENT = StudentConfig(steps=3, ema=None, labeled_batch=8, mined_batch=8, model=MODEL)


def _handed(at: Path, labels: list[str] | None = None) -> Handed:
    records = SyntheticSet(count=COUNT, test_count=0, rule="probability").records("set").table
    columns = {name: records[name] for name in LABELED.names if name != "role"}
    columns["role"] = pa.array(["train"] * COUNT)
    columns["soft"] = pa.nulls(COUNT, LABELED.field("soft").type)
    columns["label"] = pa.array(labels or [NAMES[i % 3] for i in range(COUNT)])
    schema = with_label_names(LABELED, NAMES)
    table = pa.table([columns[name] for name in LABELED.names], schema=schema)
    read = table.select(["id", "group", "image", "box", "landmarks"])
    read = read.append_column("position", pa.array(range(COUNT), pa.int64()))
    read = read.append_column("reason", pa.nulls(COUNT, pa.string()))
    read = read.append_column("detail", pa.nulls(COUNT, pa.string()))
    folder = location(at) / "labeled"
    write_table(folder / LABELED_FILE, table)
    write_table(folder / FACES_FILE, describe(read, Crop(), "gray", threads=1))
    views = {"pool": (Crop(), "gray")}
    return Handed(
        labeled=folder.uri,
        guard=None,
        crop=Crop(),
        color="gray",
        scratch=str(at / "cache"),
        views=views,
    )


def _made(handed: Handed) -> Contest:
    rng = np.random.default_rng(0)
    _, rows = open_labeled(handed, MODEL)
    classes = len(NAMES)
    pool = rows.slice(0, DRAWN).select(["id", "image", "box", "landmarks"])
    pool = pool.append_column("source", pa.array(["pool"] * DRAWN))
    soft = rng.dirichlet(np.ones(classes), (2, DRAWN)).astype(np.float32)
    kept = np.stack([np.ones((2, DRAWN), bool), np.zeros((2, DRAWN), bool)])
    return Contest(
        handed=handed,
        student=STUDENT,
        alone=student.control(STUDENT),
        teacher="",
        seed=0,
        ids=rows["id"].to_pylist(),
        fold=np.arange(COUNT) % 2,
        taught=np.arange(COUNT) % 3 > 0,
        faces=pool,
        soft=soft,
        kept=kept,
    )


@pytest.fixture
def worker() -> object:
    return local("cpu", torch.float32)


def _logits(made: Contest, which: int | None, worker, monkeypatch) -> np.ndarray:
    """What the network that is judged says of all labeled faces."""
    data, _ = open_labeled(made.handed, MODEL)
    said = []

    def look(model, faces, worker, *, rows):
        said.append(predict_logits(model, data.faces, worker))
        return said[-1][rows]

    monkeypatch.setattr(finalist, "predict_logits", look)
    contest(made, which, 0, worker)
    return said[0]


def test_contest__no_label_of_a_judge_or_of_the_other_half_teaches(
    tmp_path: Path, worker, monkeypatch
) -> None:
    made = _made(_handed(tmp_path / "a"))
    data, _ = open_labeled(made.handed, MODEL)
    mute = ~made.taught | (made.fold == 0)
    shifted = np.where(mute, (data.labels + 1) % len(NAMES), data.labels)
    other = replace(made, handed=_handed(tmp_path / "b", [NAMES[code] for code in shifted]))
    first = _logits(made, 0, worker, monkeypatch)
    assert np.array_equal(first, _logits(other, 0, worker, monkeypatch))
    taught = np.flatnonzero(~mute)[:10]
    shifted[taught] = (shifted[taught] + 1) % len(NAMES)
    other = replace(made, handed=_handed(tmp_path / "c", [NAMES[code] for code in shifted]))
    assert not np.array_equal(first, _logits(other, 0, worker, monkeypatch))


def test_contest__is_taught_by_what_the_point_keeps(tmp_path: Path, worker, monkeypatch) -> None:
    made = _made(_handed(tmp_path))
    everything = _logits(made, 0, worker, monkeypatch)
    changed = made.soft.copy()
    changed[0, ::2] = changed[0, ::2, ::-1]
    assert not np.array_equal(
        everything, _logits(replace(made, soft=changed), 0, worker, monkeypatch)
    )
    half = made.kept.copy()
    half[0, 0, ::2] = False  # the changed faces leave
    few = [
        _logits(replace(made, soft=soft, kept=half), 0, worker, monkeypatch)
        for soft in (made.soft, changed)
    ]
    assert np.array_equal(*few)


def test_contest__a_point_that_keeps_nothing_is_the_labels_alone(tmp_path: Path, worker) -> None:
    made = _made(_handed(tmp_path))
    nothing, alone = (contest(made, which, 1, worker) for which in (1, None))
    assert nothing == alone
    assert alone.judged == int((made.taught & (made.fold == 1)).sum())
    assert alone.judged_held == int((~made.taught & (made.fold == 1)).sum())
    images = STUDENT.steps * (STUDENT.labeled_batch + STUDENT.mined_batch)
    assert alone.passes == pytest.approx(images + 2 * 30 / 3)


def test_contest__refuses_other_labeled_faces(tmp_path: Path, worker) -> None:
    made = _made(_handed(tmp_path))
    with pytest.raises(RunError, match="not those that the teacher was taught with"):
        contest(replace(made, ids=made.ids[::-1]), 0, 0, worker)
