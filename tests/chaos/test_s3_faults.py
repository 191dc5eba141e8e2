"""Proves that commits on S3 survive throttling, conflicts and lost answers, each exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pytest
from helpers.faults import Fault, bad_day
from helpers.s3 import s3_bucket

from pipeline import s3, sealing
from pipeline.errors import SourceError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.storage import Location, location, probe


@pytest.fixture(scope="module")
def bucket() -> Iterator[Location]:
    with s3_bucket() as root:
        yield root


class Seeded:
    """Faults in a share of the writes and reads, never more than two in a row for one request."""

    def __init__(self, seed: int, kinds: tuple[Fault, ...]) -> None:
        self.random, self.kinds, self.lock = random.Random(seed), kinds, Lock()
        self.row: Counter[tuple[str, str]] = Counter()
        self.made: Counter[Fault] = Counter()

    def __call__(self, method: str, path: str, conditional: bool) -> Fault:
        with self.lock:
            if self.row[method, path] >= 2 or self.random.random() > 0.4:
                self.row[method, path] = 0
                return None
            kind = self.random.choice(self.kinds)
            if kind == "409" and not conditional:
                return None
            self.row[method, path] += 1
            self.made[kind] += 1
            return kind


@pytest.mark.parametrize("kinds", [("503",), ("409",), ("lost",), ("503", "409", "lost")])
def test_commit__exactly_once_on_a_bad_day(bucket: Location, kinds: tuple[Fault, ...]) -> None:
    root = bucket / "-".join(map(str, kinds))
    slices = [Slice(f"s{i:07d}", 0, "web", "s3://a", i, i + 1, "f", 1) for i in range(6)]
    plan = Plan.write(root / "plan.parquet", slices)

    def work(slice: Slice) -> str:
        """Two attempts at every slice, with tables of their own."""
        tables = [pa.table({"id": [f"{slice.key} by {who}"]}) for who in "ab"]
        won = [Ledger(root / "l").commit(slice, table).attempt for table in tables]
        assert won[0] == won[1]
        return won[0]

    faults = Seeded(1, kinds)
    with bad_day(faults), ThreadPoolExecutor(3) as pool:
        won = list(pool.map(work, slices))
        sealing.seal(Ledger(root / "l"), plan)
    assert all(faults.made[kind] > 0 for kind in kinds)
    calm = Ledger(root / "l")
    assert [commit.attempt for commit in calm.committed(plan)] == won
    assert [t["id"][0].as_py() for _, t in calm.tables(plan)] == [f"{s.key} by a" for s in slices]


def test_create__gives_up_on_lasting_conflicts(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "WAITS", (0.0, 0.0))
    line = r"conflict/a: conditional write conflicts persist \(409\)"
    conflict = bad_day(lambda method, path, conditional: "409" if conditional else None)
    with conflict, pytest.raises(SourceError, match=line):
        (bucket / "conflict/a").create(b"1")


def test_probe__tells_a_store_that_overwrites(
    bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(bucket / "run")
    probe(location(tmp_path))
    assert (bucket / "run").children() == location(tmp_path).children() == []
    monkeypatch.setattr(Location, "create", lambda self, data: True)
    with pytest.raises(SourceError, match="run: two writers both created one file"):
        probe(bucket / "run")
