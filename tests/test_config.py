"""Proves that a person learns every fault of a configuration at once, with the nearest spelling."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from pipeline.config import Config, digest, filled, nearest, parse
from pipeline.errors import ConfigError


class Leaf(Config):
    width: int = Field(default=1, ge=1)
    color: Literal["gray", "rgb"] = "gray"


class Disk(Config):
    kind: Literal["disk"] = "disk"
    folder: str
    crop: Leaf = Leaf()


class Cloud(Config):
    kind: Literal["cloud"] = "cloud"
    bucket: str
    region: str = "here"


class Listed(Config):
    items: tuple[Leaf, ...] = Field(min_length=1)


class Whole(Config):
    name: str
    share: float = Field(default=0.5, gt=0, le=1)
    leaf: Leaf | None = None
    pool: tuple[Annotated[Disk | Cloud, Field(discriminator="kind")], ...] = ()


def faults(values: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Whole, values, where="x.yaml")
    return str(caught.value).splitlines()


def test_parse__good_values_come_out_frozen() -> None:
    whole = parse(Whole, {"name": "a", "pool": [{"kind": "cloud", "bucket": "b"}]})
    assert whole.pool == (Cloud(bucket="b"),)
    with pytest.raises(ValidationError, match="frozen"):
        whole.name = "b"  # type: ignore[misc]


def test_parse__all_faults_at_once() -> None:
    found = faults({"shares": 1, "share": 2, "leaf": {"width": 0, "color": "green"}})
    assert len(found) == 5
    assert "x.yaml: 'name' is required" in found
    assert "x.yaml: unknown key 'shares'; did you mean 'share'?" in found
    assert any(line.startswith("x.yaml: share: ") and "(given 2)" in line for line in found)
    assert any(line.startswith("x.yaml: leaf.width: ") for line in found)
    assert any("'gray' or 'rgb' (given 'green')" in line for line in found)


@pytest.mark.parametrize(
    ("values", "place", "hint"),
    [
        ({"nmae": 1}, "nmae", "name"),
        ({"leaf": {"widht": 1}}, "leaf.widht", "width"),
        ({"pool": [{"kind": "disk", "folder": "f", "crp": {}}]}, "pool.0.disk.crp", "crop"),
        (
            {"pool": [{"kind": "cloud", "bucket": "b", "regoin": 1}]},
            "pool.0.cloud.regoin",
            "region",
        ),
        (
            {"pool": [{"kind": "disk", "folder": "f", "crop": {"colour": 1}}]},
            "pool.0.disk.crop.colour",
            "color",
        ),
    ],
    ids=["top", "optional model", "union", "other kind", "model in a union in a list"],
)
def test_parse__nearest_key_at_any_depth(values: dict[str, object], place: str, hint: str) -> None:
    assert faults({"name": "a", **values}) == [
        f"x.yaml: unknown key {place!r}; did you mean {hint!r}?"
    ]


def test_parse__keys_of_the_other_kinds_are_not_offered() -> None:
    found = faults({"name": "a", "pool": [{"kind": "disk", "folder": "f", "buckets": 1}]})
    assert "did you mean 'bucket'" not in found[0]


def test_parse__unknown_kind_names_the_kinds() -> None:
    (line,) = faults({"name": "a", "pool": [{"kind": "disc", "folder": "f"}]})
    assert line.startswith("x.yaml: pool.0: ")
    assert "'disk'" in line
    assert "'cloud'" in line


def test_parse__a_faulty_item_does_not_also_make_its_list_too_short() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Listed, {"items": [{"widht": 1}]})
    assert str(caught.value) == "recipe: unknown key 'items.0.widht'; did you mean 'width'?"
    with pytest.raises(ConfigError, match="items: Tuple should have at least 1 item"):
        parse(Listed, {"items": []})


def test_parse__long_values_are_cut() -> None:
    (line,) = faults({"name": list(range(1000))})
    assert line.endswith("...)")
    assert len(line) < 160


def test_nearest__lists_what_is_known_where_nothing_is_near() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "; known: alpha, beta"
    assert nearest("alpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
    assert nearest("zzz", []) == ""


def test_filled__names_what_is_not_named_and_leaves_all_else() -> None:
    assert filled({"name": "a"}, name="b", width=2) == {"name": "a", "width": 2}
    assert filled({"width": None}, width=2) == {"width": None}
    finished = Config()
    assert filled(finished, width=2) is finished


def test_digest__order_of_keys_does_not_count_and_values_do() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}]
    assert len({digest(value) for value in different}) == len(different)
    assert digest([1, 2]) != digest([2, 1])
