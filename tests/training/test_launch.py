"""Proves that a training function runs alike here and on Ray Train workers, and fails clearly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import streaming
from pipeline.errors import ModelError, ResourceError, RunError
from pipeline.storage import location
from pipeline.streaming import StreamConfig
from pipeline.training import launch as launching
from pipeline.training.launch import launch, spread
from pipeline.training.loop import Worker

pytestmark = pytest.mark.ray


def add(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Every worker adds its number, counted from 1, times a factor."""
    found = worker.all_reduce(torch.tensor([config["factor"] * (worker.rank + 1.0)]))
    facts = {"sum": found.item(), "world": worker.world, "device": worker.device.type}
    if worker.world > 1:
        group = torch.distributed.distributed_c10d._get_default_group()
        facts["hours"] = group._get_backend(worker.device).options._timeout.total_seconds() / 3600
    return {**facts, "dtype": str(worker.dtype), "every": worker.checkpoint_every}


def misfit(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    if worker.rank == config["rank"]:
        raise ModelError("weights of another network")
    worker.barrier()
    return {}


def divide(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    return {"never": 1 / config["zero"]}


def killed_once(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    worker.barrier()
    time.sleep(2)  # as in life: dies while training, not while it is started
    once = Path(config["once"])
    if worker.rank == 1 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    worker.barrier()
    return {"world": worker.world}


def run(loop: launching.Training, config: dict[str, Any], at: Path, workers: int) -> dict[str, Any]:
    return launch(
        loop,
        config,
        workers=workers,
        use_gpu=False,
        storage=location(at),
        name="try",
        bf16=False,
        threads=1,
        checkpoint_every=7,
    )


def test_launch__no_workers_runs_here_without_ray(tmp_path: Path) -> None:
    import ray

    found = run(add, {"factor": 3.0}, tmp_path, workers=0)
    assert found == {"sum": 3, "world": 1, "device": "cpu", "dtype": "torch.float32", "every": 7}
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_launch__here_errors_are_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights of another network"):
        run(misfit, {"rank": 0}, tmp_path, workers=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_launch__a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="use_gpu is set, but torch sees no GPU"):
        launch(add, {}, workers=0, use_gpu=True, storage=location(tmp_path), name="try")


class Trainer:
    """Stands for Ray's: keeps what it is asked for."""

    asked: dict[str, Any]

    def __init__(self, loop: Any, **asked: Any) -> None:
        Trainer.asked = asked

    def fit(self) -> SimpleNamespace:
        return SimpleNamespace(return_value={"trained": True})


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that we joined, of a head without CPUs."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.setattr(launching, "start_ray", lambda config: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)


def on_a_gpu(at: Path, stream: StreamConfig, workers: int = 1) -> dict[str, Any]:
    place = {"use_gpu": True, "storage": location(at), "name": "teach"}
    return launch(add, {}, workers=workers, stream=stream, **place)  # type: ignore[arg-type]


def test_launch__workers_that_a_cluster_can_grow_to_are_waited_for(
    cold: None, tmp_path: Path
) -> None:
    grows = StreamConfig(cpus=128, gpus=8, no_progress_seconds=3600)
    assert on_a_gpu(tmp_path, grows, workers=8) == {"trained": True}
    assert Trainer.asked["scaling_config"].num_workers == 8
    assert Trainer.asked["run_config"].failure_config.controller_failure_limit == 60  # minutes
    on_a_gpu(tmp_path, StreamConfig(cpus=1, gpus=1))
    kept = Trainer.asked["run_config"].failure_config.controller_failure_limit
    assert kept == launching.PATIENCE
    assert spread(add, [], use_gpu=True, name="experts", stream=grows) == []


def test_launch__workers_that_will_never_be_there_are_refused(
    cold: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grows = StreamConfig(cpus=128, gpus=8)
    with pytest.raises(ResourceError, match=r"9 workers x 1 GPU = 9 needed at once, 8 there"):
        on_a_gpu(tmp_path, grows, workers=9)
    with pytest.raises(ResourceError, match=r"1 CPU = 1 needed at once, 0 there; .* stream\.cpus"):
        on_a_gpu(tmp_path, StreamConfig())
    with pytest.raises(ResourceError, match="experts: 1 workers x 1 GPU = 1 needed at once, 0"):
        spread(add, [], use_gpu=True, name="experts", stream=StreamConfig(cpus=4))
    monkeypatch.delenv("RAY_ADDRESS")  # a local Ray has what it has
    with pytest.raises(ResourceError, match="0 there"):
        on_a_gpu(tmp_path, grows)


def test_room__is_the_larger_of_what_is_there_and_what_is_declared(
    cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 1.0})
    assert streaming.room(StreamConfig(cpus=8, gpus=4)) == {"CPU": 16, "GPU": 4}
    assert streaming.room(StreamConfig()) == {"CPU": 16, "GPU": 1}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    patch = pytest.MonkeyPatch()
    # Workers import this module by the name that pytest gave it.
    root = Path(__file__).parents[__name__.count(".")]
    patch.setenv("PYTHONPATH", str(root))
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    patch.undo()


@pytest.mark.cluster
def test_launch__two_workers_reduce_and_the_first_answers(
    ray_cluster: None, tmp_path: Path
) -> None:
    found = run(add, {"factor": 3.0}, tmp_path, workers=2)
    facts = {"sum": 9, "world": 2, "device": "cpu", "dtype": "torch.float32", "every": 7}
    assert found == {**facts, "hours": 12}  # as long as a late node may pack its faces


@pytest.mark.cluster
def test_launch__a_killed_worker_starts_the_group_again(ray_cluster: None, tmp_path: Path) -> None:
    assert run(killed_once, {"once": str(tmp_path / "once")}, tmp_path, workers=2) == {"world": 2}
    assert (tmp_path / "once").exists()


@pytest.mark.cluster
def test_launch__errors_of_a_worker_keep_their_class(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "RESTARTS", 0)
    with pytest.raises(ModelError) as caught:
        run(misfit, {"rank": 1}, tmp_path, workers=2)
    assert str(caught.value) == "weights of another network"
    with pytest.raises(RunError, match="try: worker 0: ZeroDivisionError: "):
        run(divide, {"zero": 0}, tmp_path, workers=1)


@pytest.mark.cluster
def test_launch__more_workers_than_cpus_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="3 workers x 1 CPU = 3 needed at once, 2 there"):
        run(add, {"factor": 1.0}, tmp_path, workers=3)
