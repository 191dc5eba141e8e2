"""Proves that a pass yields every slice exactly once, under kills too, and refuses what would hang.

One Ray of four logical CPUs and two logical GPUs serves the whole file; no GPU is touched.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import streaming
from pipeline.errors import ResourceError, RunError, SourceError
from pipeline.placement import Capacity, Operator, StreamConfig, Transform, chain, lay_out
from pipeline.plan import Plan, Slice
from pipeline.storage import Location, location
from pipeline.streaming import account, read_range, stream

pytestmark = pytest.mark.ray
TWO_CPUS = Capacity(cpus=2, gpus=0, node_cpus=2, node_gpus=0, object_store=300_000_000)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    patch = pytest.MonkeyPatch()
    # Workers import this module by the name that pytest gave it.
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[__name__.count(".")]))
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    patch.undo()


def slices(count: int) -> list[Slice]:
    return [
        Slice(f"s{i:07d}", i // 1024, "toy", "memory", 10 * i, 10 * i + i % 5, f"f{i}", i % 5)
        for i in range(count)
    ]


def planned(at: Path, count: int) -> Plan:
    return Plan.write(location(at / "plan"), slices(count))


def read(slice: Slice) -> pa.Table:
    """Every fifth slice (0, 5, ...) has no face at all."""
    positions = list(range(slice.start, slice.stop))
    return pa.table({"position": pa.array(positions, pa.int64())})


class Doubled:
    """Adds a column and leaves a trace of the actor and of the rows it was called with."""

    def __init__(self, trace: Location, gpu: bool = False) -> None:
        import ray

        self.trace = trace
        context = ray.get_runtime_context()
        ids = context.get_accelerator_ids()["GPU"] if gpu else []
        (trace / f"actor-{os.getpid()}-{'+'.join(ids)}").create(b"")

    def __call__(self, slice: Slice, table: pa.Table) -> pa.Table:
        assert table["position"].to_pylist() == list(range(slice.start, slice.stop))
        return table.append_column("twice", pa.array([2 * p.as_py() for p in table["position"]]))


def make_count(names: tuple[str, ...]) -> Transform:
    def count(slice: Slice, table: pa.Table) -> pa.Table:
        assert table.column_names == list(names)
        return pa.table({"faces": [len(table)]})

    return count


def make_killer(once: Location) -> Transform:
    """Kills its own process on the seventh slice, the first time anybody sees it."""

    def kill(slice: Slice, table: pa.Table) -> pa.Table:
        if slice.key == "s0000007" and once.create(b"killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return table

    return kill


def make_poisoned() -> Transform:
    """Kills its process on the second slice, whenever anybody sees it."""

    def kill(slice: Slice, table: pa.Table) -> pa.Table:
        if slice.key == "s0000001":
            os.kill(os.getpid(), signal.SIGKILL)
        return table

    return kill


def make_failing(error: type[Exception]) -> Transform:
    def fail(slice: Slice, table: pa.Table) -> pa.Table:
        if slice.key == "s0000003":
            raise error("first line\nsecond line")
        return table

    return fail


def make_slow(trace: Location) -> Transform:
    doubled = Doubled(trace, gpu=True)

    def slow(slice: Slice, table: pa.Table) -> pa.Table:
        time.sleep(0.2)
        return doubled(slice, table)

    return slow


def keys(rows: Iterator[tuple[Slice, pa.Table]]) -> list[str]:
    return sorted(slice.key for slice, _ in rows)


def test_stream__twenty_slices_are_twenty_rows_after_each_operator(
    ray_cluster: None, tmp_path: Path
) -> None:
    pending = planned(tmp_path, 20)
    trace = location(tmp_path / "trace")
    trace.mkdir()
    operators = [
        Operator(make_count_passing, (("position",),), "checked", num_cpus=0.5),
        Operator(Doubled, (trace,), "doubled", pool=(1, 1)),
        Operator(make_count, (("position", "twice"),), "counted"),
    ]
    rows = list(stream(pending, read, operators, StreamConfig()))
    assert keys(iter(rows)) == [slice.key for slice in pending]
    assert {slice.key: table["faces"][0].as_py() for slice, table in rows} == {
        slice.key: slice.faces for slice in pending
    }


def test_stream__a_chain_runs_in_one_actor_and_several_slices_at_a_time(
    ray_cluster: None, tmp_path: Path
) -> None:
    pending = planned(tmp_path, 20)
    trace = location(tmp_path / "trace")
    trace.mkdir()
    home = Operator(Doubled, (trace,), "doubled", pool=(1, 1), calls=2)
    steps = [
        Operator(make_read, (), "read"),
        home,
        Operator(make_count, (("position", "twice"),), "counted"),
    ]
    rows = list(stream(pending, nothing, [chain(steps, home)], StreamConfig()))
    assert {slice.key: table["faces"][0].as_py() for slice, table in rows} == {
        slice.key: slice.faces for slice in pending
    }
    assert len(list(trace.children())) == 1  # one actor, though two slices were under way


def nothing(slice: Slice) -> pa.Table:
    return pa.table({})


def make_read() -> Transform:
    def reading(slice: Slice, table: pa.Table) -> pa.Table:
        assert not table.column_names
        return read(slice)

    return reading


def make_count_passing(names: tuple[str, ...]) -> Transform:
    count = make_count(names)

    def passing(slice: Slice, table: pa.Table) -> pa.Table:
        count(slice, table)
        return table

    return passing


def test_stream__pending_slices_only(ray_cluster: None, tmp_path: Path) -> None:
    every = slices(20)
    pending = Plan.write(location(tmp_path / "pass"), every[3:5] + every[11:])
    rows = stream(pending, read, [], StreamConfig())
    assert keys(rows) == [slice.key for slice in pending]


def test_stream__actor_killed_once_yields_every_slice_once(
    ray_cluster: None, tmp_path: Path
) -> None:
    pending = planned(tmp_path, 20)
    once = location(tmp_path / "killed")
    operators = [
        Operator(make_killer, (once,), "killer", pool=(1, 1)),
        Operator(make_count, (("position",),), "counted"),
    ]
    rows = stream(pending, read, operators, StreamConfig())
    assert keys(rows) == [slice.key for slice in pending]
    assert once.exists()


def test_stream__slice_that_always_kills_its_worker_is_named(
    ray_cluster: None, tmp_path: Path
) -> None:
    pending = planned(tmp_path, 3)
    operators = [Operator(make_poisoned, (), "decoder", pool=(1, 1))]
    config = StreamConfig(no_progress_seconds=5)
    with pytest.raises(RunError, match=r"nothing moved for 5 s .* come out: .*s0000001"):
        list(stream(pending, read, operators, config))


def read_killing(once: Location, slice: Slice) -> pa.Table:
    if slice.key == "s0000007" and once.create(b"killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(slice)


def test_stream__reader_killed_once_yields_every_slice_once(
    ray_cluster: None, tmp_path: Path
) -> None:
    pending = planned(tmp_path, 20)
    once = location(tmp_path / "killed")
    reading = partial(read_killing, once)
    rows = stream(pending, reading, [], StreamConfig(readers=1))
    assert keys(rows) == [slice.key for slice in pending]
    assert once.exists()


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (ValueError, RunError, "slice s0000003 of toy, broken: ValueError: first line second line"),
        (SourceError, SourceError, "slice s0000003 of toy, broken: first line second line"),
    ],
)
@pytest.mark.parametrize("pool", [None, (1, 1)])
def test_stream__failing_operator_names_the_slice(
    ray_cluster: None,
    tmp_path: Path,
    error: type[Exception],
    raised: type[Exception],
    text: str,
    pool: tuple[int, int] | None,
) -> None:
    pending = planned(tmp_path, 5)
    operators = [Operator(make_failing, (error,), "broken", pool=pool)]
    rows = stream(pending, read, operators, StreamConfig())
    with pytest.raises(raised) as caught:
        list(rows)
    assert type(caught.value) is raised
    assert str(caught.value) == text


def fail_to_read(slice: Slice) -> pa.Table:
    raise SourceError(f"{slice.shard}: changed since it was planned")


def test_stream__failing_read_keeps_its_class(ray_cluster: None, tmp_path: Path) -> None:
    pending = planned(tmp_path, 1)
    with pytest.raises(SourceError, match="slice s0000000 of toy, read: memory: changed since"):
        list(stream(pending, fail_to_read, [], StreamConfig()))


def make_broken() -> Transform:
    raise SourceError("no such weights")


def test_stream__operator_that_cannot_start_ends_the_run(ray_cluster: None, tmp_path: Path) -> None:
    pending = planned(tmp_path, 2)
    operators = [Operator(make_broken, (), "model", pool=(1, 1))]
    with pytest.raises(SourceError, match=r"slice s000000[01] of toy, model: no such"):
        list(stream(pending, read, operators, StreamConfig()))


def read_much(slice: Slice) -> pa.Table:
    return pa.table({"image": pa.array([bytes(60_000_000)], pa.large_binary())})


def test_stream__payload_that_would_spill_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    pending = planned(tmp_path, 1)
    with pytest.raises(ResourceError, match=r"60,000,\d+ bytes of payload would spill, at most "):
        list(stream(pending, read_much, [], StreamConfig()))


def test_stream__half_gpus_hold_at_most_four_actors(ray_cluster: None, tmp_path: Path) -> None:
    pending = planned(tmp_path, 40)
    trace = location(tmp_path / "trace")
    trace.mkdir()
    operators = [Operator(make_slow, (trace,), "embed", pool=(1, 4), num_gpus=0.5)]
    rows = stream(pending, read, operators, StreamConfig())
    assert keys(rows) == [slice.key for slice in pending]
    actors = [child.uri.rsplit("-", 1)[1] for child in trace.children()]
    assert 1 <= len(actors) <= 4
    assert set(actors) <= {"0", "1"}


def test_stream__more_gpus_than_there_are(ray_cluster: None, tmp_path: Path) -> None:
    pending = planned(tmp_path, 2)
    operators = [Operator(Doubled, (location(tmp_path),), "embed", pool=(3, 3), num_gpus=1)]
    with pytest.raises(ResourceError, match="= 3 GPUs needed at once, 2 there"):
        stream(pending, read, operators, StreamConfig())


def test_read_range__a_repeated_task_yields_the_same_sequence(tmp_path: Path) -> None:
    plan = planned(tmp_path, 20)
    task = partial(read_range, location(tmp_path / "plan"), 4, 9, read, 10**6)
    first, second = list(task()), list(task())
    assert [row["slice"][0].as_py() for row in first] == [row["slice"][0].as_py() for row in second]
    assert all(a.equals(b) for a, b in zip(first, second, strict=True))
    assert len(first) == 5
    assert len(plan) == 20


@pytest.mark.parametrize(
    ("pool", "cpus", "read_cpus"), [((2, 2), 1.0, 0.25), ((1, 1), 2.0, 0.25), ((1, 1), 1.0, 1.5)]
)
def test_lay_out__refuses_what_hangs_on_two_cpus(
    pool: tuple[int, int], cpus: float, read_cpus: float
) -> None:
    operators = [Operator(make_broken, (), "embed", pool=pool, num_cpus=cpus)]
    needed = pool[0] * cpus + read_cpus
    with pytest.raises(ResourceError, match=f"= {needed:g} CPUs needed at once, 2 there"):
        lay_out(operators, StreamConfig(read_cpus=read_cpus), TWO_CPUS)


def test_lay_out__gpu_actor_on_a_host_without_one_is_refused() -> None:
    operators = [Operator(make_broken, (), "embed", pool=(1, 1), num_gpus=0.5)]
    with pytest.raises(ResourceError, match=r"embed asks for 0\.5 GPUs at a time, .* has 0"):
        lay_out(operators, StreamConfig(), TWO_CPUS)


def test_lay_out__actor_larger_than_any_node_is_refused() -> None:
    have = Capacity(cpus=8, gpus=0, node_cpus=2, node_gpus=0, object_store=10**9)
    operators = [Operator(make_broken, (), "embed", pool=(1, 1), num_cpus=4)]
    with pytest.raises(ResourceError, match="asks for 4 CPUs at a time, the largest node has 2"):
        lay_out(operators, StreamConfig(), have)


def test_lay_out__payloads_of_all_rows_in_flight_fit_half_the_store() -> None:
    operators = [
        Operator(make_broken, (), "survey", num_cpus=1),
        Operator(make_broken, (), "embed", pool=(1, 2), num_cpus=0.5, calls=2),
    ]
    layout = lay_out(operators, StreamConfig(readers=2, in_flight=3), TWO_CPUS)
    assert (layout.readers, layout.workers) == (2, (2, 2))
    rows = 3 * 2 + 3 * 2 + 2 * 4  # two calls at a time want four in flight, not three
    assert layout.largest_payload == 300_000_000 // (2 * rows)


HEAD_ALONE = {"Alive": True, "Resources": {"object_store_memory": 4.8e9}}


def test_capacity__of_a_cluster_whose_workers_are_still_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [HEAD_ALONE])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    grows = StreamConfig(cpus=128, gpus=8, in_flight=4)
    gpu = Operator(make_broken, (), "embed", pool=(1, 8), num_cpus=8, num_gpus=1)
    assert lay_out([gpu], grows, streaming._capacity(grows)).largest_payload < 50_000_000
    said = {"node_cpus": 16, "node_gpus": 1, "object_store_mb": 110_000}
    grows = grows.model_copy(update=said)
    have = streaming._capacity(grows)
    assert have == Capacity(128, 8, 16, 1, 110_000_000_000)
    assert lay_out([gpu], grows, have).largest_payload > 8_192 * 8_000  # a slice of the recipe
    for wide in (replace(gpu, num_cpus=17), replace(gpu, num_gpus=2)):
        with pytest.raises(ResourceError, match=r"embed asks for (17 CPUs|2 GPUs) at a time"):
            lay_out([wide], grows, have)
    monkeypatch.setattr(ray, "nodes", lambda: [HEAD_ALONE, {**LARGE, "Alive": True}])
    assert streaming._capacity(grows) == Capacity(128, 8, 64, 1, 200_000_000_000)
    monkeypatch.delenv("RAY_ADDRESS")
    assert streaming._capacity(grows).cpus == 64


LARGE = {"Resources": {"CPU": 64.0, "object_store_memory": 195.2e9}}


def test_ranges__cover_everything_once_and_stay_few() -> None:
    for count in (1, 2, 20, 999, 5000, 1_000_000):
        ranges = streaming._ranges(count, readers=2)
        assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1]) == (0, count)
        assert len(ranges) <= 4096


def test_account__missing_slices_are_named(tmp_path: Path) -> None:
    plan, pending = planned(tmp_path, 4), slices(4)
    table = pa.table({})
    with pytest.raises(RunError, match="2 of 4 slices did not come out: s0000001, s0000003"):
        list(account(plan, [(pending[0], table), (pending[2], table)]))


def test_account__a_slice_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    plan, pending = planned(tmp_path, 2), slices(2)
    table = pa.table({})
    with pytest.raises(RunError, match="s0000000 came out twice"):
        list(account(plan, [(pending[0], table), (pending[0], table)]))


def test_stream__nothing_pending_needs_no_ray(tmp_path: Path) -> None:
    assert list(stream(planned(tmp_path, 0), read, [], StreamConfig())) == []


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_start_ray__local_unless_ray_address_is_set(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    address: str | None,
) -> None:
    import ray

    started: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(ray, "init", lambda **how: started.append(how))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    for _ in range(2):
        streaming.start_ray(StreamConfig(cpus=3, gpus=0, object_store_mb=200))
    assert len(started) == 1
    warned = capsys.readouterr().out.count("warning: joining 10.0.0.1:6379, and no token here")
    assert warned == (address is not None)
    assert started[0]["address"] == (address or "local")
    mine = {name: started[0].get(name) for name in ("num_cpus", "num_gpus", "object_store_memory")}
    if address is None:
        assert mine == {"num_cpus": 3, "num_gpus": 0, "object_store_memory": 200_000_000}
        assert started[0]["include_dashboard"] is False
    else:
        assert set(mine.values()) == {None}
