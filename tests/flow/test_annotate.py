"""Proves the rounds of a person: asked, filled in, learned, and judged on the same faces."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow
from helpers.command import Ended, omnifer
from helpers.s3 import s3_bucket

from pipeline import conduct, images, pool, s3, stages
from pipeline.run import CURRENT, Run
from pipeline.schema import EMOTIONS
from pipeline.storage import Location, location
from pipeline.tables import read_table
from pipeline.training.runs import FOLDS_FILE

SETS = [part for item in (*flow.TINY, flow.UNTRACKED) for part in ("--set", item)]
BUDGET = 24


def annotate(root: Path | Location, *options: object) -> Ended:
    return omnifer("annotate", flow.DEMO, "--run", root, *SETS, *options)


def ask(root: Path | Location, *options: object) -> Ended:
    ended = annotate(root, "--budget", BUDGET, *options)
    assert ended.code == 0, ended.err
    return ended


def folds_of(root: Path) -> list[dict[str, Any]]:
    at = Run(location(root)).artifact("teach").dir
    return read_table(at / FOLDS_FILE).to_pylist()


def round_of(root: Path, number: int = 1) -> Path:
    return root / "annotate" / f"round-{number:03d}"


def truth_of(root: Location) -> dict[str, str]:
    table = read_table(Run(root).artifact("survey").dir / pool.TRUTH_FILE)
    return dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))


def filled(sheet: bytes, truth: dict[str, str], leave: int = 2) -> bytes:
    """The sheet as Excel may save it, with the truth; the last faces are skipped or left empty."""
    rows = list(csv.DictReader(io.StringIO(sheet.decode("utf-8-sig"), newline="")))
    lines = ["rank;id;label"]
    for number, row in enumerate(rows):
        label = truth[row["id"]] if number < len(rows) - leave else ("skip", "")[number % 2]
        lines.append(f"{row['rank']};{row['id']};{label}")
    return "\r\n".join(lines).encode("utf-8-sig")


def content(root: Path) -> dict[str, bytes]:
    return {str(at.relative_to(root)): at.read_bytes() for at in root.rglob("*") if at.is_file()}


@pytest.fixture(scope="module")
def asked(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which a round waits; nobody may change it."""
    root = flow.copy(tiny_run, tmp_path_factory.mktemp("asked") / "run")
    ask(root)
    return root


