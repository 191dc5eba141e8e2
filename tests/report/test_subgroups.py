"""Accuracy by subgroup, against counts by hand and the exact test of scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from pipeline.metrics import holm
from pipeline.report.subgroups import LEAST, compare, subgroups
from pipeline.run import Artifact
from pipeline.schema import PERCEIVED
from pipeline.storage import Location, location
from pipeline.tables import write_table

FACES = 300


def _said() -> pa.Table:
    """The student is right where the control is, and on every second face of the last hundred."""
    rows = np.arange(FACES)
    control = np.where(rows % 3 == 0, "fear", "anger")
    student = np.where((rows >= 200) & (rows % 2 == 0), "anger", control)
    return pa.table(
        {
            "id": [f"t#{i}" for i in rows],
            "label": ["anger"] * FACES,
            "control_b": control.tolist(),
            "student": student.tolist(),
        }
    )


def test_compare__terciles_with_paired_change_and_corrected_p() -> None:
    found = compare(
        _said(), pa.table({"brightness": np.arange(FACES, dtype=np.float64)}), "control_b"
    )
    assert [one.n for one in found] == [100, 100, 100]
    assert [one.group.partition(",")[0] for one in found] == [
        "lowest third", "middle third", "highest third"
    ]  # fmt: skip
    assert found[0].control.value == pytest.approx(66 / 100)
    assert found[0].change.value == 0
    rows = np.arange(200, 300)
    won = int(((rows % 3 == 0) & (rows % 2 == 0)).sum())
    assert found[2].change.value == pytest.approx(won / 100)
    assert found[2].change.low > 0
    assert found[2].student.low < found[2].student.value < found[2].student.high
    alone = binomtest(won, won).pvalue
    assert [one.p for one in found] == pytest.approx(holm([1.0, 1.0, alone]))
    assert found[2].p == pytest.approx(min(1.0, 3 * alone))


def test_compare__small_and_unknown_groups_and_constant_traits_are_left_out() -> None:
    ages = ["20-39"] * 200 + ["70+"] * (LEAST - 1) + [None] * (100 - LEAST + 1)
    attributes = pa.table({"side": [48] * FACES, "perceived_age": ages})
    found = compare(_said(), attributes, "control_b")
    assert [(one.trait, one.group, one.n) for one in found] == [("perceived_age", "20-39", 200)]
    unmeasured = np.where(np.arange(FACES) < 30, np.nan, np.arange(FACES))
    found = compare(_said(), pa.table({"contrast": unmeasured}), "control_b")
    assert [one.n for one in found] == [90, 90, 90]


def _artifact(name: str, at: Location) -> Artifact:
    return Artifact(name, at, "d" * 64, {})


def test_subgroups__reads_attributes_by_id(tmp_path: Path) -> None:
    """The test table holds more faces, in another order, and is asked for no label."""
    at = location(tmp_path)
    ids = [f"t#{i}" for i in reversed(range(FACES + 5))]
    sizes = {"width": [48] * len(ids), "height": [48] * len(ids)}
    level = np.arange(FACES + 5, dtype=np.float64)[::-1]
    quality = dict.fromkeys(("brightness", "contrast", "sharpness"), level)
    write_table(at / "faces.parquet", pa.table({"id": ids, **quality, **sizes}))
    people = {name: pa.nulls(len(ids), pa.string()) for name in PERCEIVED}
    write_table(at / "labeled.parquet", pa.table({"id": ids, **people}))
    assert subgroups(_artifact("evaluate", at), _artifact("test", at), "control_b") == ()
    write_table(at / "predictions.parquet", _said())
    found = subgroups(_artifact("evaluate", at), _artifact("test", at), "control_b")
    assert [one.trait for one in found] == ["brightness"] * 3 + ["contrast"] * 3 + ["sharpness"] * 3
    wanted = compare(_said(), pa.table({"brightness": level[::-1][:FACES]}), "control_b")
    assert [one.change for one in found[:3]] == [one.change for one in wanted]
