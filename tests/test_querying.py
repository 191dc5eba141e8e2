"""Proves who may be asked for, that functions see the run's columns, and that bytes are fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow

from pipeline import pool, querying
from pipeline.acquisition.functions import ACQUISITIONS
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.job import Job
from pipeline.plan import Slice
from pipeline.querying import AskConfig, choose, faces_of

SLICES = [Slice(f"s{i:07d}", 0, "web", f"shard {i}", 0, 4, "f", 4) for i in range(2)]
FACES = [  # id, decodes, twin of, duplicate group
    ("a", True, None, None),
    ("bad", False, None, None),
    ("twin", True, "test/1", None),
    ("c", True, None, "c"),
    ("d", True, None, "c"),  # a copy of c
    ("e", True, None, "e"),
    ("f", True, None, "e"),
    ("g", True, None, None),
]


class Invented:
    """A ledger of two slices of four faces."""

    def tables(self, plan: object, columns: Sequence[str]) -> Iterator[tuple[Slice, pa.Table]]:
        ids, good, twins, groups = zip(*FACES, strict=True)
        columns_of = {
            "id": pa.array(ids),
            "status": pa.array(["ok" if one else "quarantined" for one in good]),
            "twin_of": pa.array(twins, pa.string()),
            "duplicate_group": pa.array(groups, pa.string()),
        }
        table = pa.table({name: columns_of[name] for name in columns})
        yield from zip(SLICES, (table.slice(0, 4), table.slice(4)), strict=True)


@pytest.mark.parametrize(
    ("closed", "left"),
    [
        ((), ["a", "c", "e", "g"]),
        (("a", "nobody"), ["c", "e", "g"]),
        (("d",), ["a", "e", "g"]),  # its copy c was not asked for, but is the same face
        (("e", "f", "g", "a", "c"), []),
    ],
)
def test_askable__by_hand(
    monkeypatch: pytest.MonkeyPatch, closed: tuple[str, ...], left: list[str]
) -> None:
    monkeypatch.setattr(querying, "ledger", lambda job, stage: Invented())
    monkeypatch.setattr(querying, "pool_plan", lambda job: None)
    found = querying._askable(None, closed)  # type: ignore[arg-type]
    assert [FACES[row][0] for row in found] == left


@pytest.fixture(scope="module")
def job(tiny_run: Path) -> Job:
    return flow.start(flow.tiny(flow.UNTRACKED), tiny_run)


def stored(job: Job, stage: str) -> pa.Table:
    return pa.concat_tables(t for _, t in pool.ledger(job, stage).tables(pool.pool_plan(job)))


def test_choose__entropy_as_sorted_by_hand(job: Job) -> None:
    scores = stored(job, "score")
    probs = np.stack(scores["probs"].to_numpy(zero_copy_only=False)).astype(np.float64)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(1)
    ids = scores["id"].to_pylist()
    guard = stored(job, "twins").to_pylist()
    open_ = [
        i
        for i, row in enumerate(guard)
        if row["twin_of"] is None and row["duplicate_group"] in (None, row["id"])
    ]
    expected = [ids[i] for i in sorted(open_, key=lambda i: -entropy[i])]
    found = choose(job, AskConfig(budget=12, acquisition="entropy"), expected[:2], seed=0)
    assert found["id"].to_pylist() == expected[2:14]
    assert found["rank"].to_pylist() == list(range(1, 13))
    surveyed = {row["id"]: row for row in stored(job, "survey").to_pylist()}
    positions = [surveyed[face]["position"] for face in found["id"].to_pylist()]
    assert found["position"].to_pylist() == positions


@pytest.mark.parametrize("name", sorted(ACQUISITIONS.keys() - {"deepfool"}))
def test_choose__every_function_finds_its_columns(job: Job, name: str) -> None:
    config = AskConfig(budget=4, acquisition=name, candidates=60)
    found = choose(job, config, (), seed=1)
    ids = found["id"].to_pylist()
    assert len(set(ids)) == 4
    assert choose(job, config, (), seed=1).equals(found)
    assert not set(choose(job, config, ids, seed=1)["id"].to_pylist()) & set(ids)


def test_choose__no_more_than_are_left(job: Job) -> None:
    every = stored(job, "survey")["id"].to_pylist()
    found = choose(job, AskConfig(budget=50, acquisition="random"), every[3:], seed=0)
    assert set(found["id"].to_pylist()) <= set(every[:3])
    with pytest.raises(ConfigError, match="no face of the pool is left"):
        choose(job, AskConfig(), every, seed=0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"acquisition": "bagde"}, "did you mean 'badge'"),
        ({"acquisition": "deepfool"}, "gradients of every face"),
        ({"budget": 0}, "greater than or equal to 1"),
    ],
)
def test_ask_config__faults(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(AskConfig, values)


def test_faces_of__bytes_as_surveyed_and_no_others(job: Job) -> None:
    known = {row["id"]: row["sha256"] for row in stored(job, "survey").to_pylist()}
    ids = [list(known)[row] for row in (599, 0, 64)]
    found = faces_of(job, [*ids, "pool/gone"])
    assert found["id"].to_pylist() == sorted(ids, key=list(known).index)
    assert set(found["source"].to_pylist()) == {"pool"}
    for row in found.to_pylist():
        assert hashlib.sha256(row["image"]).digest() == known[row["id"]]
