"""Proves that the gates of the bench active can fail, and what its cells depend on."""

import argparse

import numpy as np
import pytest

from pipeline.active import pack
from tests.bench import active
from tests.bench.harness import digest_of

TEST = 200


def _record(start, seed, right, labels=(10, 15)):
    rounds = [
        {
            "number": number,
            "labels": count,
            "class_counts": {"neutral": count - 3, "fear": 3},
            "accuracy": share,
            "macro_f1": share,
            "recall": {"neutral": share, "fear": share},
            "correct": pack(np.arange(TEST) < round(share * TEST)),
        }
        for number, (count, share) in enumerate(zip(labels, right, strict=True))
    ]
    metrics = {"rounds": rounds, "start": start, "first": 10, "budget": 5, "seconds_asking": 1.0}
    return {"seed": seed, "n": TEST, "metrics": metrics}


def _grid(margin=0.7, pretrained=0.6):
    found = {}
    for seed in active.SEEDS:
        for name in (*active.UNSURE, "random"):
            last = margin if name == "margin" else 0.55
            found[f"{name}-scratch-s{seed}"] = _record("scratch", seed, (0.5, last))
            found[f"{name}-pretrained-s{seed}"] = _record("pretrained", seed, (pretrained, 0.7))
    return found


def test_gates__pass_and_fail_by_what_was_measured():
    assert active.judge_unsure(_grid()) == []
    assert active.judge_start(_grid()) == []
    assert "margin +0.00" in active.judge_unsure(_grid(margin=0.55))[0]
    (fault,) = active.judge_start(_grid(pretrained=0.4))
    assert fault.startswith("by -10.00 points (")


def test_gates__wait_for_all_seeds():
    lacking = {name: r for name, r in _grid().items() if name != "random-scratch-s2"}
    assert active.judge_unsure(lacking) is None
    assert active.judge_start(lacking) is None
    assert active.judge_finite({}) is None


def test_gates__see_wrong_counts_and_several_first_rounds():
    wrong = {"margin-scratch-s0": _record("scratch", 0, (0.5, 0.6), labels=(10, 16))}
    assert active.judge_labels(wrong) == ["margin-scratch-s0 round 1: 16 labels, not 15"]
    pair = {
        "margin-scratch-s0": _record("scratch", 0, (0.5, 0.6)),
        "random-scratch-s0": _record("scratch", 0, (0.4, 0.6)),
    }
    assert active.judge_shared(pair) == ["scratch, seed 0: 2 first rounds"]
    assert active.judge_labels(pair) == []


def test_difference__is_of_the_seeds_that_both_have():
    records = _grid()
    del records["margin-scratch-s1"]
    value = active.difference(records, ("margin", "scratch"), ("random", "scratch"), 1)
    assert value.value == pytest.approx(0.15)
    assert active.difference({}, ("margin", "scratch"), ("random", "scratch"), 1) is None


def test_cells__are_a_grid_and_share_first_rounds():
    cells = active.cells(argparse.Namespace(quick=False))
    assert len(cells) == 13 * 3 * 2
    assert len({digest_of(cell) for cell in cells}) == len(cells)
    trainings = {name for cell in cells for name in cell.trainings}
    assert len(trainings) == len(cells) + 6
    assert len({cell.run for cell in cells}) == 6
