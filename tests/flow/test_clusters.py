"""Proves that a run finds its clusters once, decides by them and explains them."""

from pathlib import Path

import pyarrow as pa
import pytest
from helpers import flow

from pipeline import explaining, pool, stages

pytestmark = pytest.mark.usefixtures("local_ray")


def test_select__by_clusters(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run", without=("select",))
    clusters = "select.clusters={count: 8, share: null, purity: 0.3}"
    job = flow.start(flow.tiny(flow.UNTRACKED, clusters, "select.class_cap=null"), root, fresh=True)
    stages.select(job)
    made = job.run.artifact("clusters")
    plan = pool.pool_plan(job)
    decided = pa.concat_tables(table for _, table in pool.ledger(job, "select").tables(plan))
    own = pa.concat_tables(table for _, table in pool.ledger(job, "clusters").tables(plan))
    point = (job.run.artifact("select").dir / stages.POINT_FILE).read_json()
    assert len(point["clusters"]) == made.facts["clusters"] == 8
    kept = 0
    for row, number in zip(decided.to_pylist(), own["cluster"].to_pylist(), strict=True):
        if row["selected"]:
            kept += 1
            assert row["label"] == point["clusters"][number] is not None
    assert kept > 20
    said = explaining.explain(str(root), decided["id"][0].as_py())
    assert said["threshold.cluster_label"] == point["clusters"][said["clusters.cluster"]]

    other = "select.clusters={count: 8, share: null, purity: 0.9}"
    job = flow.start(flow.tiny(flow.UNTRACKED, other, "select.class_cap=null"), root, fresh=True)
    stages.select(job)
    assert job.run.artifact("clusters").dir == made.dir  # found once
    stricter = (job.run.artifact("select").dir / stages.POINT_FILE).read_json()
    assert sum(map(bool, stricter["clusters"])) < sum(map(bool, point["clusters"]))
