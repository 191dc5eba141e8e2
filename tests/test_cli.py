"""Proves the command's verbs, exit codes and that a dry run leaves no trace."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import omnifer

from pipeline import __version__, cli, doctor
from pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
OTHERS = {
    *("run", "submit", "plan", "inspect", "predict", "detect", "export", "lineage", "explain"),
    *("active", "annotate", "forget", "doctor"),
}


def test_verbs__one_per_stage_in_the_order_of_the_flow() -> None:
    assert list(cli.STAGE_HELP) == list(STAGES)


def test_verbs__those_and_no_others() -> None:
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert verbs == {*STAGES, *OTHERS}
    shown = omnifer("--help").out
    assert all(f" {verb} " in shown for verb in verbs)


@pytest.mark.parametrize("verb", ["train", "serve", "relabel"])
def test_verbs__unknown_one_is_two(verb: str) -> None:
    ended = omnifer(verb)
    assert ended.code == 2
    assert verb in ended.err


def test_version() -> None:
    assert omnifer("--version").out.strip() == f"omnifer {__version__}"


def test_start__imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'faiss', 'timm', 'pyarrow'}"
    code = f"import sys, pipeline.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exit_code__of_the_process_itself(tmp_path: Path) -> None:
    gone = tmp_path / "gone.yaml"
    command = [sys.executable, "-m", "pipeline.cli", "run", str(gone)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"omnifer: {gone}: no such recipe (No such file or directory)\n"


def test_exit_code__what_the_disk_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = omnifer("run", DEMO, "--run", "/proc/omnifer/run")
    assert ended.code == 1
    assert re.fullmatch(r"omnifer: /proc/omnifer/run/\S+: cannot be written there\n", ended.err)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")

    monkeypatch.setattr(cli, "app", full)
    ended = omnifer("doctor")
    assert (ended.code, ended.err) == (1, "omnifer: /dev/full: No space left on device\n")


@pytest.mark.parametrize("verb", ["run", "survey", "report"])
def test_exit_code__missing_recipe(verb: str, tmp_path: Path) -> None:
    ended = omnifer(verb, tmp_path / "gone.yaml")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "gone.yaml: no such recipe" in ended.err


def test_exit_code__faults_of_a_recipe_one_line_each(tmp_path: Path) -> None:
    sets = ("--set", "sed=1", "--set", "guard.neighbours=2")
    ended = omnifer("run", DEMO, *sets, "--run", tmp_path / "run")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "omnifer: demo.yaml: unknown key 'guard.neighbours'; did you mean 'neighbors'?",
        "omnifer: demo.yaml: unknown key 'sed'; did you mean 'seed'?",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_until__unknown_stage_before_anything_is_made(dry: list[str], tmp_path: Path) -> None:
    ended = omnifer("run", DEMO, *dry, "--until", "evalute", "--run", tmp_path / "run")
    assert ended.code == 2
    assert ended.err == "omnifer: --until: no stage 'evalute'; did you mean 'evaluate'?\n"
    assert not (tmp_path / "run").exists()


def test_exit_code__run_failed_is_one(tmp_path: Path) -> None:
    sets = ("--set", "tracking.uri=off")
    ended = omnifer("select", DEMO, *sets, "--run", tmp_path / "run")
    assert ended.code == 1
    assert ended.err.endswith("stage survey has not been run; run `omnifer survey` first\n")
    assert ended.err.count("\n") == 1


def test_exit_code__our_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Finding]:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "checks", broken)
    with pytest.raises(ZeroDivisionError):
        omnifer("doctor")


def test_dry_run__reads_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "name: small\n"
        "labeled: {kind: folder, path: /nowhere/labeled}\n"
        "pool: [{kind: parquet, name: big, path: s3://nowhere/faces}]\n"
        "removals: /nowhere/removals.txt\n"
    )
    monkeypatch.chdir(tmp_path)
    ended = omnifer("run", file, "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    assert [line for line in STAGES if line not in ended.out] == []
    assert "big (parquet)" in ended.out
    assert "run folder: runs/small" in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_dry_run__a_changed_setting_shows_in_the_stages_it_touches() -> None:
    def rows(*args: object) -> dict[str, str]:
        lines = [line.replace("│", " ").split() for line in omnifer(*args).out.splitlines()]
        return {words[0]: words[-1] for words in lines if words and words[0] in STAGES}

    before = rows("run", DEMO, "--dry-run")
    after = rows("run", DEMO, "--dry-run", "--set", "score.neighbors=3")
    assert list(before) == list(STAGES)
    assert {name for name in STAGES if before[name] != after[name]} == {"score"}
    assert list(rows("run", DEMO, "--dry-run", "--until", "teach"))[-1] == "teach"


@pytest.mark.parametrize("good", [True, False])
def test_doctor__exit_code(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [doctor.Finding("ray", True, "2"), doctor.Finding("disk", good, "[1 GiB]")]
    monkeypatch.setattr(doctor, "checks", lambda: found)
    ended = omnifer("doctor")
    assert ended.code == (0 if good else 1)
    assert "[1 GiB]" in ended.out
    assert ("PROBLEM" in ended.out) is not good
