"""The machine is read as its own files say it, and told once a sample."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import gauges
from pipeline.gauges import Gauges, Row, gpus, watching

HEAD = "Inter-|   Receive       |  Transmit\n face |bytes packets errs|bytes packets errs\n"


def _say(proc: Path, busy: int, idle: int, waits: int, received: int, sent: int) -> None:
    (proc / "net").mkdir(parents=True, exist_ok=True)
    # user nice system idle iowait irq softirq steal guest guest_nice; guests are part of user.
    (proc / "stat").write_text(
        f"cpu  {busy} 0 0 {idle} {waits} 0 0 0 {busy} 0\ncpu0 1 1 1 1 1 1 1 1\n"
    )
    (proc / "meminfo").write_text("MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable: 1000 kB\n")
    wires = {"lo": (9e9, 9e9), "eth0": (received, sent), "eth1": (10, 20)}
    lines = [f"  {n}: {int(r)} 1 0 0 0 0 0 0 {int(s)} 1 0 0 0 0 0 0" for n, (r, s) in wires.items()]
    (proc / "net" / "dev").write_text(HEAD + "\n".join(lines) + "\n")


def test_read__equals_what_the_files_say(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    _say(proc, busy=1000, idle=5000, waits=0, received=500, sent=700)
    read = Gauges(tmp_path, proc)
    _say(proc, busy=1030, idle=5050, waits=20, received=2_000_500, sent=700)
    found = {name: value for name, value in read.read().items() if "/gpu_" not in name}
    disk = shutil.disk_usage(tmp_path)
    assert found == {
        "system/cpu_utilization_percentage": 30.0,
        "system/system_memory_usage_megabytes": pytest.approx(3000 * 1024 / 1e6),
        "system/system_memory_usage_percentage": 75.0,
        "system/network_receive_megabytes": 2.0,
        "system/network_transmit_megabytes": 0.0,
        "system/disk_usage_percentage": pytest.approx(100 * disk.used / disk.total, abs=1),
        "system/disk_usage_megabytes": pytest.approx(disk.used / 1e6, rel=0.05),
        "system/disk_available_megabytes": pytest.approx(disk.free / 1e6, rel=0.05),
    }
    # CPU is of the time between two readings, network of all the time.
    _say(proc, busy=1130, idle=5050, waits=20, received=3_000_500, sent=700)
    found = read.read()
    assert found["system/cpu_utilization_percentage"] == 100.0
    assert found["system/network_receive_megabytes"] == 3.0
    assert "system/cpu_utilization_percentage" not in read.read()  # no time has passed


def test_read__a_machine_that_says_nothing_leaves_it_out(tmp_path: Path) -> None:
    found = Gauges(tmp_path / "gone", tmp_path / "none").read()
    assert [name for name in found if "/gpu_" not in name] == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_read__this_machine_has_all_of_it(tmp_path: Path) -> None:
    read = Gauges(tmp_path)
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    found = read.read()
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert found["system/network_receive_megabytes"] >= 0


def test_gpus__a_card_a_line_and_parts_of_cards_left_out() -> None:
    found = gpus("45, 1000, 4000\n[N/A], 1, 2\n0, 0, 4000\n")
    assert found == {
        "system/gpu_0_utilization_percentage": 45.0,
        "system/gpu_0_memory_usage_megabytes": pytest.approx(1048.576),
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_2_utilization_percentage": 0.0,
        "system/gpu_2_memory_usage_megabytes": 0.0,
        "system/gpu_2_memory_usage_percentage": 0.0,
    }
    assert gpus("") == gpus("No devices were found") == {}


def test_watching__tells_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "SECONDS", 0.01)
    monkeypatch.setattr(gauges, "TOLD", 2)
    told: list[tuple[str, list[Row]]] = []
    before = threading.active_count()
    with watching(
        Gauges(tmp_path), lambda rows: told.append((threading.current_thread().name, rows))
    ):
        until = time.monotonic() + 30
        while len(told) < 2 and time.monotonic() < until:
            time.sleep(0.005)
    assert threading.active_count() == before
    assert {name for name, _ in told[:-1]} == {"gauges"}  # meanwhile, not at the end
    assert told[-1][0] == threading.current_thread().name
    rows = [row for _, part in told for row in part if row[0] == "system/disk_usage_megabytes"]
    assert [row[3] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 5
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)
