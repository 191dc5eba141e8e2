"""Splits keep groups and copies together, hit the rounded counts, and depend on the seed only."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SourceError
from pipeline.labeled.records import RECORDS
from pipeline.labeled.splits import (
    DevelopmentConfig,
    draw_development,
    draw_share,
    parted_groups,
    split,
    unit_keys,
)

NAMES = ("neutral", "fear", "anger")


def records(labels, *, roles=None, groups=None, images=None):
    n = len(labels)
    columns = [
        [f"x#{i}" for i in range(n)],
        roles or ["train"] * n,
        labels,
        [None] * n,
        groups or [None] * n,
        images or [b"%d" % i for i in range(n)],
        *[[None] * n] * (len(RECORDS) - 6),
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, RECORDS, strict=True)], RECORDS)


def run(table, **options):
    given = {"fraction": None, "validation": None, "development": None, "seed": 0, **options}
    return split(table, NAMES, **given)


def count(done, table, role):
    pairs = list(zip(done.roles, table["label"].to_pylist(), strict=True))
    return [pairs.count((role, name)) for name in NAMES]


def test_split__fraction_rounds_per_class_and_takes_at_least_one():
    table = records(["neutral"] * 95 + ["fear"] * 24 + ["anger"] * 3)
    done = run(table, fraction=0.1)
    assert count(done, table, "train") == [10, 2, 1]
    assert count(done, table, "rest") == [85, 22, 2]


def test_split__seeds_differ_and_repeat():
    table = records(["neutral"] * 50 + ["fear"] * 50)
    assert run(table, fraction=0.5, seed=1).roles == run(table, fraction=0.5, seed=1).roles
    assert run(table, fraction=0.5, seed=1).roles != run(table, fraction=0.5, seed=2).roles


def test_split__does_not_depend_on_row_order():
    table = records(["neutral"] * 50 + ["fear"] * 50)
    order = np.random.default_rng(0).permutation(100)
    shuffled = run(table.take(pa.array(order)), fraction=0.3).roles
    assert [run(table, fraction=0.3).roles[i] for i in order] == shuffled


def test_split__larger_fraction_holds_the_smaller():
    table = records(["neutral"] * 60 + ["fear"] * 40)
    small, large = (run(table, fraction=f).roles for f in (0.2, 0.5))
    assert all(b == "train" for a, b in zip(small, large, strict=True) if a == "train")


def test_split__groups_are_never_parted():
    rng = np.random.default_rng(0)
    labels = rng.choice(NAMES, size=600, p=[0.7, 0.2, 0.1]).tolist()
    groups = [f"p{g}" for g in rng.integers(0, 120, size=600)]
    table = records(labels, groups=groups)
    done = run(table, fraction=0.4, validation=0.25)
    where = {}
    for group, role in zip(groups, done.roles, strict=True):
        where.setdefault(group, set()).add(role)
    assert all(len(roles) == 1 for roles in where.values())
    for name, n in zip(NAMES, count(done, table, "rest"), strict=True):
        assert n == pytest.approx(0.6 * labels.count(name), abs=3)


def test_parted_groups__says_which_splits_share_how_many_faces():
    groups = ["a", "a", "b", "c", "c", "c", None, "d", None]
    roles = ["train", "test", "rest", "test", "validation", "test", "test", "test", "train"]
    lines = parted_groups([*groups, "b"], [*roles, "test"])
    assert [line.partition("; ")[0].partition(", so")[0] for line in lines] == [
        "2 group(s), such as 'a', are in both train and test: "
        "2 of 6 test faces share a person or a video with train",
        "1 group(s), such as 'c', are in both validation and test: "
        "2 of 6 test faces share a person or a video with validation",
    ]
    assert parted_groups(groups[:1] * 3, ["train", "rest", None]) == []


def test_split__copies_are_never_parted():
    images = [b"%d" % (i // 2) for i in range(80)]
    table = records(["neutral"] * 40 + ["fear"] * 40, images=images)
    done = run(table, fraction=0.5, validation=0.2)
    assert all(done.roles[i] == done.roles[i + 1] for i in range(0, 80, 2))


def test_split__unlabeled_training_faces_are_rest():
    table = records(["neutral", None, "fear", None], roles=["train", "train", "train", "test"])
    done = run(table)
    assert done.roles == ["train", "rest", "train", None]
    assert done.left_out == {"no_label": 1}


def test_split__rest_faces_of_validation_people_leave():
    labels = ["neutral"] * 10 + [None] * 10
    table = records(labels, groups=[f"p{i % 10}" for i in range(20)])
    done = run(table, validation=0.3)
    held = {i for i, role in enumerate(done.roles) if role == "validation"}
    assert len(held) == 3
    assert {i for i, role in enumerate(done.roles) if role is None} == {i + 10 for i in held}
    assert done.left_out == {"shares_unit_with_validation": 3}


def test_split__development_is_the_same_for_every_seed_and_fraction():
    table = records(["neutral"] * 100 + ["fear"] * 100 + [None] * 10 + ["fear"] * 5,
                    roles=["train"] * 210 + ["test"] * 5)  # fmt: skip
    config = DevelopmentConfig(count=30, role="test")
    held = [
        [i for i, role in enumerate(run(table, development=config, seed=s, fraction=f).roles)
         if role == "test"]
        for s, f in ((0, None), (1, 0.1), (2, 0.5))
    ]  # fmt: skip
    assert len(held[0]) == 30
    assert held[0] == held[1] == held[2]
    assert run(table, development=config).left_out == {"other_test": 5}


def test_split__development_takes_unlabeled_copies_out():
    images = [b"%d" % (i % 10) for i in range(20)]
    table = records(["neutral"] * 10 + [None] * 10, images=images)
    done = run(table, development=DevelopmentConfig(count=4))
    out = [i for i, role in enumerate(done.roles) if role is None]
    assert len(out) == 8
    assert {i % 10 for i in out} == set(out[:4])
    assert done.left_out == {"development": 8}


def test_draw_development__not_enough_faces():
    with pytest.raises(SourceError, match="5 faces asked for, 3 found among 3"):
        draw_development(np.array(["a", "b", "c"]), np.ones(3, bool), DevelopmentConfig(count=5))


def test_draw_share__a_class_in_one_large_unit_is_still_drawn():
    codes = np.array([0] * 40 + [1] * 10)
    units = np.array([str(i) for i in range(40)] + ["big"] * 10)
    drawn = draw_share(codes, units, np.ones(50, bool), 0.1, "s")
    assert drawn[40:].all()
    assert drawn[:40].sum() == 4


def test_draw_share__mixed_units_do_not_overshoot_where_others_fit():
    codes = np.array([0, 1] * 50 + [0] * 100 + [1] * 10)
    units = np.array([str(i // 2) for i in range(100)] + [f"s{i}" for i in range(110)])
    drawn = draw_share(codes, units, np.ones(210, bool), 0.1, "s")
    assert np.bincount(codes[drawn]).tolist() == [15, 6]


def test_split__no_labeled_face():
    with pytest.raises(SourceError, match="no labeled training face among 2 rows"):
        run(records([None, None]))


def test_unit_keys__group_before_bytes():
    keys = unit_keys(records(["fear"] * 4, groups=["a", "a", None, None], images=[b"x"] * 4))
    assert keys[0] == keys[1] != keys[2] == keys[3]
