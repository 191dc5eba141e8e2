"""Proves that what a distillation will take is known before: passes, memory, refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.training.distill import distill
from pipeline.training.distill_cost import Cost, cost_of, refuse_too_large
from training.test_distill import EXPERT, LEARNED, NAMES, chosen, here, judge, toy


@pytest.mark.parametrize("method", LEARNED)
def test_cost_of__passes_are_those_of_the_run(method: str) -> None:
    config = LEARNED[method]
    found = distill(config, *toy(), NAMES, here(), seed=0, experts=[EXPERT])
    expected = cost_of(config, NAMES, 60).passes
    # A random window's length is known in the mean only.
    assert expected == pytest.approx(found.passes, rel=0.2 if method == "unrolled" else 0.05)


@pytest.mark.parametrize("method", LEARNED)
def test_cost_of__memory_is_that_of_the_tensors_that_a_real_step_saves(method: str) -> None:
    config = LEARNED[method]
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one = config.model_copy(update={"steps": 1})
        distill(one, *toy(), NAMES, here(), seed=0, experts=[EXPERT])
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / 1e6
    assert 0.25 * real < cost_of(config, NAMES, 60).graph_mb < 1.5 * real


def test_cost_of__more_steps_in_the_graph_take_more_memory() -> None:
    config = LEARNED["trajectory"]
    longer = config.model_copy(update={"inner": config.inner.model_copy(update={"steps": 6})})
    few, many = (cost_of(c, NAMES, 60).graph_mb for c in (config, longer))
    assert many == pytest.approx(2 * few, rel=0.1)


def test_cost_of__a_chosen_set_takes_nothing() -> None:
    # but the teacher's look at every face, and at the images for soft labels and for provenance
    assert cost_of(chosen("random"), NAMES, 60) == Cost(0, 0, 0, 0, 60 + 2 * 6)


@pytest.mark.parametrize("method", ["herding", "crops", "unrolled"])
def test_cost_of__looks_of_the_teacher_are_those_of_a_worker(method: str) -> None:
    seen = []

    def counted(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(len(images))
        return judge(images)

    config = {**LEARNED, "herding": chosen("herding"), "crops": chosen("crops")}[method]
    config = config.model_copy(update={"steps": 1})
    distill(config, *toy(), NAMES, here(), seed=0, judge=counted, experts=[EXPERT])
    provenance = 60 + 6
    assert cost_of(config, NAMES, 60).judged == provenance + sum(seen)
    assert cost_of(config, NAMES, 60, 2).judged == provenance + 2 * sum(seen)


def test_cost_of__an_inner_batch_is_no_larger_than_the_set() -> None:
    config = LEARNED["gradient"]
    large = config.model_copy(update={"inner": config.inner.model_copy(update={"batch": 500})})
    whole = config.model_copy(update={"inner": config.inner.model_copy(update={"batch": None})})
    assert cost_of(large, NAMES, 60).passes == cost_of(whole, NAMES, 60).passes


def test_cost_of__experts_are_counted() -> None:
    found = cost_of(LEARNED["trajectory"], NAMES, 1280)
    assert found.expert_passes == 4 * (1280 // 128) * 128
    assert found.expert_mb == pytest.approx(5 * EXPERT.shape[1] * 4 / 1e6)


@pytest.mark.parametrize(
    ("method", "share"), [("gradient", 2 / 3), ("unrolled", 1 / 2), ("trajectory", 1 / 2)]
)
def test_cost_of__a_worker_holds_the_graph_of_its_share(method: str, share: float) -> None:
    # Three classes or four networks over two workers; the image passes are those of both.
    alone, shared = (cost_of(LEARNED[method], NAMES, 60, workers) for workers in (1, 2))
    assert shared.graph_mb == pytest.approx(share * alone.graph_mb, rel=0.15)
    assert shared.passes == alone.passes


def test_refuse_too_large__says_what_is_needed() -> None:
    config = LEARNED["unrolled"].model_copy(update={"memory_mb": 100})
    refuse_too_large(config, Cost(50, 0, 0, 0), here())
    with pytest.raises(ConfigError, match="step of unrolled needs about 102 MB, and 100 may"):
        refuse_too_large(config, Cost(51, 0, 0, 0), here())


def test_refuse_too_large__experts_take_memory_beside_the_graph() -> None:
    config = LEARNED["trajectory"].model_copy(update={"memory_mb": 100})
    refuse_too_large(config, Cost(40, 0, 0, 20), here())
    with pytest.raises(ConfigError, match="80 MB and its experts 21 MB, and 100 may"):
        refuse_too_large(config, Cost(40, 0, 0, 21), here())


def test_refuse_too_large__a_gpu_has_a_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config, worker = LEARNED["trajectory"], replace(here(), device=torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100e6, 80e9))
    refuse_too_large(config, Cost(30, 0, 0, 50), worker)
    with pytest.raises(ConfigError, match="step of trajectory needs about 62 MB, and 60 may"):
        refuse_too_large(config, Cost(31, 0, 0, 50), worker)
    with pytest.raises(ConfigError, match="1 experts need 100,000,000 MB in every worker"):
        refuse_too_large(config, Cost(30, 0, 0, 1e8), worker)
