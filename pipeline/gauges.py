"""What this machine does while a stage runs: CPU, memory, disk, network, GPUs; for MLflow.

The names are those of MLflow's own system metrics, which its pages draw apart from all others. Only
the driver's machine is read: Ray exports those of all nodes to Prometheus, see infra/monitoring.

Cost: a thread that wakes every `SECONDS`, and half a millisecond then; where there is an
`nvidia-smi`, a process of it as well.
Departs from mlflow.system_metrics: that needs psutil and a run of MLflow's global state. Here Linux
is asked itself; on other systems there is no CPU, memory and network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0
TOLD = 6
"""Samples that are told together."""
GPU_QUERY = ("utilization.gpu", "memory.used", "memory.total")  # percent, MiB, MiB
GPU_PATIENCE = 5.0  # seconds for an answer; who is slower is not asked again
MB = 1e6

Row = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, number of the sample."""


class Gauges:
    """Reads the machine. Owns what it read before, since shares and sums are of the time between.

    Args:
        disk: a folder on the disk that is looked at.
        proc: where Linux says how it is.
    """

    def __init__(self, disk: str | os.PathLike[str], proc: Path = Path("/proc")) -> None:
        self._disk, self._proc = disk, proc
        self._smi = shutil.which("nvidia-smi")
        self._ticks = _ticks(_text(proc / "stat"))
        self._network = _network(_text(proc / "net" / "dev"))

    def read(self) -> dict[str, float]:
        """Values by name; what cannot be read is left out.

        CPU is that since the call before, network the sum since this object was made.
        """
        memory = _memory(_text(self._proc / "meminfo"))
        return {**self._cpu(), **memory, **self._wires(), **self._room(), **self._gpus()}

    def _cpu(self) -> dict[str, float]:
        before, self._ticks = self._ticks, _ticks(_text(self._proc / "stat"))
        if before is None or self._ticks is None:
            return {}
        busy, total = (new - old for new, old in zip(self._ticks, before, strict=True))
        return {"system/cpu_utilization_percentage": 100 * busy / total} if total > 0 else {}

    def _wires(self) -> dict[str, float]:
        now = _network(_text(self._proc / "net" / "dev"))
        if now is None or self._network is None:
            return {}
        names = ("system/network_receive_megabytes", "system/network_transmit_megabytes")
        pairs = zip(names, now, self._network, strict=True)
        return {name: (new - old) / MB for name, new, old in pairs}

    def _room(self) -> dict[str, float]:
        try:
            disk = shutil.disk_usage(self._disk)
        except OSError:
            return {}
        return {
            "system/disk_usage_percentage": 100 * disk.used / disk.total,
            "system/disk_usage_megabytes": disk.used / MB,
            "system/disk_available_megabytes": disk.free / MB,
        }

    def _gpus(self) -> dict[str, float]:
        if self._smi is None:
            return {}
        query = [f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(
                [self._smi, *query],
                capture_output=True,
                check=True,
                text=True,
                timeout=GPU_PATIENCE,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            self._smi = None
            return {}
        return gpus(said)


def gpus(said: str) -> dict[str, float]:
    """Values of every GPU, from the lines of `nvidia-smi`; a card that says no number is left out.

    Args:
        said: lines of :data:`GPU_QUERY`, a card each, without header and units.
    """
    found: dict[str, float] = {}
    for number, line in enumerate(said.splitlines()):
        try:
            busy, used, total = (float(value) for value in line.split(","))
        except ValueError:  # [N/A], as a card says that is cut into parts
            continue
        found[f"system/gpu_{number}_utilization_percentage"] = busy
        found[f"system/gpu_{number}_memory_usage_megabytes"] = used * 2**20 / MB
        found[f"system/gpu_{number}_memory_usage_percentage"] = 100 * used / total
    return found


@contextmanager
def watching(gauges: Gauges, tell: Callable[[list[Row]], None]) -> Iterator[None]:
    """Read while the block runs, and once more at its end.

    Args:
        gauges: what is read.
        tell: called with rows, from a thread of its own and at last from this one.
    """
    over, rows, number = threading.Event(), list[Row](), 0

    def sample() -> None:
        nonlocal number
        now = int(time.time() * 1000)
        rows.extend((name, value, now, number) for name, value in gauges.read().items())
        number += 1

    def watch() -> None:
        while not over.wait(SECONDS):
            sample()
            if number % TOLD == 0:
                tell(rows.copy())
                rows.clear()

    thread = threading.Thread(target=watch, name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sample()
        tell(rows)


def _text(at: Path) -> str:
    try:
        return at.read_text()
    except OSError:
        return ""


def _ticks(stat: str) -> tuple[int, int] | None:
    """Ticks of all CPUs that were busy, and all; None where the machine does not say."""
    first = stat.partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    each = [int(value) for value in first[1:9]]  # what guests took is part of user and nice
    return sum(each) - each[3] - each[4], sum(each)  # idle, and waiting for a disk


def _memory(meminfo: str) -> dict[str, float]:
    sizes = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    if not {"MemTotal", "MemAvailable"} <= set(sizes):
        return {}
    total, free = (float(sizes[n].split()[0]) * 1024 for n in ("MemTotal", "MemAvailable"))
    return {
        "system/system_memory_usage_megabytes": (total - free) / MB,
        "system/system_memory_usage_percentage": 100 * (total - free) / total,
    }


def _network(dev: str) -> tuple[int, int] | None:
    """Bytes received and sent by all interfaces, this machine's talk with itself apart."""
    lines = [line.partition(":") for line in dev.splitlines() if ":" in line]
    counts = [rest.split() for name, _, rest in lines if name.strip() != "lo"]
    if not lines:
        return None
    return sum(int(c[0]) for c in counts), sum(int(c[8]) for c in counts)
