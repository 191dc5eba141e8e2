"""Proves that a stopped search goes on where it was, and asks what an undisturbed one asks."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunError
from pipeline.storage import location
from pipeline.tuning import Plan, _rounds, tuned

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


def by_hand(plan: Plan, latest_first: bool = False) -> list[dict[str, Any]]:
    """Rounds asked and told as Tune does it, without workers."""
    from ray.tune.search import Searcher

    rounds = _rounds(space(), plan, None, lambda number, found: None, lambda points: None)
    running: dict[str, dict[str, Any]] = {}
    for name in map(str, range(1000)):
        asked = rounds.suggest(name)
        if asked == Searcher.FINISHED:
            break
        if asked is not None:
            running[name] = asked
            continue
        for trial in sorted(running, reverse=latest_first):
            found = [{**p, "objective": -((p["x"] - 0.7) ** 2)} for p in running[trial]["points"]]
            rounds.on_trial_complete(trial, {"found": found, "objective": 0.0})
        running = {}
    return [point for number in range(plan.trials) for point in rounds.found[number]]


def test_rounds__no_trial_decides_by_its_speed_what_is_asked_next() -> None:
    plan = replace(PLAN, trials=12)
    first = by_hand(plan)
    assert len(first) == 36
    assert first == by_hand(plan, latest_first=True)
    assert first != by_hand(replace(plan, seed=1))


def test_rounds__optuna_learns_and_random_points_do_not() -> None:
    plan = replace(PLAN, trials=20)
    asked = {s: [p["x"] for p in by_hand(replace(plan, sampler=s))] for s in ("tpe", "random")}
    assert not set(asked["tpe"]) & set(asked["random"])
    far = {s: np.abs(np.array(x[30:]) - 0.7).mean() for s, x in asked.items()}
    assert far["tpe"] < 0.75 * far["random"]


@pytest.mark.cluster
@pytest.mark.ray
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
