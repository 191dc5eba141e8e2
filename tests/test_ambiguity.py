"""The vote rules agree with a slow face-by-face version and with the published set sizes."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.ambiguity import (
    RULES,
    conformal_cut,
    conformal_sets,
    cumulative_sets,
    drop_single_votes,
    majority,
    multi_target,
    near_top,
    probability,
    voted,
    within,
)
from pipeline.schema import EMOTIONS


def votes(**counts):
    row = [counts.get(name, 0) for name in (*EMOTIONS, "unknown", "NF")]
    return np.array([row])


def label(rule, row):
    code = int(rule(row)[0][0])
    return None if code < 0 else EMOTIONS[code]


def slow_probability(row):
    """Walks down the levels of equal votes, one face at a time."""
    row = [0 if v <= 1 else v for v in row]
    total, taken = sum(row), []
    for level in sorted({v for v in row if v > 0}, reverse=True):
        members = [k for k, v in enumerate(row) if v == level]
        taken += [k for k in members if k < 8]
        covered = sum(row[k] for k in taken)
        if any(k >= 8 for k in members) or covered >= 0.75 * total or len(taken) >= 3:
            break
    covered = sum(row[k] for k in taken)
    if not taken or len(taken) > 3 or covered <= 0.5 * total or max(row[8:]) > max(row[:8]):
        return -1, np.zeros(8)
    return int(np.argmax(row[:8])), np.array(
        [row[k] / covered if k in taken else 0 for k in range(8)]
    )


def slow_multi_target(row):
    """The released rule (src/ferplus.py of microsoft/FERPlus), one face at a time."""
    row = [0 if v <= 1 else v for v in row]
    entered = [v if v >= 0.3 * sum(row) else 0 for v in row]
    if sum(entered) <= 0.5 * sum(row) or int(np.argmax(entered)) >= 8:
        return -1, np.zeros(8)
    return int(np.argmax(entered)), np.array(entered[:8]) / sum(entered[:8])


def test_drop_single_votes__leaves_two_and_more():
    assert drop_single_votes(np.array([[0, 1, 2, 10]])).tolist() == [[0, 0, 2, 10]]


def test_majority__single_votes_do_not_count_towards_the_half():
    assert label(majority, votes(fear=4, anger=1, disgust=1, sadness=1, surprise=3)) == "fear"


def test_majority__exactly_half_is_no_majority():
    assert label(majority, votes(fear=5, anger=5)) is None


def test_majority__unknown_in_the_lead_drops():
    assert label(majority, votes(fear=2, unknown=8)) is None
    assert label(majority, votes(NF=10)) is None


def test_majority__unknown_counts_in_the_total():
    assert label(majority, votes(fear=5, unknown=5)) is None


def test_majority__soft_label_is_the_share_of_the_emotions():
    _, soft = majority(votes(fear=6, anger=2, sadness=1, unknown=1))
    assert soft[0, EMOTIONS.index("fear")] == pytest.approx(0.75)
    assert soft[0, EMOTIONS.index("anger")] == pytest.approx(0.25)
    assert soft.sum() == pytest.approx(1.0)


def test_majority__all_single_votes_drop():
    assert label(majority, np.ones((1, 10))) is None


def test_probability__takes_classes_until_three_quarters():
    _, soft = probability(votes(happiness=5, neutral=3, sadness=2))
    assert np.flatnonzero(soft[0]).tolist() == [0, 1]
    assert soft[0, 1] == pytest.approx(5 / 8)


def test_probability__four_tied_classes_drop():
    assert label(probability, votes(fear=2, anger=2, sadness=2, surprise=2)) is None


def test_probability__stops_at_unknown():
    assert label(probability, votes(fear=4, unknown=3, anger=2)) is None
    assert label(probability, votes(fear=6, unknown=2, anger=2)) == "fear"


@pytest.mark.parametrize(
    ("rule", "slow"), [(probability, slow_probability), (multi_target, slow_multi_target)]
)
def test_rules__agree_with_the_slow_version(rule, slow):
    rng = np.random.default_rng(0)
    table = rng.multinomial(10, rng.dirichlet(np.full(10, 0.4), size=1)[0], size=2000)
    table = np.concatenate([table, rng.integers(0, 5, size=(2000, 10))])
    labels, soft = rule(table)
    for row, got_label, got_soft in zip(table, labels, soft, strict=True):
        want_label, want_soft = slow(row.tolist())
        assert got_label == want_label
        np.testing.assert_allclose(got_soft, want_soft, atol=1e-6)


def test_multi_target__keeps_every_emotion_of_three_tenths():
    _, soft = multi_target(votes(fear=4, surprise=4, anger=2))
    assert {EMOTIONS[k] for k in np.flatnonzero(soft[0])} == {"fear", "surprise"}


def test_multi_target__unknown_in_the_lead_drops():
    assert label(multi_target, votes(fear=4, unknown=6)) is None
    assert label(multi_target, votes(fear=5, unknown=5)) == "fear"


def test_multi_target__half_of_the_votes_or_less_drops():
    assert label(multi_target, votes(fear=4, surprise=2, anger=2, sadness=2)) is None
    assert label(multi_target, votes(fear=5, surprise=2, anger=3)) == "fear"
    assert label(multi_target, votes(fear=4, unknown=4, anger=2)) == "fear"  # unknown counts


def test_voted__keeps_what_majority_drops():
    tie = votes(fear=5, anger=4, unknown=1)
    assert label(majority, votes(fear=5, anger=5)) is None
    assert label(voted, tie) == "fear"
    _, soft = voted(tie)
    assert soft[0, EMOTIONS.index("anger")] == pytest.approx(4 / 9)


def test_voted__single_votes_count_where_nothing_else_does():
    _, soft = voted(votes(fear=1, anger=1, unknown=1))
    assert np.flatnonzero(soft[0]).tolist() == [EMOTIONS.index("fear"), EMOTIONS.index("anger")]
    _, soft = voted(votes(fear=2, anger=1, sadness=1))
    assert np.flatnonzero(soft[0]).tolist() == [EMOTIONS.index("fear")]


def test_voted__unknown_in_the_lead_drops():
    assert label(voted, votes(fear=1, anger=1, unknown=2)) is None
    assert label(voted, votes(fear=4, unknown=6)) is None
    assert label(voted, votes(fear=5, unknown=5)) == "fear"
    assert label(voted, votes(NF=10)) is None
    assert label(voted, votes()) is None


@pytest.mark.parametrize("rule", RULES)
def test_rules__no_rows(rule):
    labels, soft = RULES[rule](np.zeros((0, 10)))
    assert labels.shape == (0,)
    assert soft.shape == (0, 8)


@pytest.mark.real
def test_majority__published_set_sizes():
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    table = pq.read_table(
        Path(os.environ["OMNIFER_DATA"]) / "fer2013" / "fer2013.parquet",
        columns=["usage", *EMOTIONS, "unknown", "NF"],
    )
    counts = np.stack([table[name].to_numpy() for name in (*EMOTIONS, "unknown", "NF")], axis=1)
    labels, _ = majority(counts)
    usage = np.array(table["usage"].to_pylist())
    assert counts.sum(axis=1)[10435] == 9
    assert int((labels[usage == "Training"] >= 0).sum()) == 25_060
    assert np.bincount(labels[(usage == "PublicTest") & (labels >= 0)]).tolist() == [
        1182, 865, 351, 415, 62, 24, 287, 13,
    ]  # fmt: skip
    assert int((voted(counts)[0] >= 0).sum()) == sum(
        max(row[:8]) >= max(row[8:]) and max(row[:8]) > 0 for row in counts.tolist()
    )


# -- candidate sets -------------------------------------------------------------------------------


def drawn(faces, seed, sharpness=1.0):
    """Probabilities of a model that is not calibrated, and labels."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(6, 0.5), faces)
    labels = (truth.cumsum(1) < rng.random((faces, 1))).sum(1).clip(max=5)
    probs = truth**sharpness
    return probs / probs.sum(1, keepdims=True), labels


