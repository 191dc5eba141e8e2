"""What is written again holds the other faces unchanged, and no pointer to those that left."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.tiny import NAMES, tiny_teacher

from pipeline import sealing
from pipeline.artifacts import load_teacher, save_teacher
from pipeline.ledger import Ledger
from pipeline.packs import content_digest
from pipeline.plan import Plan, Slice
from pipeline.purging import (
    LedgerChange,
    Purge,
    duplicate_groups,
    lists_any,
    manifest,
    purge_chosen,
    purge_ledger,
    purge_table,
    purge_teacher,
)
from pipeline.sources.index import Entry, build, keep, named
from pipeline.storage import location
from pipeline.tables import read_table, write_table
from pipeline.training.distill import Distilled
from pipeline.training.distilled import load_distilled, save_distilled

IDS = frozenset({"a1", "b0"})


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.posix.os.fsync", lambda _: None)


def in_place(at):
    """New versions replace the old ones at once."""
    return at


def slices(count: int) -> list[Slice]:
    return [Slice(f"s{i:07d}", 0, "pool", "shard", i, i + 1, "f", 2) for i in range(count)]


def table(letter: str) -> pa.Table:
    return pa.table(
        {
            "id": [f"{letter}0", f"{letter}1"],
            "status": ["ok", "quarantined"],
            "duplicate_group": ["a1", "a1"] if letter != "c" else [None, "b0"],
            "value": pa.array([1.5, None], pa.float32()),
        }
    )


def filled(at, sealed: bool) -> tuple[Ledger, Plan]:
    plan = Plan.write(at / "plan.parquet", slices(3))
    ledger = Ledger(at)
    for slice, letter in zip(plan.slices(), "abc", strict=True):
        ledger.commit(slice, table(letter), quarantined=1)
    if sealed:
        sealing.seal(ledger, plan)
        sealing.sweep(ledger, plan)
    return ledger, plan


@pytest.mark.parametrize("sealed", [True, False])
def test_purge_ledger__commits_and_manifest_are_of_the_rows_that_stay(tmp_path, sealed) -> None:
    at = location(tmp_path)
    _, plan = filled(at, sealed)
    groups = duplicate_groups(at, IDS)
    assert groups == {"a1": "a0", "b0": None}  # a0 and b1 stay; c1 is alone
    change = purge_ledger(at, in_place, Purge(IDS, groups))
    assert change.dropped == 2
    ledger = Ledger(at)
    tables = [ledger.read(slice.key) for slice in plan.slices()]
    assert [t["id"].to_pylist() for t in tables] == [["a0"], ["b1"], ["c0", "c1"]]
    assert [t["duplicate_group"].to_pylist() for t in tables] == [["a0"], ["a0"], [None, None]]
    assert tables[2].drop(["duplicate_group"]).equals(table("c").drop(["duplicate_group"]))
    for slice, rows in zip(plan.slices(), tables, strict=True):
        commit = ledger.winner(slice.key)
        assert (commit.rows, commit.sha256) == (rows.num_rows, content_digest(rows))
    assert [ledger.winner(s.key).quarantined for s in plan.slices()] == [0, 1, 1]
    if sealed:
        assert manifest(at, plan, LedgerChange()) == ledger.manifest(plan)
        assert manifest(at, plan, change) == ledger.manifest(plan)
    assert ledger.manifest(plan)["rows"] == 4


def test_purge_ledger__without_the_faces_nothing_is_written(tmp_path) -> None:
    filled(location(tmp_path), sealed=True)

    def staged(at):
        raise AssertionError(at)

    change = purge_ledger(location(tmp_path), staged, Purge(frozenset({"z"})))
    assert (change.seals, change.dropped) == ({}, 0)


def test_purge_table__drops_rows_and_empties_pointers(tmp_path) -> None:
    at = location(tmp_path / "t.parquet")
    rows = pa.table(
        {
            "id": ["a0", "a1", "x"],
            "twin_of": ["b0", None, "keep"],
            "neighbor_ids": pa.array(
                [["a1", "n"], ["n", "n"], ["n", None]], pa.list_(pa.string(), 2)
            ),
            "role": ["train", "train", "rest"],
            "label": ["fear", "anger", None],
        }
    ).replace_schema_metadata({b"label_names": b"fear,anger"})
    write_table(at, rows)
    left = purge_table(at, in_place, Purge(IDS))
    assert left.to_pylist() == [{"id": "a1", "role": "train", "label": "anger"}]
    now = read_table(at)
    assert now["id"].to_pylist() == ["a0", "x"]
    assert now["twin_of"].to_pylist() == ["forgotten", "keep"]  # a twin of a test face stays out
    assert now["neighbor_ids"].to_pylist() == [[None, "n"], ["n", None]]
    assert now.schema.equals(rows.schema, check_metadata=True)
    assert purge_table(at, in_place, Purge(IDS)) is None


def test_purge_teacher__the_bank_forgets_and_its_digest_is_that_of_what_loads(tmp_path) -> None:
    at, teacher = location(tmp_path), tiny_teacher()
    save_teacher(teacher, at)
    gone = frozenset({"train/2", "train/5"})
    new = purge_teacher(at, in_place, gone, np.ones(7, bool), 1, 0)
    again = load_teacher(at)
    assert again.sha256 == new != teacher.sha256
    assert again.weights_sha256 == teacher.weights_sha256
    assert again.bank_ids == ("train/0", "train/1", "train/3", "train/4", "train/6")
    assert torch.equal(again.bank, teacher.bank[[0, 1, 3, 4, 6]])
    assert torch.equal(again.bank_labels, teacher.bank_labels[[0, 1, 3, 4, 6]])
    assert torch.equal(again.prototypes, teacher.prototypes)
    assert purge_teacher(at, in_place, gone, np.ones(5, bool), 1, 0) is None


def test_purge_teacher__a_prototype_that_is_one_face_is_made_again(tmp_path) -> None:
    at, teacher = location(tmp_path), tiny_teacher()
    teacher.prototypes[1] = teacher.bank[1]  # of class 1 only this face was right
    save_teacher(teacher, at)
    purge_teacher(at, in_place, frozenset({"train/1"}), np.ones(7, bool), 1, 0)
    again = load_teacher(at)
    rest = teacher.bank[4]  # the other face of class 1
    torch.testing.assert_close(again.prototypes[1], rest, rtol=1e-5, atol=1e-5)
    assert len(again.prototypes) == len(NAMES)


def test_purge_chosen__the_image_leaves_with_its_label(tmp_path) -> None:
    at = location(tmp_path)
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 1, 4, 4)
    soft = np.eye(3, dtype=np.float32)
    made = Distilled(images, np.arange(3), soft, NAMES, np.arange(3), [], 0.0, 0.0, None)
    save_distilled(at, made)
    purge_chosen(at, in_place, np.array([False, True, False]))
    now = load_distilled(at)
    np.testing.assert_array_equal(now.images, images[[0, 2]])
    np.testing.assert_array_equal(now.soft, soft[[0, 2]])
    assert now.labels.tolist() == [0, 2]


@pytest.mark.parametrize("source", ["web", "my.web", "web-2"])
def test_lists_any__an_index_by_any_name(tmp_path, source) -> None:
    at = location(tmp_path / f"{source}.index.parquet")
    entries = [Entry("a.tar", "m", 1, f"/{i}.png") for i in range(3)]
    build(at, entries, "none")
    build(named(at, "0123456789"), entries, "none")
    files = [at, named(at, "0123456789"), keep(at, entries[:2], "none")]
    assert len({file.name for file in files}) == 3
    for file in files:
        assert lists_any(file, frozenset([f"{source}/a.tar/1.png"]))
        assert not lists_any(file, frozenset(["a.tar/1.png", "other/a.tar/1.png"]))
