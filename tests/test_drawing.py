"""Proves what is drawn for heads, and that a head search sees no test label and goes on."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow

from pipeline import drawing, pool, stages
from pipeline.artifacts import load_teacher
from pipeline.ledger import Ledger
from pipeline.spaces import HeadConfig
from pipeline.storage import location
from pipeline.tables import read_table, write_table
from pipeline.training import runs
from pipeline.training.handed import LABELED_FILE

HEADS = "search={objective: head, trials: 3, batch: 2, head: {class_faces: 20}}"


def codes(n: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).choice([-1, 0, 1, 2], n, p=[0.2, 0.5, 0.29, 0.01])


def test_draw__chunks_change_nothing() -> None:
    pool = codes()
    whole = drawing.draw([pool], 30, 0)
    parts = drawing.draw(np.split(pool, [7, 7, 400]), 30, 0)
    other = drawing.draw([pool], 30, 1)
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))
    assert whole[0].tolist() != other[0].tolist()


def test_draw__equally_many_of_each_class_stand_for_all_of_it() -> None:
    pool = codes()
    place, stands_for = drawing.draw([pool], 30, 0)
    assert (np.diff(place) > 0).all()
    for code in range(3):
        own, every = pool[place] == code, int((pool == code).sum())
        assert own.sum() == min(30, every)
        assert stands_for[own].sum() == pytest.approx(every)
    assert (pool[place] >= 0).all()


def test_draw__every_face_is_as_likely() -> None:
    pool = np.zeros(40, np.int64)
    hits = np.zeros(40)
    for seed in range(400):
        hits[drawing.draw([pool[:25], pool[25:]], 10, seed)[0]] += 1
    assert abs(hits - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_draw__of_nothing() -> None:
    place, stands_for = drawing.draw([np.full(5, -1)], 30, 0)
    assert len(place) == len(stands_for) == 0


def test_spaces__hold_no_twin_and_one_of_each_duplicate_group(
    tiny_run: Path, tmp_path: Path
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    job = flow.start(flow.tiny(flow.UNTRACKED), root, fresh=True)
    plan, guarded = pool.pool_plan(job), pool.ledger(job, "twins")
    teacher = job.run.artifact("teach").dir
    stage = job.open("twins", {"planted": "three faces of each slice"}, plan=plan.digest)
    into, ids = Ledger(stage.dir), []
    for slice, table in guarded.tables(plan):
        rows = table.to_pylist()
        rows[3] |= {"twin_of": "test/0", "twin_role": "test", "twin_kind": "pixels"}
        rows[5]["duplicate_group"] = rows[8]["duplicate_group"] = f"group of {slice.key}"
        ids += [row["id"] for row in rows]
        into.commit(slice, pa.Table.from_pylist(rows, schema=table.schema))
    pool.seal(stage, plan)
    assert guarded.at != into.at

    place, stands_for = drawing.drawn_rows(job, plan, 10_000)
    out = sorted(set(range(len(ids))) - set(place.tolist()))
    firsts = np.cumsum([0, *(len(table) for _, table in guarded.tables(plan))])[:-1]
    assert len(out) == 2 * len(firsts)
    for first in firsts:
        lost = [row - first for row in out if first <= row < first + 9]
        assert lost in ([3, 5], [3, 8])
    assert (stands_for == 1).all()

    found, at = drawing.spaces(job, plan, HeadConfig(class_faces=10_000))
    assert at == [ids[row] for row in place]
    embedded = pa.concat_tables(t for _, t in pool.ledger(job, "embed").tables(plan))
    flat = np.stack(embedded["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    members = len(load_teacher(teacher / runs.TEACHER).members)
    parts = np.split(flat[place], members, axis=1)
    for space, part in zip(found, parts, strict=True):
        own = part / np.linalg.norm(part, axis=1, keepdims=True)
        np.testing.assert_allclose(space.pool, own, atol=1e-6)


@pytest.mark.cluster
@pytest.mark.usefixtures("local_ray")
def test_search__sees_no_test_label_and_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    plain, poisoned = (flow.copy(tiny_run, tmp_path / name) for name in ("plain", "poisoned"))
    (at,) = poisoned.glob(f"test/g*/{LABELED_FILE}")
    table = read_table(location(at))
    turned = np.roll(np.array(table["label"].to_pylist(), dtype=object), 17)
    assert turned.tolist() != table["label"].to_pylist()
    column = table.column_names.index("label")
    label = pa.array(turned.tolist(), table.schema.field("label").type)
    at.unlink()
    write_table(location(at), table.set_column(column, table.schema.field("label"), label))

    def searched(root: Path) -> dict:
        job = flow.start(flow.tiny(flow.UNTRACKED, HEADS), root, fresh=True)
        stages.search(job)
        point = (job.run.artifact("search").dir / stages.POINT_FILE).read_json()
        assert len(point["trials"]) == 6
        return point

    first = searched(plain)
    assert first == searched(poisoned)
    assert any(trial["pareto"] for trial in first["trials"])
    best = max(first["trials"], key=lambda trial: trial["objective"])
    told = first["estimates"]
    assert told["accuracy_in_search"] == best["accuracy"]
    assert told["winners_curse"] == pytest.approx(best["objective"] - told["objective"])

    home = max(plain.glob("search/g*"))
    kept = sorted((home / stages.TRIALS).iterdir())
    assert len(kept) == 3
    kept[1].unlink()  # as if killed before it
    kept[2].unlink()
    for done in home.glob("done*.json"):
        done.unlink()
    shutil.rmtree(plain / "cache", ignore_errors=True)
    assert searched(plain) == first
