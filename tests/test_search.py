"""Proves that the search counts exactly, keeps its targets, repeats itself and admits its luck."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import search as searching
from pipeline.errors import RunError
from pipeline.policy import OperatingPoint, passes, rows_of
from pipeline.schema import EMOTIONS, with_label_names
from pipeline.search import (
    Evidence,
    SearchConfig,
    appraise,
    best_precision,
    evidence,
    halves,
    pareto,
    point_of,
    search,
    worth,
)
from pipeline.spaces import Space, heads, said
from pipeline.tally import pool_counts
from pipeline.training.teacher import stratified_folds

pytestmark = pytest.mark.ray
NAMES = EMOTIONS[:4]


def score_rows(n: int, seed: int) -> pa.Table:
    """Score rows with `label`; confidence is honest, prototype and neighbors see something, too."""
    rng = np.random.default_rng(seed)
    names = np.array(NAMES)
    truth = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    confidence = rng.uniform(0.25, 1, n).astype(np.float32)
    predicted = np.where(rng.random(n) < confidence, truth, rng.integers(0, 4, n))
    table = pa.table(
        {
            "id": [f"{seed}#{i}" for i in range(n)],
            "status": ["quarantined" if i % 50 == 49 else "ok" for i in range(n)],
            "pseudo_label": pa.array(names[predicted]),
            "confidence": confidence,
            "prototype_label": names[np.where(rng.random(n) < 0.7, truth, predicted)],
            "neighbor_label": names[np.where(rng.random(n) < 0.6, truth, predicted)],
            "neighbor_agreement": rng.uniform(0.2, 1, n).astype(np.float32),
            "label": names[truth],
        }
    )
    return table.cast(with_label_names(table.schema, NAMES))


def _evidence(n: int = 1500) -> Evidence:
    points, pool = score_rows(n, 0), score_rows(4000, 1)
    labels = np.array([NAMES.index(name) for name in points["label"].to_pylist()])
    labeled = {name: int((labels == i).sum()) for i, name in enumerate(NAMES)}
    start = OperatingPoint(label_names=NAMES, labeled=labeled)
    return Evidence(rows_of(points, NAMES), labels, pool_counts([pool], NAMES), start)


def test_halves__split_every_class_evenly() -> None:
    labels = np.repeat([0, 1, 2], [101, 10, 1])
    seen = halves(labels, 0)
    assert np.bincount(labels[seen], minlength=3).tolist() == [51, 5, 1]
    assert (seen == halves(labels, 0)).all()
    assert (seen != halves(labels, 1)).any()


def test_halves__keep_groups_together_and_are_as_ever_without_them() -> None:
    rng = np.random.default_rng(0)
    labels, people = rng.integers(0, 3, 400), rng.integers(0, 60, 400)
    groups = [None if one == 0 else f"person {one}" for one in people]
    seen = halves(labels, 0, groups)
    for one in range(1, 60):
        assert len(set(seen[people == one])) <= 1
    assert len(set(seen[people == 0])) == 2
    assert (abs(np.bincount(labels[seen], minlength=3) / np.bincount(labels) - 0.5) < 0.03).all()
    assert (halves(labels, 0, [None] * 400) == halves(labels, 0)).all()


def test_halves__of_each_fold_apart_whatever_the_groups_sizes() -> None:
    videos = np.repeat(np.arange(12), np.arange(12, 24))  # each of another size
    labels = np.arange(len(videos)) % 3
    groups = [f"video {one}" for one in videos]
    for seed in range(3):
        fold = stratified_folds(labels, groups, 2, seed)  # the teacher's
        seen = halves(labels, seed, groups, fold)
        assert all(len(set(seen[videos == one])) == 1 for one in range(12))
        assert (np.histogram2d(seen, fold, 2)[0] > 0.3 * len(labels) / 2).all()
    lone = halves(labels, 0, groups, videos)  # a fold of one group is seen whole
    assert lone.all()


def test_appraise__penalizes_what_misses_its_targets() -> None:
    evidence = _evidence()
    strict = evidence.start.model_copy(update={"confidence": 0.75})
    pure = appraise(strict, evidence, SearchConfig(target_purity=0.5, min_utilization=0))
    impure = appraise(strict, evidence, SearchConfig(target_purity=0.99, min_utilization=0))
    scarce = appraise(strict, evidence, SearchConfig(target_purity=0.5, min_utilization=0.9))
    assert impure["objective"] == pytest.approx(pure["objective"] - 10 * (0.99 - pure["purity"]))
    missing = 0.9 - pure["utilization"]
    assert scarce["objective"] == pytest.approx(pure["objective"] - 10 * missing)
    plain = SearchConfig(target_purity=0.5, min_utilization=0, objective="utilization")
    assert appraise(strict, evidence, plain)["objective"] == pytest.approx(pure["utilization"])


def test_best_precision__reaches_the_target_with_the_most_faces() -> None:
    evidence = _evidence()
    rules = {"confidence": 0.0, "prototype": False, "neighbors": None}
    loose = best_precision(rules, evidence, SearchConfig(target_purity=0.7))
    tight = best_precision(rules, evidence, SearchConfig(target_purity=0.9))
    assert loose["purity"] >= 0.7
    assert tight["purity"] >= 0.9
    assert loose["utilization"] > tight["utilization"] > 0.05


def test_best_precision__an_adaptive_rule_is_one_more_way_to_cut() -> None:
    evidence = _evidence()
    rules = {"confidence": 0.0, "prototype": False, "neighbors": None}
    config = SearchConfig(target_purity=0.7)
    plain = best_precision(rules, evidence, config)
    assert "adaptive" not in plain
    nothing = dict.fromkeys(NAMES, 2.0)
    same = best_precision(rules, replace(evidence, adaptive={"fixed": nothing}), config)
    assert same == {**plain, "adaptive": None}
    own = {"neutral": 0.5, "happiness": 0.625, "sadness": 0.625, "surprise": 0.625}
    point = evidence.start.model_copy(update={"confidence": 0.0, "cuts": own})
    worth = appraise(point, evidence, config)
    found = best_precision(rules, replace(evidence, adaptive={"dtm": own}), config)
    if worth["objective"] > plain["objective"]:
        assert (found["adaptive"], found["target_precision"]) == ("dtm", None)
    assert found["objective"] == max(plain["objective"], worth["objective"])


def test_pareto__keeps_what_nothing_surpasses() -> None:
    rows = [
        (0.9, 0.2, 3),
        (0.8, 0.4, 3),
        (0.8, 0.3, 3),
        (0.9, 0.2, 3),
        (0.7, 0.1, 4),
        (0.7, 0.1, 2),
    ]
    names = ("purity", "utilization", "effective_classes")
    marks = pareto([dict(zip(names, row, strict=True)) for row in rows])
    assert marks.tolist() == [True, True, False, True, True, False]


def _spaces(points: pa.Table, pool: pa.Table) -> list[Space]:
    """Two spaces in which a face's features tell its true class but for noise."""
    found = []
    for number in range(2):
        rng = np.random.default_rng(number)
        parts = []
        for table in (points, pool):
            codes = [NAMES.index(name) for name in table["label"].to_pylist()]
            x = rng.normal(size=(len(codes), 6)) + 2 * np.eye(4, 6)[codes]
            parts.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
        unseen = np.arange(len(points)) % 2 == number
        rows = rows_of(pool, NAMES)
        each = np.full(len(pool), 3.0)
        soft = np.eye(len(NAMES), dtype=np.float32)[rows.predicted]
        found.append(Space(parts[0], unseen, parts[1], rows, each, soft))
    return found


