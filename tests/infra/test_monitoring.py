"""Proves that what is drawn and alerted on exists: among Ray's metrics, or among our own.

Neither Prometheus nor Grafana is at hand; their files are checked by shape.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import telemetry
from pipeline.conduct import SHARED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "monitoring"
BOARD: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DRAWN = [(p["title"], t["expr"]) for p in BOARD["panels"] for t in p["targets"]]
ASKED = [*DRAWN, *((rule["alert"], rule["expr"]) for rule in RULES)]
OWN = {f"ray_{n}_total" for n in (telemetry.FACES, telemetry.QUARANTINED, telemetry.YIELDED)}


@cache
def rays() -> str:
    """The text of Ray's own dashboards and of what its nodes report."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent / "dashboard" / "modules"
    panels = (home / "metrics" / "dashboards").glob("*_panels.py")
    reporter = home / "reporter" / "reporter_agent.py"
    return "\n".join(at.read_text(encoding="utf-8") for at in (*panels, reporter))


def known(metric: str) -> bool:
    """Nodes report `node_mem_used`; it is exported as `ray_node_mem_used`."""
    bare = metric.removeprefix("ray_")
    return metric in OWN or bool(re.search(rf'\bray_{bare}\b|"{bare}"', rays()))


@pytest.mark.parametrize(("where", "expr"), ASKED, ids=lambda value: str(value)[:40])
def test_expressions__name_metrics_that_exist(where: str, expr: str) -> None:
    metrics = set(re.findall(r"\b(?:ray|omnifer)_\w+", expr))
    assert metrics or expr.startswith("up{"), where
    assert [metric for metric in metrics if not known(metric)] == []
    for opened, closed in ("()", "{}", "[]"):
        assert expr.count(opened) == expr.count(closed)
    stages = set(re.findall(r'stage="(\w+)"', expr))
    assert stages <= set(SHARED)


def test_known__sees_what_nobody_reports() -> None:
    assert known("ray_omnifer_faces_total")
    assert not known("ray_omnifer_faces")
    assert not known("ray_node_mem_usage_ratio")


def test_alerts__are_rules_that_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_prometheus__scrapes_and_reads_the_rules(name: str) -> None:
    config = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert config.keys() == {"global", "rule_files", "scrape_configs"}
    assert all((FOLDER / file).is_file() for file in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "ray"  # the alert on unreachable nodes asks for it
    assert any('job="ray"' in rule["expr"] for rule in RULES)


def test_prometheus__finds_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    text = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    assert f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}" in text


def test_prometheus__finds_the_port_of_the_pods() -> None:
    cluster = (ROOT / "infra/kuberay/cluster/raycluster.yaml").read_text(encoding="utf-8")
    assert cluster.count("{name: metrics, containerPort: 8080}") == 2  # the head, and all workers


def test_board__fills_rows_of_24_without_overlap() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not taken & cells
        taken |= cells
        assert panel["datasource"]["uid"] == "${source}"
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["source"]


def test_board__shows_what_was_promised() -> None:
    titles = {panel["title"] for panel in BOARD["panels"]}
    wanted = {"Faces per second", "Utilization", "Quarantine rate", "Actors", "Memory"}
    assert wanted <= titles