def test_within__by_hand():
    soft = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    inside = within(soft, np.array([[True, False, True], [False, True, True]]))
    np.testing.assert_allclose(inside, [[5 / 7, 0, 2 / 7], [0, 0.5, 0.5]], rtol=1e-6)


def test_near_top__has_the_label_and_what_is_near_the_top():
    probs = np.array([[0.6, 0.3, 0.1], [0.5, 0.45, 0.05]])
    sets = near_top(probs, np.array([2, 0]), 0.5)
    assert sets.tolist() == [[True, True, True], [True, True, False]]
    alone = near_top(probs, np.array([0, 0]), 1.0)
    assert alone.tolist() == [[True, False, False], [True, False, False]]


def test_cumulative_sets__agree_with_the_slow_version():
    probs, _ = drawn(300, 0)
    for coverage in (0.3, 0.9, 1.0):
        for row, got in zip(probs, cumulative_sets(probs, coverage), strict=True):
            held, want = 0.0, set()
            for k in sorted(range(6), key=lambda k: -row[k]):
                if held >= coverage:
                    break
                want.add(k)
                held += row[k]
            assert set(np.flatnonzero(got)) == want


def test_cumulative_sets__all_of_the_probability_is_not_every_class():
    probs = np.array([[0.7, 0.3, 0.0, 0.0]], np.float32)
    assert cumulative_sets(probs, 1.0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("rule", ["lac", "aps"])
@pytest.mark.parametrize("coverage", [0.7, 0.9])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_conformal__sets_hold_the_truth_as_often_as_asked(rule, coverage, sharpness):
    cut = conformal_cut(*drawn(4000, 1, sharpness), coverage, rule)
    probs, labels = drawn(4000, 2, sharpness)
    sets = conformal_sets(probs, cut, rule)
    held = sets[np.arange(len(labels)), labels].mean()
    # Two samples of 4,000: a standard deviation of at most sqrt(2 * .21 / 4000) = .0102.
    assert held >= coverage - 0.03
    if rule == "lac" and sharpness <= 1:  # sets of at least one class: more where one is enough
        assert held <= coverage + 0.03
    assert sets.any(1).all()


def test_conformal_cut__is_the_smallest_score_with_enough_faces_below():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    labels = np.zeros(4, np.int64)
    # Scores 1 - p: 0.1, 0.4, 0.7, 0.8; ceil(5 * 0.6) = 3 of them.
    assert conformal_cut(probs, labels, 0.6, "lac") == pytest.approx(0.7)
    # Probability down to the class: 0.9, 0.6, 1, 1.
    assert conformal_cut(probs, labels, 0.4, "aps") == pytest.approx(0.9)


@pytest.mark.parametrize("rule", ["lac", "aps"])
def test_conformal_cut__too_few_faces_leave_nothing_out(rule):
    probs, labels = drawn(8, 0)
    cut = conformal_cut(probs, labels, 0.9, rule)
    assert cut == np.inf
    assert conformal_sets(probs, cut, rule).all()


def test_conformal_sets__the_top_class_is_always_in():
    probs, _ = drawn(50, 3)
    assert np.array_equal(conformal_sets(probs, -1.0, "aps").argmax(1), probs.argmax(1))
