"""The vote rules agree with a slow face-by-face version and with the published set sizes."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.ambiguity import RULES, drop_single_votes, majority, multi_target, probability
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


def test_probability__agrees_with_the_slow_version():
    rng = np.random.default_rng(0)
    table = rng.multinomial(10, rng.dirichlet(np.full(10, 0.4), size=1)[0], size=2000)
    table = np.concatenate([table, rng.integers(0, 5, size=(2000, 10))])
    labels, soft = probability(table)
    for row, got_label, got_soft in zip(table, labels, soft, strict=True):
        want_label, want_soft = slow_probability(row.tolist())
        assert got_label == want_label
        np.testing.assert_allclose(got_soft, want_soft, atol=1e-6)


def test_multi_target__keeps_every_emotion_of_three_tenths():
    _, soft = multi_target(votes(fear=4, surprise=4, anger=2))
    assert {EMOTIONS[k] for k in np.flatnonzero(soft[0])} == {"fear", "surprise"}


def test_multi_target__unknown_in_the_lead_drops():
    assert label(multi_target, votes(fear=4, unknown=6)) is None
    assert label(multi_target, votes(fear=5, unknown=5)) == "fear"


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
