"""Proves that learning in pieces decides as sorting the whole pool rule by rule does."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ranking
from pipeline.judge import Judge
from pipeline.policy import OperatingPoint, SelectConfig
from pipeline.ranking import stable_hash
from pipeline.schema import EMOTIONS
from pipeline.selection import select

NAMES = EMOTIONS[:3]
CLUSTERS = (NAMES[0], None, NAMES[1], NAMES[0], NAMES[2], NAMES[1])
CODED = ("status", "pseudo_label", "prototype_label", "neighbor_label", "twin_role")


def pool(rng: np.random.Generator, rows: int) -> pa.Table:
    """Few scores, groups and classes, so that ties, shared bins and full caps abound."""

    def some(values: Any, share: float) -> list[Any]:
        return [str(v) if rng.random() < share else None for v in rng.choice(values, rows)]

    near = 0.5 + rng.integers(0, 6, rows) / 3e5
    scores = np.where(rng.random(rows) < 0.7, near, rng.choice([0.0, 0.25, 1.0], rows))
    twin = some(["t"], 0.1)
    columns = {
        "id": [f"f{i}" for i in rng.permutation(10**4)[:rows]],
        "status": ["ok" if rng.random() < 0.95 else "quarantined" for _ in range(rows)],
        "pseudo_label": some(NAMES, 0.97),
        "confidence": pa.array(scores, pa.float32()),
        "prototype_label": some(NAMES[:2], 0.9),
        "neighbor_label": some(NAMES, 0.9),
        "neighbor_agreement": pa.array(rng.random(rows), pa.float32()),
        "twin_of": twin,
        "twin_role": [None if t is None else str(rng.choice(["test", "validation"])) for t in twin],
        "duplicate_group": some(list("abcdef"), 0.5),
        "group": some(list("uvwxyz"), 0.8),
        "cluster": pa.array(rng.integers(0, len(CLUSTERS), rows), pa.int32()),
    }
    typed = {
        name: column if isinstance(column, pa.Array) else pa.array(column, pa.string())
        for name, column in columns.items()
    }
    return pa.table(typed)


def slow(
    table: pa.Table, point: OperatingPoint, config: SelectConfig
) -> dict[str, tuple[str, str | None]]:
    """Reason and label of every face: each rule in turn over the whole pool, in plain Python."""
    faces = table.to_pylist()
    tie = dict(zip(table["id"].to_pylist(), stable_hash(table["id"]).tolist(), strict=True))
    reasons: dict[str, str] = {}

    def still() -> list[dict]:
        return [face for face in faces if face["id"] not in reasons]

    def keep_best(reason: str, key: str, limit_of: Any) -> None:
        groups: dict[str, list[dict]] = {}
        for face in still():
            if face[key] is not None:
                groups.setdefault(face[key], []).append(face)
        for name, members in groups.items():
            members.sort(key=lambda f: (-f["confidence"], tie[f["id"]]))
            for face in members[limit_of(name) :]:
                reasons[face["id"]] = reason

    for face in faces:
        if face["status"] != "ok" or face["pseudo_label"] is None:
            reasons[face["id"]] = "quarantined"
        elif face["twin_of"] is not None:
            reasons[face["id"]] = f"twin_of_{face['twin_role']}"
    if config.duplicates:
        keep_best("duplicate", "duplicate_group", lambda name: 1)
    for face in still():
        label, score = face["pseudo_label"], face["confidence"]
        if score < np.float32(point.confidence or 0):
            reasons[face["id"]] = "below_confidence"
        elif point.prototype and face["prototype_label"] != label:
            reasons[face["id"]] = "prototype_disagrees"
        elif point.neighbors is not None and (
            face["neighbor_label"] != label
            or face["neighbor_agreement"] < np.float32(point.neighbors)
        ):
            reasons[face["id"]] = "neighbors_disagree"
        elif score < np.float32((point.cuts or {}).get(label, 0)):
            reasons[face["id"]] = "below_class_threshold"
        elif point.clusters is None:
            continue
        elif point.clusters[face["cluster"]] is None:
            reasons[face["id"]] = "impure_cluster"
        elif point.relabel:
            face["pseudo_label"] = point.clusters[face["cluster"]]
        elif point.clusters[face["cluster"]] != label:
            reasons[face["id"]] = "cluster_disagrees"
    if config.group_cap is not None:
        keep_best("group_cap", "group", lambda name: config.group_cap)
    if config.class_cap is not None:
        keep_best("class_cap", "pseudo_label", lambda name: config.class_cap)
    return {
        face["id"]: (reasons.get(face["id"], "selected"), face["pseudo_label"]) for face in faces
    }


POLICY = st.builds(
    SelectConfig,
    duplicates=st.booleans(),
    group_cap=st.sampled_from([None, 1, 2, 5]),
    class_cap=st.sampled_from([None, 0, 1, 7, 1000]),
    weights=st.sampled_from(["one", "softmatch"]),
)
POINT = st.builds(
    OperatingPoint,
    label_names=st.just(NAMES),
    confidence=st.sampled_from([None, 0.25, 0.5]),
    prototype=st.booleans(),
    neighbors=st.sampled_from([None, 0.3]),
    cuts=st.sampled_from([None, {NAMES[0]: 0.50001, NAMES[1]: 2.0}]),
    clusters=st.sampled_from([None, CLUSTERS]),
    relabel=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    config=POLICY,
    point=POINT,
    workers=st.integers(1, 4),
    size=st.integers(1, 60),
    compact=st.sampled_from([1, 9, 1000]),
    coded=st.booleans(),
)
def test_judge__decides_as_the_slow_reference(
    seed: int,
    config: SelectConfig,
    point: OperatingPoint,
    workers: int,
    size: int,
    compact: int,
    coded: bool,
) -> None:
    rng = np.random.default_rng(seed)
    table = pool(rng, int(rng.integers(1, 120)))
    expected = slow(table, point, config)
    if coded:
        for name in CODED:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, table[name].dictionary_encode())
    chunks = [table.slice(i, size) for i in range(0, len(table), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COMPACT_ROWS", compact)
        judges = [Judge(point, config) for _ in range(workers)]
        for i in rng.permutation(len(chunks)).tolist():
            judges[rng.integers(workers)].absorb(judges[0].study(chunks[i]))
        judge = judges.pop(rng.integers(workers))
        for other in judges:
            judge.merge(other)
        judge.close()
    found = pa.concat_tables([judge.decide(chunk) for chunk in chunks])
    decided = zip(found["reason"].to_pylist(), found["label"].to_pylist(), strict=True)
    assert dict(zip(found["id"].to_pylist(), decided, strict=True)) == expected
    threaded = pa.concat_tables(select(lambda: iter(chunks), point, config, threads=workers))
    assert threaded.equals(found)


def test_judge__weights_do_not_depend_on_who_learned() -> None:
    rng = np.random.default_rng(5)
    table = pool(rng, 100)
    point, config = OperatingPoint(label_names=NAMES), SelectConfig(group_cap=3)
    whole = Judge(point, config)
    whole.absorb(whole.study(table))
    one, two = Judge(point, config), Judge(point, config)
    one.absorb(whole.study(table.slice(30)))
    two.absorb(whole.study(table.slice(0, 30)))
    one.merge(two)
    whole.close()
    one.close()
    weights = one.decide(table)["weight"]
    assert weights.equals(whole.decide(table)["weight"])
    assert 0 < weights.null_count < 100


def test_must_learn__only_where_faces_are_compared() -> None:
    alone = SelectConfig(duplicates=False, weights="one")
    point = OperatingPoint(label_names=NAMES)
    assert not Judge(point, alone).must_learn
    for more in ({"duplicates": True}, {"weights": "softmatch"}, {"group_cap": 1}):
        assert Judge(point, alone.model_copy(update=more)).must_learn
