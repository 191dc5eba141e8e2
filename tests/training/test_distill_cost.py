"""Proves that what a distillation will take is known before: passes, memory, refusal."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.training.distill import distill
from pipeline.training.distill_cost import Cost, cost_of, refuse_too_large
from training.test_distill import EXPERT, LEARNED, NAMES, chosen, here, toy


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
    assert cost_of(chosen("random"), NAMES, 60) == Cost(0, 0, 0, 0)


def test_cost_of__experts_are_counted() -> None:
    found = cost_of(LEARNED["trajectory"], NAMES, 1280)
    assert found.expert_passes == 4 * (1280 // 128) * 128
    assert found.expert_mb == pytest.approx(5 * EXPERT.shape[1] * 4 / 1e6)


def test_refuse_too_large__says_what_is_needed() -> None:
    config = LEARNED["unrolled"].model_copy(update={"memory_mb": 100})
    refuse_too_large(config, Cost(50, 0, 0, 0), 1)
    with pytest.raises(ConfigError, match="step of unrolled needs about 102 MB, and 100 may"):
        refuse_too_large(config, Cost(51, 0, 0, 0), 1)
