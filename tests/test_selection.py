"""Proves the policy: which rule rejects a face, guard always on, caps independent of the order."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sealing
from pipeline.config import parse
from pipeline.errors import ConfigError, LabelError, LedgerError, SourceError
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.policy import FACE_COLUMNS, GUARD_COLUMNS, OperatingPoint, rows_of
from pipeline.schema import EMOTIONS, REASONS, SELECTION, with_label_names
from pipeline.selection import (
    Pool,
    SelectConfig,
    cut,
    join,
    operating_point,
    select,
    yield_by_class,
)
from pipeline.storage import Location, location

NAMES = EMOTIONS[:3]
OPEN = SelectConfig(prototype=False, target_precision=None, duplicates=False, weights="one")

CHUNK = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("pseudo_label", pa.string()),
        ("confidence", pa.float32()),
        ("prototype_label", pa.string()),
        ("neighbor_label", pa.string()),
        ("neighbor_agreement", pa.float32()),
        ("twin_of", pa.string()),
        ("twin_role", pa.string()),
        ("duplicate_group", pa.string()),
        ("group", pa.string()),
    ]
)


def _face(name: str, label: str | None = "neutral", confidence: float = 0.9, **more: Any) -> dict:
    base = {
        "id": name,
        "status": "ok",
        "pseudo_label": label,
        "confidence": confidence,
        "prototype_label": label,
        "neighbor_label": label,
        "neighbor_agreement": 1.0,
        "twin_of": None,
        "twin_role": None,
        "duplicate_group": None,
        "group": None,
    }
    return base | more


def _table(*faces: dict) -> pa.Table:
    return pa.Table.from_pylist(list(faces), schema=CHUNK)


def _select(config: SelectConfig, *tables: pa.Table, **decided: Any) -> dict[str, dict]:
    point = OperatingPoint(label_names=NAMES, **decided)
    found = list(select(lambda: iter(tables), point, config))
    assert [len(t) for t in found] == [len(t) for t in tables]
    assert all(t.schema == SELECTION for t in found)
    return {row["id"]: row for t in found for row in t.to_pylist()}


def test_select__first_failing_rule_is_the_reason() -> None:
    wrong = {"prototype_label": "sadness", "neighbor_label": "sadness"}
    worst = {"status": "quarantined", "twin_of": "t", "twin_role": "test", "confidence": 0.1}
    table = _table(
        _face("bad", **worst | wrong),
        _face("test", twin_of="t", twin_role="test", confidence=0.1, **wrong),
        _face("validation", twin_of="v", twin_role="validation", confidence=0.1, **wrong),
        _face("low", confidence=0.1, **wrong),
        _face("prototype", **wrong),
        _face("neighbors", neighbor_label="sadness"),
        _face("share", neighbor_agreement=0.4),
        _face("class", confidence=0.75),
        _face("good"),
    )
    found = _select(
        OPEN, table, confidence=0.5, prototype=True, neighbors=0.5, cuts={"neutral": 0.8}
    )
    assert {name: row["reason"] for name, row in found.items()} == {
        "bad": "quarantined",
        "test": "twin_of_test",
        "validation": "twin_of_validation",
        "low": "below_confidence",
        "prototype": "prototype_disagrees",
        "neighbors": "neighbors_disagree",
        "share": "neighbors_disagree",
        "class": "below_class_threshold",
        "good": "selected",
    }
    assert [name for name, row in found.items() if row["selected"]] == ["good"]
    assert found["good"]["weight"] == 1
    assert found["low"]["weight"] is None
    assert found["low"]["label"] == "neutral"


def test_select__what_a_person_labeled_is_not_kept_and_competes_with_nobody() -> None:
    config = OPEN.model_copy(update={"duplicates": True, "class_cap": 2})
    table = _table(
        _face("a", confidence=0.99, duplicate_group="a"),
        _face("b", confidence=0.5, duplicate_group="a"),
        _face("c", confidence=0.4),
        _face("d", confidence=0.3),
        _face("twin", twin_of="t", twin_role="test"),
        _face("bad", status="quarantined"),
    )
    point = OperatingPoint(label_names=NAMES)
    chunks = [table.slice(0, 2), table.slice(2)]
    labeled = {"a", "twin", "bad", "of no pool"}
    found = pa.concat_tables(select(lambda: iter(chunks), point, config, labeled=labeled))
    assert found["reason"].to_pylist() == [
        "labeled",
        "selected",
        "selected",
        "class_cap",
        "twin_of_test",
        "quarantined",
    ]


@pytest.mark.parametrize("config", [SelectConfig(policy="all"), OPEN])
def test_select__guard_has_no_switch(config: SelectConfig) -> None:
    table = _table(
        _face("a", twin_of="t", twin_role="test"),
        _face("b", twin_of="v", twin_role="validation"),
        _face("c", twin_of="x", twin_role=None),  # a twin of unknown role is no training face
        _face("d", status="quarantined"),
        _face("e", label=None),
    )
    found = _select(config, table)
    assert not any(row["selected"] for row in found.values())
    with pytest.raises(SourceError, match="missing column twin_of"):
        list(
            select(
                lambda: iter([table.drop(["twin_of"])]), OperatingPoint(label_names=NAMES), config
            )
        )


def test_select__confidence_per_class() -> None:
    table = _table(
        _face("a", confidence=0.6), _face("b", "sadness", 0.6), _face("c", "happiness", 0.1)
    )
    found = _select(OPEN, table, confidence={"neutral": 0.7, "sadness": 0.5})
    assert [row["selected"] for row in found.values()] == [False, True, True]


def test_select__duplicates_keep_the_most_confident_usable_face() -> None:
    config = OPEN.model_copy(update={"duplicates": True})
    first = _table(
        _face("a", confidence=0.8, duplicate_group="a"),
        _face("twin", confidence=0.99, duplicate_group="a", twin_of="t", twin_role="test"),
        _face("alone", confidence=0.1),
    )
    second = _table(_face("b", confidence=0.9, duplicate_group="a"))
    found = _select(config, first, second)
    assert {name: row["reason"] for name, row in found.items()} == {
        "a": "duplicate",
        "twin": "twin_of_test",
        "alone": "selected",
        "b": "selected",
    }


def test_select__caps_take_the_best_of_what_other_rules_left() -> None:
    faces = [_face(f"p{i}", confidence=0.5 + i / 100, group="p") for i in range(5)]
    faces += [_face("q", confidence=0.55, group="q"), _face("nobody", confidence=0.51)]
    faces += [_face("off", confidence=0.99, group="p", prototype_label="sadness")]
    capped = _select(OPEN.model_copy(update={"group_cap": 2}), _table(*faces), prototype=True)
    assert {n for n, row in capped.items() if row["selected"]} == {"p3", "p4", "q", "nobody"}
    assert capped["off"]["reason"] == "prototype_disagrees"
    assert capped["p0"]["reason"] == "group_cap"
    both = OPEN.model_copy(update={"group_cap": 2, "class_cap": 3})
    found = _select(both, _table(*faces), prototype=True)
    assert {n for n, row in found.items() if row["selected"]} == {"p3", "p4", "q"}
    assert found["nobody"]["reason"] == "class_cap"


def test_select__class_cap_in_multiples_of_labeled_faces() -> None:
    table = _table(
        *[_face(f"n{i}", "neutral", i / 10) for i in range(10)],
        *[_face(f"s{i}", "sadness", i / 10) for i in range(10)],
    )
    config = OPEN.model_copy(update={"class_cap_labeled": 1.5, "class_cap": 4})
    found = _select(config, table, labeled={"neutral": 2, "sadness": 100})
    kept = {name for name, row in found.items() if row["selected"]}
    assert kept == {"n9", "n8", "n7", "s9", "s8", "s7", "s6"}


def _pool(seed: int, rows: int = 80) -> pa.Table:
    rng = np.random.default_rng(seed)

    def label() -> str:
        return str(rng.choice(NAMES))

    return _table(
        *[
            _face(
                f"f{i}",
                label(),
                float(np.float32(0.5 + rng.integers(0, 12) / 3e5)),  # ties, and one bin for many
                prototype_label=label() if rng.random() < 0.2 else None,
                status="quarantined" if rng.random() < 0.05 else "ok",
                twin_of="t" if rng.random() < 0.05 else None,
                duplicate_group=f"d{rng.integers(4)}" if rng.random() < 0.3 else None,
                group=f"g{rng.integers(9)}" if rng.random() < 0.8 else None,
            )
            for i in range(rows)
        ]
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), weights=st.sampled_from(["one", "confidence", "softmatch"]))
def test_select__is_independent_of_the_order_of_chunks(seed: int, weights: str) -> None:
    rng = np.random.default_rng(seed)
    pool = _pool(seed)
    config = SelectConfig(
        group_cap=4, class_cap=9, duplicates=True, weights=weights, target_precision=None
    )
    whole = _select(config, pool)
    shuffled = pool.take(pa.array(rng.permutation(len(pool))))
    parts = [shuffled.slice(i, 23) for i in range(0, len(pool), 23)]
    assert _select(config, *parts) == whole
    kept = [row for row in whole.values() if row["selected"]]
    for name in NAMES:
        assert sum(row["label"] == name for row in kept) <= 9


def test_select__weights() -> None:
    table = _table(
        _face("a", confidence=0.9), _face("b", confidence=0.3), _face("c", confidence=0.6)
    )
    by_confidence = _select(OPEN.model_copy(update={"weights": "confidence"}), table)
    assert by_confidence["c"]["weight"] == pytest.approx(0.6)
    soft = _select(OPEN.model_copy(update={"weights": "softmatch"}), table)
    assert soft["a"]["weight"] == 1
    assert soft["c"]["weight"] == pytest.approx(1, abs=1e-6)
    assert soft["b"]["weight"] == pytest.approx(np.exp(-(0.3**2) / (2 * 0.06 / 4)), rel=1e-3)


def test_select__policy_all_keeps_everything_usable() -> None:
    points = _points(200)
    point = operating_point(SelectConfig(policy="all"), points)
    table = _table(
        _face("a", confidence=0.34, prototype_label="sadness"), _face("b", status="quarantined")
    )
    found = list(select(lambda: iter([table]), point, SelectConfig(policy="all")))
    assert found[0]["selected"].to_pylist() == [True, False]


def test_select__class_unknown_to_the_operating_point() -> None:
    with pytest.raises(LabelError, match="'anger' is not one of neutral, happiness, sadness"):
        _select(OPEN, _table(_face("a", "anger")))


def test_yield_by_class__adds_up() -> None:
    pool = _pool(3)
    config = SelectConfig(class_cap=5)
    found = list(select(lambda: _chunks(pool), OperatingPoint(label_names=NAMES), config))
    counts = yield_by_class(found)
    assert list(counts) == [n for n in EMOTIONS if n in counts]
    assert sum(sum(own.values()) for own in counts.values()) == len(pool)
    assert all(own["selected"] == 5 for own in counts.values())
    assert all(list(own) == [r for r in REASONS if r in own] for own in counts.values())


def _chunks(pool: pa.Table) -> Iterator[pa.Table]:
    return iter([pool.slice(0, 30), pool.slice(30)])


def _points(n: int, seed: int = 0) -> pa.Table:
    """Out-of-fold rows whose confidence is honest."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    confidence = rng.uniform(0.34, 1, n).astype(np.float32)
    predicted = np.where(rng.random(n) < confidence, truth, (truth + 1) % 3)
    names = np.array(NAMES)
    table = _table(
        *[
            _face(f"l{i}", str(names[p]), float(c))
            for i, (p, c) in enumerate(zip(predicted, confidence, strict=True))
        ]
    ).append_column("label", pa.array(names[truth]))
    return table.cast(with_label_names(table.schema, NAMES))


