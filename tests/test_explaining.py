"""A face's explanation is what select decided, with the labeled faces it really resembles."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import flow
from safetensors.numpy import load_file

from pipeline import explaining, pool
from pipeline.errors import RunError, SourceError
from pipeline.explaining import MEASURED, judged
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.policy import OperatingPoint
from pipeline.storage import location

NAMES = ("neutral", "fear")


def scored(label: str = "fear", confidence: float = 0.7, agreement: float = 0.8) -> pa.Table:
    return pa.table(
        {
            "pseudo_label": [label],
            "confidence": pa.array([confidence], pa.float32()),
            "prototype_label": ["fear"],
            "prototype_margin": pa.array([0.125], pa.float32()),
            "neighbor_label": ["fear"],
            "neighbor_agreement": pa.array([agreement], pa.float32()),
        }
    )


def test_judged__margins_are_value_minus_threshold() -> None:
    point = OperatingPoint(
        label_names=NAMES,
        confidence={"fear": 0.5},
        prototype=True,
        neighbors=0.9,
        cuts={"neutral": 0.9, "fear": 0.75},
    )
    said = judged(scored(), point)
    assert said == {
        "rule.below_confidence": "passed: confidence as fear 0.7000, threshold 0.5000, "
        "margin +0.2000",
        "rule.prototype_disagrees": "passed: nearest prototype fear, label fear, ahead of the "
        "second class by 0.1250",
        "rule.neighbors_disagree": "failed: vote for fear 0.8000, threshold 0.9000, margin -0.1000",
        "rule.below_class_threshold": "failed: confidence as fear 0.7000, threshold 0.7500, "
        "margin -0.0500",
    }


def test_judged__rules_that_are_off_are_not_asked() -> None:
    said = judged(scored(), OperatingPoint(label_names=NAMES))
    assert set(said.values()) == {"not asked"}


def test_explain__names_the_first_rule_that_failed_and_true_neighbors(tiny_run: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    slice, table = next(pool.ledger(job, "select").tables(pool.pool_plan(job)))
    embedded = pool.ledger(job, "embed").read(slice.key, ["embedding"])["embedding"]
    teacher = job.run.artifact("teach").dir / "teacher"
    bank = load_file((teacher / "bank.safetensors").local_path())["vectors"]
    ids = (teacher / "bank_ids.json").read_json()
    seen = set()
    for row, face in enumerate(table.to_pylist()):
        if face["reason"] not in (*MEASURED, "selected") or face["reason"] in seen:
            continue
        seen.add(face["reason"])
        found = explaining.explain(str(tiny_run), face["id"])
        failed = [k.removeprefix("rule.") for k, v in found.items() if str(v).startswith("failed")]
        assert failed[:1] == ([] if face["reason"] == "selected" else [face["reason"]])
        cosines = bank @ np.asarray(embedded[row].as_py(), np.float32)
        best = np.argsort(-cosines)[:3]
        for number, place in enumerate(best, 1):
            name, _, said = re.split(r"  ", found[f"neighbor.{number}"])
            assert name == ids[place]
            assert float(said.removeprefix("cosine ")) == pytest.approx(cosines[place], abs=2e-3)
    assert "selected" in seen
    assert len(seen) > 1


def test_explain__every_part_of_the_row_says_why(tiny_run: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    _, table = next(pool.ledger(job, "select").tables(pool.pool_plan(job)))
    found = explaining.explain(str(tiny_run), table["id"][0].as_py())
    assert {"survey.status", "score.confidence", "select.reason", "neighbor.1"} <= set(found)


def test_explain__says_that_the_scores_are_newer_than_the_selection(
    tiny_run: Path, tmp_path: Path
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    (at,) = root.glob("select/g*/identity.json")
    identity = json.loads(at.read_text())
    identity["inputs"]["score"] = "another"
    at.write_text(json.dumps(identity))
    (part,) = list(root.glob("select/g*/packs/*.parquet"))[:1]
    face = pq.read_table(part, columns=["id"])["id"][0].as_py()
    assert "run the recipe again" in explaining.explain(str(root), face)["note"]
    assert "note" not in explaining.explain(str(tiny_run), face)


def test_find__the_id_else_the_only_one_that_begins_so(tmp_path: Path) -> None:
    at, names = location(tmp_path), (["a#1", "a#10", "b#7"], ["a#123", "a#124", "c#9"])
    slices = [Slice(f"s{n:07d}", 0, "pool", "shard", 3 * n, 3 * n + 3, "f", 3) for n in range(2)]
    plan, ledger = Plan.write(at / "plan.parquet", slices), Ledger(at / "survey")
    for slice, ids in zip(slices, names, strict=True):
        ledger.commit(slice, pa.table({"id": ids}), quarantined=0)
    found = {
        asked: (slice.key, row)
        for asked in ("a#1", "a#124", "b", "c#", "a#10")
        for slice, row in [explaining.find(ledger, plan, asked)]
    }
    assert found == {
        "a#1": ("s0000000", 0),
        "a#124": ("s0000001", 1),
        "b": ("s0000000", 2),
        "c#": ("s0000001", 2),
        "a#10": ("s0000000", 1),
    }
    with pytest.raises(SourceError, match="begin with 'a#12': 'a#123', 'a#124'"):
        explaining.find(ledger, plan, "a#12")
    for nobody in ("", "z", "a#1234"):
        with pytest.raises(SourceError, match=f"no pool face '{nobody}'"):
            explaining.find(ledger, plan, nobody)


def test_explain__a_run_that_has_not_begun(tmp_path: Path) -> None:
    with pytest.raises((RunError, SourceError), match="survey"):
        explaining.explain(str(tmp_path / "gone"), "pool/1")
