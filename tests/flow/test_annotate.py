"""Proves the rounds of a person: asked, filled in, learned, and judged on the same faces."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow
from helpers.command import Ended, omnifer
from helpers.s3 import s3_bucket

from pipeline import conduct, images, pool, s3
from pipeline.run import Run
from pipeline.schema import EMOTIONS
from pipeline.storage import Location, location, read_table
from pipeline.training.runs import FOLDS_FILE

pytestmark = pytest.mark.usefixtures("local_ray")

SETS = [part for item in (*flow.TINY, flow.UNTRACKED) for part in ("--set", item)]
BUDGET = 24


def annotate(root: Path | Location, *options: object) -> Ended:
    return omnifer("annotate", flow.DEMO, "--run", root, *SETS, *options)


def ask(root: Path | Location, *options: object) -> Ended:
    ended = annotate(root, "--budget", BUDGET, *options)
    assert ended.code == 0, ended.err
    return ended


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


def test_annotate__a_round_from_the_question_to_the_curve(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    before = flow.finished(root)
    asked = ask(root, "--out", tmp_path / "desk")
    assert flow.finished(root) == before, "the run was finished: nothing is made again"

    queries = read_table(location(round_of(root) / "queries.parquet"))
    assert queries["rank"].to_pylist() == list(range(1, BUDGET + 1))
    assert set(queries["acquisition"].to_pylist()) == {"badge"}
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    plan = pool.pool_plan(job)
    scores = pa.concat_tables(t for _, t in pool.ledger(job, "score").tables(plan))
    known = {row["id"]: row for row in scores.select(
        ["id", "pseudo_label", "confidence", "margin"]).to_pylist()}  # fmt: skip
    guard = pa.concat_tables(t for _, t in pool.ledger(job, "twins").tables(plan)).to_pylist()
    closed = {
        row["id"]
        for row in guard
        if row["twin_of"] or row["duplicate_group"] not in (None, row["id"])
    }
    for row in queries.to_pylist():
        assert {key: row[key] for key in known[row["id"]]} == known[row["id"]]
        assert row["id"] not in closed
        assert row["source"] == "pool"
    sheet = (round_of(root) / "sheet.csv").read_bytes()
    assert (tmp_path / "desk" / "round-001.csv").read_bytes() == sheet
    assert b"suggested" not in sheet
    page = (round_of(root) / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<img ") == BUDGET
    assert "recognizable" in page
    assert "round-001" in asked.out

    again = ask(root)
    assert "round-001" in again.out
    assert not round_of(root, 2).exists()
    assert (round_of(root) / "sheet.csv").read_bytes() == sheet

    own = tmp_path / "filled.csv"
    own.write_bytes(filled(sheet, truth_of(location(root))))
    done = annotate(root, "--sheet", own, "--by", "someone")
    assert done.code == 0, done.err
    answers = read_table(location(round_of(root) / "labels.parquet"))
    labeled = [row for row in answers.to_pylist() if row["label"] is not None]
    truth = truth_of(location(root))
    assert len(labeled) == BUDGET - 2
    assert answers.num_rows == BUDGET - 1  # one was skipped, one left empty
    assert all(row["label"] == truth[row["id"]] for row in labeled)
    assert all(images.decode(row["image"]).size for row in labeled)
    assert set(answers["by"].to_pylist()) == {"someone"}

    folds = read_table(Run(location(root)).artifact("teach").dir / FOLDS_FILE)
    taught = dict(zip(folds["id"].to_pylist(), folds["label"].to_pylist(), strict=True))
    assert all(taught[row["id"]] == row["label"] for row in labeled)
    old = read_table(Run(location(tiny_run)).artifact("teach").dir / FOLDS_FILE)
    assert folds.num_rows == old.num_rows + len(labeled)

    curve = json.loads((root / "annotate" / "curve.json").read_text())["points"]
    assert [(p["round"], p["labels"]) for p in curve] == [(0, 0), (1, BUDGET - 2)]
    assert {p["faces"] for p in curve} == {old.num_rows}
    first = np.stack(old["logits"].to_numpy(zero_copy_only=False)).argmax(1)
    right = [
        EMOTIONS[code] == label for code, label in zip(first, old["label"].to_pylist(), strict=True)
    ]
    assert curve[0]["accuracy"] == pytest.approx(np.mean(right))
    same = {row["id"] for row in old.to_pylist()}
    second = [row for row in folds.to_pylist() if row["id"] in same]
    right = [EMOTIONS[int(np.argmax(row["logits"]))] == row["label"] for row in second]
    assert curve[1]["accuracy"] == pytest.approx(np.mean(right))
    assert (root / "annotate" / "curve.svg").read_text().startswith("<svg xmlns=")

    same_again = annotate(root, "--sheet", own)
    assert same_again.code == 0, same_again.err
    own.write_bytes(own.read_bytes().replace(b";skip", b";anger"))
    state = content(root)
    other = annotate(root, "--sheet", own)
    assert other.code == 2
    assert "round-001" in other.err
    assert content(root) == state

    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    conduct.run_all(job, "mine")  # learns from the bigger set, and nobody learns a face twice
    plan = pool.pool_plan(job)
    decided = pa.concat_tables(t for _, t in pool.ledger(job, "select").tables(plan)).to_pylist()
    reasons = {row["id"]: row["reason"] for row in decided}
    assert {reasons[row["id"]] for row in labeled} == {"labeled"}
    assert sum(reason == "labeled" for reason in reasons.values()) == len(labeled)
    mined = pa.concat_tables(t for _, t in pool.ledger(job, "mine").tables(plan))["id"].to_pylist()
    assert mined
    assert not {row["id"] for row in labeled} & set(mined)

    ask(root)
    fresh = set(read_table(location(round_of(root, 2) / "queries.parquet"))["id"].to_pylist())
    assert not fresh & set(answers["id"].to_pylist())
    ask(root, "--new", "--acquisition", "entropy")
    newest = set(read_table(location(round_of(root, 3) / "queries.parquet"))["id"].to_pylist())
    assert not newest & (fresh | set(answers["id"].to_pylist()))


def test_annotate__a_refused_sheet_changes_nothing(tiny_run: Path, tmp_path: Path) -> None:
    root = flow.copy(tiny_run, tmp_path / "run")
    ask(root)
    lines = (round_of(root) / "sheet.csv").read_bytes().decode("utf-8-sig").splitlines()
    lines[1] += "hapiness"
    lines[2] += "anger"
    lines[5] = lines[2]
    lines.append("99,pool/nobody,fear")
    own = tmp_path / "filled.csv"
    own.write_text("\n".join(lines))
    state = content(root)
    ended = annotate(root, "--sheet", own)
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
    ended = annotate(tmp_path / "run", "--sheet", own)
    assert ended.code == 2
    assert "no round" in ended.err
    for options in (("--acquisition", "bagde"), ("--budget", "0")):
        assert annotate(tmp_path / "run", *options).code == 2
    assert not (tmp_path / "run").exists()


def test_annotate__on_s3(tiny_run: Path, tmp_path: Path) -> None:
    drop = ("drivers", "mine", "student", "control_a", "control_b", "distill", "tuned", "evaluate")
    local = flow.copy(tiny_run, tmp_path / "run", drop)
    with s3_bucket() as runs:
        root = runs / "tiny"
        s3.filesystem().put(str(local), root.uri.removeprefix("s3://"), recursive=True)
        ask(root, "--out", tmp_path / "desk")
        sheet = (tmp_path / "desk" / "round-001.csv").read_bytes()
        own = tmp_path / "filled.csv"
        own.write_bytes(filled(sheet, truth_of(root)))
        done = annotate(root, "--sheet", own)
        assert done.code == 0, done.err
        curve = (root / "annotate" / "curve.json").read_json()["points"]
        assert [p["labels"] for p in curve] == [0, BUDGET - 2]
