"""Proves that cells are finished once, go stale with their settings, and that gates can fail."""

import argparse
import json
import time

import numpy as np
import pytest

from pipeline.active import pack, unpack
from tests.bench import ferplus10, gains, markdown, selection
from tests.bench.harness import (
    Bench,
    Cell,
    Context,
    Gate,
    OutOfTime,
    call,
    judge,
    keep,
    load,
    main,
    python,
    state_of,
)

CELL = Cell("a-s0", "a", 0, {"steps": 3}, "run")


def _context(seconds=60.0):
    options = argparse.Namespace(quick=False, jobs=1)
    return Context(options, None, time.monotonic() + seconds, 1)


def test_state_of__done_until_settings_change(tmp_path):
    assert state_of(CELL, load(tmp_path, "a-s0")) == "missing"
    keep(tmp_path, CELL, {"x": 1.0}, seconds=1)
    assert state_of(CELL, load(tmp_path, "a-s0")) == "done"
    changed = Cell("a-s0", "a", 0, {"steps": 4}, "run")
    assert state_of(changed, load(tmp_path, "a-s0")) == "stale"


def test_keep__adds_up_readings_and_names_no_host(tmp_path):
    keep(tmp_path, CELL, {"readings": 1, "n": 7}, seconds=1)
    keep(tmp_path, CELL, {"readings": 1, "n": 7}, seconds=1)
    record = load(tmp_path, "a-s0")
    assert (record["readings"], record["n"]) == (2, 7)
    assert record["metrics"] == {}
    assert "cores" in record["host"]
    assert "/" not in record["host"]


def test_keep__refuses_a_figure_that_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        keep(tmp_path, CELL, {"x": float("nan")}, seconds=1)
    assert load(tmp_path, "a-s0") is None


def test_judge__full_gates_are_not_for_quick(capsys):
    gates = [Gate("fine", "always", lambda r: []), Gate("bad", "full", lambda r: ["too low"])]
    assert not judge(gates, {}, quick=True)
    assert judge(gates, {}, quick=False)
    assert "too low" in capsys.readouterr().out
    assert not judge([Gate("open", "full", lambda r: None)], {}, quick=False)


def test_main__quick_runs_each_cell_and_fails_with_its_gate():
    calls = []

    def measure(cell, context):
        calls.append(cell.name)
        return {"value": cell.seed}

    def bench(judge):
        cells = [Cell(f"s{i}", "m", i, {"i": i}, "same") for i in range(2)]
        gate = Gate("gate", "always", judge)
        return Bench("toy", lambda o: cells, measure, (gate,), lambda o: "toy")

    assert main(bench(lambda records: []), ["--quick"]) == 0
    assert calls == ["s0", "s1"]
    assert main(bench(lambda records: ["bad"]), ["--quick"]) == 1


def test_main__quick_fails_when_a_cell_fails():
    def measure(cell, context):
        raise RuntimeError("no data")

    bench = Bench("toy", lambda o: [CELL], measure, (), lambda o: "toy")
    assert main(bench, ["--quick"]) == 1


