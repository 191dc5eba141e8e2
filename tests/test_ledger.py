"""Proves the commit protocol: each slice exactly once, whatever is killed, raced or torn."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.s3 import s3_bucket

from pipeline import commits, packs, sealing
from pipeline.errors import LedgerError, RunError, SourceError
from pipeline.ledger import GROUP, Commit, Ledger, Plan, Slice
from pipeline.packs import content_digest
from pipeline.parquet import Reader
from pipeline.storage import Location, location

NUMBERS = (0, 1, 2, 3, 1024, 1025)
"""Two groups; slice 2 yields no face."""

STEPS = ("part-written", "before-commit", "after-commit", "pack-written", "before-seal")


def _slice(number: int, suffix: str = "") -> Slice:
    return Slice(
        key=f"s{number:07d}{suffix}",
        group=number // GROUP,
        source="pool",
        shard=f"/data/{number}.tar",
        start=0,
        stop=number,
        fingerprint=f"print-{number}",
        faces=None,
    )


def _table(slice: Slice, salt: float = 0.0) -> pa.Table:
    rows = 0 if slice.stop == 2 else slice.stop % 100 + 1
    ids = pa.array([f"{slice.shard}#{i}" for i in range(rows)], pa.string())
    return pa.table({"id": ids, "score": pa.array([i + salt for i in range(rows)], pa.float32())})


def _work(root: str) -> None:
    """What a driver does, start or resume; also run as a process of its own and killed."""
    at = location(root)
    plan = Plan.write(at / "plan.parquet", [_slice(n) for n in NUMBERS])
    ledger = Ledger(at / "scores")
    for slice in ledger.pending(plan):
        ledger.commit(slice, _table(slice), quarantined=slice.stop % 3)
    sealing.seal(ledger, plan)


def _open(tmp_path: Path) -> tuple[Ledger, Plan]:
    at = location(tmp_path)
    return Ledger(at / "scores"), Plan.write(at / "plan.parquet", [_slice(n) for n in NUMBERS])


def _parts(ledger: Ledger) -> list[str]:
    return sorted(f.name.partition("-")[0] for f in (ledger.at / "parts").files([".parquet"]))


@pytest.mark.parametrize("step", STEPS)
def test_protocol__killed_anywhere_then_run_again(tmp_path: Path, step: str) -> None:
    root = tmp_path / "killed"
    code = f"from test_ledger import _work; _work({str(root)!r})"
    here = Path(__file__).parent
    env = os.environ | {"OMNIFER_FAULT": step, "PYTHONPATH": f"{here}:{here.parent}"}
    killed = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert killed.returncode == 137
    assert not (root / "scores/seals").exists()

    _work(str(root))
    _work(str(tmp_path / "calm"))
    plan = Plan(location(root) / "plan.parquet")
    calm = Ledger(location(tmp_path / "calm") / "scores")
    resumed = Ledger(location(root) / "scores")
    assert resumed.manifest(plan) == calm.manifest(plan)
    assert resumed.digest(plan) == calm.digest(plan)
    assert [t for _, t in resumed.tables(plan)] == [t for _, t in calm.tables(plan)]
    orphans = 1 if step in ("part-written", "before-commit") else 0
    assert len(_parts(resumed)) == len(NUMBERS) + orphans
    sealing.sweep(resumed, plan)
    assert _parts(resumed) == []


def test_commit__stores_and_describes(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[3]
    assert ledger.find(slice.key) is None
    made = ledger.commit(
        slice, _table(slice), quarantined=2, reads={"embeddings": "ab"}, seconds=1.23456
    )
    assert (made.key, made.rows, made.quarantined, made.seconds) == (slice.key, 4, 2, 1.235)
    assert (made.reads, made.fingerprint) == ({"embeddings": "ab"}, "print-3")
    again = pickle.loads(pickle.dumps(ledger))
    assert again.find(slice.key) == made
    assert again.read(slice.key) == _table(slice)
    assert content_digest(again.read(slice.key)) == made.sha256
    assert again.read(slice.key, ["score"]).column_names == ["score"]
    assert (tmp_path / "scores/commits/000000/s0000003.json").exists()


def test_commit__group_is_reversed_hex_first_in_the_key(tmp_path: Path) -> None:
    ledger = Ledger(location(tmp_path))
    slice = _slice(0x12F * GROUP)
    ledger.commit(slice, _table(slice))
    assert (tmp_path / f"commits/f21000/{slice.key}.json").exists()
    assert [p.parent.name for p in tmp_path.glob("parts/*/*")] == ["f21000"]


def test_commit__one_of_eight_threads_wins(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[1]
    gate = threading.Barrier(8)
    got: list[Commit] = []

    def writer(salt: int) -> None:
        gate.wait()
        got.append(Ledger(ledger.at).commit(slice, _table(slice, salt)))

    threads = [threading.Thread(target=writer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert set(map(repr, got)) == {repr(ledger.find(slice.key))}
    assert _parts(ledger) == [slice.key]  # the losers removed their own
    assert content_digest(ledger.read(slice.key)) == got[0].sha256


def test_commit__lost_answer_is_still_a_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that wrote the record but answers "exists", as a repeated request does."""
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[0]
    create = Location.create

    def forgetful(self: Location, data: bytes) -> bool:
        create(self, data)
        return False

    monkeypatch.setattr(Location, "create", forgetful)
    made = ledger.commit(slice, _table(slice))
    assert made == ledger.find(slice.key)
    assert ledger.read(slice.key) == _table(slice)


