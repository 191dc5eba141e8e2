"""Proves that Ray Train workers learn the backbone that one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import flow

from pipeline import stages
from pipeline.artifacts import load_model

NET = "{name: convnet, args: {width: 8}, size: 32, dropout: 0.0}"
SETS = (
    flow.UNTRACKED,
    "train.bf16=false",
    "train.threads=1",
    "pretrain.augment=plain",
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.cluster]


def backbone(tiny_run: Path, root: Path, *sets: str) -> dict[str, torch.Tensor]:
    flow.copy(tiny_run, root)
    own = f"pretrain={{model: {NET}, steps: 5, batch: 32, probe_every: null}}"
    job = flow.start(flow.tiny(own, *SETS, *sets), root, fresh=True)
    made = stages.pretrain(job)
    assert made is not None
    assert made.facts["passes"] == 5 * 32 * 2
    return load_model(made.dir / "backbone").net.state_dict()


def test_pretrain__two_ray_workers_learn_what_one_process_does(
    tiny_run: Path, tmp_path: Path
) -> None:
    one = backbone(tiny_run, tmp_path / "one")
    two = backbone(tiny_run, tmp_path / "two", "train.stage_workers={pretrain: 2}")
    other = backbone(tiny_run, tmp_path / "other", "seed=1", "pretrain.steps=5")
    for name, value in one.items():
        if name.endswith("weight") and value.ndim == 4:
            assert (two[name] - value).abs().mean() < 1e-5, name
            assert (other[name] - value).abs().mean() > 1e-2, name


def test_pretrain__a_ray_worker_reads_the_shards_that_this_process_would(
    tiny_run: Path, tmp_path: Path
) -> None:
    """A Ray Data pipeline inside a worker of Ray Train, and one beside the training here."""
    read = "pretrain.read=streamed"
    here = backbone(tiny_run, tmp_path / "here", read)
    there = backbone(tiny_run, tmp_path / "there", read, "train.stage_workers={pretrain: 1}")
    packed = backbone(tiny_run, tmp_path / "packed")
    for name, value in here.items():
        if name.endswith("weight") and value.ndim == 4:
            assert (there[name] - value).abs().mean() < 1e-5, name
            assert not torch.equal(packed[name], value), name
