"""Proves what a stage's identity is made of: each setting counts where it matters, nowhere else."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from pipeline.config import digest, parse
from pipeline.errors import IdentityError, SourceError
from pipeline.job import SETTINGS, Job, file_stamp, settings
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import STAGES
from pipeline.storage import location
from pipeline.tracking import OFF, connect

SMALL = {
    "name": "small",
    "labeled": {"kind": "synthetic", "count": 40, "test_count": 20},
    "pool": [{"kind": "synthetic", "name": "drawn", "count": 100}],
    "search": {"trials": 2},
    "distill": {"ipc": 1},
}


def job(at: Path, **changed: object) -> Job:
    root = location(at)
    recipe = parse(Recipe, {**SMALL, **changed})
    return Job(recipe, Run(root), connect(OFF, "x", root))


def test_settings__cover_every_stage_but_the_report() -> None:
    assert set(STAGES) - set(SETTINGS) == {"report"}


def test_settings__name_fields_of_the_recipe() -> None:
    named = {name for names in SETTINGS.values() for name in names}
    assert named <= set(Recipe.model_fields)


def test_settings__what_no_identity_holds_does_not_change_results() -> None:
    named = {name for names in SETTINGS.values() for name in names}
    free = set(Recipe.model_fields) - named
    assert free == {
        *("name", "run", "tracking", "report", "stream", "train", "error_budget"),
        "survey",  # threads
        "embed",  # enters as its profile: threads, pools and batch sizes do not
        "removals",  # enters as the plan and as the digest of the faces that are left
    }


@pytest.mark.parametrize(
    ("changed", "touched"),
    [
        (
            {"seed": 1},
            {
                "clusters",
                "labeled",
                "pretrain",
                "teach",
                "search",
                "experts",
                "distill",
                "student",
                "student_share",
                "control_a",
                "control_b",
                "tuned",
            },
        ),
        ({"slice_faces": 8}, {"survey"}),
        ({"guard": {"neighbors": 7}}, {"annotated", "guard", "twins"}),
        ({"score": {"neighbors": 7}}, {"score"}),
        ({"student": {"steps": 7}}, {"student", "student_share"}),
        ({"mined_share": 0.1}, {"student_share"}),
        ({"stream": {"object_store_mb": 99}}, set()),
        ({"name": "other"}, set()),
    ],
)
def test_identity__changes_where_the_setting_matters(
    tmp_path: Path, changed: dict[str, object], touched: set[str]
) -> None:
    one, other = job(tmp_path), job(tmp_path, **changed)
    differ = {name for name in SETTINGS if one.identity(name, {}) != other.identity(name, {})}
    assert differ == touched


def test_identity__holds_inputs_and_the_schema_version(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert one.identity("mine", {"select": "a"}) == {"inputs": {"select": "a"}, "schema": 1}
    assert digest(one.identity("mine", {"select": "b"})) != digest(
        one.identity("mine", {"select": "a"})
    )


def test_identity__hidden_settings_do_not_count(tmp_path: Path) -> None:
    labeled = {"kind": "synthetic", "count": 40}
    development = {"count": 4, "role": "test"}
    one = job(tmp_path, labeled={**labeled, "development": development})
    other = job(tmp_path, labeled={**labeled, "development": {**development, "role": "exclude"}})
    hide = ("labeled.test", "labeled.development.role")
    assert one.identity("labeled", {}) != other.identity("labeled", {})
    assert one.identity("labeled", {}, hide=hide) == other.identity("labeled", {}, hide=hide)


def test_identity__hiding_below_what_is_off_is_no_error(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert one.recipe.labeled.development is None
    assert one.identity("labeled", {}, hide=["labeled.development.role"])["labeled"]


def test_identity__hiding_leaves_the_recipe_alone(tmp_path: Path) -> None:
    one = job(tmp_path)
    before = settings(one.recipe, "labeled")
    one.identity("labeled", {}, hide=["labeled.count"])
    assert settings(one.recipe, "labeled") == before


def test_open__changed_inputs_need_no_fresh_and_changed_settings_do(tmp_path: Path) -> None:
    first = job(tmp_path).open("score", {"embed": "a"})
    again = job(tmp_path).open("score", {"embed": "b"})
    assert first.dir != again.dir
    with pytest.raises(IdentityError, match=r"score\.neighbors: \d+ -> 7"):
        job(tmp_path, score={"neighbors": 7}).open("score", {"embed": "b"})


def test_open__retargeted_settings_need_no_fresh(tmp_path: Path) -> None:
    job(tmp_path).open("test", {})
    development = {"count": 4, "role": "test"}
    other = job(tmp_path, labeled={**SMALL["labeled"], "development": development})
    assert other.open("test", {}, retarget=["labeled.development"]).done is None


def test_file_stamp__changes_with_content_and_place(tmp_path: Path) -> None:
    one, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("x")
    other.write_text("x")
    before = file_stamp(str(one))
    assert file_stamp(str(one)) == before
    assert file_stamp(str(other)) != before
    state = one.stat()
    one.write_text("y")
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert file_stamp(str(one)) != before


def test_file_stamp__missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.csv"):
        file_stamp(str(tmp_path / "gone.csv"))


def test_command__is_what_a_shell_takes_and_the_report_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path)
    sets = ["r.yaml", "--set", "pool=[{kind: synthetic, count: 5}]", "--run", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["/bin/omnifer", "report", *sets])
    assert shlex.split(made.command) == ["omnifer", "run", *sets]
    secret = "tracking.uri=http://me:hush@host"
    monkeypatch.setattr("sys.argv", ["/bin/omnifer", "run", *sets, "--set", secret])
    made.note_command()
    monkeypatch.setattr("sys.argv", ["/bin/omnifer", "report", "r.yaml"])
    expected = ["omnifer", "run", *sets, "--set", "tracking.uri=http://host"]
    assert shlex.split(job(tmp_path).command) == expected
