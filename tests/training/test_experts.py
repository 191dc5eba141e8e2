"""Proves that experts are reproducible, learn, and are all there before they are followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distillers.learned import logits_of, unflat, weights_of
from pipeline.errors import SourceError
from pipeline.storage import location
from pipeline.training.distilling import ExpertConfig
from pipeline.training.experts import expert, load_experts, save_expert
from pipeline.training.supervised import new_model
from training.test_distill import LEARNED, NAMES, here, toy

CONFIG = LEARNED["trajectory"].model_copy(
    update={"experts": ExpertConfig(count=2, epochs=6, batch=20, lr=0.1, latest=(1, 3), ahead=2)}
)


def test_expert__keeps_every_epoch_and_learns() -> None:
    faces, labels = toy()
    kept = expert(CONFIG, faces, labels, NAMES, here(), seed=4)
    net = new_model(CONFIG.net, NAMES, 4)
    start = weights_of(net)
    assert kept.shape == (7, sum(value.numel() for value in start.values()))
    x = torch.from_numpy(faces.pixels).float() / 255
    right = [
        (logits_of(net, unflat(weights, start), x).argmax(1).numpy() == labels).mean()
        for weights in kept
    ]
    assert right[0] < 0.6
    assert right[-1] > 0.9


def test_expert__the_seed_decides() -> None:
    one, again, other = (expert(CONFIG, *toy(), NAMES, here(), seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one, again)
    assert not torch.allclose(one[0], other[0])


def test_load_experts__a_missing_one_is_an_error(tmp_path: Path) -> None:
    at, weights = location(tmp_path), torch.arange(6.0).view(2, 3)
    save_expert(at, 0, weights)
    with pytest.raises(SourceError, match="expected 2 experts, 1 are missing"):
        load_experts(at, 2)
    save_expert(at, 1, weights + 1)
    assert torch.equal(load_experts(at, 2)[1], weights + 1)
