"""From what a face costs on one machine to how long a stage takes on another: sums, no I/O.

A pass is a pipeline of steps; it is as fast as its slowest step, or as all the cores together, or
as the network. Training is image passes over a rate. What cannot be summed (waiting for busy disks,
stragglers, a node that leaves) is one number, the efficiency, which is assumed and said to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GB = 1e9  # storage and networks are sold in powers of ten


@dataclass(frozen=True)
class Spent:
    """What one face costs: seconds of the worker that has it, and core-seconds of all threads."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Part:
    """A piece of a step's work; `gpu` pieces take no core where there is a GPU."""

    name: str
    spent: Spent
    gpu: bool = False
    beside: bool = False
    """Done while the step's other such pieces are done, as decoding beside the forward pass."""


@dataclass(frozen=True)
class Step:
    """An operator of a pass: what its workers do with a face, and how many of them may run."""

    name: str
    parts: Sequence[Part]
    workers: float
    gpus: float = 0.0
    """That its workers hold together: two workers of one GPU are no faster on it than one."""


@dataclass(frozen=True)
class Machine:
    """What a stage runs on, in cores of the machine that was probed."""

    cores: float
    core_speed: float = 1.0
    """Of one of its logical CPUs; the probed machine has 1."""
    gpu_factor: float | None = None
    """Forward rate of one GPU over that of one probed worker; None: forwards are not on GPUs."""
    network: float | None = None
    """Bytes per second of all nodes together; None: nothing is asked of a network."""
    dollars_per_hour: float = 0.0
    efficiency: float = 1.0
    """Share of the arithmetic that is reached; of several nodes, always an assumption."""


@dataclass(frozen=True)
class Span:
    """How long a pass streams, and what it waits for."""

    seconds: float
    bottleneck: str
    bounds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each thing alone would take."""


def stream_time(
    steps: Sequence[Step],
    faces: float,
    slices: int,
    machine: Machine,
    *,
    face_bytes: float = 0.0,
    slice_cpu: float = 0.0,
) -> Span:
    """Seconds of a pass between its first slice and its last.

    A step with w workers needs ceil(slices / w) times what a slice takes it; all steps share the
    cores. The slowest of these decides; the others are paid once, while the pipeline fills.

    Args:
        steps: in order.
        faces: in the pass.
        slices: that they are cut into, of equal size.
        machine: where.
        face_bytes: over the network, per face.
        slice_cpu: core-seconds that Ray takes per slice.
    """
    if slices < 1 or faces <= 0:
        return Span(0.0, "-")
    each = faces / slices
    bounds: dict[str, float] = {}
    times = []
    for step in steps:
        seconds, slowest = _worker(step, machine)
        workers = max(1, min(int(step.workers), slices) if step.workers < math.inf else slices)
        times.append(each * seconds)
        bounds[slowest] = max(
            bounds.get(slowest, 0.0), math.ceil(slices / workers) * each * seconds
        )
    busy = {part.name: _cores(part, machine) for step in steps for part in step.parts}
    total = faces * sum(busy.values()) + slices * slice_cpu
    most = max(busy, key=lambda name: busy[name])
    bounds[f"cores ({most} {_percent(faces * busy[most], total)})"] = total / machine.cores
    for step in steps:
        held = sum(_seconds(part, machine) for part in step.parts if _on_gpu(part, machine))
        if held and step.gpus:
            bounds[f"GPUs ({step.name})"] = faces * held / step.gpus
    if machine.network is not None:
        bounds["network"] = faces * face_bytes / machine.network
    bottleneck = max(bounds, key=lambda name: bounds[name])
    fill = sum(times) - max(times)
    return Span(bounds[bottleneck] / machine.efficiency + fill, bottleneck, bounds)


def _worker(step: Step, machine: Machine) -> tuple[float, str]:
    """Seconds per face of one worker, and its largest piece."""
    speeds = {part.name: _seconds(part, machine) for part in step.parts}
    beside = [speeds[part.name] for part in step.parts if part.beside]
    after = [speeds[part.name] for part in step.parts if not part.beside]
    return max(beside, default=0.0) + sum(after), max(speeds, key=lambda name: speeds[name])


def _on_gpu(part: Part, machine: Machine) -> bool:
    return part.gpu and machine.gpu_factor is not None


def _seconds(part: Part, machine: Machine) -> float:
    if part.gpu and machine.gpu_factor is not None:
        return part.spent.seconds / machine.gpu_factor
    return part.spent.seconds / machine.core_speed


def _cores(part: Part, machine: Machine) -> float:
    return 0.0 if _on_gpu(part, machine) else part.spent.cpu


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def train_time(
    passes: float, rate: float, machine: Machine, *, workers: int = 0, threads: int = 1
) -> Span:
    """Seconds of a training of so many image passes.

    Args:
        passes: image passes, over all workers.
        rate: passes per second of one worker on the probed machine.
        machine: where.
        workers: of Ray Train; 0: one process.
        threads: cores that a worker asks for; without GPUs no more run than the cores hold.
    """
    if machine.gpu_factor is not None:
        speed, several = machine.gpu_factor, max(1, workers)
    else:
        room = machine.cores / machine.core_speed / threads
        speed, several = machine.core_speed, max(1, min(workers, math.floor(room)))
    reached = machine.efficiency if several > 1 else 1.0
    return Span(passes / (rate * speed * several * reached), "training steps")


def average(
    values: Mapping[str, Sequence[tuple[float, float]]], faces: Mapping[str, float]
) -> float:
    """Cost per face of a pool whose sources were probed one by one.

    Args:
        values: by source, (cost per face, faces) of every probe.
        faces: by source, all its faces; a source without a probe does not count.
    """
    total = weight = 0.0
    for source, probes in values.items():
        seen = sum(count for _, count in probes)
        if seen:
            mean = sum(cost * count for cost, count in probes) / seen
            total += faces[source] * mean
            weight += faces[source]
    return total / weight if weight else 0.0


def choose(count: int, probes: int, draws: Sequence[float]) -> list[int]:
    """Places of probes in a plan of `count` slices: one in each of as many equal stretches.

    `draws` in [0, 1), one per probe, say where in its stretch.
    """
    probes = min(probes, count)
    ends = [count * i / probes for i in range(probes + 1)] if probes else [0.0]
    found = [
        min(int(a + draw * (b - a)), count - 1)
        for a, b, draw in zip(ends, ends[1:], draws, strict=False)
    ]
    return sorted(set(found))
