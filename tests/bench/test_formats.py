"""Proves that the bench formats sees other rows, other refusals and a secret that came out."""

from __future__ import annotations

import argparse
import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.storage import location
from tests.bench import formats, omni
from tests.bench.cases import Case, Row, outcome

ROWS = [Row(f"a#{i}", b"%d" % i, group=f"g{i // 2}") for i in range(4)]


def ended(case: Case, rows: list[Row] | Exception, folder: Path) -> dict[str, Any]:
    def read(config: Any, work: Path) -> list[Row]:
        if isinstance(rows, Exception):
            raise rows
        return list(rows)

    return outcome(case, read, folder)


def written(at: Path) -> tuple[dict[str, Any], list[Row]]:
    return {}, ROWS


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (ROWS, None),
        ([replace(row, group=f"other {row.group}") for row in ROWS], None),  # names do not count
        (ROWS[:3], "3 rows, expected 4"),
        (ROWS[::-1], "4 rows differ"),
        ([*ROWS[:3], replace(ROWS[3], image=b"x")], "1 rows differ; first: a#3: {'image'"),
        ([*ROWS[:3], replace(ROWS[3], group="g0")], "1 rows differ; first: a#3: {'group'"),
        ([*ROWS[:3], replace(ROWS[3], reason="empty")], "'reason'"),
        (SourceError("gone"), "refused: gone"),
    ],
)
def test_outcome__other_rows_are_faults(tmp_path: Path, rows: Any, fault: str | None) -> None:
    found = ended(Case("whole", written), rows, tmp_path)
    assert [fault in said for said in found["faults"]] == [True] if fault else not found["faults"]
    judged = formats.judge_whole({"pool-x": {"metrics": {"cases": {"whole": found}}}})
    assert bool(judged) == (fault is not None)


def test_outcome__refusals_say_one_line_of_what_is_expected(tmp_path: Path) -> None:
    case = Case("cut", written, refused="broken")
    assert ended(case, SourceError("a: broken x"), tmp_path)["faults"] == []
    assert len(ended(case, SourceError("a: strange"), tmp_path)["faults"]) == 1
    assert ended(case, SourceError("a: broken\nx"), tmp_path)["faults"] == ["more than one line"]
    assert len(ended(case, ROWS, tmp_path)["faults"]) == 1


@pytest.mark.parametrize(
    ("rows", "is_good"),
    [
        ([*ROWS[:2], Row("a@9", None, reason="truncated")], True),
        ([*ROWS[:2], *[Row("a@9", None, reason="truncated")] * 2], True),
        ([ROWS[0], replace(ROWS[1], group=None), Row("a@9", None, reason="truncated")], True),
        ([replace(ROWS[0], group=None), ROWS[1], Row("a@9", None, reason="truncated")], False),
        (ROWS[:2], False),
        ([*ROWS[1:3], Row("a@9", None, reason="truncated")], False),
        ([*ROWS, Row("a@9", None, reason="truncated")], False),
        ([*ROWS[:2], Row("a@9", None, reason="empty")], False),
    ],
)
def test_outcome__a_break_ends_in_a_row(tmp_path: Path, rows: list[Row], is_good: bool) -> None:
    found = ended(Case("cut", written, prefix=True), rows, tmp_path)
    assert (found["faults"] == []) == is_good


def test_cells__one_per_format_and_identities_hold() -> None:
    options = argparse.Namespace(quick=False)
    full = {cell.name: cell.identity for cell in formats.cells(options)}
    names = [cell.name for cell in formats.cells(options)]
    assert len(set(names)) == len(names) == len(formats.POOL) + len(formats.LABELED) + 2
    quick = formats.cells(argparse.Namespace(quick=True))
    assert all(full[cell.name] != cell.identity for cell in quick)
    assert full.keys() - {cell.name for cell in quick} == {"omni-rec"}


def test_leaks__finds_a_secret_in_files_and_objects(tmp_path: Path) -> None:
    secret = "S3cret-of-the-test/+x"
    (tmp_path / "clean.log").write_text("nothing")
    (tmp_path / "plain.log").write_text(f"key={secret}")
    (tmp_path / "packed.log").write_bytes(base64.b64encode(secret.encode()))
    with s3_bucket() as root:
        (root / "run" / "fine.json").write_text("{}")
        (root / "run" / "bad.json").write_text(secret)
        found = omni.leaks(secret, sorted(tmp_path.iterdir()), root / "run")
        assert found == ["packed.log", "plain.log", f"{root}/run/bad.json"]


def test_watch__counts_by_stage_from_its_done_files() -> None:
    watch = omni.Watch()
    watch("PUT", "/faces/runs/x/survey/g1/done.json")
    assert not watch.methods
    watch.begin(location("s3://faces/runs/x"))
    watch("GET", "/faces/pool/a.tsv")
    watch("PUT", "/faces/runs/x/survey/g1/done-1.json")
    watch("GET", "/faces/runs/x/survey/g1/a")
    watch("PUT", "/faces/runs/x/guard/g1/done.json")
    watch("PUT", "/faces/runs/x/teach/g1/x")
    assert watch.methods == {"GET": 2, "PUT": 3}
    assert watch.stages == {"survey": 2, "guard": 2, "teach": 1}


def _omni(**changes: Any) -> dict[str, Any]:
    rows = {"survey": 9, "embed": 9, "score": 9, "select": 9, "mine": 4}
    found = {"faces": 9, "selected": 4, "rows": rows, "leaks": [], "report": True}
    return {"omni-x": {"metrics": {**found, "until": "report", **changes}}}


def test_judge_omni__lost_faces_and_secrets_are_faults() -> None:
    assert formats.judge_omni(_omni()) == []
    assert formats.judge_omni({}) is None
    assert len(formats.judge_omni(_omni(faces=10)) or ()) == 4
    assert formats.judge_omni(_omni(leaks=["a.log"])) == ["omni-x: a.log holds the planted secret"]
    assert formats.judge_omni(_omni(report=False)) == ["omni-x: no report"]
    assert formats.judge_omni(_omni(report=False, until="mine")) == []
