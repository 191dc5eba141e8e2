"""Proves trials of active learning in a run: stored rounds, resuming, sharing, parallel trials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import flow

from pipeline import conduct, trials, tuning
from pipeline.active import Round
from pipeline.errors import ConfigError, ResourceError
from pipeline.flow import read_labels
from pipeline.job import Job
from pipeline.placement import StreamConfig
from pipeline.training.runs import TrainConfig
from pipeline.trials import TrialJob, finished, kept, trial, trials_of, worker_of
from pipeline.twins import guard_labeled

ROOT = Path(__file__).parents[1]
NET = "{name: compact_resnet, args: {widths: [8, 16]}, size: 16, dropout: 0.2}"
SMALL = (
    flow.UNTRACKED,
    "labeled.count=120",
    "labeled.test_count=40",
    f"active={{strategies: [random, badge], seeds: [0], start: 0.2, step: 0.1, rounds: 3, "
    f"train: {{steps: 3, batch: 16, ema: null, model: {NET}}}}}",
)
WORKER = worker_of(TrainConfig(bf16=False, threads=1))


def opened(root: Path, *sets: str) -> Job:
    """A run that is ready for trials, without a pool."""
    job = flow.start(flow.tiny(*SMALL, *sets), root)
    read_labels(job)
    stage = job.open("guard", {})
    if stage.done is None:
        guard_labeled(job, stage.dir)
        stage.finish("guard")
    return job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return opened(tmp_path / "run")


def run_all(found: Sequence[TrialJob], job: Job) -> None:
    """Runs trials one after another, here."""
    for one in found:
        trial(one.model_dump(mode="json"), WORKER)


def stamps(root: Path) -> dict[str, int]:
    """When each round and model was written, by its place."""
    return {
        str(at.relative_to(root)): at.stat().st_mtime_ns
        for at in sorted(root.rglob("rounds/g*/*/*"))
    }


def test_trial__stores_a_file_per_round_and_shares_the_first_model(job: Job) -> None:
    random, badge = trials_of(job, job.run.root / "rounds/g1")
    run_all([random], job)
    names = [at.name for at in (job.run.root / "rounds/g1/random-scratch-s0").children()]
    assert names == ["round-00.json", "round-01.json", "round-02.json"]
    first = job.run.root / "rounds/g1/first-scratch-s0/model.safetensors"
    before = first.stamp()
    run_all([badge], job)
    assert first.stamp() == before
    curves = [kept(random), kept(badge)]
    assert curves[0][0].accuracy == curves[1][0].accuracy
    assert curves[0][0].correct == curves[1][0].correct
    assert set(curves[0][0].chosen) != set(curves[1][0].chosen)
    count = sum(curves[0][0].class_counts.values())
    assert [one.labels for one in curves[0]] == [
        count,
        count + 11,
        count + 22,
    ]  # of 110 to 119 faces
    assert finished(random)


class Killed(Exception):
    pass


def test_trial__stopped_anywhere_trains_only_what_is_missing(tmp_path: Path) -> None:
    whole, broken = opened(tmp_path / "whole"), opened(tmp_path / "broken")
    (_, wanted), (_, one) = (trials_of(job, job.run.root / "rounds/g1") for job in (whole, broken))
    run_all([wanted], whole)

    def kill(made: Round) -> None:
        if made.number == 1:
            raise Killed

    with pytest.raises(Killed):
        trial(one.model_dump(mode="json"), WORKER, kill)
    assert len(kept(one)) == 2
    assert not finished(one)
    before = stamps(tmp_path / "broken")
    told: list[Round] = []
    trial(one.model_dump(mode="json"), WORKER, told.append)
    assert [made.number for made in told] == [2]
    after = stamps(tmp_path / "broken")
    assert {name: after[name] for name in before} == before
    curves = [[(m.chosen, m.correct) for m in kept(each)] for each in (one, wanted)]
    assert curves[0] == curves[1]


def test_trial__first_alone_trains_the_shared_model(job: Job) -> None:
    one = trials_of(job, job.run.root / "rounds/g1")[0].model_copy(update={"strategy": None})
    assert not finished(one)
    run_all([one], job)
    assert finished(one)
    assert kept(one) == []


def test_required__says_that_the_recipe_compares_nothing() -> None:
    with pytest.raises(ConfigError, match="recipe demo has no `active`"):
        trials.required(flow.tiny())


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("active.starts=[pretrained]",), "active.starts: pretrained, and the recipe has no"),
        (
            ("active.starts=[pretrained]", "pretrain={model: {name: convnet}}"),
            "active.train.model: compact_resnet at 16 px gray cannot start",
        ),
        (("active.strategies=[bade]",), "did you mean 'badge'"),
    ],
)
def test_recipe__refuses_starts_and_strategies_that_are_not_there(
    sets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        flow.tiny(*SMALL, *sets)


# -- on Ray Tune ----------------------------------------------------------------------------------

PRETRAINED = (
    "active.starts=[scratch, pretrained]",
    f"pretrain={{steps: 3, batch: 16, probe_every: null, model: {NET}}}",
    "train.threads=1",
    "pool.0.count=100",
)


def test_tuned__a_gpu_that_the_cluster_can_grow_to_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    class Started(Exception): ...

    def started() -> None:
        raise Started

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(trials, "start_ray", lambda config: None)
    monkeypatch.setattr(tuning, "quiet_tune", started)
    first: Any = SimpleNamespace(strategy=None, model_dump=lambda mode: {})

    def job(**stream: int) -> Any:
        train = TrainConfig(use_gpu=True)
        recipe = SimpleNamespace(train=train, stream=StreamConfig(**stream))
        return SimpleNamespace(recipe=recipe, run=SimpleNamespace(scratch=Path("tune")))

    with pytest.raises(Started):
        trials.tuned([first], job(cpus=8, gpus=1))
    with pytest.raises(ResourceError, match="takes 1 CPUs and 1 GPUs; there are 8 and 0"):
        trials.tuned([first], job(cpus=8))


@pytest.mark.cluster
def test_active__trials_of_both_starts_run_on_ray_tune(local_ray: None, tmp_path: Path) -> None:
    recipe = flow.tiny(*SMALL, *PRETRAINED)
    job = flow.start(recipe, tmp_path / "run")
    conduct.run_active(job)
    told = (job.run.artifact("active").dir / "curve.json").read_json()
    assert sorted(told["trials"]) == sorted(
        f"{strategy}-{start}-s0"
        for strategy in ("random", "badge")
        for start in ("scratch", "pretrained")
    )
    assert all(len(curve) == 3 for curve in told["trials"].values())
    scratch, pretrained = (told["trials"][f"random-{s}-s0"][0] for s in ("scratch", "pretrained"))
    assert scratch["correct"] != pretrained["correct"]

    # A strategy more: what is trained already is found again.
    before = stamps(tmp_path / "run")
    more = flow.tiny(*SMALL, *PRETRAINED, "active.strategies=[random, badge, margin]")
    conduct.run_active(flow.start(more, tmp_path / "run"))
    after = stamps(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert sum("margin" in name for name in after) == 6


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_active__killed_and_run_again_trains_no_round_twice(tmp_path: Path) -> None:
    root = tmp_path / "run"
    longer = ("active.rounds=6", "active.train.steps=30", "pool.0.count=64", "train.threads=1")
    sets = [part for item in (*flow.TINY, *SMALL, *longer) for part in ("--set", item)]
    command = [sys.executable, "-m", "pipeline.cli", "active", str(flow.DEMO), "--run", str(root)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def rounds_there() -> dict[str, int]:
        return {n: t for n, t in stamps(root).items() if "round-" in n and n.endswith(".json")}

    driver = subprocess.Popen([*command, *sets], cwd=ROOT, env=env, start_new_session=True)
    try:
        until = time.monotonic() + 150
        while len(rounds_there()) < 3 and time.monotonic() < until:
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(3)  # Ray's own processes end when they miss the driver
    before = rounds_there()
    assert 3 <= len(before) < 12
    subprocess.run([*command, *sets], cwd=ROOT, env=env, check=True, timeout=200)
    after = rounds_there()
    assert len(after) == 12
    assert {name: after[name] for name in before} == before
