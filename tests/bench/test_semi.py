"""Proves that the bench semi corrects for the rows it looked at, and that its gate can fail."""

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.active import pack
from pipeline.training.student import StudentConfig
from tests.bench import ferplus10, semi, semi_tables

FACES = 1000


def _record(right, macro_f1=0.5):
    metrics = {"correct": pack(right), "macro_f1": macro_f1, "accuracy": float(right.mean())}
    return {"n": FACES, "metrics": metrics | {"passes": 9.0, "seconds": 1.0}}


def _records(seeds=(0,), **won):
    """Controls that are right on the first 500 faces; a row is right on so many more."""
    rows = {"control": 0, "control_vit": 0, **won}
    return {
        f"{row}-10-s{seed}": _record(np.arange(FACES) < 500 + more, 0.5 + more / FACES)
        for row, more in rows.items()
        for seed in seeds
    }


def alone(won):
    return binomtest(won, won).pvalue


@pytest.mark.parametrize("steps", [None, 800])
def test_drop_later__takes_out_what_changes_nothing_within_a_section_too(steps):
    online = {"thresholds": {"rule": "dtm"}, "epoch_steps": steps}
    student = StudentConfig.model_validate({"online": online}).model_dump(mode="json")
    identity = {"student": {"student": student, "seed": 0}, "schema": 1}
    ferplus10.drop_later(identity)
    left = identity["student"]["student"]
    assert left["online"].get("epoch_steps") == steps
    assert ("epoch_steps" in left["online"]) == (steps is not None)
    assert "candidates" not in left


def test_chances__all_rows_but_the_named_one_are_corrected(monkeypatch):
    records = _records(fixmatch=8, dtm=7, mae=7, simclr=0)
    found = semi.chances(records)
    assert set(found) == {"fixmatch", "dtm", "mae", "simclr"}  # controls have no difference
    assert found["fixmatch"] == pytest.approx(4 * alone(8))
    assert found["dtm"] == pytest.approx(3 * alone(7))
    assert found["mae"] == pytest.approx(3 * alone(7))  # not below the one before it
    assert found["simclr"] == 1.0

    monkeypatch.setattr(semi, "NAMED", "dtm")
    found = semi.chances(records)
    assert found["dtm"] == pytest.approx(alone(7))
    assert found["fixmatch"] == pytest.approx(3 * alone(8))
    assert found["mae"] == pytest.approx(2 * alone(7))


def test_chances__seeds_are_averaged_and_other_labels_left_out():
    records = _records(seeds=(0, 1, 2), fixmatch=6)
    records["fixmatch-10-s2"] = _record(np.arange(FACES) < 495)  # five lost, in one seed of three
    records["fixmatch-5-s0"] = _record(np.arange(FACES) < 900)
    assert semi.chances(records) == {"fixmatch": pytest.approx(binomtest(6, 11).pvalue)}
    assert semi.chances(records, "5") == {}  # no control there


def test_tables__say_which_p_is_corrected(monkeypatch):
    monkeypatch.setattr(semi, "NAMED", "dtm")
    lines = semi_tables._rows(_records(fixmatch=20, dtm=8, mae=7), "10")
    place = lines[0].split(" | ").index("p")
    said = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[place] for line in lines[2:]}
    assert said == {
        "labels alone": "-",
        "labels alone, transformer": "-",
        "FixMatch": "<0.001",
        "dynamic thresholds (DTM)": f"{alone(8):.3f} (named)",
        semi_tables.TITLES["mae"]: f"{alone(7):.3f}",
    }


@pytest.mark.parametrize(
    ("won", "said"), [(40, []), (10, ["mean gain +1.00 points, not 1.5"]), (-20, ["-2.00", "F1"])]
)
def test_judge_gain__of_the_named_row(monkeypatch, won, said):
    records = _records(seeds=semi.SEEDS, dtm=won)
    assert semi.judge_gain(records) is None
    monkeypatch.setattr(semi, "NAMED", "dtm")
    faults = semi.judge_gain(records)
    assert len(faults) >= len(said)
    assert all(any(word in fault for fault in faults) for word in said)
    assert bool(faults) == bool(said)
    del records["dtm-10-s2"]
    assert semi.judge_gain(records) is None
