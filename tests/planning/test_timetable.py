"""Proves what a person reads of an outlook: figures, dollars and the honest lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from helpers.command import omnifer
from helpers.flow import DEMO, TINY
from rich.console import Console

from pipeline.planning import timetable
from pipeline.planning.costs import load_prices
from pipeline.planning.foresight import Row
from pipeline.planning.outlook import Outlook
from pipeline.planning.probing import Requests

CLUSTER = """\
groups:
  - {name: node, min: 1, max: 3, cpus: 4, dollars_per_hour: 2}
"""
SETS = [part for item in TINY for part in ("--set", item)]
SMALL = ["--set", "pool.0.count=100", "--set", "labeled.count=80", "--set", "labeled.test_count=30"]


def outlook(
    *rows: Row, on_s3: bool = True, fewest: tuple[Row, ...] = (), quiet: tuple[Row, ...] = ()
) -> Outlook:
    return Outlook(
        recipe="made up",
        machine="a cluster",
        pool=None,  # type: ignore[arg-type]
        probes=[],
        measured=None,  # type: ignore[arg-type]
        rows=rows,
        fewest=fewest,
        quiet=quiet,
        honest=["[1] of 2 slices"],
        on_s3=on_s3,
        prices=load_prices(None),
    )


def shown(found: Outlook) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=200).print(timetable.table(found))
    return out.getvalue().splitlines()


PASS = Row(
    "embed", 7200.0, "faces", 3600.0, 3000.0, 7200.0, "forward", 2e9, Requests(1e6, 1e6), 4.0
)
TRAIN = Row("teach", 600.0, "passes", 60.0, 60.0, 60.0, "training steps")


def test_table__rates_requests_per_second_and_dollars() -> None:
    lines = shown(outlook(PASS, TRAIN))
    embed = next(line for line in lines if "embed" in line).split()
    # 7,200 in an hour are 2 a second; two million requests 556 a second; 5.00 + 0.40 $ and 4 $
    assert [
        w for w in embed if w in ("7,200", "2", "2.00", "2,000,000", "556", "5.40", "9.40")
    ] == [
        "7,200",
        "2",
        "2.00",
        "2,000,000",
        "556",
        "5.40",
        "9.40",
    ]
    assert "50 min - 2.0 h" in next(line for line in lines if "embed" in line)
    total = next(line for line in lines if "total" in line)
    assert "61 min" in total
    assert total.split()[-1] == "9.40"


def test_table__columns_that_would_be_empty_are_left_out() -> None:
    header = shown(outlook(TRAIN, on_s3=False))[1]
    assert "$" not in header
    assert "S3" not in header


def test_said__storage_by_the_month_and_the_smallest_cluster() -> None:
    lines = timetable.said(outlook(PASS, fewest=(PASS, TRAIN)))
    assert lines[0] == "With the fewest nodes: 61 min, $9.40."
    assert "2.00 GB of results, $0.05 a month" in lines[1]
    assert "check before you rely on it" in lines[1]
    assert lines[-1] == "[1] of 2 slices"


def test_said__passes_of_a_quiet_machine() -> None:
    lines = timetable.said(outlook(PASS, on_s3=False, quiet=(PASS, TRAIN)))
    assert lines == ["With every core of this machine free: embed 60 min.", "[1] of 2 slices"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert timetable.duration(seconds) == text


def test_plan__the_verb_prints_a_table_and_writes_every_figure(tmp_path: Path) -> None:
    cluster, out = tmp_path / "nodes.yaml", tmp_path / "plan.json"
    cluster.write_text(CLUSTER)
    ended = omnifer(
        "plan", DEMO, *SETS, *SMALL, "--run", tmp_path / "run", "--probe", 1,
        "--cluster", cluster, "--out", out,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "cluster at its largest" in ended.out
    assert "With the fewest nodes" in ended.out
    assert "Not modelled" in ended.out
    facts = json.loads(out.read_text())
    stages = {row["stage"]: row for row in facts["stages"]}
    assert list(stages)[:2] == ["survey", "guard"]
    survey = stages["survey"]
    assert survey["dollars"] == pytest.approx(survey["seconds"] / 3600 * 6)
    assert len(facts["probes"]) == 1
    assert sorted(at.name for at in tmp_path.iterdir()) == ["nodes.yaml", "plan.json"]


def test_plan__a_typo_in_the_cluster_file_before_anything_is_read(tmp_path: Path) -> None:
    cluster = tmp_path / "nodes.yaml"
    cluster.write_text(CLUSTER.replace("cpus", "cpu"))
    ended = omnifer("plan", tmp_path / "gone.yaml", "--cluster", cluster)
    assert ended.code == 2
    assert ended.err == ("omnifer: nodes.yaml: unknown key 'groups.0.cpu'; did you mean 'cpus'?\n")
