"""Proves how a pool is counted, that very many files are sampled, and where probes are placed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import synthetic
from pipeline.errors import SourceError
from pipeline.labeled.reader import LabeledSynthetic, read_labeled
from pipeline.planning import sampling
from pipeline.planning.sampling import plan_pool, probed_slices
from pipeline.sources.folder import FolderPool
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import plan_slices, read_slice
from pipeline.sources.rest import RestPool
from pipeline.sources.synthetic import SyntheticPool
from pipeline.sources.tsv import MsCelebPool
from pipeline.storage import Location, location
from pipeline.tables import write_table


def face(number: int) -> bytes:
    return synthetic.encode(synthetic.draw(0, np.array([number]), 16)[0])


def parquet(at: Path, count: int) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [face(i) for i in range(count)]}), at)


def plan(sources: dict[str, object], work: Path, faces: int = 10) -> sampling.Pool:
    return plan_pool(sources, faces, location(work), rest=None, seed=0)  # type: ignore[arg-type]


def test_plan_pool__is_the_run_s_own_plan_where_the_pool_is_small(tmp_path: Path) -> None:
    parquet(tmp_path / "pool" / "a.parquet", 25)
    sources = {
        "drawn": SyntheticPool(count=42),
        "rows": ParquetPool(path=str(tmp_path / "pool")),
    }
    pool = plan(dict(sources), tmp_path)
    planned = list(plan_slices(sources, 10, location(tmp_path / "own")))
    assert pool.plan.slices() == planned
    assert (pool.slices, pool.count) == (len(planned), 67)
    assert {name: one.faces for name, one in pool.sampled.items()} == {"drawn": 42, "rows": 25}
    assert {name: one.said for name, one in pool.sampled.items()} == {
        "drawn": "counted",
        "rows": "all 1 files opened",
    }


def test_plan_pool__of_many_containers_some_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_FILES", 3)
    for i in range(12):
        parquet(tmp_path / "pool" / f"{i:02d}.parquet", 20)
    source = ParquetPool(path=str(tmp_path / "pool"))
    pool = plan({"rows": source}, tmp_path)
    assert len(pool.plan) == 3 * 2
    assert (pool.slices, pool.count) == (24, 240)
    assert "3 of 12 files opened" in pool.sampled["rows"].said
    assert set(pool.owner.values()) == {"rows"}
    assert len({slice.shard for slice in pool.plan}) == 3
    slice = pool.plan.slices()[-1]
    assert read_slice(slice, pool.sources).num_rows == slice.faces


def test_plan_pool__of_many_files_some_are_asked_for_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_LISTED", 40)
    monkeypatch.setattr(sampling, "STRETCHES", 2)
    (tmp_path / "pool").mkdir()
    for i in range(200):
        (tmp_path / "pool" / f"{i:03d}.png").write_bytes(face(i))
    asked: list[str] = []
    size = Location.size
    monkeypatch.setattr(Location, "size", lambda at: asked.append(at.uri) or size(at))
    pool = plan({"files": FolderPool(path=str(tmp_path / "pool"))}, tmp_path)
    pictures = [uri for uri in asked if uri.endswith(".png")]
    assert 0 < len(pictures) == len(set(pictures)) <= 20
    assert pool.count == pytest.approx(200)
    assert pool.slices == 20
    assert read_slice(pool.plan.slices()[0], pool.sources).num_rows == 10


def test_plan_pool__faces_that_only_reading_tells(tmp_path: Path) -> None:
    tsv = tmp_path / "faces.tsv"
    line = "\t".join(["m", "q", "0", "u", "p", "0", "AAAA"]) + "\n"
    tsv.write_text(line * 40)
    pool = plan({"tsv": MsCelebPool(path=str(tsv))}, tmp_path)
    assert pool.sampled["tsv"].faces is None
    rows = [read_slice(slice, pool.sources).num_rows for slice in pool.plan]
    assert sum(rows) == 40
    assert pool.with_rows({"tsv": rows}).count == pytest.approx(40)


def test_plan_pool__rest_faces_come_from_the_labeled_set(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="needs a stored labeled set"):
        plan({"rest": RestPool()}, tmp_path)
    config = LabeledSynthetic(count=60, test_count=5, fraction=0.5)
    table = read_labeled(config).table
    at = location(tmp_path / "labeled.parquet")
    write_table(at, table)
    pool = plan_pool({"rest": RestPool()}, 10, location(tmp_path), rest=at, seed=0)
    assert pool.count == table["role"].to_pylist().count("rest") > 0


def test_probed_slices__spread_and_one_of_every_source(tmp_path: Path) -> None:
    sources = {
        "large": SyntheticPool(count=1000),
        "small": SyntheticPool(count=10, draw_seed=2),
    }
    pool = plan(dict(sources), tmp_path)
    for seed in range(5):
        chosen = probed_slices(pool, 4, seed)
        assert {pool.owner[slice.source] for slice in chosen} == {"large", "small"}
        places = [int(slice.key[1:]) for slice in chosen]
        assert places == sorted(places)
        assert {place * 4 // 101 for place in places} == {0, 1, 2, 3}
    assert probed_slices(pool, 4, 1) == probed_slices(pool, 4, 1)
    assert len(probed_slices(pool, 1000, 0)) == len(pool.plan)
