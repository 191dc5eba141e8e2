"""What this machine does while a stage runs: CPU, memory, disk, network, GPUs; for MLflow.

The names are those of MLflow's own system metrics, which its pages draw apart from all others. Only
the driver's machine is read: Ray exports those of all nodes to Prometheus, see infra/monitoring.

Cost: a thread that wakes every `SECONDS`, and half a millisecond then; where there is an
`nvidia-smi`, a process of it as well.
Departs from mlflow.system_metrics: that talks to the server itself, so it would lose what a server
that is down cannot take; here it waits with everything else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

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
    """

    def __init__(self, disk: str | os.PathLike[str]) -> None:
        self._disk = disk
        self._smi = shutil.which("nvidia-smi")
        self._received, self._sent = _network()
        psutil.cpu_percent()  # the next call tells of the time since

    def read(self) -> dict[str, float]:
        """Values by name; what cannot be read is left out.

        CPU is that since the call before, of whichever object; network the sum since this object
        was made.
        """
        memory, (received, sent) = psutil.virtual_memory(), _network()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": (memory.total - memory.available) / MB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/network_receive_megabytes": (received - self._received) / MB,
            "system/network_transmit_megabytes": (sent - self._sent) / MB,
            **self._room(),
            **self._gpus(),
        }

    def _room(self) -> dict[str, float]:
        try:
            disk = psutil.disk_usage(os.fspath(self._disk))
        except OSError:
            return {}
        return {
            "system/disk_usage_percentage": disk.percent,
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


def _network() -> tuple[int, int]:
    """Bytes received and sent by all interfaces, this machine's talk with itself apart."""
    wires = [one for name, one in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return sum(one.bytes_recv for one in wires), sum(one.bytes_sent for one in wires)