def _judged(**rules: object) -> tuple[dict, dict, Evidence, Evidence]:
    """What rules are worth in the search and after it, and the evidence of both."""
    points, pool = score_rows(400, 0), score_rows(300, 1)
    config = SearchConfig(objective="head", min_utilization=0)
    seen, held = evidence(points, [pool], config, (), _spaces(points, pool))
    found = worth({"cut_by": "precision", "target_precision": 0.75, **rules}, (seen, config))
    return found, appraise(point_of(found, seen), held, config), seen, held


def test_worth__of_a_head_is_its_accuracy_on_faces_that_its_space_has_not_seen() -> None:
    rules = {"confidence": 0.25, "prototype": True, "neighbors": None}
    found, again, seen, held = _judged(**rules)
    named = said(heads(point_of(found, seen), seen.study), seen.study)
    right = named == seen.study.labels
    assert found["accuracy"] == found["objective"] == right[seen.judges].mean()
    assert again["accuracy"] == right[~seen.judges].mean()
    assert (held.judges == ~seen.judges).all()
    assert found["accuracy"] > 0.6
    assert found["target_precision"] == 0.75
    plain, *_ = _judged(**rules, cut_by="none")
    assert plain["target_precision"] is None
    assert plain["utilization"] > found["utilization"]


def test_worth__of_a_head_misses_a_utilization_that_is_asked_for() -> None:
    points, pool = score_rows(400, 0), score_rows(300, 1)
    config = SearchConfig(objective="head", min_utilization=0.5)
    seen, _ = evidence(points, [pool], config, (), _spaces(points, pool))
    rules = {"confidence": 0.875, "prototype": True, "neighbors": 0.75, "cut_by": "none"}
    found = worth({**rules, "target_precision": 0.5}, (seen, config))
    missing = 0.5 - found["utilization"]
    assert missing > 0.3
    assert found["objective"] == pytest.approx(found["accuracy"] - 10 * missing)


