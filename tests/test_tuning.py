"""Proves that a stopped search goes on where it was, and asks what an undisturbed one asks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.storage import location
from pipeline.tuning import Plan, tuned

pytestmark = [pytest.mark.cluster, pytest.mark.ray]
PLAN = Plan(trials=8, batch=3, concurrency=2, seed=0)


def space() -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {"x": FloatDistribution(-2, 2), "on": CategoricalDistribution([False, True, None])}


def worth(point: dict[str, Any], folder: str) -> dict[str, Any]:
    """Notes each call; once this many points are known, something happens once or always."""
    with open(f"{folder}/calls", "a") as calls:
        calls.write("x\n")
    done = len(Path(f"{folder}/calls").read_text().split())
    kill, broken = Path(f"{folder}/kill"), Path(f"{folder}/broken")
    if kill.exists() and done >= 8:
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if broken.exists() and done >= 14:
        raise ValueError("broken here")
    return {**point, "objective": -((point["x"] - 0.7) ** 2) + 0.1 * bool(point["on"])}


@pytest.fixture(scope="module")
def ray_here() -> Any:
    import ray

    env = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        runtime_env=env,
    )
    yield
    ray.shutdown()


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().split())


@pytest.mark.usefixtures("ray_here")
def test_tuned__goes_on_after_a_killed_worker_and_after_a_failed_search(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("calm", "killed", "broken")}
    for folder in folders.values():
        folder.mkdir()
    calm = tuned(worth, str(folders["calm"]), space(), PLAN, folders["calm"])
    assert len(calm) == 24
    assert calls(folders["calm"]) == 24
    assert max(one["objective"] for one in calm[-6:]) > max(one["objective"] for one in calm[:6])

    (folders["killed"] / "kill").touch()
    killed = tuned(worth, str(folders["killed"]), space(), PLAN, folders["killed"])
    assert not (folders["killed"] / "kill").exists()
    assert calls(folders["killed"]) > 24
    assert killed == calm

    at, told = folders["broken"], []
    (at / "broken").touch()
    kept = location(at / "trials")
    with pytest.raises(RunError, match=r"1 of 8 trials failed|2 of 8 trials failed"):
        tuned(worth, str(at), space(), PLAN, at, kept, lambda number, _: told.append(number))
    first = len(list(kept.children()))
    assert 0 < first < 8
    (at / "broken").unlink()
    before = calls(at)
    again = tuned(worth, str(at), space(), PLAN, at, kept, lambda number, _: told.append(number))
    assert again == calm
    assert calls(at) - before == (8 - first) * 3
    assert sorted(told) == list(range(8))

    once_more = tuned(worth, str(at), space(), PLAN, at, kept)
    assert once_more == calm
    assert calls(at) - before == (8 - first) * 3
