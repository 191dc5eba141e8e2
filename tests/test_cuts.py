"""Proves that rules at rest cut as the same rules shown all rows in one step, in any order."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.adaptive import rule
from pipeline.config import parse
from pipeline.cuts import AdaptiveConfig, Seen, adaptive_cuts, look, probs_of, settled
from pipeline.errors import ConfigError, RunError, SourceError
from pipeline.policy import OperatingPoint, SelectConfig, passes, rows_of
from pipeline.schema import EMOTIONS, scores_schema, with_label_names
from pipeline.selection import operating_point
from pipeline.threshold_config import READ

NAMES = EMOTIONS[:4]
RULES = ("fixed", "ada_cm", "dtm", "flexmatch", "freematch", "adamatch")


def drawn(n: int, seed: int, sure: float = 0.3) -> np.ndarray:
    """Probabilities (n, 4), uneven over classes; smaller `sure` makes surer."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(sure * np.array([4.0, 2.0, 1.0, 0.5]), n).astype(np.float32)


def table(probs: np.ndarray, labels: np.ndarray | None = None, bad: int = 0) -> pa.Table:
    """Score rows, the first `bad` of them quarantined."""
    n, names = len(probs), np.array(NAMES)
    good = np.arange(n) >= bad
    said = pa.array(names[probs.argmax(1)], mask=~good)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(probs.ravel()), 4, mask=pa.array(~good))
    columns = {
        "id": [f"f{i}" for i in range(n)],
        "status": np.where(good, "ok", "quarantined"),
        "probs": flat,
        "pseudo_label": said,
        "confidence": pa.array(probs.max(1), mask=~good),
        "prototype_label": said,
        "neighbor_label": said,
        "neighbor_agreement": pa.array(np.ones(n, np.float32)),
    }
    schema = scores_schema(4, 1)
    given = pa.table({k: pa.array(v).cast(schema.field(k).type) for k, v in columns.items()})
    if labels is not None:
        given = given.append_column("label", pa.array(names[labels]))
    return given.cast(with_label_names(given.schema, NAMES))


def labeled(seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    probs = drawn(120, seed)
    rng = np.random.default_rng(seed)
    return probs, np.where(rng.random(120) < 0.8, probs.argmax(1), rng.integers(0, 4, 120))


def in_one_go(config: AdaptiveConfig, pool: np.ndarray) -> torch.Tensor:
    """Cuts of the rule of training that sees every face once, in one step."""
    probs, labels = labeled()
    made = rule(config.at_rest, 4, len(pool))
    known = torch.from_numpy(probs)
    made.observe(known, torch.from_numpy(pool), torch.arange(len(pool)))
    made.epoch(math.inf, known, torch.from_numpy(labels))
    return made.cuts()


def settings(name: str) -> AdaptiveConfig:
    own = {key: value for key, value in {"tau": 0.8, "floor": 0.3}.items() if key in READ[name]}
    return AdaptiveConfig.model_validate({"rule": name, **own})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sure", [0.05, 0.3, 2.0])
def test_settled__equals_the_rule_on_the_same_rows_in_one_go(name: str, sure: float) -> None:
    config = settings(name)
    pool, (probs, labels) = drawn(500, 1, sure), labeled()
    expected = in_one_go(config, pool)
    torch.testing.assert_close(settled(config, Seen.of(pool, 0.8), probs, labels).cuts(), expected)
    found = adaptive_cuts(config, Seen.of(pool, 0.8), table(probs, labels), NAMES)
    assert list(found) == list(NAMES)
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_seen__parts_add_up_in_any_order() -> None:
    pool = drawn(400, 2)
    whole = look([table(pool)], 4, 0.8)
    rng = np.random.default_rng(0)
    for parts in (3, 40):
        shuffled = [table(part) for part in np.array_split(rng.permutation(pool), parts)]
        found = look(shuffled, 4, 0.8)
        assert (found.faces, found.confidence) == (whole.faces, whole.confidence)
        for column in ("given", "sure", "probs"):
            assert (getattr(found, column) == getattr(whole, column)).all(), column
    assert whole.faces == 400
    assert whole.sure.sum() == (pool.max(1) >= np.float32(0.8)).sum() > 0
    assert whole.given.tolist() == np.bincount(pool.argmax(1), minlength=4).tolist()
    assert whole.probs / 2**24 == pytest.approx(pool.astype(np.float64).sum(0), rel=1e-6)
    assert look([table(pool, bad=150)], 4, 0.8).faces == 250


@pytest.mark.parametrize("name", RULES)
def test_settled__no_confident_face_and_one_class_only(name: str) -> None:
    config = AdaptiveConfig(rule=name)
    probs, labels = labeled()
    flat = np.full((50, 4), 0.25, np.float32)
    one = np.tile(np.float32([1, 0, 0, 0]), (50, 1))
    for pool in (flat, one):
        cuts = settled(config, Seen.of(pool, config.tau), probs, labels).cuts()
        assert ((cuts >= 0) & (cuts <= 1)).all()
    nothing = Seen.of(flat[:0], config.tau)
    if name in ("flexmatch", "freematch"):
        with pytest.raises(RunError, match=f"{name}: the pool has no scored face"):
            settled(config, nothing, probs, labels)
    else:
        settled(config, nothing, probs, labels)
    assert Seen.of(flat, 0.95).sure.sum() == 0
    own = settled(config, Seen.of(one, config.tau), probs, labels).cuts().tolist()
    if name == "flexmatch":
        assert own == pytest.approx([config.tau, 0, 0, 0])  # never sure of: everything is kept
    if name == "freematch":
        assert own == [1, 0, 0, 0]


@pytest.mark.parametrize("name", RULES)
def test_operating_point__select_keeps_what_the_rule_would(name: str) -> None:
    pool, (probs, labels) = drawn(300, 3), labeled()
    adaptive = settings(name)
    config = SelectConfig(adaptive=adaptive, prototype=False)
    chunks = [table(pool[:120]), table(pool[120:])]
    point = operating_point(config, table(probs, labels), chunks)
    kept = passes(rows_of(table(pool), NAMES), point)
    cuts = in_one_go(adaptive, pool)
    confidence, label = torch.from_numpy(pool).max(1)
    near = (confidence - cuts[label]).abs() < 1e-6
    expected = (confidence >= cuts[label]).numpy()
    assert (kept == expected)[~near.numpy()].all()
    assert kept.any() or expected.sum() == 0
    assert OperatingPoint.model_validate(point.model_dump(mode="json")) == point
    assert 0 < point.estimates["utilization_labeled"] <= 1


def test_probs_of__a_table_without_them() -> None:
    with pytest.raises(SourceError, match="scores: missing column probs"):
        probs_of(table(drawn(3, 0)).drop(["probs"]), 4)


def test_config__says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"adaptive\.rule: Input should be 'fixed', 'ada_cm', "):
        parse(SelectConfig, {"adaptive": {"rule": "softmatch"}})
    with pytest.raises(ConfigError, match="policy all has no thresholds"):
        parse(SelectConfig, {"policy": "all", "adaptive": {}})
