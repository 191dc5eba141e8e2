"""The machine is read as it says itself, and told once a sample."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import gauges
from pipeline.gauges import Gauges, Row, gpus, watching


def test_read__equals_what_the_machine_says(tmp_path: Path) -> None:
    read, until = Gauges(tmp_path), time.process_time() + 0.1
    while time.process_time() < until:
        pass
    found = read.read()
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(tmp_path)
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert found["system/system_memory_usage_percentage"] == pytest.approx(memory.percent, abs=10)
    used = memory.total * found["system/system_memory_usage_percentage"] / 100
    assert found["system/system_memory_usage_megabytes"] == pytest.approx(used / 1e6, rel=0.01)
    assert found["system/disk_available_megabytes"] == pytest.approx(disk.free / 1e6, rel=0.05)
    assert found["system/disk_usage_megabytes"] == pytest.approx(disk.used / 1e6, rel=0.05)


def test_read__network_is_the_sum_since_the_start_less_talk_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"lo": (0, 0), "eth0": (500, 700), "eth1": (10, 20)}
    monkeypatch.setattr(
        "psutil.net_io_counters",
        lambda pernic: {
            name: SimpleNamespace(bytes_recv=got, bytes_sent=sent)
            for name, (got, sent) in said.items()
        },
    )
    read = Gauges(tmp_path)
    for received in (2_000_500, 3_000_500):
        said |= {"lo": (9_000_000, 9_000_000), "eth0": (received, 700)}
        found = read.read()
        assert found["system/network_receive_megabytes"] == (received - 500) / 1e6
        assert found["system/network_transmit_megabytes"] == 0.0


def test_read__a_disk_that_is_gone_is_left_out(tmp_path: Path) -> None:
    found = Gauges(tmp_path / "gone").read()
    assert not any("disk" in name for name in found)
    assert "system/cpu_utilization_percentage" in found


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
