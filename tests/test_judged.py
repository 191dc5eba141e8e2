"""Proves which models sit the exam, and what a number's protocol names."""

from pathlib import Path

import numpy as np
from helpers import flow as tiny

from pipeline import judged
from pipeline.schema import EMOTIONS


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
