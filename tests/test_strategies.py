"""Proves what is told of a comparison: table, picture, curve.json, and growing lists."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_trials import opened, run_all, stamps

from pipeline.active import unpack
from pipeline.errors import IdentityError
from pipeline.report.figures import Curve, learning_curves, standalone
from pipeline.strategies import CURVE_FILE, PICTURE, active


def test_active__tells_of_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = opened(tmp_path / "run", "active.seeds=[0, 1]")
    made = active(job, run_all)
    told = (made.dir / CURVE_FILE).read_json()
    assert set(told["points"]) == {"scratch"}
    assert len(told["trials"]) == 4
    first, last = told["points"]["scratch"]["badge"][0], told["points"]["scratch"]["badge"][2]
    count = told["protocol"]["n"]
    assert count == sum(told["protocol"]["classes"].values())
    lasts = {
        name: [told["trials"][f"{name}-scratch-s{seed}"][2]["correct"] for seed in (0, 1)]
        for name in ("random", "badge")
    }
    right = {name: np.mean([unpack(t, count) for t in texts]) for name, texts in lasts.items()}
    assert np.mean(last["accuracy"]) == pytest.approx(right["badge"])
    assert last["gap"]["value"] == pytest.approx(right["badge"] - right["random"])
    assert first["gap"] == {"value": 0.0, "low": 0.0, "high": 0.0}  # one model for both
    assert told["points"]["scratch"]["random"][2]["gap"] is None
    assert "nothing is chosen" in told["protocol"]["mode"]
    out = capsys.readouterr().out
    assert "last minus random" in out
    assert f"{100 * np.mean(last['accuracy']):.2f}" in out
    picture = ET.fromstring((made.dir / PICTURE).read_bytes())
    tag = "{http://www.w3.org/2000/svg}"
    assert len(picture.findall(f"{tag}polyline")) == 2
    assert {"random", "badge"} <= {text.text for text in picture.findall(f"{tag}text")}


def test_active__lists_may_grow_and_settings_may_not(tmp_path: Path) -> None:
    active(opened(tmp_path / "run"), run_all)
    before = stamps(tmp_path / "run")
    grown = active(opened(tmp_path / "run", "active.strategies=[random, badge, bald]"), run_all)
    after = stamps(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if "bald-" in name]) == 3
    assert grown.facts["trials"] == 3
    with pytest.raises(IdentityError, match=r"active.rounds: 3 -> 2"):
        active(opened(tmp_path / "run", "active.rounds=2"), run_all)


def test_picture__has_a_line_and_a_name_for_every_strategy() -> None:
    found = [Curve(name, ((10, low), (20, 0.5))) for name, low in (("<a>", 0.4), ("b", 0.3))]
    picture = ET.fromstring(standalone(learning_curves(found)))
    tag = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points", "").split() for line in picture.findall(f"{tag}polyline")]
    first, last = ([[float(v) for v in line[i].split(",")] for line in lines] for i in (0, 1))
    assert [x for x, _ in first] == [52, 52]
    assert first[0][1] < first[1][1]  # the higher accuracy stands higher
    assert last[0] == last[1]
    names = {text.text: float(text.get("y", "0")) for text in picture.findall(f"{tag}text")}
    assert abs(names["<a>"] - names["b"]) >= 12  # no name over another
    assert ET.fromstring(standalone(learning_curves([]))) is not None
