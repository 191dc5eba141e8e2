"""Removal lists: every way to write them, what they hit, and what they refuse."""

import hashlib
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.sources.removals import Removals
from pipeline.storage import location

HASH = hashlib.sha256(b"face 2").digest()
FACES = pa.table(
    {
        "id": ["p/a#0", "p/a#1", "p/a#2", "p/a#3"],
        "group": ["g0", None, None, "g3"],
        "image": [b"face 0", b"face 1", b"face 2", None],
    }
)
BOTH = Removals(frozenset(["p/a#0"]), frozenset([HASH]), frozenset(["g3"]))


def loaded(path, text):
    path.write_text(text)
    return Removals.load(location(path))


def test_hits__by_id_bytes_and_group():
    assert BOTH.hits(FACES).tolist() == [True, False, True, True]
    assert Removals().hits(FACES).tolist() == [False] * 4
    assert BOTH.hits(FACES.slice(0, 0)).tolist() == []


def test_hits__stored_hashes_do_as_well_as_bytes():
    hashes = [hashlib.sha256(image or b"").digest() for image in FACES["image"].to_pylist()]
    hashes[3] = None
    table = FACES.drop_columns(["image"]).append_column("sha256", pa.array(hashes, pa.binary(32)))
    assert BOTH.hits(table).tolist() == [True, False, True, True]


def test_load__text(tmp_path):
    found = loaded(tmp_path / "list.txt", f"p/a#0\n\n {HASH.hex().upper()} \ng3\n")
    assert found.hits(FACES).tolist() == [True, False, True, True]


def test_load__csv_and_parquet(tmp_path):
    text = f"id,group,sha256,why\np/a#0,,,asked\n,g3,,\n,,{HASH.hex()},\n"
    assert loaded(tmp_path / "list.csv", text) == BOTH
    table = pa.table({"sha256": pa.array([HASH], pa.binary(32)), "id": ["p/a#0"], "group": ["g3"]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert Removals.load(location(tmp_path / "list.parquet")) == BOTH


def test_load__numbers_stay_text(tmp_path):
    assert loaded(tmp_path / "list.csv", "group\n007\n").groups == {"007"}


def test_load__none():
    assert Removals.load(None) == Removals()
    assert not Removals()
    assert BOTH


def test_load__faults(tmp_path):
    with pytest.raises(SourceError, match="expected a column id, sha256, group; found: name"):
        loaded(tmp_path / "list.csv", "name\nx\n")
    with pytest.raises(SourceError, match=r"list.csv row 0: sha256 'abc'; expected 64 hex digits"):
        loaded(tmp_path / "list.csv", "sha256\nabc\n")
    with pytest.raises(SourceError, match="no such file"):
        Removals.load(location(tmp_path / "gone.txt"))


def test_digest__order_does_not_count(tmp_path):
    first = loaded(tmp_path / "a.txt", "x/1#1\nx/1#2\n")
    second = loaded(tmp_path / "b.txt", "x/1#2\nx/1#1\n")
    assert first.digest == second.digest == pickle.loads(pickle.dumps(first)).digest
    assert first.digest != loaded(tmp_path / "c.txt", "x/1#2\n").digest


def test_covers__a_grown_list_covers_the_old_one():
    grown = Removals(BOTH.ids | {"p/a#9"}, BOTH.sha256, BOTH.groups)
    assert grown.covers(BOTH)
    assert not BOTH.covers(grown)


def test_blinded__keeps_a_face_out_and_names_nobody() -> None:
    blinded = Removals().also(BOTH.all_blinded)
    assert blinded.hits(FACES).tolist() == BOTH.hits(FACES).tolist()
    assert (blinded.ids, blinded.sha256, blinded.groups) == (frozenset(),) * 3
    assert not any(b"g3" in value or HASH in value for value in blinded.blinded)
    assert blinded.covers(BOTH)
    assert not Removals().covers(blinded)
    assert blinded.digest != Removals().digest
