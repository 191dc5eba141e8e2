"""Proves that cluster files and price tables are read, filled and refused with one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.planning.costs import Prices, load_cluster, load_prices

GROUPS = """\
groups:
  - {name: head, min: 1, max: 1, cpus: 4, dollars_per_hour: 0.2}
  - {name: gpu, max: 4, instance: g5.xlarge, dollars_per_hour: 0.5, spot: true,
     gpu_images_per_second: 8000}
"""


@pytest.fixture
def prices() -> Prices:
    return load_prices(None)


def write(at: Path, text: str) -> Path:
    file = at / "cluster.yaml"
    file.write_text(text)
    return file


def test_load_prices__every_price_of_the_package_has_a_date(prices: Prices) -> None:
    dated = [prices.s3.as_of, *(one.as_of for one in prices.instances.values())]
    assert all(text[:2] == "20" and text[4] == "-" for text in dated)
    assert "check" in prices.note
    assert prices.s3.requests(2_000_000, 1_000_000) == pytest.approx(2000 * 0.005 + 1000 * 0.0004)


def test_load_prices__the_users_file_replaces_it(tmp_path: Path) -> None:
    own = tmp_path / "prices.yaml"
    own.write_text(
        "region: here\n"
        "s3: {as_of: 2026-01-31, put_per_1000: 1, get_per_1000: 0, gb_month: 0}\n"
        "instances: {box: {as_of: 2026-01, dollars_per_hour: 2, cpus: 3}}\n"
    )
    found = load_prices(own)
    assert (found.region, found.s3.as_of, list(found.instances)) == ("here", "2026-01-31", ["box"])
    assert found.s3.requests(5000, 9) == 5


def test_load_cluster__fills_from_the_table_what_is_not_said(
    tmp_path: Path, prices: Prices
) -> None:
    cluster = load_cluster(write(tmp_path, GROUPS), prices)
    gpu = cluster.groups[1]
    known = prices.instances["g5.xlarge"]
    assert (gpu.cpus, gpu.gpus, gpu.network_gbit) == (known.cpus, 1, known.network_gbit)
    assert gpu.dollars_per_hour == 0.5  # as the file says


def test_machine__adds_up_nodes(tmp_path: Path, prices: Prices) -> None:
    cluster = load_cluster(write(tmp_path, GROUPS), prices)
    found = cluster.machine({"head": 1, "gpu": 3}, 400.0, gpu=True)
    assert found.cores == 4 + 3 * 4
    assert found.gpu_factor == pytest.approx(8000 / 400)
    assert found.network == pytest.approx(3 * 2.5e9 / 8)  # the head's is not known
    assert found.dollars_per_hour == pytest.approx(0.2 + 3 * 0.5)
    assert found.efficiency == 0.8
    alone = cluster.machine({"head": 1, "gpu": 0}, 400.0, gpu=True)
    assert (alone.gpu_factor, alone.efficiency) == (None, 1.0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("instance:", "instanc:", "unknown key 'groups.1.instanc'; did you mean 'instance'?"),
        ("g5.xlarge", "g5.xlrge", "no price of instance 'g5.xlrge'; did you mean 'g5.xlarge'?"),
        ("groups:", "group:", "unknown key 'group'; did you mean 'groups'?"),
        ("name: gpu", "name: head", "two groups are named 'head'"),
        ("max: 4", "min: 5, max: 4", "max 4 is less than min 5"),
        (", cpus: 4", "", "group 'head': expected cpus"),
        ("images_per_second: 8000", "factor: 0", "gpu_factor"),
        ("gpu_images_per_second: 8000", "spot: true", "1 GPUs of unknown speed"),
    ],
)
def test_load_cluster__fault(old: str, new: str, said: str, tmp_path: Path, prices: Prices) -> None:
    text = GROUPS.replace("spot: true,\n     ", "") if new == "spot: true" else GROUPS
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, text.replace(old, new)), prices)
    assert any(said in line for line in str(caught.value).splitlines())


def test_load_cluster__missing_or_no_yaml(tmp_path: Path, prices: Prices) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_cluster(tmp_path / "gone.yaml", prices)
    with pytest.raises(ConfigError, match="not YAML"):
        load_cluster(write(tmp_path, "a: [1"), prices)
    with pytest.raises(ConfigError, match="max is 0 in every group"):
        load_cluster(write(tmp_path, "groups: [{name: a, max: 0, cpus: 1}]"), prices)
