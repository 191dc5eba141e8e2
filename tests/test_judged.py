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