def test_operating_point__cuts_reach_the_target_on_fresh_faces() -> None:
    config = SelectConfig(target_precision=0.85, prototype=False)
    point = operating_point(config, _points(3000))
    assert sum(point.labeled.values()) == 3000
    assert [row["class"] for row in point.table] == list(NAMES)
    fresh = _points(3000, seed=1)
    kept = next(select(lambda: iter([fresh]), point, config))
    good = np.asarray(kept["selected"])
    right = np.asarray(fresh["label"]) == np.asarray(fresh["pseudo_label"])
    assert right[good].mean() == pytest.approx(0.85, abs=0.03)
    assert point.estimates["purity"] == pytest.approx(0.85, abs=0.02)


def test_operating_point__a_class_that_the_data_lacks() -> None:
    with pytest.raises(ConfigError, match="'contempt' is not a class"):
        operating_point(SelectConfig(confidence={"contempt": 0.5}), _points(10))


def test_operating_point__json_and_digest(tmp_path: Any) -> None:
    point = operating_point(SelectConfig(), _points(300))
    at = location(tmp_path) / "point.json"
    point.save(at)
    assert OperatingPoint.load(at) == point
    other = point.model_copy(update={"estimates": {"purity": 0.1}})
    assert other.digest == point.digest
    assert point.model_copy(update={"prototype": False}).digest != point.digest


