"""Proves resume to the last bit, two workers equal to one, and honest counting of passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers.toy import BATCHNORM, CONVNET, GROUPNORM, NAMES, RESNET, VIT, labeled
from helpers.workers import in_threads as meet_in_threads
from torch import Tensor, nn

from pipeline.augment import VIEWS
from pipeline.errors import IdentityError, RunError
from pipeline.losses import cross_entropy
from pipeline.models import FaceModel, ModelConfig
from pipeline.training import loop
from pipeline.training.data import Batch, Stream
from pipeline.training.loop import (
    Fitted,
    Hook,
    Loss,
    Objective,
    Schedule,
    Step,
    Worker,
    distributed,
    fit,
    local,
)
from pipeline.training.supervised import Supervised, SupervisedConfig, new_model

SCHEDULE = Schedule(steps=9, lr=1e-2)
SLOW = Schedule(steps=9, lr=1e-3)


class Toy:
    """Two forwards per backward, a sum with a count, and a number that update moves."""

    def __init__(self, model: ModelConfig = CONVNET, view: str = "plain") -> None:
        self.model: FaceModel = new_model(model, NAMES, seed=1)
        data = labeled(40)
        self.moved = torch.zeros(1)
        self.stream = Stream(
            "labeled", data.faces, 8, {"x": VIEWS[view]}, 16, {"y": data.targets}
        )  # fmt: skip

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.model})

    def streams(self) -> Sequence[Stream]:
        return [self.stream]

    def loss(self, batch: Mapping[str, Batch], at: Step) -> Loss:
        x, y = batch["labeled"].views["x"], batch["labeled"].targets["y"]
        losses = cross_entropy(self.model(x), y) + cross_entropy(self.model(x.flip(3)), y)
        total = losses.sum() * (1 + self.moved.item())
        return Loss(total, trained=2 * len(x), forward=3, count=float(len(x)))

    def update(self, loss: Loss, at: Step) -> None:
        self.moved = self.moved + 0.1

    def state(self) -> dict[str, Tensor]:
        return {"moved": self.moved}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.moved = state["moved"]


def weights(fitted: Fitted) -> Tensor:
    return torch.cat([p.reshape(-1) for p in fitted.averaged.state_dict().values()]).float()


def meaningful(fitted: Fitted) -> Tensor:
    """Weights without the biases that instance norm takes out again.

    Their gradient is rounding alone, and AdamW makes full steps of it.
    """
    named = fitted.averaged.state_dict()
    dead = {name for name in named if name.endswith(("blocks.0.bias", "blocks.4.bias"))}
    assert len(dead) == 2
    return torch.cat([value.reshape(-1) for name, value in named.items() if name not in dead])


def stop_after(steps: int) -> Hook:
    def hook(objective: Objective, at: Step) -> None:
        if at.number + 1 == steps:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("killed_after", [3, 5, 6])
def test_fit__killed_and_resumed_is_uninterrupted(tmp_path: Path, killed_after: int) -> None:
    # dropout, batch norm and random views: all of it must come back
    whole = fit(Toy(RESNET, "strong"), SCHEDULE, local(dtype=torch.float32), seed=3)
    worker = local("cpu", torch.float32, tmp_path, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(RESNET, "strong"), SCHEDULE, worker, seed=3, hooks=[stop_after(killed_after)])
    resumed = fit(Toy(RESNET, "strong"), SCHEDULE, worker, seed=3)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.passes == resumed.passes


def test_fit__slow_steps_are_saved_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    whole = fit(Toy(RESNET, "strong"), SCHEDULE, local(dtype=torch.float32), seed=3)
    worker = local("cpu", torch.float32, tmp_path)  # a checkpoint every 500 steps
    begun: list[int] = []

    def note(objective: Objective, at: Step) -> None:
        begun.append(at.number + 1)

    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    for seconds in (60.0, 0.0, 0.0):
        monkeypatch.setattr(loop, "SAVE_EVERY", seconds)
        with pytest.raises(KeyboardInterrupt):
            fit(Toy(RESNET, "strong"), SCHEDULE, worker, seed=3, hooks=[note, stop_after(5)])
    assert begun == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 5]  # the second was saved after step 4
    resumed = fit(Toy(RESNET, "strong"), SCHEDULE, worker, seed=3)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.history == resumed.history


def test_fit__a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    worker = local("cpu", torch.float32, tmp_path)
    first = fit(Toy(), SCHEDULE, worker, seed=3)
    again = fit(Toy(), SCHEDULE, worker, seed=3, hooks=[stop_after(1)])
    assert torch.equal(weights(first), weights(again))
    assert first.history == again.history


def test_fit__a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    worker = local("cpu", torch.float32, tmp_path)
    fit(Toy(), SCHEDULE, worker, seed=3)
    with pytest.raises(IdentityError, match="seed 3, not 4"):
        fit(Toy(), SCHEDULE, worker, seed=4)
    with pytest.raises(IdentityError, match=r"lr 0\.01, not 0\.1"):
        fit(Toy(), Schedule(steps=9, lr=0.1), worker, seed=3)
    with pytest.raises(IdentityError, match="another network"):
        fit(Toy(RESNET), SCHEDULE, worker, seed=3)


def test_fit__passes_are_counted(tmp_path: Path) -> None:
    fitted = fit(Toy(), SCHEDULE, local(dtype=torch.float32), seed=0)
    assert fitted.passes == pytest.approx(9 * (16 + 3 / 3))
    assert fitted.history[-1]["step"] == 9
    assert fitted.history[-1]["passes"] == pytest.approx(fitted.passes)


def test_fit__leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(Toy(), Schedule(steps=1), local(dtype=torch.float32), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_fit__bfloat16_learns() -> None:
    toy = Toy(RESNET)
    fitted = fit(toy, Schedule(steps=60, lr=1e-2), local(), seed=0)
    data = labeled(40)
    seen = fitted.averaged["model"](torch.from_numpy(data.faces.take(np.arange(40))) / 255)
    assert (seen.argmax(1).numpy() == data.labels).mean() > 0.9
    assert next(fitted.averaged.parameters()).dtype == torch.float32


def test_fit__a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    broken = Toy()
    broken.moved += torch.nan
    with pytest.raises(RunError, match="step 9: loss is nan"):
        fit(broken, SCHEDULE, local("cpu", torch.float32, tmp_path), seed=0)
    assert not list(tmp_path.iterdir())


def in_threads(workers: int, ranks: Sequence[Worker]) -> list[Fitted]:
    """Run `fit` in threads that add up their tensors at a barrier."""
    # Made here: threads share torch's global generator. All but the first start elsewhere.
    toys = [Toy() for _ in range(workers)]
    for toy in toys[1:]:
        toy.model = new_model(CONVNET, NAMES, seed=99)
    done: dict[int, Fitted] = {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(ranks[rank], rank=rank, world=workers, sum_over_workers=reduce)
        done[rank] = fit(toys[rank], SLOW, worker, seed=3)

    meet_in_threads(workers, run)
    return [done[rank] for rank in range(workers)]


@pytest.mark.parametrize("workers", [2, 4])
def test_fit__several_workers_equal_one(workers: int) -> None:
    one = fit(Toy(), SLOW, local(dtype=torch.float32), seed=3)
    several = in_threads(workers, [local(dtype=torch.float32)] * workers)
    for fitted in several:
        torch.testing.assert_close(meaningful(fitted), meaningful(one), atol=1e-5, rtol=0)
        assert fitted.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], abs=1e-5)
    assert several[0].passes == pytest.approx(9 * (16 + workers))  # 3 forwards on every worker


RATES = {"sgd": 1e-2, "adamw": 1e-3}
"""AdamW, which all trainings have by default, is blind to the size of a gradient; sgd is not."""


def learn(
    model: ModelConfig, worker: Worker, optimizer: str = "sgd", objective: Supervised | None = None
) -> Fitted:
    """A network learns labels, as teachers and controls do."""
    schedule = Schedule.model_validate(
        {"steps": 4, "lr": RATES[optimizer], "optimizer": optimizer, "clip": None}
    )
    return fit(objective or supervised(model), schedule, worker, seed=3)


def supervised(model: ModelConfig, seed: int = 1) -> Supervised:
    net, config = new_model(model, NAMES, seed), SupervisedConfig(batch=16, augment="plain")
    return Supervised(net, config, labeled(40))


def learn_in_threads(
    model: ModelConfig, optimizer: str = "sgd"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of the network in each of two workers; the second starts from other weights."""
    ours, done = [supervised(model), supervised(model, seed=99)], {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(local(dtype=torch.float32), rank=rank, world=2, sum_over_workers=reduce)
        done[rank] = learn(model, worker, optimizer, ours[rank]).averaged.state_dict()

    meet_in_threads(2, run)
    return done[0], done[1]


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("model", [VIT, GROUPNORM], ids=["vit", "groupnorm"])
def test_fit__two_workers_equal_one_in_every_weight(model: ModelConfig, optimizer: str) -> None:
    start = supervised(model).modules().state_dict()
    one = learn(model, local(dtype=torch.float32), optimizer).averaged.state_dict()
    for both in learn_in_threads(model, optimizer):
        for name, value in one.items():
            torch.testing.assert_close(both[name], value, atol=1e-5, rtol=0, msg=name)
            # The bound would mean little of weights that stand still; sgd moves some by as little.
            assert optimizer == "sgd" or (value - start[name]).abs().max() > 1e-4, name


def test_fit__batch_norms_see_their_own_workers_faces_on_cpus() -> None:
    first, second = learn_in_threads(BATCHNORM)
    kept = [name for name in first if "running" in name]
    assert len(kept) == 2 * len([name for name in first if name.endswith("num_batches_tracked")])
    for name, value in first.items():
        if name in kept:
            assert not torch.equal(value, second[name]), name
        else:
            torch.testing.assert_close(value, second[name], atol=0, rtol=0, msg=name)


def _gloo(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    worker = distributed(dtype=torch.float32)
    found = [meaningful(fit(Toy(), SLOW, worker, seed=3))]
    found += [weights(learn(model, worker)) for model in (VIT, GROUPNORM)]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fit__two_processes_equal_one(tmp_path: Path) -> None:
    worker = local(dtype=torch.float32)
    expected = [meaningful(fit(Toy(), SLOW, worker, seed=3))]
    expected += [weights(learn(model, worker)) for model in (VIT, GROUPNORM)]
    mp.spawn(_gloo, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, one in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, one, atol=1e-5, rtol=0)


def test_fit__workers_that_see_other_checkpoints_are_refused(tmp_path: Path) -> None:
    worker = local("cpu", torch.float32, tmp_path)
    fit(Toy(), SCHEDULE, worker, seed=3)
    alone = replace(worker, world=2, sum_over_workers=lambda tensor: tensor)
    with pytest.raises(RunError, match="resumes at 9, others do not"):
        fit(Toy(), SCHEDULE, alone, seed=3)
