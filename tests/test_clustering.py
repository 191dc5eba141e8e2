"""Proves that clusters of a pool in a ledger are those of all its rows at once, without twins."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_clusters import blobs

from pipeline.clustering import Inputs, cluster, save_counts, with_clusters
from pipeline.clusters import PER_CLUSTER, ClusterConfig, Clusters
from pipeline.errors import LedgerError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.policy import OperatingPoint
from pipeline.ranking import stable_hash
from pipeline.schema import EMOTIONS, with_label_names
from pipeline.storage import Location, location

NAMES = EMOTIONS[:3]


def pool(seed: int = 0) -> dict[str, list[Any]]:
    """Faces of four clear clusters whose pseudo-labels mostly follow them; some bad, some twins."""
    rng = np.random.default_rng(seed)
    x, own = blobs(seed)
    order = rng.permutation(len(x))
    x, own = x[order], own[order]
    label = np.where(rng.random(len(x)) < 0.8, own % 3, rng.integers(0, 3, len(x)))
    bad = rng.random(len(x)) < 0.1
    return {
        "id": [f"f{i}" for i in range(len(x))],
        "status": ["quarantined" if b else "ok" for b in bad],
        "embedding": [None if b else row for b, row in zip(bad, x, strict=True)],
        "pseudo_label": [None if b else NAMES[c] for b, c in zip(bad, label, strict=True)],
        "twin_of": ["test/1" if t else None for t in rng.random(len(x)) < 0.15],
        "own": own.tolist(),
    }


def stored(at: Location, faces: dict[str, list[Any]], size: int = 13) -> Inputs:
    """The pool in slices of so many rows."""
    rows = len(faces["id"])
    cuts = range(0, rows, size)
    slices = [Slice(f"s{i:07d}", 0, "p", "x", c, c + size, "f", size) for i, c in enumerate(cuts)]
    plan = Plan.write(at / "plan.parquet", slices)
    text = dict.fromkeys(("pseudo_label", "twin_of"), pa.string())
    types = {"embedding": pa.list_(pa.float16(), 8), **text}
    table = pa.table({k: pa.array(v, types.get(k)) for k, v in faces.items()})
    table = table.cast(with_label_names(table.schema, NAMES))
    columns = {
        "embed": ["id", "status", "embedding"],
        "score": ["id", "pseudo_label"],
        "twins": ["id", "twin_of"],
    }
    ledgers = []
    for name, chosen in columns.items():
        ledger = Ledger(at / name)
        for slice in slices:
            ledger.commit(slice, table.select(chosen).slice(slice.start, size))
        ledgers.append(ledger)
    return Inputs(plan, *ledgers)


def read(ledger: Ledger, plan: Plan) -> dict[str, int | None]:
    rows = pa.concat_tables(table for _, table in ledger.tables(plan)).to_pylist()
    return {row["id"]: row["cluster"] for row in rows}


def test_cluster__equals_all_rows_at_once(tmp_path: Path) -> None:
    at, faces = location(tmp_path), pool()
    inputs = stored(at, faces)
    counts = cluster(inputs, 4, 0, into := Ledger(at / "clusters"))
    found = read(into, inputs.plan)

    rows = [dict(zip(faces, values, strict=True)) for values in zip(*faces.values(), strict=True)]
    voters = [row for row in rows if row["status"] == "ok" and row["twin_of"] is None]
    hashes = stable_hash(pa.array([row["id"] for row in voters])).tolist()
    voters = [row for _, row in sorted(zip(hashes, voters, strict=True), key=lambda p: p[0])]
    made = Clusters(np.stack([row["embedding"] for row in voters]), 4, 0)
    expected = Counter()
    for row in rows:
        own = made.of(row["embedding"][None])[0] if row["status"] == "ok" else None
        assert found[row["id"]] == own
        if row["status"] == "ok" and row["twin_of"] is None:
            expected[own, NAMES.index(row["pseudo_label"])] += 1
    assert {(n, c): counts[n, c] for n, c in np.argwhere(counts)} == expected
    pairs = {(row["own"], found[row["id"]]) for row in rows if row["status"] == "ok"}
    assert len(pairs) == 4


def test_cluster__slices_of_another_size_change_nothing(tmp_path: Path) -> None:
    found, faces = [], pool(1)
    for size in (160, 7):
        at = location(tmp_path / str(size))
        inputs = stored(at, faces, size)
        counts = cluster(inputs, 4, 3, into := Ledger(at / "clusters"))
        found.append((counts.tolist(), read(into, inputs.plan)))
    assert found[0] == found[1]


def test_cluster__a_pool_of_bad_faces_only(tmp_path: Path) -> None:
    faces = pool()
    none = [None] * len(faces["id"])
    faces |= {"status": ["quarantined"] * len(none), "embedding": none, "pseudo_label": none}
    at = location(tmp_path)
    inputs = stored(at, faces)
    counts = cluster(inputs, 4, 0, into := Ledger(at / "clusters"))
    assert counts.shape == (0, 3)
    assert set(read(into, inputs.plan).values()) == {None}


def test_cluster__stages_that_do_not_line_up(tmp_path: Path) -> None:
    at, faces = location(tmp_path), pool()
    inputs = stored(at / "one", faces)
    other = stored(at / "two", {**faces, "id": [f"g{i}" for i in range(len(faces["id"]))]})
    mixed = Inputs(inputs.plan, inputs.embeddings, inputs.scores, other.twins)
    with pytest.raises(LedgerError, match="faces of twins and embed differ"):
        cluster(mixed, 4, 0, Ledger(at / "clusters"))


def test_with_clusters__names_what_is_pure(tmp_path: Path) -> None:
    save_counts(np.array([[9, 1, 0], [2, 2, 2], [0, 0, 4]]), at := location(tmp_path))
    point = OperatingPoint(label_names=NAMES)
    config = ClusterConfig(count=3, share=None, purity=0.5, outvoted="leave")
    found = with_clusters(point, config, at)
    assert found.clusters == ("neutral", None, "sadness")
    assert not found.relabel
    assert found.digest != point.digest
    again = with_clusters(point, config.model_copy(update={"outvoted": "relabel"}), at)
    assert again.digest != found.digest
    assert PER_CLUSTER * config.count == 768  # rows of the sample, at most
