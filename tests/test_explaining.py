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
from pipeline.policy import OperatingPoint

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
    assert {"selected", "neighbors_disagree"} <= seen


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


def test_explain__the_beginning_of_an_id_is_enough_where_it_is_the_only_one(
    tiny_run: Path,
) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    ids = [
        face
        for _, t in pool.ledger(job, "survey").tables(pool.pool_plan(job), ["id"])
        for face in t["id"].to_pylist()
    ]
    face = ids[len(ids) // 2]
    short = next(
        face[:n]
        for n in range(1, len(face) + 1)
        if sum(one.startswith(face[:n]) for one in ids) == 1
    )
    assert len(short) < len(face)
    assert explaining.explain(str(tiny_run), short) == explaining.explain(str(tiny_run), face)
    with pytest.raises(SourceError, match="several pool faces begin with 'pool"):
        explaining.explain(str(tiny_run), "pool")
    with pytest.raises(SourceError, match="no pool face ''"):
        explaining.explain(str(tiny_run), "")


def test_explain__a_run_that_has_not_begun(tmp_path: Path) -> None:
    with pytest.raises((RunError, SourceError), match="survey"):
        explaining.explain(str(tmp_path / "gone"), "pool/1")