def test_rows_of__null_and_nan_pass_nothing() -> None:
    rows = rows_of(_table(_face("a", None, float("nan"))), NAMES)
    assert dataclasses.asdict(rows)["predicted"].tolist() == [-1]
    assert rows.confidence.tolist() == [0]


def test_join__refuses_tables_that_do_not_line_up() -> None:
    pool = _pool(0, rows=4)
    scores = pool.select(CHUNK.names[:7])
    guard = pool.select(["id", "twin_of", "twin_role", "duplicate_group"])
    faces = pool.select(["id", "status", "group"])
    bad = faces.set_column(1, "status", pa.array(["ok", "quarantined", "ok", "ok"]))
    chunk = join(scores, guard, bad)
    assert chunk.column_names == CHUNK.names
    assert chunk["status"].to_pylist()[1] == "quarantined"
    with pytest.raises(LedgerError, match="ids of guard"):
        join(scores, guard.take([1, 0, 2, 3]), faces)


def _ledgers(at: Location, pool: pa.Table, sealed: bool) -> tuple[Plan, list[Ledger]]:
    """The pool in slices of 7 rows, each stage in a ledger of its own."""
    cuts = range(0, len(pool), 7)
    slices = [Slice(f"s{i:07d}", 0, "p", "x", c, c + 7, "f", 7) for i, c in enumerate(cuts)]
    plan = Plan.write(at / "plan.parquet", slices)
    columns = {"score": CHUNK.names[:7], "twins": GUARD_COLUMNS, "survey": FACE_COLUMNS}
    ledgers = []
    for name, chosen in columns.items():
        ledger = Ledger(at / name)
        for slice in slices:
            ledger.commit(slice, pool.slice(slice.start, 7).select(chosen))
        if sealed or name == "survey":
            sealing.seal(ledger, plan)
        ledgers.append(ledger)
    return plan, ledgers


