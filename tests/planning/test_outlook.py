"""Proves that planning leaves nothing behind, on disk or S3, and comes near what a run takes."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import flow
from helpers.s3 import s3_bucket

from pipeline import conduct
from pipeline.errors import SourceError
from pipeline.labeled.reader import read_labeled
from pipeline.planning import probing
from pipeline.planning.costs import Cluster, NodeGroup, load_prices
from pipeline.planning.outlook import Outlook, honest, look_ahead, scratch
from pipeline.planning.rehearsal import Rehearsed
from pipeline.posix import cores
from pipeline.recipe import Recipe
from pipeline.sources.reader import plan_slices, read_slice
from pipeline.sources.synthetic import SyntheticPool
from pipeline.storage import location

pytestmark = pytest.mark.ray
DATA = os.environ.get("OMNIFER_DATA")
SMALL = ("pool.0.count=100", "slice_faces=50", "labeled.count=80", "labeled.test_count=30")


def look(recipe: Recipe, at: object, **more: int) -> Outlook:
    options = {"probes": 2, "steps": 2, **more}
    return look_ahead(recipe, str(at), load_prices(None), **options)


def listing(at: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.stat().st_mtime_ns) for file in at.rglob("*"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outlook, list[Path]]:
    """An outlook of a recipe that never ran, and what lies where its run would be."""
    at = tmp_path_factory.mktemp("outlook")
    return look(flow.tiny(*SMALL), at / "runs" / "one"), list(at.iterdir())


def test_look_ahead__leaves_nothing_where_the_run_would_be(
    seen: tuple[Outlook, list[Path]],
) -> None:
    assert seen[1] == []


@pytest.mark.parametrize(("spot", "said"), [(False, ""), (True, "spot nodes (b) that leave")])
def test_honest__names_the_groups_whose_nodes_may_leave(
    seen: tuple[Outlook, list[Path]], spot: bool, said: str
) -> None:
    groups = (NodeGroup(name="a", max=1, cpus=1), NodeGroup(name="b", max=1, cpus=1, spot=spot))
    trained = {"teach": Rehearsed(1.0, (1.0,))}
    cluster = Cluster(groups=groups)
    lines = honest(seen[0].pool, seen[0].probes, trained, cluster, 2, 2.0, own_teacher=False)
    assert said in "".join(lines)
    assert ("spot" in "".join(lines)) == spot


def test_look_ahead__knows_the_pool_and_the_labeled_set(
    seen: tuple[Outlook, list[Path]],
) -> None:
    measured = seen[0].measured
    assert (measured.faces, measured.slices) == (100, 2)
    roles = read_labeled(flow.tiny(*SMALL).labeled).table["role"].to_pylist()
    assert measured.training_faces == roles.count("train") > 0
    assert measured.classes == 8
    assert 0.3 < measured.start_cpu["survey"] < measured.start_cpu["embed"]  # torch
    assert not seen[0].on_s3
    stages = [row.stage for row in seen[0].rows]
    assert stages[:4] == ["survey", "guard", "teach", "embed"]
    assert all(row.low <= row.seconds * 1.001 for row in seen[0].rows)
    assert "random weights" in seen[0].honest[0]


def test_look_ahead__a_finished_run_stays_as_it_is_and_gives_its_teacher(tiny_run: Path) -> None:
    before = listing(tiny_run)
    found = look(flow.tiny(), tiny_run)
    assert listing(tiny_run) == before
    assert [at.name for at in tiny_run.parent.iterdir()].count(tiny_run.name) == 1
    assert not list(tiny_run.parent.glob(".omnifer-plan-*"))
    assert "the run's teacher" in found.honest[0]
    assert "random weights" in look(flow.tiny("teach.folds=3"), tiny_run).honest[0]


def test_look_ahead__on_s3_a_prefix_beside_the_run_that_is_removed(tmp_path: Path) -> None:
    source = SyntheticPool(count=100)
    drawn = [
        read_slice(slice, {"a": source}) for slice in plan_slices({"a": source}, 50, location("/"))
    ]
    with s3_bucket() as bucket:
        with (location("s3://faces/pool/a.parquet")).replacing() as file:
            pq.write_table(pa.concat_tables(drawn).select(["image"]), file)
        sets = ("pool=[{kind: parquet, name: p, path: 's3://faces/pool'}]", "slice_faces=50")
        found = look(flow.tiny(*SMALL[2:], *sets), bucket / "one")
        left = [at.uri for at in location("s3://faces/runs").files([""])]
        left += [at.uri for at in location("s3://faces").children() if "plan" in at.name]
    assert left == []
    assert found.on_s3
    rows = {row.stage: row for row in found.rows}
    assert rows["survey"].requests.puts >= 2 * 3  # attempt, part and commit of two slices
    assert rows["survey"].requests.gets > 0  # the pool's bytes
    assert rows["teach"].requests.puts == 0


@pytest.mark.parametrize("uri", ["local", "s3://faces/runs/one"])
def test_scratch__is_removed_when_probing_fails(uri: str, tmp_path: Path) -> None:
    def fail(at: str) -> None:
        with scratch(location(at)) as work:
            (work / "survey/part").write_bytes(b"1")
            assert (work / "survey/part").exists()
            raise SourceError("broken")

    with s3_bucket():
        with pytest.raises(SourceError, match="broken"):
            fail(str(tmp_path / "runs" / "one") if uri == "local" else uri)
        assert list(location("s3://faces/runs").files([""])) == []
    assert list(tmp_path.iterdir()) == []


def test_scratch__is_on_the_disk_of_the_run_and_not_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with scratch(location(tmp_path / "run")) as work:
        assert work.local_path().parent == tmp_path


def quiet() -> bool:
    """Whether other work leaves this machine's cores."""
    return probing.usable_cores(cores()) > 0.75 * cores()


def judge(recipe: Recipe, at: Path) -> None:
    if not quiet():
        pytest.skip("other work runs on this machine: nothing can be predicted")
    found = look_ahead(recipe, str(at), load_prices(None), steps=3)
    flow.SharedRay.start()
    job = conduct.start(recipe, str(at), fresh=False, show_faces=False)
    conduct.run_all(job, "embed")
    if not quiet():
        pytest.skip("other work runs on this machine: nothing can be predicted")
    predicted = {row.stage: row.seconds for row in found.rows}
    took = {name: job.run.artifact(name).facts["seconds"] for name in ("survey", "embed")}
    factor = sum(took.values()) / sum(predicted[name] for name in took)
    assert 0.5 <= factor <= 2, f"took {took}, predicted {predicted}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_look_ahead__within_a_factor_of_two_of_a_run(tmp_path: Path) -> None:
    model = "{name: compact_resnet, args: {widths: [16, 32, 64, 128]}, size: 48, dropout: 0.1}"
    sets = ("pool.0.count=12000", "slice_faces=512", "distill=null", "tune=null")
    judge(flow.tiny(*sets, f"teach.model={model}", flow.UNTRACKED), tmp_path / "run")


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.skipif(DATA is None, reason="OMNIFER_DATA is not set")
def test_look_ahead__within_a_factor_of_two_on_real_photos(tmp_path: Path) -> None:
    pool = f"{{kind: parquet, name: faces, path: {DATA}/faces, crop: {{fraction: 0.5}}}}"
    judge(flow.tiny(f"pool=[{pool}]", "slice_faces=1024", flow.UNTRACKED), tmp_path / "run")
