"""Proves which models sit the exam, and what a number's protocol names."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from helpers import flow as tiny

from pipeline import conduct, judged
from pipeline.config import parse
from pipeline.recipe import Recipe
from pipeline.schema import EMOTIONS, TRUTH
from pipeline.tables import write_table
from pipeline.training.watching import guesses_at


def test_sit_exam__probabilities_of_every_model(tiny_run: Path) -> None:
    job = tiny.start(tiny.tiny(tiny.UNTRACKED), tiny_run)
    probs, labels, names = judged.sit_exam(job)
    assert set(probs) == {"teacher", "control_a", "control_b", "student", "tuned"}
    assert names == EMOTIONS
    for model, table in probs.items():
        assert table.shape == (len(labels), len(names)), model
        np.testing.assert_allclose(table.sum(1), 1, atol=1e-3)
    card = judged.protocol_card(job)
    assert set(card["passes"]) == set(probs)
    assert card["pretraining_data"] == "none"


def test_exam_input__a_test_face_that_may_no_longer_be_read(tiny_run: Path, tmp_path: Path) -> None:
    job = tiny.start(tiny.tiny(tiny.UNTRACKED), tiny_run)
    assert judged.exam_input(job) == {}
    faces = judged.exam_faces(job)
    listed = tmp_path / "removed.txt"
    root = tiny.copy(tiny_run, tmp_path / "run")
    found = []
    for removed in ("nobody", faces["id"][0].as_py()):
        listed.write_text(removed)
        other = tiny.start(tiny.tiny(tiny.UNTRACKED, f"removals={listed}"), root)
        found.append((judged.exam_input(other)["judged"], judged.exam_faces(other).num_rows))
    assert [rows for _, rows in found] == [faces.num_rows, faces.num_rows - 1]
    assert found[0][0] != found[1][0]


def test_course__purity_of_what_an_online_student_said(tmp_path: Path) -> None:
    recipe = parse(
        Recipe,
        {
            "name": "small",
            "labeled": {"kind": "synthetic", "count": 40},
            "pool": [{"kind": "synthetic", "count": 100}],
            "tracking": {"uri": "off"},
        },
    )
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    stage = job.open("student", {})
    (stage.dir / "model" / "history.json").write_json([{"step": s} for s in (2.0, 4.0, 5.0, 6.0)])
    stage.finish("d" * 64)
    truth = pa.table({"id": ["a", "b"], "label": ["fear", "anger"]}, schema=TRUTH)
    assert judged.course(job, truth) == []  # it was taught by teachers
    for step, labels, weights in (
        (2, ["fear", "fear"], [0.5, 0.5]),
        (4, ["fear", "fear"], [0.0, 0.0]),
        (6, ["fear", "anger"], [1.0, 0.2]),
    ):
        said = {"id": ["a", "b"], "label": labels, "weight": weights}
        write_table(guesses_at(stage.dir / "model" / "guesses", step), pa.table(said))
    assert judged.course(job, truth) == [
        {"step": 2.0, "purity": 0.5, "known": 2.0},
        {"step": 6.0, "purity": 1.0, "known": 2.0},
    ]
    assert judged.course(job, TRUTH.empty_table()) == []
