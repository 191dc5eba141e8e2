"""Proves that a stage is reused only if it was made from the same things, and refused aloud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import IdentityError, RunError
from pipeline.run import FORGOTTEN_LIST, Run, code_version, open_scratch
from pipeline.storage import location

IDENTITY: dict[str, Any] = {"embed": {"size": 48, "crops": [1, 2]}, "weights": "aa", "test": {}}


def _run(path: Path, *, fresh: bool = False) -> Run:
    return Run(location(path), fresh=fresh)


def test_open__same_identity_continues_then_skips(tmp_path: Path) -> None:
    stage = _run(tmp_path).open("embed", IDENTITY)
    assert stage.done is None
    assert stage.dir.name.startswith("g001-")
    again = _run(tmp_path).open("embed", dict(reversed(IDENTITY.items())))
    assert (again.dir, again.done) == (stage.dir, None)
    made = again.finish("d1", rows=3, at=location("/x"))
    assert (made.digest, made.facts, made.stage) == (
        "d1",
        {"rows": 3, "at": "/x", "seconds": made.facts["seconds"], "code": code_version()},
        "embed",
    )
    assert _run(tmp_path).open("embed", IDENTITY).done == made
    assert _run(tmp_path).artifact("embed") == made


def test_open__other_identity_names_every_field(tmp_path: Path) -> None:
    _run(tmp_path).open("embed", IDENTITY)
    other = {"embed": {"size": 64, "crops": [1, 3]}, "weights": "aa", "half": True, "test": {}}
    with pytest.raises(IdentityError) as caught:
        _run(tmp_path).open("embed", other)
    assert str(caught.value).splitlines()[1:] == [
        "  embed.crops.1: 2 -> 3",
        "  embed.size: 48 -> 64",
        "  half: (absent) -> true",
        "use --fresh to start a new generation (the old one stays), or another run",
    ]


def test_open__fresh_starts_a_generation_and_keeps_the_old(tmp_path: Path) -> None:
    old = _run(tmp_path).open("embed", IDENTITY)
    old.finish("d1")
    changed = IDENTITY | {"weights": "bb"}
    new = _run(tmp_path, fresh=True).open("embed", changed)
    assert new.dir.name.startswith("g002-")
    assert new.done is None
    assert (old.dir / "done.json").exists()
    again = _run(tmp_path, fresh=True).open("embed", changed)
    assert again.dir == new.dir  # --fresh given once more after a kill continues
    with pytest.raises(RunError, match=r"started but not finished; run `omnifer embed` first"):
        _run(tmp_path).artifact("embed")


def test_open__retarget_moves_on_and_leads_back(tmp_path: Path) -> None:
    first = _run(tmp_path).open("guard", {"test": {"path": "a"}, "pool": 1})
    first.finish("g-a")
    moved = _run(tmp_path).open("guard", {"test": {"path": "b"}, "pool": 1}, retarget=["test"])
    assert moved.done is None
    assert moved.dir != first.dir
    home = _run(tmp_path).open("guard", {"test": {"path": "a"}, "pool": 1}, retarget=["test"])
    assert home.dir == first.dir
    assert home.done is not None
    assert home.done.digest == "g-a"


def test_open__a_plan_finishes_on_its_own(tmp_path: Path) -> None:
    one = _run(tmp_path).open("survey", IDENTITY, plan="a" * 64)
    one.finish("all")
    other = _run(tmp_path).open("survey", IDENTITY, plan="b" * 64)
    assert (other.dir, other.done) == (one.dir, None)
    with pytest.raises(RunError, match="not finished"):
        _run(tmp_path).artifact("survey")
    other.finish("fewer")
    assert _run(tmp_path).artifact("survey").digest == "fewer"
    again = _run(tmp_path).open("survey", IDENTITY, plan="a" * 64)
    assert again.done is not None
    assert again.done.digest == "all"


@pytest.mark.parametrize("retarget", [["test"], ["tests.path", "pool"]])
def test_open__retarget_covers_named_fields_only(tmp_path: Path, retarget: list[str]) -> None:
    run = _run(tmp_path)
    run.open("guard", {"tests": {"path": "a"}, "pool": 1, "cut": 1})
    with pytest.raises(IdentityError):
        run.open("guard", {"tests": {"path": "b"}, "pool": 2, "cut": 2}, retarget=retarget)


def test_open__firm_fields_stay_below_what_may_change(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.open("embed", {"inputs": {"weights": "a", "profile": {"batch": 64}}})
    other = {"inputs": {"weights": "b", "profile": {"batch": 64}}}
    moved = run.open("embed", other, retarget=["inputs"], firm=["inputs.profile"])
    assert moved.dir.name.startswith("g002-")
    other = {"inputs": {"weights": "b", "profile": {"batch": 32}}}
    with pytest.raises(IdentityError, match=r"inputs\.profile\.batch: 64 -> 32\nuse --fresh"):
        run.open("embed", other, retarget=["inputs"], firm=["inputs.profile"])


def test_open__killed_before_current_was_written(tmp_path: Path) -> None:
    stage = _run(tmp_path).open("embed", IDENTITY)
    (tmp_path / "embed/current.json").unlink()
    assert _run(tmp_path).open("embed", IDENTITY).dir == stage.dir
    (tmp_path / "embed/current.json").unlink()
    assert _run(tmp_path).open("embed", {"other": 1}).dir.name.startswith("g002-")


def test_open__order_of_a_set_does_not_count(tmp_path: Path) -> None:
    stage = _run(tmp_path).open("embed", {"ids": {"a", "b", "c"}})
    assert stage.identity == {"ids": ["a", "b", "c"]}


def test_finish__the_first_is_final(tmp_path: Path) -> None:
    one = _run(tmp_path).open("teach", IDENTITY)
    two = _run(tmp_path).open("teach", IDENTITY)
    one.finish("first")
    assert two.finish("second").digest == "first"


def test_latest__none_before_it_is_finished(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert run.latest("embed") is None
    stage = run.open("embed", IDENTITY)
    assert run.latest("embed") is None
    assert stage.finish("d1") == run.latest("embed") == run.artifact("embed")


def test_generations__finished_ones_oldest_first(tmp_path: Path) -> None:
    run = _run(tmp_path, fresh=True)
    assert run.generations("embed") == []
    made = [run.open("embed", {"size": size}) for size in (1, 2, 3)]
    for stage in (made[2], made[0]):
        stage.finish(f"d{stage.identity['size']}")
    assert [one.digest for one in run.generations("embed")] == ["d1", "d3"]


def test_artifact__names_the_verb_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"stage teach has not been run; run `omnifer teach` first"):
        _run(tmp_path).artifact("teach")
    assert list(tmp_path.iterdir()) == []  # asking writes nothing


def test_recipe__keeps_history_without_repeats(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for resolved in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}):
        run.recipe(resolved)
    history = [c for c in run.root.children() if c.name.startswith("recipe-")]
    assert [c.name for c in history] == [f"recipe-000{i}.json" for i in (1, 2, 3)]
    assert [c.read_json()["a"] for c in history] == [1, 2, 1]


def test_scratch__is_local_for_any_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert _run(tmp_path).scratch == tmp_path / "cache"
    with s3_bucket() as bucket:
        one, two = (Run(bucket / name).scratch for name in ("one", "two"))
    assert one != two
    assert one.parent == tmp_path / "tmp"
    assert one.is_dir()


def test_scratch__a_node_keeps_none_of_before_faces_were_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with s3_bucket() as bucket:
        run, other = Run(bucket / "one"), Run(bucket / "two")
        homes = [other.scratch]
        for forgotten in (None, ["aa"], ["aa", "bb"]):
            if forgotten is not None:
                (run.root / FORGOTTEN_LIST).write_json(forgotten)
            homes.append(run.scratch)
            (homes[-1] / "pool-1").mkdir()
            assert run.scratch == homes[-1]
    (tmp_path / f"{homes[1].name}-mine").mkdir()
    assert len(set(homes)) == 4
    assert [home.exists() for home in homes] == [True, False, False, True]
    # A node that trains is told no more than the folder.
    homes[1].mkdir()
    assert open_scratch(homes[3]) == homes[3]
    assert {at.name for at in tmp_path.iterdir()} == {
        homes[0].name, homes[3].name, f"{homes[1].name}-mine"
    }  # fmt: skip
    assert (homes[3] / "pool-1").is_dir()
