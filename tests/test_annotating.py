"""Proves which round a sheet answers, what a second import may say, and what is never overwritten.

The rounds of a whole run are in tests/flow/test_annotate.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import flow
from helpers.command import omnifer

from pipeline import annotating
from pipeline.errors import ConfigError, SourceError
from pipeline.ledger import Ledger
from pipeline.pool import pool_plan
from pipeline.querying import AskConfig
from pipeline.rounds import HOME, Round, rounds
from pipeline.sheets import Filled, write_sheet
from pipeline.storage import location
from tests.test_rounds import answers, queries


def test_round_of__most_ids_then_waiting_then_newest(tmp_path: Path) -> None:
    home = location(tmp_path)
    with pytest.raises(SourceError, match="no round was asked yet"):
        annotating._round_of([], {"a"}, home)
    for number, ids in enumerate((("a", "b"), ("b", "c"), ("c", "d"), ("e",)), 1):
        Round(home, number).ask(queries(*ids))
    every = rounds(home)
    every[0].answer(answers({"a": "fear"}))
    for ids, number in (({"a", "b"}, 1), ({"b"}, 2), ({"c"}, 3), ({"d", "x"}, 3), ({"x"}, 4)):
        assert annotating._round_of(every, ids, home).number == number, ids


def test_unused__options_for_a_new_round_are_named(tmp_path: Path) -> None:
    one = Round(location(tmp_path), 1)
    one.ask(queries("a", "b"))
    (one.at / "sheet.csv").create(write_sheet(["a", "b"], None))
    said = one.queries()["acquisition"][0].as_py()
    same = AskConfig(budget=2, acquisition=said)
    assert annotating._unused(one, same, False) == []
    assert annotating._unused(one, AskConfig(), False) == []
    other = AskConfig(budget=3, acquisition="random", candidates=5)
    wanted = ["--budget", "--acquisition", "--suggest"]
    assert annotating._unused(one, other, True) == wanted


def filled(labels: dict[str, str], *skipped: str) -> Filled:
    return Filled(labels, frozenset(skipped), empty=0)


def test_require_same__identical_or_refused(tmp_path: Path) -> None:
    one = Round(location(tmp_path), 1)
    before = answers({"a": "fear", "b": None, "gone": "anger"}, gone=("gone",))
    annotating._require_same(one, before, filled({"a": "fear", "gone": "anger"}, "b"))
    for other in (
        filled({"a": "anger", "gone": "anger"}, "b"),
        filled({"a": "fear", "gone": "anger"}),
        filled({"a": "fear", "gone": "anger", "b": "fear"}),
        filled({"a": "fear", "gone": "anger", "later": "fear"}, "b"),
        filled({"a": "fear", "gone": "anger"}, "b", "later"),
    ):
        with pytest.raises(ConfigError, match="round-001 was answered before, and 1 answers"):
            annotating._require_same(one, before, other)


def test_answers__faces_that_the_pool_lost_are_without_bytes(tiny_run: Path) -> None:
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    plan = pool_plan(job)
    slice = next(iter(plan))
    surveyed = Ledger(job.run.artifact("survey").dir).read(slice.key)
    known, skipped = surveyed["id"][3].as_py(), surveyed["id"][4].as_py()
    found = annotating._answers(job, filled({known: "fear", "pool/gone": "anger"}, skipped), "me")
    rows = {row["id"]: row for row in found.to_pylist()}
    assert {face: row["label"] for face, row in rows.items()} == {
        known: "fear",
        "pool/gone": "anger",
        skipped: None,
    }
    assert [face for face, row in rows.items() if row["image"] is not None] == [known]
    assert [face for face, row in rows.items() if row["source"] == "pool"] == [known]
    assert {row["by"] for row in rows.values()} == {"me"}


def test_ask__a_waiting_round_is_shown_and_copies_stay(tmp_path: Path) -> None:
    one = Round(location(tmp_path) / "run" / HOME, 1)
    one.ask(queries("a"))
    for name in annotating.FILES:
        (one.at / name).write_text(f"the {name}")
    desk = tmp_path / "desk"
    asked = ("annotate", flow.DEMO, "--run", tmp_path / "run", "--out", desk)
    assert "1 faces wait" in omnifer(*asked).out
    assert (desk / "round-001.html").read_text() == "the sheet.html"
    (desk / "round-001.csv").write_text("half filled in")
    ended = omnifer(*asked)
    assert ended.code == 0
    assert (desk / "round-001.csv").read_text() == "half filled in"
    assert "round-001.csv: there already" in ended.out
    assert "round-001.html: there already" not in ended.out
    assert [at.name for at in (tmp_path / "run").iterdir()] == [HOME]
