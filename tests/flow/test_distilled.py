"""Proves distillation in a run on real Ray: experts as tasks, two workers, tuning, resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import flow

from pipeline import stages
from pipeline.flow import tune
from pipeline.storage import location
from pipeline.training.distilled import load_distilled

SETS = (
    flow.UNTRACKED,
    "distill.method=trajectory",
    "distill.steps=4",
    "distill.learn_labels=true",
    "distill.inner={networks: 2, steps: 2, lr: 0.05}",
    "distill.experts={count: 2, epochs: 3, epoch_steps: 2, batch: 16, ahead: 1, latest: [1, 2]}",
    "train.bf16=false",
    "train.threads=1",
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.cluster]


def distilled(tiny_run: Path, root: Path, *sets: str) -> flow.LoggedJob:
    flow.copy(tiny_run, root, without=("distill", "experts"))
    job = flow.start(flow.tiny(*SETS, *sets), root, fresh=True)
    stages.distill(job)
    return job


def test_distill__two_ray_workers_learn_the_images_of_one_process(
    tiny_run: Path, tmp_path: Path
) -> None:
    one = distilled(tiny_run, tmp_path / "one")
    two = distilled(tiny_run, tmp_path / "two", "train.stage_workers={distill: 2}")
    assert one.run.artifact("experts").facts["count"] == 2
    assert one.run.artifact("experts").digest == two.run.artifact("experts").digest
    passes = 2 * 3 * 2 * 16  # experts, epochs, steps, faces
    assert one.run.artifact("experts").facts["passes"] == passes
    assert one.run.artifact("distill").facts["expert_passes"] == passes
    sets = [load_distilled(job.run.artifact("distill").dir) for job in (one, two)]
    assert np.abs(sets[0].images.astype(int) - sets[1].images).max() <= 1
    assert np.allclose(sets[0].soft, sets[1].soft, atol=1e-4)

    before = flow.finished(tmp_path / "one")
    stages.distill(one)
    assert flow.finished(tmp_path / "one") == before

    # Another number of images follows the same experts.
    more = flow.start(flow.tiny(*SETS, "distill.ipc=2"), tmp_path / "one", fresh=True)
    stages.distill(more)
    kept = {name: when for name, when in before.items() if name.startswith("experts/")}
    assert kept
    assert kept.items() <= flow.finished(tmp_path / "one").items()
    made = load_distilled(more.run.artifact("distill").dir)
    assert len(made.images) == 2 * len(sets[0].images)

    tune(more)
    members = (more.run.artifact("tuned").dir / "model").children()
    assert [(location(at.uri) / "config.json").exists() for at in members] == [True, True]
