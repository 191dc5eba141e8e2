"""Proves which nodes a stage is predicted on, and that what cannot run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.flow import tiny

from pipeline.errors import ConfigError
from pipeline.planning.costs import Cluster, load_cluster, load_prices
from pipeline.planning.renting import cluster_at, here, machines, resting
from planning.test_foresight import measured

FILE = """\
efficiency: 0.5
node_start_seconds: 100
groups:
  - {name: head, min: 1, max: 1, cpus: 4, network_gbit: 1, dollars_per_hour: 1}
  - {name: gpu, max: 4, cpus: 8, gpus: 2, gpu_factor: 30, network_gbit: 8, dollars_per_hour: 10}
"""
GPU = ("embed.num_gpus=1", "embed.pool=[1,8]")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    file = tmp_path / "cluster.yaml"
    file.write_text(FILE)
    return load_cluster(file, load_prices(None))


def test_resting__the_fewest_nodes_and_one_that_can(cluster: Cluster) -> None:
    assert resting(cluster, gpu=False) == {"head": 1, "gpu": 0}
    assert resting(cluster, gpu=True) == {"head": 1, "gpu": 1}


def test_resting__a_gpu_that_no_group_has(cluster: Cluster) -> None:
    bare = cluster.model_copy(update={"groups": cluster.groups[:1]})
    with pytest.raises(ConfigError, match="asks for a GPU and no group has one"):
        resting(bare, gpu=True)


def test_machines__at_its_largest_and_at_its_smallest(cluster: Cluster) -> None:
    most, least, name = machines(tiny(*GPU), measured(), cluster, 2, 2.0)
    assert least is not None
    assert "largest" in name
    assert (most.passes.cores, most.passes.gpu_factor) == (4 + 4 * 8, 30)
    assert (most.capacity.gpus, most.capacity.node_gpus) == (8, 2)
    assert most.passes.dollars_per_hour == 41
    assert most.passes.network == pytest.approx(33e9 / 8)
    assert most.node_start == 100
    assert (least.passes.cores, least.capacity.gpus) == (12, 2)
    # training holds the head alone, as the recipe trains on CPUs
    assert (most.resting.cores, most.resting.dollars_per_hour) == (4, 1)
    assert most.resting.efficiency == 1.0


def test_cluster_at__no_node_has_to_come(cluster: Cluster) -> None:
    fixed = cluster_at(tiny(), measured(), cluster, {"head": 1, "gpu": 0})
    assert fixed.node_start == 0
    assert fixed.passes.gpu_factor is None


def test_here__what_other_work_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = here(tiny(), 4, 3.0)
    assert (found.passes.cores, found.passes.core_speed) == (3.0, 0.75)
    assert found.capacity.cpus == 4
    assert found.capacity.object_store == 300_000_000  # as the helper's recipe says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="this machine has no GPU; give --cluster"):
        here(tiny(*GPU), 4, 4.0)
