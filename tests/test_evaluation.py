"""Proves the gain is over the better control, cards are complete, and purity is not luck."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import RunError
from pipeline.evaluation import EvaluateConfig, evaluate, purity, right_so_far, votes_of
from pipeline.schema import EMOTIONS, SELECTION, TRUTH

NAMES = EMOTIONS[:4]
N = 1500
FAST = EvaluateConfig(draws=300)


def _labels() -> np.ndarray:
    return np.random.default_rng(9).choice(4, N, p=[0.5, 0.3, 0.15, 0.05])


def _probs(share: float, seed: int) -> np.ndarray:
    """A model that is right on about `share` of the faces."""
    rng = np.random.default_rng(seed)
    labels = _labels()
    answer = np.where(rng.random(N) < share, labels, (labels + 1) % 4)
    return np.full((N, 4), 0.1) + 0.6 * np.eye(4)[answer]


def _seeds(share: float, first: int, count: int = 3) -> np.ndarray:
    return np.stack([_probs(share, first + i) for i in range(count)])


def _card(*models: str) -> dict:
    return {
        "split": "test",
        "seeds": [0, 1, 2],
        "sampler": "n^-0.5",
        "crop": "none",
        "passes": dict.fromkeys(models, 1000.0),
        "pretraining_data": None,
    }


def test_evaluate__gain_is_over_the_better_control() -> None:
    probs = {
        "student": _seeds(0.80, 0),
        "control_a": _seeds(0.65, 10),
        "control_b": _seeds(0.72, 20),
        "teacher": _probs(0.78, 30),
    }
    found = evaluate(probs, _labels(), NAMES, _card(*probs), FAST)
    gain = found["gain"]
    models = found["models"]
    assert gain["over"] == "control_b"
    expected = models["student"]["accuracy"]["value"] - models["control_b"]["accuracy"]["value"]
    assert gain["accuracy"]["value"] == pytest.approx(expected)
    assert np.mean(gain["per_seed"]) == pytest.approx(expected)
    assert gain["real"]
    assert models["teacher"]["seeds"] == 1
    assert models["student"]["passes"] == 1000
    assert found["protocol"]["n"] == N
    assert sum(found["protocol"]["classes"].values()) == N
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("student", "control", "why"),
    [
        (_seeds(0.80, 0, 2), _seeds(0.70, 10, 2), "two seeds"),
        (_seeds(0.70, 0), _seeds(0.70, 0), "no gain"),
        (_seeds(0.60, 0), _seeds(0.70, 10), "a loss"),
        (_seeds(0.80, 0), _seeds(0.70, 10, 2), "seeds cannot be paired"),
        (
            np.stack([_probs(0.9, 0), _probs(0.9, 1), _probs(0.68, 2)]),
            np.stack([_probs(0.7, 3), _probs(0.7, 4), _probs(0.72, 5)]),
            "one seed of the other sign",
        ),
    ],
)
def test_evaluate__what_is_no_real_gain(student: np.ndarray, control: np.ndarray, why: str) -> None:
    probs = {"student": student, "control_a": control}
    gain = evaluate(probs, _labels(), NAMES, _card(*probs), FAST)["gain"]
    assert not gain["real"], why


def test_evaluate__without_control_there_is_no_gain() -> None:
    found = evaluate({"student": _probs(0.8, 0)}, _labels(), NAMES, _card("student"), FAST)
    assert found["gain"] is None


def test_evaluate__per_class_counts_faces_once_whatever_the_seeds() -> None:
    found = evaluate({"student": _seeds(0.8, 0)}, _labels(), NAMES, _card("student"), FAST)
    student = found["models"]["student"]
    assert [row["n"] for row in student["per_class"]] == np.bincount(_labels()).tolist()
    assert np.sum(student["confusion"]) == 3 * N
    assert student["accuracy_per_seed"] == pytest.approx(
        (_seeds(0.8, 0).argmax(2) == _labels()).mean(1)
    )
    assert not student["label_order"]["suspicious"]


def test_evaluate__class_without_faces_is_null_and_not_averaged() -> None:
    labels = np.zeros(N, dtype=np.int64)
    found = evaluate(
        {"student": np.tile([0.7, 0.1, 0.1, 0.1], (N, 1))}, labels, NAMES, _card("student"), FAST
    )
    student = found["models"]["student"]
    assert student["per_class"][1]["recall"] is None
    assert student["mean_class_accuracy"]["value"] == 1
    json.dumps(found, allow_nan=False)


def test_evaluate__refuses_incomplete_cards_logits_and_wrong_shapes() -> None:
    good, labels = _probs(0.8, 0), _labels()
    card = _card("student")
    lacking = {key: value for key, value in card.items() if key != "crop"}
    with pytest.raises(RunError, match=r"card lacks crop, passes\.teacher"):
        evaluate({"student": good, "teacher": good}, labels, NAMES, lacking, FAST)
    with pytest.raises(RunError, match="no probabilities"):
        evaluate({"student": good * 10}, labels, NAMES, card, FAST)
    with pytest.raises(RunError, match="expected"):
        evaluate({"student": good[:-1]}, labels, NAMES, card, FAST)


def _selection(labels: list[str], selected: list[bool]) -> pa.Table:
    rows = [
        {
            "id": f"f{i}",
            "selected": kept,
            "reason": "selected" if kept else "below_confidence",
            "label": label,
            "weight": 1.0 if kept else None,
        }
        for i, (label, kept) in enumerate(zip(labels, selected, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SELECTION)


def _truth(labels: list[str | None]) -> pa.Table:
    rows = [{"id": f"f{i}", "label": label} for i, label in enumerate(labels)]
    return pa.Table.from_pylist(rows, schema=TRUTH)


def test_purity__counts_kept_faces_with_known_truth() -> None:
    table = _selection(
        ["neutral", "neutral", "sadness", "fear", "fear"], [True, True, True, False, True]
    )
    truth = _truth(["neutral", "fear", "sadness", "fear", None])
    found = purity([table.slice(0, 2), table.slice(2)], truth)
    assert found["purity"] == pytest.approx(2 / 3)
    assert (found["pool"], found["selected"], found["known"]) == (5, 4, 3)
    assert found["utilization"] == pytest.approx(4 / 5)
    assert found["per_class"] == {
        "neutral": {"n": 2, "purity": 0.5},
        "sadness": {"n": 1, "purity": 1.0},
    }
    assert purity([table], _truth([None] * 5))["purity"] is None


def test_purity__falls_to_chance_when_the_truth_is_permuted() -> None:
    rng = np.random.default_rng(0)
    names = np.array(NAMES)
    codes = rng.choice(4, 4000, p=[0.5, 0.3, 0.15, 0.05])
    guess = np.where(rng.random(4000) < 0.9, codes, rng.integers(0, 4, 4000))
    table = _selection(names[guess].tolist(), [True] * 4000)
    honest = purity([table], _truth(names[codes].tolist()))["purity"]
    permuted = purity([table], _truth(names[rng.permutation(codes)].tolist()))["purity"]
    share = [np.bincount(c, minlength=4) / 4000 for c in (codes, guess)]
    assert honest > 0.9
    assert permuted == pytest.approx(float(share[0] @ share[1]), abs=0.03)


def test_evaluate__votes_judge_every_model_and_the_gain() -> None:
    labels = _labels()
    votes = 0.7 * np.eye(4)[labels] + 0.3 * np.eye(4)[(labels + 1) % 4]
    near = np.stack([0.5 * votes + 0.125, 0.6 * votes + 0.1])
    probs = {"student": near, "control_a": _seeds(0.7, 0, 2)}
    found = evaluate(probs, labels, NAMES, _card(*probs), FAST, votes)
    student, control = (found["models"][name]["votes"] for name in ("student", "control_a"))
    kl = [(votes * np.log(np.where(votes > 0, votes / p, 1))).sum(1).mean() for p in near]
    assert student["kl"]["value"] == pytest.approx(np.mean(kl))
    assert student["accuracy_disputed"]["value"] == 1  # all faces: 7 of 10 votes
    assert student["accuracy_agreed"]["value"] is None
    for name in ("kl", "brier"):
        gap = found["gain"]["votes"][name]
        assert gap["value"] == pytest.approx(student[name]["value"] - control[name]["value"])
        assert gap["high"] < 0
    json.dumps(found, allow_nan=False)
    without = evaluate(probs, labels, NAMES, _card(*probs), FAST)
    assert "votes" not in without["gain"]
    assert "votes" not in without["models"]["student"]


def test_votes_of__all_faces_or_none() -> None:
    shares = [[0.5, 0.5], [1.0, 0.0]]
    kind = pa.list_(pa.float32())
    full = pa.table({"soft": pa.array(shares, kind)})
    assert votes_of(full).tolist() == shares
    assert votes_of(pa.table({"soft": pa.array([*shares, None], kind)})) is None


def test_right_so_far__each_label_as_much_as_it_counted() -> None:
    truth = pa.table({"id": ["a", "b", "c"], "label": ["fear", "fear", None]}, schema=TRUTH)
    said = {"id": ["b", "c", "x", "a"], "label": ["fear", "fear", "fear", "anger"]}
    table = pa.table({**said, "weight": [0.3, 1.0, 1.0, 0.1]})
    assert right_so_far(table, truth) == (pytest.approx(0.3 / 0.4), 2)
    assert right_so_far(table.slice(1, 2), truth) == (None, 0)  # of these nothing is known
    silent = pa.table({**said, "weight": [0.0] * 4})
    assert right_so_far(silent, truth) == (None, 2)
    assert right_so_far(table, TRUTH.empty_table()) == (None, 0)