@pytest.mark.parametrize("sealed", [True, False])
def test_pool__lines_up_blocks_of_any_size(tmp_path: Path, sealed: bool) -> None:
    pool = _pool(1)
    plan, ledgers = _ledgers(location(tmp_path), pool, sealed)
    opens = Pool(plan, *ledgers)
    chunks = list(opens())
    assert list(opens()) == chunks  # without comparing ids again
    assert len(chunks) == (1 if sealed else 12)
    joined = [row for chunk in chunks for row in chunk.to_pylist()]
    assert joined == pool.to_pylist()
    config, point = SelectConfig(group_cap=4, class_cap=9), OperatingPoint(label_names=NAMES)
    found = pa.concat_tables(select(Pool(plan, *ledgers), point, config))
    assert {row["id"]: row for row in found.to_pylist()} == _select(config, pool)
    rows = [commit.rows for commit in ledgers[0].committed(plan)]
    parts = list(cut([found.slice(0, 11), found.slice(11)], rows))
    assert [len(part) for part in parts] == rows
    assert pa.concat_tables(parts).equals(found)


def test_pool__clusters_are_one_more_ledger(tmp_path: Path) -> None:
    pool, at = _pool(1), location(tmp_path)
    plan, ledgers = _ledgers(at, pool, False)
    cluster = pa.array([i % 3 if i % 10 else None for i in range(len(pool))], pa.int32())
    own = Ledger(at / "clusters")
    for slice in plan:
        rows = pa.table({"id": pool["id"], "cluster": cluster}).slice(slice.start, 7)
        own.commit(slice, rows)
    opens = Pool(plan, *ledgers, own)
    assert pa.concat_tables(opens())["cluster"].combine_chunks().equals(cluster)
    point = OperatingPoint(label_names=NAMES, clusters=("sadness", None, "neutral"), relabel=True)
    config = SelectConfig(policy="all", duplicates=False, weights="one")
    decided = pa.concat_tables(select(opens, point, config)).to_pylist()
    for row, number in zip(decided, cluster.to_pylist(), strict=True):
        if row["selected"]:
            assert row["label"] == {0: "sadness", 2: "neutral"}[number]
        elif row["reason"] not in ("quarantined", "twin_of_test", "twin_of_validation"):
            assert row["reason"] == "impure_cluster"
            assert number in (1, None)
    assert sum(row["selected"] for row in decided) > 10
    with pytest.raises(ConfigError, match="the point has clusters, and the rows have none"):
        list(select(Pool(plan, *ledgers), point, config))


def test_pool__a_ledger_with_fewer_rows(tmp_path: Path) -> None:
    pool = _pool(1)
    plan, ledgers = _ledgers(location(tmp_path / "one"), pool, True)
    _, short = _ledgers(location(tmp_path / "two"), pool.slice(0, 79), True)
    with pytest.raises(LedgerError, match=r"ids of guard|equally many rows"):
        list(Pool(plan, ledgers[0], short[1], ledgers[2])())


def test_cut__more_or_fewer_rows_than_told() -> None:
    config = SelectConfig(policy="all")
    found = list(select(lambda: _chunks(_pool(3)), OperatingPoint(label_names=NAMES), config))
    assert [len(t) for t in cut(found, [0, 79, 0, 1])] == [0, 79, 0, 1]
    with pytest.raises(LedgerError, match="1 rows are missing"):
        list(cut(found, [80, 1]))
    with pytest.raises(LedgerError, match="more rows"):
        list(cut(found, [79]))


def test_select_config__unknown_key_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'class_cap'"):
        parse(SelectConfig, {"clas_cap": 3})