@pytest.fixture(scope="module")
def learned(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, answered and learned; nobody may change it. The sheet lies beside it."""
    root = flow.copy(asked, tmp_path_factory.mktemp("learned") / "run")
    own = root.with_name("filled.csv")
    own.write_bytes(filled((round_of(root) / "sheet.csv").read_bytes(), truth_of(location(root))))
    done = annotate(root, "--sheet", own, "--by", "someone")
    assert done.code == 0, done.err
    assert f"{BUDGET - 2} labels, 1 skipped, 1 left empty" in done.out
    assert "what labels brought" in done.out
    return root


def rows(job: flow.LoggedJob, stage: str) -> list[dict[str, Any]]:
    tables = pool.ledger(job, stage).tables(pool.pool_plan(job))
    return pa.concat_tables(table for _, table in tables).to_pylist()


def given(root: Path) -> list[dict[str, Any]]:
    answers = read_table(location(round_of(root) / "labels.parquet")).to_pylist()
    return [row for row in answers if row["label"] is not None]


def test_ask__faces_that_may_be_labeled_and_their_sheets(tiny_run: Path, asked: Path) -> None:
    assert flow.finished(asked) == flow.finished(tiny_run), "nothing was made again"
    queries = read_table(location(round_of(asked) / "queries.parquet"))
    assert queries["rank"].to_pylist() == list(range(1, BUDGET + 1))
    assert set(queries["acquisition"].to_pylist()) == {"badge"}
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    known = {row["id"]: row for row in rows(job, "score")}
    closed = {
        row["id"]
        for row in rows(job, "twins")
        if row["twin_of"] or row["duplicate_group"] not in (None, row["id"])
    }
    for row in queries.to_pylist():
        assert row["id"] not in closed
        assert row["source"] == "pool"
        for name in ("pseudo_label", "confidence", "margin"):
            assert row[name] == known[row["id"]][name]
    assert b"suggested" not in (round_of(asked) / "sheet.csv").read_bytes()
    page = (round_of(asked) / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<img ") == page.count("data:image/jpeg;base64,") == BUDGET
    assert "recognizable" in page


def test_ask__the_same_round_until_it_is_answered(asked: Path, tmp_path: Path) -> None:
    root = flow.copy(asked, tmp_path / "run")
    state = content(root)
    again = ask(root, "--out", tmp_path / "desk")
    assert content(root) == state
    assert "round-001" in again.out
    for name in ("csv", "html"):
        copy = (tmp_path / "desk" / f"round-001.{name}").read_bytes()
        assert copy == (round_of(root) / f"sheet.{name}").read_bytes()
    ask(root, "--new", "--acquisition", "entropy", "--suggest")
    first, second = (
        read_table(location(round_of(root, number) / "queries.parquet")) for number in (1, 2)
    )
    assert not set(first["id"].to_pylist()) & set(second["id"].to_pylist())
    assert b"suggested" in (round_of(root, 2) / "sheet.csv").read_bytes()


def test_answer__the_teacher_learns_what_was_said(tiny_run: Path, learned: Path) -> None:
    answers = read_table(location(round_of(learned) / "labels.parquet"))
    assert answers.num_rows == BUDGET - 1  # one was skipped, one left empty
    assert set(answers["by"].to_pylist()) == {"someone"}
    truth, labeled = truth_of(location(learned)), given(learned)
    assert len(labeled) == BUDGET - 2
    assert all(row["label"] == truth[row["id"]] for row in labeled)
    assert all(images.decode(row["image"]).size for row in labeled)
    old, new = folds_of(tiny_run), folds_of(learned)
    assert {row["id"] for row in new} - {row["id"] for row in old} == {r["id"] for r in labeled}
    assert {row["id"]: row["label"] for row in new}.items() >= {
        row["id"]: row["label"] for row in labeled
    }.items()


def test_answer__the_curve_has_two_points_on_the_same_faces(tiny_run: Path, learned: Path) -> None:
    points = json.loads((learned / "annotate" / "curve.json").read_text())["points"]
    assert [(p["round"], p["labels"]) for p in points] == [(0, 0), (1, BUDGET - 2)]
    old = folds_of(tiny_run)
    same = {row["id"] for row in old}
    for point, folds in zip(points, (old, folds_of(learned)), strict=True):
        said = [row for row in folds if row["id"] in same]
        right = [EMOTIONS[int(np.argmax(row["logits"]))] == row["label"] for row in said]
        assert point["faces"] == len(said) == len(old)
        assert point["accuracy"] == pytest.approx(np.mean(right))
    assert ElementTree.parse(learned / "annotate" / "curve.svg").getroot().tag.endswith("}svg")


def test_answer__a_second_time_is_the_same_or_refused(learned: Path, tmp_path: Path) -> None:
    root, own = flow.copy(learned, tmp_path / "run"), tmp_path / "filled.csv"
    own.write_bytes(learned.with_name("filled.csv").read_bytes())
    before = flow.finished(root)
    same = annotate(root, "--sheet", own, "--by", "someone")
    assert same.code == 0, same.err
    assert flow.finished(root) == before
    own.write_bytes(own.read_bytes().replace(b";skip", b";anger"))
    state = content(root)
    other = annotate(root, "--sheet", own, "--by", "someone")
    assert other.code == 2
    assert "round-001 was answered before, and 1 answers differ" in other.err
    assert content(root) == state


def test_select__nobody_learns_an_annotated_face_twice(learned: Path, tmp_path: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), flow.copy(learned, tmp_path / "run"))
    stages.select(job)
    reasons = {row["id"]: row["reason"] for row in rows(job, "select")}
    labeled = {face for face, reason in reasons.items() if reason == "labeled"}
    assert labeled == {row["id"] for row in given(learned)}
    assert "selected" in reasons.values()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_run__after_a_round_makes_everything_again(learned: Path, tmp_path: Path) -> None:
    root = flow.copy(learned, tmp_path / "run")
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    conduct.run_all(job, None)
    labeled = {row["id"] for row in given(root)}
    mined = {row["id"] for row in rows(job, "mine")}
    assert mined
    assert not labeled & mined
    metrics = (job.run.artifact("evaluate").dir / stages.METRICS_FILE).read_json()
    assert metrics["protocol"]["annotated"] == len(labeled)
    ask(root)
    fresh = read_table(location(round_of(root, 2) / "queries.parquet"))["id"].to_pylist()
    seen = read_table(location(round_of(root) / "labels.parquet"))["id"].to_pylist()
    assert not set(fresh) & set(seen)


def test_answer__a_refused_sheet_changes_nothing(asked: Path, tmp_path: Path) -> None:
    root = flow.copy(asked, tmp_path / "run")
    lines = (round_of(root) / "sheet.csv").read_bytes().decode("utf-8-sig").splitlines()
    lines[1] += "hapiness"
    lines[2] += "anger"
    lines[5] = lines[2]
    lines.append("99,pool/nobody,fear")
    own = tmp_path / "filled.csv"
    own.write_text("\n".join(lines))
    state = content(root)
    ended = annotate(root, "--sheet", own, "--by", "someone")
    assert ended.code == 2
    found = ended.err.splitlines()
    assert len(found) == 3
    assert "filled.csv line 2: " in found[0]
    assert "did you mean 'happiness'?" in found[0]
    assert "filled.csv line 6: " in found[1]
    assert "line 3" in found[1]
    assert f"filled.csv line {BUDGET + 2}: " in found[2]
    assert "pool/nobody" in found[2]
    assert content(root) == state


def test_annotate__before_any_round(tmp_path: Path) -> None:
    own = tmp_path / "filled.csv"
    own.write_text("rank,id,label\n")
    ended = annotate(tmp_path / "run", "--sheet", own, "--by", "someone")
    assert ended.code == 2
    assert "no round" in ended.err
    for options in (("--acquisition", "bagde"), ("--budget", "0"), ("--sheet", own)):
        assert annotate(tmp_path / "run", *options).code == 2
    assert not (tmp_path / "run").exists()


def test_annotate__on_s3(asked: Path, learned: Path, tmp_path: Path) -> None:
    """The teacher of these answers is there already: it depends on what was said, not on when."""
    spare = ("search", "select", "mine", "distill", "student", "control_a", "control_b", "tuned")
    drop = (*spare, "evaluate", "drivers", "work", "annotate", "annotated")
    local = flow.copy(learned, tmp_path / "run", drop)
    shutil.copy(asked / "teach" / CURRENT, local / "teach" / CURRENT)
    with s3_bucket() as runs:
        root = runs / "tiny"
        s3.filesystem().put(str(local), root.uri.removeprefix("s3://"), recursive=True)
        ask(root, "--out", tmp_path / "desk")
        sheet = (tmp_path / "desk" / "round-001.csv").read_bytes()
        assert sheet == (round_of(asked) / "sheet.csv").read_bytes()
        own = tmp_path / "filled.csv"
        own.write_bytes(filled(sheet, truth_of(root)))
        done = annotate(root, "--sheet", own, "--by", "someone")
        assert done.code == 0, done.err
        points = (root / "annotate" / "curve.json").read_json()["points"]
        assert [p["labels"] for p in points] == [0, BUDGET - 2]
        assert Run(root).artifact("teach") == replace(
            Run(location(learned)).artifact("teach"), dir=Run(root).artifact("teach").dir
        )