@pytest.mark.parametrize(("purity", "warned"), [(0.5, 0), (1.0, 1)])
def test_search__says_that_a_target_is_out_of_reach(
    purity: float,
    warned: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = {"confidence": 0.0, "prototype": False, "neighbors": None}
    monkeypatch.setattr(searching, "tuned", lambda f, shared, *_: [f(rules, shared)])
    config = SearchConfig(target_purity=purity, min_utilization=0.3)
    search(score_rows(400, 0), [score_rows(800, 1)], config, tmp_path)
    assert len(caplog.messages) == warned
    assert all("the point taken of 1 misses purity 1 (0." in line for line in caplog.messages)


def test_search__says_that_ray_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RunError, match="Ray is not started"):
        search(score_rows(200, 0), [score_rows(100, 1)], SearchConfig(), tmp_path)


def test_search__without_pool(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="0 scored pool faces"):
        search(score_rows(200, 0), [], SearchConfig(), tmp_path)


@pytest.mark.cluster
def test_search__same_seed_same_trials_and_honest_estimate(tmp_path: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=2, object_store_memory=300_000_000, include_dashboard=False)
    before = dict(os.environ)
    try:
        points, pool = score_rows(3000, 0), [score_rows(4000, 1)]
        config = SearchConfig(trials=14, target_purity=0.85, concurrency=2)
        first = search(points, pool, config, tmp_path / "a")
        again = search(points, pool, config, tmp_path / "b")
        other = search(points, pool, config.model_copy(update={"seed": 1}), tmp_path / "c")
    finally:
        ray.shutdown()
    assert dict(os.environ) == before
    assert first == again
    assert first.trials != other.trials
    assert len(first.trials) == 14
    best = max(first.trials, key=lambda trial: trial["objective"])
    found = first.estimates
    assert found["purity_in_search"] == best["purity"] >= 0.85
    assert found["winners_curse_purity"] == pytest.approx(best["purity"] - found["purity"])
    assert found["labeled_searched"] + found["labeled_held_out"] == 3000

    fresh = score_rows(20_000, 7)
    rows = rows_of(fresh, NAMES)
    kept = passes(rows, first)
    right = np.asarray(fresh["label"]) == np.asarray(fresh["pseudo_label"])
    assert right[kept].mean() == pytest.approx(found["purity"], abs=0.03)
    assert kept.mean() == pytest.approx(found["utilization"], abs=0.03)