def test_commit__changed_shard_is_an_error(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[0]
    ledger.commit(slice, _table(slice))
    changed = replace(slice, fingerprint="newer")
    message = r"s0000000 of /data/0\.tar: .*fingerprint print-0, the plan has newer"
    with pytest.raises(LedgerError, match=message):
        ledger.commit(changed, _table(slice))
    plan = Plan.write(location(tmp_path) / "changed.parquet", [changed])
    with pytest.raises(LedgerError, match=message):
        list(ledger.committed(plan))


def test_commit__full_disk_is_one_line_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """Files may not grow beyond a limit, as on a disk that is full."""
    ledger, plan = _open(tmp_path)
    first, second = plan.slices()[:2]
    ledger.commit(first, _table(first))
    wide = pa.table({"id": [np.random.default_rng(0).bytes(30_000).hex()]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            RunError, match=r"^/\S*s0000001\S*: File too large; make room"
        ) as caught:
            ledger.commit(second, wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value)
    assert _parts(ledger) == ["s0000000"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert Ledger(ledger.at).find(second.key) is None
    assert ledger.commit(second, wide).rows == 1
    assert Ledger(ledger.at).read(second.key) == wide


def test_find__torn_files_are_not_commits(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[0]
    group = tmp_path / "scores/commits/000000"
    group.mkdir(parents=True)
    (group / f".{slice.key}.json.0123456789abcdef.tmp").write_text('{"key": ')
    assert ledger.find(slice.key) is None
    assert len(list(ledger.pending(plan))) == len(NUMBERS)
    ledger.commit(slice, _table(slice))
    assert [c.key for c in ledger.committed(plan)] == [slice.key]
    (group / "s0000001.json").write_text('{"key": ')
    with pytest.raises(LedgerError, match=r"s0000001\.json: expected a commit record"):
        ledger.find("s0000001")


def test_seal__reads_the_same_from_packs(tmp_path: Path) -> None:
    _work(str(tmp_path))
    ledger, plan = _open(tmp_path)
    assert list(ledger.pending(plan)) == []
    before = ledger.manifest(plan)
    sealing.seal(ledger, plan)  # nothing left to do
    sealing.sweep(ledger, plan)
    fresh = Ledger(ledger.at)
    assert fresh.manifest(plan) == before
    assert before["rows"] == sum(_table(s).num_rows for s in plan.slices())
    assert [(s, t) for s, t in fresh.tables(plan)] == [(s, _table(s)) for s in plan.slices()]
    assert all(fresh.read(s.key) == _table(s) for s in plan.slices())
    assert fresh.read("s0000002", ["score"]).num_rows == 0
    assert [t.column_names for _, t in fresh.tables(plan, ["score"])] == [["score"]] * 6
    late = fresh.commit(plan.slices()[1], _table(plan.slices()[1], 0.5))
    assert late == fresh.find("s0000001")  # swept, and still the first one wins
    assert _parts(fresh) == []


@pytest.mark.parametrize("first", ["stat", "open"])
def test_read__a_part_that_is_swept_meanwhile(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _work(str(tmp_path))
    ledger, plan = _open(tmp_path)
    slice, expected = plan.slices()[1], _table(plan.slices()[1])
    (part,) = (f for f in (ledger.at / "parts").files([".parquet"]) if slice.key in f.name)
    name = "pipeline.storage.Location.size" if first == "stat" else "pipeline.tables.Reader"
    real = Location.size if first == "stat" else Reader

    def late(*given: Any) -> Any:
        Path(part.uri).unlink(missing_ok=True)  # by another driver
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(name, late)
        assert Ledger(ledger.at).read(slice.key) == expected
    assert not part.exists()


def test_read__slice_after_slice_decodes_a_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mine and score do: a ledger made anew for every slice, in one process."""
    monkeypatch.setattr(packs, "ROW_GROUP", 4)
    root = location(tmp_path)
    plan = Plan.write(root / "plan.parquet", [_slice(n) for n in range(8)])
    for slice in plan:
        Ledger(root / "l").commit(slice, _table(slice))
    sealing.seal(Ledger(root / "l"), plan)
    sealing.sweep(Ledger(root / "l"), plan)
    decoded: list[int | None] = []
    read = Reader.read

    def counted(file: Reader, columns: object = None, row_group: int | None = None) -> pa.Table:
        decoded.append(row_group)
        return read(file, columns, row_group=row_group)  # type: ignore[arg-type]

    slices = plan.slices()
    monkeypatch.setattr(Reader, "read", counted)
    assert all(Ledger(root / "l").read(s.key) == _table(s) for s in slices)
    groups = range(-(-sum(len(_table(s)) for s in slices) // 4))
    assert decoded == list(groups)

    (pack,) = (root / "l" / "packs").children()
    pack.write_bytes(pack.read_bytes())  # as forget does
    Ledger(root / "l").read(slices[-1].key, ["id"])
    assert len(decoded) > len(groups)


def test_read__few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "ROW_GROUP", 1)
    monkeypatch.setattr(packs, "_HELD", 100)
    at = location(tmp_path) / "pack.parquet"
    with at.replacing() as sink:
        packs.write_pack(sink, [pa.table({"a": [i, i]}) for i in range(20)])
    rows = packs.row_ranges(packs.Pack(at), [(i, i + 1) for i in range(40)])
    assert [row["a"][0].as_py() for row in rows] == [i // 2 for i in range(40)]
    assert sum(table.nbytes for table in packs.Pack._decoded.values()) <= 100


def _bytes(ledger: Ledger, folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (ledger.at / folder).children()}


def test_pack__leaves_what_commits_and_a_seal_leave(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path / "one")
    for slice in plan:
        ledger.commit(slice, _table(slice))
    sealing.seal(ledger, plan)
    sealing.sweep(ledger, plan)
    packed, _ = _open(tmp_path / "two")
    packed.pack(plan, (_table(slice) for slice in plan))
    assert _bytes(packed, "packs") == _bytes(ledger, "packs")
    assert packed.digest(plan) == ledger.digest(plan)
    assert list(packed.pending(plan)) == []
    assert not (packed.at / "parts").exists()
    told = [[c.key, c.rows, c.sha256, c.fingerprint] for c in packed.committed(plan)]
    assert told == [[c.key, c.rows, c.sha256, c.fingerprint] for c in ledger.committed(plan)]
    for slice in plan:
        assert packed.read(slice.key).equals(_table(slice))
        assert packed.find(slice.key) is None
        assert packed.winner(slice.key).sha256 == content_digest(_table(slice))
        assert ledger.winner(slice.key).sha256 == content_digest(_table(slice))
    assert packed.winner("s0000009") is None
    assert {s.key: t for s, t in packed.tables(plan)}[plan.slices()[1].key].num_rows == 2


def test_pack__killed_between_groups_then_run_again(tmp_path: Path) -> None:
    calm, plan = _open(tmp_path / "calm")
    calm.pack(plan, (_table(slice) for slice in plan))
    killed, _ = _open(tmp_path / "killed")

    def dies():
        yield from (_table(slice) for slice in plan.slices(0, 5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.pack(plan, dies())
    assert len((killed.at / "seals").children()) == 1
    before = _bytes(killed, "seals")
    killed.pack(plan, (_table(slice) for slice in plan))
    assert _bytes(killed, "seals").items() >= before.items()
    assert killed.digest(plan) == calm.digest(plan)
    killed.pack(plan, (_table(slice) for slice in plan))  # nothing left to do


def test_pack__as_many_tables_as_slices(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    tables = [_table(slice) for slice in plan]
    with pytest.raises(LedgerError, match="no table for slice s0001025"):
        ledger.pack(plan, tables[:-1])
    with pytest.raises(LedgerError, match="more tables than the plan's 6 slices"):
        ledger.pack(plan, [*tables, tables[0]])


def test_blocks__rows_of_packs_and_of_open_groups(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slices = plan.slices()
    expected = pa.concat_tables([_table(slice) for slice in slices])
    for slice in slices:
        ledger.commit(slice, _table(slice))
    sealing.seal(ledger, Plan.write(location(tmp_path) / "first.parquet", slices[:4]))
    blocks = list(ledger.blocks(plan, ["id", "score"]))
    assert [len(block) for block in blocks] == [
        sum(len(_table(s)) for s in slices[:4]),
        *(len(_table(s)) for s in slices[4:]),
    ]
    assert pa.concat_tables(blocks).equals(expected)
    coded = next(ledger.blocks(plan, ["id"], coded=["id"]))["id"]
    assert pa.types.is_dictionary(coded.type)
    assert coded.to_pylist() == expected["id"].to_pylist()[: len(coded)]


def test_seal__leaves_open_groups_alone(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    for slice in plan.slices()[:5]:
        ledger.commit(slice, _table(slice))
    sealing.seal(ledger, plan)
    assert [c.name[:7] for c in (ledger.at / "seals").children()] == ["000000-"]
    assert [s.key for s in ledger.pending(plan)] == ["s0001025"]
    with pytest.raises(LedgerError, match=r"1 of 6 slices are not committed, .*s0001025"):
        ledger.digest(plan)
    with pytest.raises(LedgerError, match="group 1 is not sealed"):
        sealing.sweep(ledger, plan)
    reached = ledger.tables(plan)
    assert [next(reached)[0].key for _ in range(5)] == [s.key for s in plan.slices()[:5]]
    with pytest.raises(LedgerError, match="s0001025 is not committed"):
        next(reached)


def test_seal__refuses_a_part_that_rotted(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    commits = [ledger.commit(slice, _table(slice)) for slice in plan.slices()]
    other = tmp_path / "scores/parts/000000" / commits[3].file
    other.write_bytes((other.parent / commits[1].file).read_bytes())
    with pytest.raises(LedgerError, match=r"s0000003-.*content sha256"):
        sealing.seal(ledger, plan)
    assert (ledger.at / "seals").children() == []
    assert (ledger.at / "packs").children() == []


def test_seal__a_changed_group_gets_a_pack_of_its_own(tmp_path: Path) -> None:
    """A grown pool and a removal list: kept slices are not made again, not even once swept."""
    _work(str(tmp_path))
    ledger, plan = _open(tmp_path)
    sealing.sweep(ledger, plan)
    slices = [_slice(0), _slice(1, ".r0011aabb"), *(_slice(n) for n in (2, 3, 4, 1024, 1025))]
    grown = Plan.write(location(tmp_path) / "grown.parquet", slices)
    pending = list(ledger.pending(grown))
    assert [s.key for s in pending] == ["s0000001.r0011aabb", "s0000004"]
    assert len(list(ledger.committed(grown))) == 5
    for slice in pending:
        ledger.commit(slice, _table(slice))
    assert [(s, t) for s, t in ledger.tables(grown)] == [(s, _table(s)) for s in slices]
    sealing.seal(ledger, grown)
    sealing.sweep(ledger, grown)
    assert _parts(ledger) == []
    for of in (plan, grown):
        assert [(s, t) for s, t in Ledger(ledger.at).tables(of)] == [
            (s, _table(s)) for s in of.slices()
        ]


def test_committed__lists_seals_and_open_groups_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, plan = _open(tmp_path)
    for slice in plan.slices()[:5]:
        ledger.commit(slice, _table(slice))
    sealing.seal(ledger, plan)
    listed: list[str] = []
    read: list[str] = []
    children, read_bytes = Location.children, Location.read_bytes

    def spy_children(self: Location) -> list[Location]:
        listed.append(self.uri.removeprefix(f"{tmp_path}/scores/"))
        return children(self)

    def spy_read(self: Location) -> bytes:
        read.append(self.parent.name)
        return read_bytes(self)

    monkeypatch.setattr(Location, "children", spy_children)
    monkeypatch.setattr(Location, "read_bytes", spy_read)
    fresh = Ledger(ledger.at)
    assert [c.key for c in fresh.committed(plan)] == [s.key for s in plan.slices()[:5]]
    assert listed == ["seals", "commits/100000"]
    assert read == ["seals", "100000"]  # one seal for four slices, one record of the open group
    listed.clear()
    read.clear()
    assert [s.key for s in Ledger(ledger.at).pending(plan)] == ["s0001025"]
    assert (listed, read) == (["seals", "commits/100000"], [])


def test_manifest__does_not_depend_on_order_or_attempt(tmp_path: Path) -> None:
    one, plan = _open(tmp_path / "1")
    two, _ = _open(tmp_path / "2")
    for slice in plan.slices():
        one.commit(slice, _table(slice), seconds=1)
    for slice in reversed(plan.slices()):
        table = _table(slice)
        chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
        two.commit(slice, chunked, seconds=2)
    assert one.manifest(plan) == two.manifest(plan)
    said = one.manifest(plan)
    assert (said["slices"], list(said["groups"])) == (len(NUMBERS), ["0", "1"])
    other, _ = _open(tmp_path / "3")
    for slice in plan.slices():
        other.commit(slice, _table(slice, 1e-7))
    assert other.digest(plan) != one.digest(plan)


def test_read__says_what_is_missing(tmp_path: Path) -> None:
    ledger, plan = _open(tmp_path)
    slice = plan.slices()[1]
    with pytest.raises(LedgerError, match="slice s0000001 is not committed"):
        ledger.read(slice.key)
    ledger.commit(slice, _table(slice))
    with pytest.raises(SourceError, match="missing column nose; found: id, score"):
        ledger.read(slice.key, ["nose"])
    (ledger.at / "parts").remove_tree()
    with pytest.raises(LedgerError, match="neither this part nor a pack"):
        ledger.read(slice.key)


def test_protocol__holds_on_s3() -> None:
    """Race on one slice, then a whole run, sealed and swept."""
    with s3_bucket() as root:
        ledger = Ledger(root / "scores")
        slice = _slice(0)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda i: ledger.commit(slice, _table(slice, i / 8)), range(8)))
        assert set(map(repr, got)) == {repr(Ledger(ledger.at).find(slice.key))}
        assert _parts(ledger) == [slice.key]

        _work(root.uri)
        plan = Plan(root / "plan.parquet")
        sealing.sweep(ledger, plan)
        assert _parts(ledger) == []
        assert [s for s, _ in ledger.tables(plan)] == plan.slices()
        assert (
            content_digest(Ledger(ledger.at).read("s0001025"))
            == {c.key: c.sha256 for c in ledger.committed(plan)}["s0001025"]
        )


def test_fault__off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNIFER_FAULT", raising=False)
    for step in STEPS:
        commits.fault(step)
