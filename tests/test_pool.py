"""Proves what a run keeps about its pool: the plan, the hidden truth, the budget of bad faces."""

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import flow
from helpers.s3 import s3_bucket

from pipeline import conduct, pool, sealing, stages, synthetic
from pipeline.claim import WHOLE, Part
from pipeline.errors import BudgetError, IdentityError
from pipeline.job import Job
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice, number_of
from pipeline.run import Run, Stage
from pipeline.schema import EMOTIONS, FACES
from pipeline.sources import reader
from pipeline.sources.reader import read_slice
from pipeline.sources.removals import Removals
from pipeline.storage import location
from pipeline.survey import Surveyor
from pipeline.tables import read_table


def test_plan_pool__same_run_same_plan(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    before = pool.pool_plan(job).slices()
    stage, plan = pool.plan_pool(job)
    assert stage.done is not None
    assert plan.slices() == before
    assert [s.key for s in before] == [f"s{i:07d}" for i in range(10)]
    assert sum(s.stop - s.start for s in before) == 600


def test_plan_pool__removed_face_renames_its_slice_and_no_other(
    tiny_run: Path, tmp_path: Path
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    listed = tmp_path / "removed.txt"
    surveyed = flow.start(flow.tiny(flow.UNTRACKED), root)
    keys = [s.key for s in pool.pool_plan(surveyed).slices()]
    face = pool.ledger(surveyed, "survey").read(keys[4], ["id"])["id"][7].as_py()
    listed.write_text(face)
    job = flow.start(flow.tiny(flow.UNTRACKED, f"removals={listed}"), root)
    stage, plan = pool.plan_pool(job)
    now = [s.key for s in plan.slices()]
    assert stage.done is None
    assert [i for i in range(10) if now[i] != keys[i]] == [4]
    assert now[4] == f"{keys[4]}.r{job.removals.digest[:8]}"
    assert [s.key for s in Ledger(stage.dir).pending(plan)] == [now[4]]


class Surveyed:
    """A run that is planned under one list after the other; `survey` commits without Ray."""

    def __init__(self, at: Path, *slices: int) -> None:
        self.root, self.listed = at / "run", at / "removed.txt"
        self.keys = [f"s{i:07d}" for i in range(10)]
        self.faces = [f"pool/seed1#{60 * i + 7}" for i in range(10)]
        self.first = self.survey(*slices)

    def plan(self, *slices: int) -> tuple[Job, Stage, Plan]:
        """Plan with a list of one face of each of these slices."""
        self.listed.write_text("".join(f"{self.faces[i]}\n" for i in slices))
        sets = [f"removals={self.listed}"] if slices else []
        job = flow.start(flow.tiny(flow.UNTRACKED, *sets), self.root)
        if job.run.latest("labeled") is None:
            job.run.open("labeled", {}).finish("faces")
        return job, *pool.plan_pool(job)

    def survey(self, *slices: int, part: Part = WHOLE) -> Plan:
        """The same, and commit what is pending."""
        job, stage, plan = self.plan(*slices)
        surveyor = Surveyor(stage.dir, job.views, 1)
        for slice in list(Ledger(stage.dir).pending(plan)):
            if part.owns(number_of(slice.key)):
                surveyor(slice, read_slice(slice, job.sources, job.removals))
        if next(Ledger(stage.dir).pending(plan), None) is None:
            pool.seal(stage, plan)
        return plan

    def renamed(self, plan: Plan) -> list[int]:
        return [i for i, s in enumerate(plan.slices()) if s.key != self.keys[i]]


def test_plan_pool__a_removal_holds_when_its_survey_was_killed(tmp_path: Path) -> None:
    run = Surveyed(tmp_path)
    _, _, planned = run.plan(4, 5)  # and killed before anything is committed
    assert run.renamed(planned) == [4, 5]
    _, stage, plan = run.plan(4, 5)
    assert plan.digest == planned.digest
    assert stage.done is None
    assert list(Ledger(stage.dir).pending(plan)) == planned.slices(4, 6)
    assert run.survey(4, 5, part=Part(1, 2)).digest == planned.digest
    assert run.survey(4, 5, part=Part(2, 2)).digest == planned.digest  # as the first part left it
    _, stage, plan = run.plan(4, 5)
    assert stage.done is not None
    ids = [face for _, table in Ledger(stage.dir).tables(plan, ["id"]) for face in table["id"]]
    assert len(ids) == 598
    assert not {run.faces[4], run.faces[5]} & {face.as_py() for face in ids}


def test_plan_pool__a_grown_list_killed_and_one_taken_back(tmp_path: Path) -> None:
    run = Surveyed(tmp_path)
    first = run.survey(4)
    _, _, grown = run.plan(4, 7)  # killed
    assert run.renamed(grown) == [4, 7]
    assert grown.slices(4, 5) == first.slices(4, 5)  # its face is gone already
    assert run.plan(4, 7)[2].digest == grown.digest
    assert run.plan(4)[2].digest == first.digest
    run.plan(4, 7)
    _, stage, plan = run.plan()  # no list any more: what was surveyed first is whole
    assert plan.digest == run.first.digest
    assert stage.done is not None


def test_plan_pool__faces_come_back_once_a_list_is_gone(tmp_path: Path) -> None:
    """Whom the first survey left out is read again, and stays without a list."""
    run = Surveyed(tmp_path, 4)
    assert run.renamed(run.first) == []
    _, _, planned = run.plan()  # killed
    assert run.renamed(planned) == [4]
    assert run.survey().digest == planned.digest
    _, stage, plan = run.plan()
    assert plan.digest == planned.digest
    assert (stage.done is not None, Ledger(stage.dir).manifest(plan)["rows"]) == (True, 600)


@pytest.mark.parametrize("packed", [False, True])
def test_renamed__looks_slices_up_side_by_side(packed: bool) -> None:
    """As one after the other, at several requests to a store at a time."""
    under_way, most, lock = 0, 0, threading.Lock()

    def slow(method: str, path: str) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1

    slices = [Slice(f"s{i:07d}", 0, "web", "m", 2 * i, 2 * i + 2, "f", 2) for i in range(12)]
    with s3_bucket(slow) as bucket:
        at = bucket / "survey"
        plan, ledger = Plan.write(at / "plan.parquet", slices), Ledger(at)
        (at / pool.PLAN_FILE).write_json({"file": "plan.parquet", "removed": []})
        for slice in slices:
            rows = [{"id": f"web/{slice.start + i}", "position": i, "status": "ok"} for i in (0, 1)]
            ledger.commit(slice, pa.Table.from_pylist(rows, schema=FACES))
        if packed:
            sealing.seal(ledger, plan)
            sealing.sweep(ledger, plan)
        removals, earlier = Removals(frozenset(["web/5", "web/22"])), pool._earlier(at)
        most = 0
        keys = [slice.key for slice in pool.renamed(plan, removals, earlier)]
        assert most >= 4
        assert keys == [reader.keyed(slice, removals, earlier).key for slice in plan]
        assert [i for i in range(12) if keys[i] != slices[i].key] == [2, 11]


def test_plan_pool__a_changed_pool_or_decoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [tmp_path / f"web/{name}.parquet" for name in "ab"]
    shards[0].parent.mkdir()
    for at in shards:
        pq.write_table(pa.table({"image": pa.array([b"face"] * 3, pa.binary())}), at)
    web = f"pool=[{{kind: parquet, name: web, path: {shards[0].parent}}}]"

    def planned(*, fresh: bool = False) -> str:
        job = flow.start(flow.tiny(flow.UNTRACKED, web), tmp_path / "run", fresh=fresh)
        if job.run.latest("labeled") is None:
            job.run.open("labeled", {}).finish("faces")
        return pool.plan_pool(job)[0].dir.name

    first = planned()
    assert planned() == first
    os.utime(shards[1], ns=(1, 1))
    said = (
        r"inputs\.pool: .*\n.*--fresh.*\nthe plans differ, first at slice s0000001: web, .*b\.parq"
    )
    with pytest.raises(IdentityError, match=said):
        planned()
    assert planned(fresh=True).startswith("g002-")
    monkeypatch.setattr(pool, "DECODER", "another")
    with pytest.raises(IdentityError, match=r'inputs\.decoder: ".*" -> "another"'):
        planned()


def test_plan_pool__a_refused_plan_leaves_the_old_one_readable(tmp_path: Path) -> None:
    home = tmp_path / "photos"
    home.mkdir()
    for i in range(5):
        (home / f"b{i}.png").write_bytes(b"face %d" % i)
    web = f"pool=[{{kind: folder, name: web, path: {home}}}]"

    def start() -> Job:
        recipe = flow.tiny(flow.UNTRACKED, web, "slice_faces=2")
        return conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)

    job = start()
    job.run.open("labeled", {}).finish("faces")
    plan = pool.plan_pool(job)[1]
    before = [read_slice(slice, job.sources) for slice in plan]
    (home / "a.png").write_bytes(b"one that comes first")
    with pytest.raises(IdentityError, match=r"inputs\.pool: .*\n.*--fresh"):
        pool.plan_pool(start())
    assert [read_slice(slice, job.sources) for slice in plan] == before
    (home / "a.png").unlink()
    assert pool.plan_pool(start())[1].digest == plan.digest


def test_embed__another_compute_profile_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    with pytest.raises(IdentityError, match=r"inputs\.profile\.batch: 128 -> 32\nuse --fresh"):
        stages.embed(flow.start(flow.tiny(flow.UNTRACKED, "embed.batch=32"), root))
    assert stages.embed(flow.start(flow.tiny(flow.UNTRACKED, "embed.num_cpus=2"), root))


def test_write_truth__labels_of_the_drawn_faces(tiny_run: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    truth = read_table(job.run.artifact("survey").dir / pool.TRUTH_FILE).to_pylist()
    assert len(truth) == 600
    for index in (0, 63, 64, 599):
        code = synthetic.facts(1, [index], raters=2).label[0]
        assert truth[index] == {"id": f"pool/seed1#{index}", "label": EMOTIONS[code]}


@pytest.mark.parametrize(("budget", "enough"), [(0.25, True), (0.24, False), (None, True)])
def test_seal__more_bad_faces_than_the_budget(
    tmp_path: Path, budget: float | None, enough: bool
) -> None:
    stage = Run(location(tmp_path)).open("survey", {}, plan="p")
    slices = [Slice(f"s{i:07d}", 0, "web", "memory", 4 * i, 4 * i + 4, "f", 4) for i in range(2)]
    plan, ledger = Plan.write(stage.dir / "plan.parquet", slices), Ledger(stage.dir)
    for slice in slices:
        positions = range(slice.start, slice.stop)
        rows = [{"id": f"web/{i}", "position": i, "status": "ok"} for i in positions]
        rows[0] |= {
            "status": "quarantined",
            "reason": "truncated",
            "detail": "9 of 90",
            "head": b"x",
        }
        ledger.commit(slice, pa.Table.from_pylist(rows, schema=FACES), quarantined=1)
    if enough:
        facts = pool.seal(stage, plan, budget=budget).facts
        assert (facts["rows"], facts["quarantined"]) == (8, 2)
    else:
        with pytest.raises(BudgetError, match=r"2 of 8 .* web/0 \(truncated\), web/4"):
            pool.seal(stage, plan, budget=budget)
        assert stage.done is None
    if budget is None:
        return
    bad = read_table(stage.dir / pool.QUARANTINE_FILE).to_pylist()
    assert [(row["id"], row["position"]) for row in bad] == [("web/0", 0), ("web/4", 4)]
    (first, *_) = bad
    assert {first[name] for name in ("source", "shard", "reason", "detail")} == {
        "web", "memory", "truncated", "9 of 90"
    }  # fmt: skip
    assert first["head"] == b"x"
