"""What stages run on: this machine as far as it is free, or the nodes of a cluster file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from pipeline.errors import ConfigError
from pipeline.placement import Capacity
from pipeline.planning.costs import Cluster
from pipeline.planning.forecast import Machine
from pipeline.planning.foresight import Measured, Rented
from pipeline.recipe import Recipe

STORE_SHARE = 0.3  # of the memory: Ray's object store, where the recipe does not say


def machines(
    recipe: Recipe, found: Measured, cluster: Cluster | None, cores: int, usable: float
) -> tuple[Rented, Rented | None, str]:
    """What is predicted for, the same at its smallest, and its name."""
    if cluster is None:
        return here(recipe, cores, usable), None, f"this machine, {cores} cores"
    most = cluster_at(recipe, found, cluster, {g.name: g.max for g in cluster.groups})
    least = cluster_at(recipe, found, cluster, resting(cluster, gpu=recipe.embed.num_gpus > 0))
    return most, least, f"{cluster.name} at its largest"


def here(recipe: Recipe, cores: int, usable: float) -> Rented:
    """This machine, as much of it as other work leaves."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = recipe.embed.num_gpus > 0
    if on_gpu and not gpus:
        raise ConfigError(
            f"embed.num_gpus is {recipe.embed.num_gpus:g} and this machine has no GPU; give "
            f"--cluster FILE with the machines to rent, or --set embed.num_gpus=0"
        )
    machine = Machine(usable, usable / cores, gpu_factor=1.0 if on_gpu else None)
    trains = Machine(usable, usable / cores, gpu_factor=1.0 if recipe.train.use_gpu else None)
    logical = float(recipe.stream.cpus or cores)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    store = recipe.stream.object_store_mb
    size = int(STORE_SHARE * memory) if store is None else store * 1_000_000
    return Rented(machine, trains, Capacity(logical, gpus, logical, gpus, size))


def cluster_at(
    recipe: Recipe, found: Measured, cluster: Cluster, counts: Mapping[str, int]
) -> Rented:
    """A cluster with so many nodes of each group."""
    forward = found.forward_rate
    on_gpu = recipe.embed.num_gpus > 0
    passes = cluster.machine(dict(counts), forward, gpu=on_gpu)
    still = resting(cluster, gpu=recipe.train.use_gpu)
    trains = cluster.machine(still, forward, gpu=recipe.train.use_gpu)
    held = [(group, counts[group.name]) for group in cluster.groups if counts[group.name]]
    capacity = Capacity(
        cpus=sum(n * (group.cpus or 0) for group, n in held),
        gpus=sum(n * (group.gpus or 0) for group, n in held),
        node_cpus=max(group.cpus or 0 for group, _ in held),
        node_gpus=max(group.gpus or 0 for group, _ in held),
        object_store=1 << 62,  # not said in a cluster file
    )
    grows = any(counts[group.name] > group.min for group in cluster.groups)
    return Rented(passes, trains, capacity, cluster.node_start_seconds if grows else 0.0)


def resting(cluster: Cluster, *, gpu: bool) -> dict[str, int]:
    """Nodes by group while nothing streams: the fewest, and one with a GPU where it is needed."""
    counts = {group.name: group.min for group in cluster.groups}
    able = [group for group in cluster.groups if group.max and (group.gpus or not gpu)]
    if not able:
        raise ConfigError("cluster file: the recipe asks for a GPU and no group has one")
    if not any(counts[group.name] for group in able):
        counts[able[0].name] = 1
    return counts
