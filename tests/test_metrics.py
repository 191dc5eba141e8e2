"""Proves that metrics are the textbook ones (torchmetrics, closed forms) and intervals honest."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as reference

from pipeline import metrics


def _model(n: int = 600, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), labels


def test_metrics__agree_with_torchmetrics() -> None:
    probs, labels = _model()
    p, y = torch.from_numpy(probs), torch.from_numpy(labels)
    counts = metrics.confusion_matrix(probs.argmax(1), labels, 5)
    assert (counts == reference.multiclass_confusion_matrix(p, y, 5).numpy()).all()
    assert float(metrics.accuracy(counts)) == pytest.approx((p.argmax(1) == y).double().mean())
    macro = reference.multiclass_accuracy(p, y, 5, average="macro")
    assert float(metrics.mean_class_accuracy(counts)) == pytest.approx(float(macro), abs=1e-6)
    f1 = reference.multiclass_f1_score(p, y, 5, average="macro")
    assert float(metrics.macro_f1(counts)) == pytest.approx(float(f1), abs=1e-6)
    ece = reference.multiclass_calibration_error(p, y, 5, n_bins=15)
    assert metrics.calibration_error(probs, labels) == pytest.approx(float(ece), abs=1e-6)


def test_macro_f1__closed_form_with_absent_class_and_subset() -> None:
    counts = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])  # third class has no faces
    first, second = 2 * 3 / (4 + 5), 2 * 4 / (6 + 5)
    assert float(metrics.macro_f1(counts)) == pytest.approx((first + second) / 2)
    assert float(metrics.macro_f1(counts, [1, 2])) == pytest.approx(second)
    assert float(metrics.mean_class_accuracy(counts)) == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert np.isnan(metrics.recalls(counts)[2])
    assert np.isnan(metrics.precisions(counts)[2])


def test_calibration_error__known_gap() -> None:
    probs = np.tile([0.8, 0.2], (10, 1))
    labels = np.array([0] * 5 + [1] * 5)  # says 0.8, is right half of the time
    assert metrics.calibration_error(probs, labels) == pytest.approx(0.3)
    (only,) = metrics.reliability(probs, labels)
    assert only["n"] == 10
    assert only["low"] < 0.8 <= only["high"]
    assert (only["confidence"], only["accuracy"]) == (pytest.approx(0.8), 0.5)


def test_effective_classes__bounds() -> None:
    assert metrics.effective_classes(np.array([5, 5, 5, 5])) == pytest.approx(4)
    assert metrics.effective_classes(np.array([9, 0, 0])) == pytest.approx(1)
    assert metrics.effective_classes(np.zeros(3)) == 0


def test_headline__matches_a_slow_bootstrap_of_the_same_draws() -> None:
    probs, labels = _model(n=120, classes=3)
    stack = np.stack([probs, _model(n=120, classes=3, seed=1)[0]])
    found = metrics.headline(stack, labels, [0, 1], draws=50, seed=3)
    values: dict[str, list[float]] = {name: [] for name in found}
    for weights in np.concatenate(list(metrics._draws(120, 50, 3))):
        faces = np.repeat(np.arange(120), weights.astype(int))
        per_seed = []
        for p in stack[:, faces]:
            counts = metrics.confusion_matrix(p.argmax(1), labels[faces], 3)
            ece = metrics.calibration_error(p, labels[faces])
            per_seed.append((float(metrics.accuracy(counts)), float(metrics.macro_f1(counts)), ece))
        for name, value in zip(("accuracy", "macro_f1", "ece"), np.mean(per_seed, 0), strict=True):
            values[name].append(value)
    for name in ("accuracy", "macro_f1", "ece"):
        low, high = np.percentile(values[name], (2.5, 97.5))
        assert (found[name].low, found[name].high) == (pytest.approx(low), pytest.approx(high))
    assert found["accuracy"].value == pytest.approx((stack.argmax(2) == labels).mean())


def test_headline__chunking_and_seed_decide_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, labels = _model(n=200)
    once = metrics.headline(probs[None], labels, [0, 1], draws=200)
    assert once == metrics.headline(probs[None], labels, [0, 1], draws=200)
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 200 * 7)
    chunked = metrics.headline(probs[None], labels, [0, 1], draws=200)
    assert chunked["ece"].low == pytest.approx(once["ece"].low)
    assert once != metrics.headline(probs[None], labels, [0, 1], draws=200, seed=1)


def test_headline__accuracy_interval_is_the_binomial_one() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    probs = np.eye(2)[(np.arange(1000) >= 700).astype(int)]  # 70 % right
    found = metrics.headline(probs[None], labels, [0], draws=2000)["accuracy"]
    error = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(0.7 - error, abs=0.006)
    assert found.high == pytest.approx(0.7 + error, abs=0.006)


def test_paired_difference__is_narrow_for_paired_models_and_zero_for_equal() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(2000) < 0.7).astype(float)
    second = first.copy()
    second[np.flatnonzero(first)[:60]] = 0  # loses 60 faces, wins none
    found = metrics.paired_difference(first, second)
    assert found.value == pytest.approx(0.03)
    assert found.low > 0
    assert found.high - found.low < 4 * math.sqrt(0.03 / 2000) + 0.001
    same = metrics.paired_difference(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_label_order__finds_a_swap_and_trusts_a_good_model() -> None:
    probs, labels = _model(classes=4)
    right = metrics.confusion_matrix(probs.argmax(1), labels, 4)
    audit = metrics.label_order(right)
    assert audit.permutation == (0, 1, 2, 3)
    assert not audit.suspicious
    meaning = np.array([2, 0, 1, 3])  # predicted code p means class meaning[p]
    codes = np.argsort(meaning)[probs.argmax(1)]
    swapped = metrics.label_order(metrics.confusion_matrix(codes, labels, 4))
    assert swapped.permutation == (2, 0, 1, 3)
    assert swapped.suspicious
    assert swapped.accuracy_permuted == pytest.approx(audit.accuracy)


# -- against votes --------------------------------------------------------------------------------


def _votes(n: int = 400, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(10, rng.dirichlet(np.full(5, 0.3)), size=n).astype(np.float64)
    return counts / counts.sum(1, keepdims=True)


def test_votes__divergences_and_brier_face_by_face() -> None:
    probs, _ = _model(400)
    votes = _votes()
    for p, v, kl, js, brier in zip(
        probs,
        votes,
        metrics.kl_to_votes(probs, votes),
        metrics.js_to_votes(probs, votes),
        metrics.brier_to_votes(probs, votes),
        strict=True,
    ):
        m = (p + v) / 2

        def slow(a: np.ndarray, b: np.ndarray) -> float:
            return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

        assert kl == pytest.approx(slow(v, p))
        assert js == pytest.approx((slow(p, m) + slow(v, m)) / 2)
        assert brier == pytest.approx(sum((x - y) ** 2 for x, y in zip(p, v, strict=True)))


def test_votes__ends_of_the_scales() -> None:
    sure = np.eye(3)[[0, 1]]
    other = np.eye(3)[[1, 2]]
    assert metrics.kl_to_votes(sure, sure) == pytest.approx([0, 0])
    assert metrics.js_to_votes(sure, other) == pytest.approx([math.log(2)] * 2)
    assert metrics.brier_to_votes(sure, other) == pytest.approx([2, 2])
    assert metrics.kl_to_votes(sure, other) == pytest.approx([-math.log(metrics.LEAST)] * 2)


def test_vote_scores__who_agreed_and_top_two_by_hand() -> None:
    votes = np.array([[0.8, 0.2, 0], [0.7, 0.3, 0], [0.5, 0.5, 0], [0, 0, 1.0]], np.float32)
    probs = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.5, 0.2], [0.2, 0.5, 0.3]])
    labels = votes.argmax(1)
    scores = metrics.vote_scores(probs, labels, votes)
    assert scores["accuracy_agreed"][1].tolist() == [True, False, False, True]
    assert scores["accuracy_disputed"][1].tolist() == [False, True, True, False]
    assert scores["accuracy_agreed"][0].tolist() == [1, 0, 0, 0]
    assert scores["top2"][0].tolist() == [1, 0, 1, 1]


def test_against_votes__means_over_faces_and_seeds() -> None:
    votes = _votes(600)
    labels = votes.argmax(1)
    probs = np.stack([_model(600, seed=s)[0] for s in (0, 1)])
    found = metrics.against_votes(probs, labels, votes, draws=200)
    mean = np.mean([metrics.kl_to_votes(p, votes).mean() for p in probs])
    assert found["kl"].value == pytest.approx(mean)
    assert found["kl"].low < mean < found["kl"].high
    agreed = votes.max(1) > 0.79
    right = np.mean([p.argmax(1)[agreed] == labels[agreed] for p in probs])
    assert found["accuracy_agreed"].value == pytest.approx(right)
    everywhere = np.mean([p.argmax(1) == labels for p in probs])
    share = agreed.mean()
    both = share * right + (1 - share) * found["accuracy_disputed"].value
    assert both == pytest.approx(everywhere)


def test_against_votes__nobody_disputed_is_no_number() -> None:
    votes = np.eye(3)[[0, 1, 2]]
    found = metrics.against_votes(votes[None], np.arange(3), votes, draws=100)
    assert math.isnan(found["accuracy_disputed"].value)
    assert found["accuracy_agreed"].value == 1


def test_paired_chance__is_the_share_of_fair_coins_as_far_off() -> None:
    first = np.array([1, 1, 1, 1, 1, 0, 1, 0, 2 / 3])
    second = np.array([0, 0, 0, 0, 0, 1, 1, 0, 1 / 3])  # 6 to 1; of the two alike nothing is said
    tosses = np.array(list(itertools.product([0, 1], repeat=7))).sum(1)
    expected = np.mean((tosses >= 6) | (tosses <= 1))
    assert metrics.paired_chance(first, second) == pytest.approx(expected)
    assert metrics.paired_chance(second, first) == pytest.approx(expected)
    assert metrics.paired_chance(first, first) == 1.0


def test_holm__is_the_step_down_procedure() -> None:
    """By hand: 4 x 0.01, 3 x 0.013 raised to the one before, 2 x 0.3, 1 x 0.2 cannot fall back."""
    assert metrics.holm([0.3, 0.01, 0.2, 0.013]) == pytest.approx([0.4, 0.04, 0.4, 0.04])
    assert metrics.holm([]) == []
    assert metrics.holm([0.6, 0.7]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(6)
        adjusted = np.array(metrics.holm(p.tolist()))
        for level in (0.05, 0.2, 0.5):
            rejected, order = set(), np.argsort(p)
            for rank, i in enumerate(order):
                if p[i] > level / (6 - rank):
                    break
                rejected.add(int(i))
            assert set(np.flatnonzero(adjusted <= level).tolist()) == rejected
