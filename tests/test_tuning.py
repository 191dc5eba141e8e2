"""Proves that a stopped search goes on where it was, and asks what an undisturbed one asks."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunError
from pipeline.storage import location
from pipeline.tuning import Plan, _rounds, grid, tuned

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
    if Path(f"{folder}/slow").exists():
        time.sleep(0.3)
    if kill.exists() and done >= 8:
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if broken.exists() and done >= 14:
        raise ValueError("broken here")
    return {**point, "objective": -((point["x"] - 0.7) ** 2) + 0.1 * bool(point["on"])}


def start_ray() -> None:
    import ray

    env = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        runtime_env=env,
    )


@pytest.fixture(scope="module")
def ray_here() -> Any:
    import ray

    start_ray()
    yield
    ray.shutdown()


def trains(config: dict[str, Any], folder: str) -> None:
    """A trial of a grid: a file each."""
    from ray import tune

    time.sleep(0.5)
    Path(f"{folder}/trials/{config['item']}").touch()
    tune.report({"trainings": 1})


def command(what: str, folder: str) -> None:
    """A verb of `omnifer` beside the others: a search or a grid, until somebody interrupts it."""
    from pipeline import cli

    def search() -> None:
        start_ray()
        tuned(worth, folder, space(), PLAN, Path(folder), location(folder) / "trials")
        sys.stdout.write("all is done")

    def many() -> None:
        start_ray()
        room = {"CPU": 1.0}
        grid(
            trains,
            list(range(40)),
            {"folder": folder},
            name="many",
            trainings=40,
            each=room,
            there=room,
            work=Path(folder),
        )
        sys.stdout.write("all is done")

    cli.app.command("tried")({"search": search, "grid": many}[what])
    sys.argv = ["omnifer", "tried"]
    cli.main()


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


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("what", ["search", "grid"])
def test_tuned__an_interrupt_ends_it_like_any_other_verb(what: str, tmp_path: Path) -> None:
    for name in ("trials", "slow", "calm"):
        (tmp_path / name).mkdir()
    line = f"from test_tuning import command; command({what!r}, {str(tmp_path)!r})"
    here = Path(__file__).parent
    driver = subprocess.Popen(
        [sys.executable, "-c", line],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not any((tmp_path / "trials").iterdir()) and time.monotonic() < until:
            assert driver.poll() is None
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: all of its group
        said, _ = driver.communicate(timeout=60)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 130, said
    assert "Traceback" not in said
    assert "all is done" not in said
    first = len(list((tmp_path / "trials").iterdir()))
    assert 0 < first < {"search": 8, "grid": 40}[what]
    if what == "search":
        (tmp_path / "slow").rmdir()
        calm = tuned(worth, str(tmp_path / "calm"), space(), PLAN, tmp_path / "calm")
        before, kept = calls(tmp_path), location(tmp_path / "trials")
        assert tuned(worth, str(tmp_path), space(), PLAN, tmp_path, kept) == calm
        assert calls(tmp_path) - before == (8 - first) * 3
