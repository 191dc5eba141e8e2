"""Run a training function here, or on the workers of Ray Train.

What for: a training function sees settings and a :class:`pipeline.training.loop.Worker` and cannot
tell whether it is alone. Without workers it runs in this process and starts nothing. Cost of Ray
Train: 15 to 30 s until the first step, so one worker on one machine should be no worker.

Ray Train keeps nothing of a run: the loop writes its own checkpoints, the same with any number of
workers, and a group that lost a worker is started again and continues from them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.config import digest
from pipeline.errors import ResourceError, told
from pipeline.progress import meter
from pipeline.storage import Location
from pipeline.streaming import StreamConfig, room, start_ray
from pipeline.training.loop import Worker, distributed, local, precision, prepare_cpu

RESTARTS = 2
"""Times that a group of workers is started again after one of them failed."""
PATIENCE = 10
"""Minutes, at the least, that Ray Train looks for free CPUs or GPUs; by itself for ever."""
MEETING = 12 * 3600
"""Seconds that workers wait for one another: a node that came late packs its faces first, which
takes an hour for ten million. One that died is told at once, whatever this says."""

Training = Callable[[dict[str, Any], Worker], dict[str, Any]]
"""Trains on every worker; what the first worker returns, small and JSON-able, is the result."""


def launch(
    loop: Training,
    config: dict[str, Any],
    *,
    workers: int,
    use_gpu: bool,
    storage: Location,
    name: str,
    bf16: bool | None = None,
    threads: int | None = None,
    checkpoint_every: int = 500,
    stream: StreamConfig | None = None,
) -> dict[str, Any]:
    """Train and return what the first worker returns.

    Args:
        loop: a function that the workers can import by name.
        config: its settings, JSON-able.
        workers: processes of Ray Train, each with `threads` CPUs and, with `use_gpu`, one GPU;
            0 trains in this process.
        use_gpu: whether to train on GPUs.
        storage: folder that all nodes can write to.
        name: of the run; with the digest of `config` the name of Ray Train's folder there.
        bf16: autocast to bfloat16, else float32; None: what is faster, see `precision`.
        threads: torch threads of a worker; None leaves torch's choice: all cores in this process,
            one in a worker.
        checkpoint_every: steps between two checkpoints.
        stream: what a cluster can grow to, and how long to wait for its nodes.

    Raises:
        ResourceError: more CPUs or GPUs are asked for than there are or can be; Ray would wait for
            ever.
        RunError: a worker failed, and again after every restart. Errors of this package keep their
            class.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    settings = {
        "loop": loop,
        "config": config,
        "place": {"use_gpu": use_gpu, "threads": threads, "bf16": bf16},
        "worker": {"checkpoint_every": checkpoint_every},
    }
    if workers == 0:
        if use_gpu and not torch.cuda.is_available():
            raise ResourceError(f"{name}: use_gpu is set, but torch sees no GPU in this process")
        trainer = TorchTrainer(
            _here, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=0)
        )
        return dict(trainer.fit().return_value)
    stream = stream or StreamConfig()
    start_ray(stream)
    each = {"CPU": threads or 1, "GPU": int(use_gpu)}
    _check(name, workers, each, stream)
    patience = max(PATIENCE, math.ceil(stream.no_progress_seconds / 60))
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(timeout_s=MEETING),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=each
        ),
        run_config=RunConfig(
            name=f"{name}-{digest(config)[:8]}",
            storage_path=storage.uri,
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=patience),
        ),
    )
    try:
        return dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise _translated(name, error) from error


def spread(
    loop: Training,
    configs: Sequence[dict[str, Any]],
    *,
    use_gpu: bool,
    name: str,
    bf16: bool | None = None,
    threads: int | None = None,
    stream: StreamConfig | None = None,
) -> list[dict[str, Any]]:
    """Run independent trainings as Ray tasks, as many at a time as there is room for.

    Args:
        loop: as for :func:`launch`; a task that died is run again.
        configs: settings of each.
        use_gpu: one GPU for each.
        name: of what is trained, for messages.
        bf16: see :func:`launch`.
        threads: torch threads and CPUs of each; None: 1.
        stream: see :func:`launch`.

    Raises:
        ResourceError: not even one fits.
        RunError: one failed. Errors of this package keep their class.
    """
    import ray

    stream = stream or StreamConfig()
    start_ray(stream)
    each = {"CPU": threads or 1, "GPU": int(use_gpu)}
    _check(name, 1, each, stream)
    place = {"use_gpu": use_gpu, "threads": threads or 1, "bf16": bf16}
    task = ray.remote(_here).options(
        num_cpus=each["CPU"], num_gpus=each["GPU"], max_retries=RESTARTS, name=name
    )
    running = [
        task.remote({"loop": loop, "config": config, "place": place, "worker": {}})
        for config in configs
    ]
    found: list[dict[str, Any]] = []
    with meter(name, len(running), "trainings") as shown:
        for future in running:
            try:
                found.append(ray.get(future))
            except ray.exceptions.RayError as error:  # the task's own, or its process or node died
                for other in running:
                    ray.cancel(other, force=True)
                raise told(getattr(error, "cause", error), name) from error
            shown.advance(1)
    return found


def ray_train(**worker: Any) -> Worker:
    """This process's worker of a Ray Train group, on the device Ray gave it; see `distributed`."""
    import ray.train.torch

    return distributed(ray.train.torch.get_device(), **worker)


def _here(settings: dict[str, Any]) -> dict[str, Any]:
    """Body of a run in this process."""
    place = settings["place"]
    prepare_cpu(place["threads"])
    device = "cuda" if place["use_gpu"] else "cpu"
    worker = local(device, precision(place["bf16"], device), **settings["worker"])
    found: dict[str, Any] = settings["loop"](settings["config"], worker)
    return found


def _on_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Body of a worker of Ray Train."""
    place = settings["place"]
    prepare_cpu(place["threads"])
    dtype = precision(place["bf16"], "cuda" if place["use_gpu"] else "cpu")
    worker = ray_train(dtype=dtype, **settings["worker"])
    found: dict[str, Any] = settings["loop"](settings["config"], worker)
    return found


def _check(name: str, workers: int, each: Mapping[str, int], stream: StreamConfig) -> None:
    there = room(stream)
    for what, count in each.items():
        if workers * count > there[what]:
            raise ResourceError(
                f"{name}: {workers} workers x {count} {what} = {workers * count} needed at once, "
                f"{there[what]:g} there; where a cluster grows, stream.{what.lower()}s says how far"
            )


def _translated(name: str, error: Any) -> Exception:
    """The first worker's own error where it is one of this package, else a RunError."""
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        return told(cause, f"{name}: worker {rank}")
    return told(error, name)
