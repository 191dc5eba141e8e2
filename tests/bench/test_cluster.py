"""Proves that the gates about clusters and scale see what they are there for."""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.bench import cluster, scale_model
from tests.bench.harness import ROOT

RESULTS = ROOT / "tests" / "bench" / "results"


def records(name: str) -> dict[str, Any]:
    return {at.stem: json.loads(at.read_text()) for at in (RESULTS / name).glob("*.json")}


def test_judge__scenes_that_take_too_long_together() -> None:
    kept = records("cluster")
    assert cluster.judge(kept) == []
    kept["submission"]["metrics"]["scene_seconds"] += cluster.MOST_SECONDS
    assert "all scenes took" in str(cluster.judge(kept))


def test_judge_flat__requests_and_memory_that_grow() -> None:
    kept = records("scale_model")
    assert scale_model.judge_flat(kept) == []
    harmed = copy.deepcopy(kept)
    harmed["slices-100k"]["metrics"]["disk"]["memory_mb"]["account"] += 20
    (fault,) = scale_model.judge_flat(harmed) or []
    assert fault.startswith("account: memory grows by")