def test_call__interrupts_at_the_deadline_and_reports_failures(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(OutOfTime):
        call(python("-c", "import time; time.sleep(60)"), _context(0.3), log, {})
    with pytest.raises(RuntimeError, match="exit code 3"):
        call(python("-c", "import sys; sys.exit(3)"), _context(), log, {})


def test_ferplus10_cells__identities_hold_and_tell_pools_seeds_and_sets_apart():
    def grid(**given):
        defaults = {"quick": False, "on": "public", "sets": [], "name": None}
        return ferplus10.cells(argparse.Namespace(**defaults | given))

    first, again = grid(), grid()
    assert [c.identity for c in first] == [c.identity for c in again]
    assert len({json.dumps(c.identity, sort_keys=True) for c in first}) == len(first)
    assert "$OMNIFER_DATA" in json.dumps(first[0].identity)
    by_name = {c.name: c for c in first}
    both, rest = by_name["both-s0"].trainings, by_name["rest-s0"].trainings
    shared = {name.split()[0] for name in both.keys() & rest.keys()}
    assert shared == {"teach", "control_a"}
    given = {"on": "development", "name": "t", "pools": "both", "seeds": "0"}
    (attempt,) = grid(**given, sets=["student.mined_weight=1"])
    (base,) = grid(**given)
    assert {n.split()[0] for n in attempt.trainings.keys() - base.trainings.keys()} == {"student"}
    assert "labeled.development.role=test" in attempt.sets


def _record(seed, student, control_b, f1=(0.5, 0.4)):
    """A record of 1,000 faces, the first so many of which each model gets right."""
    right = {"teacher": 600, "control_a": 650, "control_b": control_b, "student": student}
    models = {}
    for name, count in right.items():
        said = dict.fromkeys(gains.HEADLINE, count / 1000)
        said |= {"macro_f1": f1[name != "student"], "macro_f1_large": f1[name != "student"]}
        packed = pack(np.arange(1000) < count)
        models[name] = {**said, "correct": packed, "passes": 300}
    found = {"models": models, "faces": "same", "made": ["teach"], "teacher": "g001"}
    return {
        "seed": seed,
        "method": "both",
        "n": 1000,
        "metrics": {**found, "student_steps": 10, "student_batch": 30},
    }


def _seeds(*pairs, **more):
    return {f"both-s{i}": _record(i, *pair, **more) for i, pair in enumerate(pairs)}


def test_judge_gain__passes_only_where_every_condition_holds():
    good = _seeds((720, 700), (725, 700), (730, 700))
    assert gains.judge_gain(good) == []
    assert gains.judge_gain({"both-s0": good["both-s0"]}) is None
    small = gains.judge_gain(_seeds((705, 700), (705, 700), (706, 700)))
    assert any("not 1.0" in fault for fault in small)
    mixed = gains.judge_gain(_seeds((760, 700), (760, 700), (690, 700)))
    assert any("sign" in fault for fault in mixed)
    unfair = gains.judge_gain(_seeds((720, 700), (725, 700), (730, 700), f1=(0.3, 0.4)))
    assert sum("lower than" in fault for fault in unfair) == 2


def test_judge_compute__both_controls_by_definition():
    record = _record(0, 700, 700)
    assert gains.judge_compute({"a": record}) == []
    record["metrics"]["models"]["control_a"]["passes"] = 299
    record["metrics"]["models"]["control_b"]["passes"] = 304
    assert len(gains.judge_compute({"a": record})) == 2


def test_judge_sharing__a_teacher_trained_twice_is_a_fault():
    first, second = _record(0, 700, 700), _record(0, 700, 700)
    assert len(gains.judge_sharing({"a": first, "b": second})) == 1
    second["metrics"]["made"] = ["student"]
    assert gains.judge_sharing({"a": first, "b": second}) == []
    second["metrics"]["made_again"] = ["teach/g002/done.json"]
    assert len(gains.judge_sharing({"a": first, "b": second})) == 1


def test_unpack__inverts_packing():
    right = np.random.default_rng(0).random(1003) < 0.7
    assert (unpack(pack(right), 1003) == right).all()


def test_spread__marks_one_seed():
    assert markdown.spread([0.5]) == "50.00 (n=1)"
    assert markdown.spread([0.5, 0.6, 0.7]) == "60.00 +- 10.00 (50.00 to 70.00)"


def _selection(**changed):
    reasons = {"selected": 5, "duplicate": 2, "group_cap": 2, "class_cap": 1}
    metrics = {
        "rows": 10,
        "seconds": [9.0, 12.0, 8.0],
        "largest_mb": [700, 800, 750],
        "reasons": reasons,
        "selected": [5, 5, 5],
        "threads_agree": True,
        "storing": {"rows": 10},
    }
    return {"select": {"metrics": metrics | changed}}


def test_judge_selection__gates_can_fail():
    assert selection.judge_same({}) is None
    assert selection.judge_fast({}) is None
    assert selection.judge_same(_selection()) == []
    assert selection.judge_fast(_selection()) == []
    assert len(selection.judge_same(_selection(rows=11))) == 2
    assert len(selection.judge_same(_selection(selected=[5, 5, 4], threads_agree=False))) == 2
    assert len(selection.judge_fast(_selection(seconds=[11, 12, 1], largest_mb=[2000]))) == 2
    assert (
        "group_cap" in selection.judge_fast(_selection(reasons={"selected": 5, "duplicate": 5}))[0]
    )


def test_judge_near__gates_can_fail():
    assert selection.judge_near({}) is None
    good = {"recall": 0.99, "wrong": 0, "orders_agree": True}
    assert selection.judge_near({"near": {"metrics": good}}) == []
    bad = {"recall": 0.9, "wrong": 1, "orders_agree": False}
    assert len(selection.judge_near({"near": {"metrics": bad}})) == 3
