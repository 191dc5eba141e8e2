"""Proves what a job takes along, what it is called, and how its log and exit code come back."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import requests
from ray.job_submission import JobStatus

from pipeline import submitting
from pipeline.claim import WHOLE, Part
from pipeline.errors import ConfigError, RunError
from pipeline.recipe import Recipe, load, variables
from pipeline.storage import location

DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load(DEMO)


def asked(recipe: Recipe, run: str = "s3://b/run", **changed: object) -> submitting.Asked:
    return submitting.Asked(recipe, DEMO, location(run), **changed)  # type: ignore[arg-type]


def test_stem__is_of_the_work_and_nothing_else(demo: Recipe) -> None:
    first = asked(demo)
    assert first.stem == asked(demo, options=("--set=seed=1",)).stem
    assert first.stem.startswith("demo-run-")
    others = [
        asked(demo, "s3://b/other"),
        asked(demo, verb="embed"),
        asked(demo, verb="embed", part=Part(1, 2)),
        asked(demo, verb="embed", part=Part(2, 2)),
    ]
    assert len({first.stem, *(one.stem for one in others)}) == 5


def test_stem__fits_a_url(demo: Recipe) -> None:
    named = demo.model_copy(update={"name": "my faces/2 / ü"})
    assert asked(named).stem.rpartition("-")[0] == "my-faces-2--run"


def test_next_id__follows_what_runs_and_counts_what_ended() -> None:
    assert submitting.next_id("a-1f", []) == ("a-1f-1", False)
    assert submitting.next_id("a-1f", [("a-1f-1", True), ("a-1f-10", True)]) == ("a-1f-11", False)
    assert submitting.next_id("a-1f", [("a-1f-1", True), ("a-1f-2", False)]) == ("a-1f-2", True)
    strange = [("a-1f-2-9", False), ("xa-1f-3", False), ("a.1f-4", False), ("raysubmit_1", False)]
    assert submitting.next_id("a-1f", strange) == ("a-1f-1", False)


def test_entrypoint__is_quoted(demo: Recipe) -> None:
    job = asked(demo, "s3://b/a b", verb="embed", part=Part(1, 4), options=("--set=a=$(id)",))
    assert job.entrypoint == (
        "python -m pipeline.cli embed demo.yaml --run 's3://b/a b' --part 1/4 '--set=a=$(id)'"
    )


@pytest.mark.parametrize("run", [None, "runs/demo"])
def test_ask__a_relative_run_folder_is_nowhere(demo: Recipe, run: str | None) -> None:
    with pytest.raises(ConfigError, match="'runs/demo' is relative"):
        submitting.ask(demo, DEMO, run, "run", WHOLE, ())


def checkout(root: Path) -> None:
    """Tracked, ignored and merely present files."""
    files = {
        "pipeline/a.py": "a",
        "pipeline/deep/b.css": "bb",
        "pipeline/gone.py": "",
        "jobs/run.py": "r",
        "tests/test_a.py": "t",
        "pyproject.toml": "p",
        ".gitignore": "*.env\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "pipeline/gone.py").unlink()
    (root / "pipeline/new.py").write_text("n")
    (root / "pipeline/notes.txt").write_text("private")
    (root / "pipeline/secret.env").write_text("S3cret")
    (root / "secrets.json").write_text("S3cret")


def sent(root: Path) -> set[str]:
    return {str(at.relative_to(root)) for at in root.rglob("*") if at.is_file()}


def test_package__takes_what_git_tracks(tmp_path: Path) -> None:
    checkout(tmp_path / "here")
    recipe = tmp_path / "elsewhere.yaml"
    recipe.write_text("name: x")
    count, size = submitting.package(tmp_path / "here", recipe, tmp_path / "job")
    expected = {"pipeline/a.py", "pipeline/deep/b.css", "jobs/run.py", "pyproject.toml"}
    assert sent(tmp_path / "job") == {*expected, "elsewhere.yaml"}
    assert (count, size) == (5, len("a" + "bb" + "r" + "p" + "name: x"))
    assert submitting.untracked(tmp_path / "here") == ["pipeline/new.py"]


def test_package__of_an_installed_package(tmp_path: Path) -> None:
    for name in ("pipeline/a.py", "pipeline/__pycache__/a.pyc", "other/b.py"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text("x")
    submitting.package(tmp_path / "site", DEMO, tmp_path / "job")
    assert sent(tmp_path / "job") == {"pipeline/a.py", "demo.yaml"}


def test_package__of_this_project_is_small(tmp_path: Path) -> None:
    root = DEMO.parents[2]
    count, size = submitting.package(root, DEMO, tmp_path)
    assert size < 5e6
    assert count > 50
    assert {at.name for at in tmp_path.iterdir()} == {*submitting.SENT, "demo.yaml"}


def test_variables__only_those_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("# $COMMENT\nname: $OMNI_A\npool: [{kind: synthetic, name: 'x-${OMNI_B}'}]\n")
    for name in ("OMNI_A", "OMNI_B", "OMNI_C", "OMNI_SECRET"):
        monkeypatch.setenv(name, name.lower())
    assert variables(file, ["run=/r/$OMNI_C"]) == {
        "OMNI_A": "omni_a",
        "OMNI_B": "omni_b",
        "OMNI_C": "omni_c",
    }


@dataclass
class Cluster:
    """A job server that breaks the line after `cut` pieces of log, then holds."""

    log: list[str]
    status: JobStatus
    code: int | None = None
    cut: int | None = None
    refuse: list[str] = field(default_factory=list)
    submitted: list[dict[str, object]] = field(default_factory=list)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        cut, self.cut = self.cut, None
        for piece in self.log[:cut]:
            yield piece
        if cut is not None:
            raise RuntimeError("connection closed")

    def get_job_info(self, job: str) -> SimpleNamespace:
        running = self.cut is not None
        status = JobStatus.RUNNING if running else self.status
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="why\nmore")

    def submit_job(self, **asked: object) -> object:
        if self.refuse:
            raise RuntimeError(self.refuse.pop(0))
        self.submitted.append(asked)
        return asked["submission_id"]


@pytest.mark.parametrize(
    ("status", "code", "left"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 1),
    ],
)
def test_follow__ends_with_the_code_of_the_job(
    capsys: pytest.CaptureFixture[str], status: JobStatus, code: int | None, left: int
) -> None:
    assert submitting.follow(Cluster(["a\n"], status, code), "job", pause=0) == left
    out = capsys.readouterr().out
    assert out.startswith("a\n")
    assert ("exit code" in out) == (left != 0)


def test_follow__a_broken_line_repeats_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Twice(Cluster):
        def get_job_info(self, job: str) -> SimpleNamespace:
            info = super().get_job_info(job)
            if not hasattr(self, "asked"):
                self.asked = True
                info.status = JobStatus.RUNNING
            return info

    cluster = Twice(["one\n", "two\n", "three\n"], JobStatus.SUCCEEDED, cut=2)
    assert submitting.follow(cluster, "job", pause=0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "lost the log" not in line] == ["one", "two", "three"]
    assert sum("lost the log" in line for line in lines) == 1


@pytest.mark.parametrize(
    "broken", [requests.ConnectionError("gone"), aiohttp.ServerDisconnectedError()]
)
def test_follow__a_server_that_is_away_for_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: Exception
) -> None:
    monkeypatch.setattr(submitting, "LOST_TIMES", 3)

    class Away(Cluster):
        times = 2

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            if self.times:
                raise broken
            yield "a\n"

        def get_job_info(self, job: str) -> SimpleNamespace:
            if self.times:
                self.times -= 1
                raise broken
            return super().get_job_info(job)

    away = Away([], JobStatus.SUCCEEDED)
    assert submitting.follow(away, "job", pause=0) == 0
    assert capsys.readouterr().out.count("lost the log") == 1
    away.times = 3
    with pytest.raises(RunError, match=r"job: the job server does not answer .* submit again to"):
        submitting.follow(away, "job", pause=0)


def test_submit__what_is_under_way_with_other_options(
    demo: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked(demo)

    class Busy(Cluster):
        def list_jobs(self) -> list[SimpleNamespace]:
            if self.refuse:
                raise requests.ConnectionError("gone")
            first, status = f"{job.stem}-1", JobStatus.RUNNING
            return [SimpleNamespace(submission_id=first, status=status, entrypoint=job.entrypoint)]

    busy = Busy(["a\n"], JobStatus.SUCCEEDED)
    monkeypatch.setattr(submitting, "_client", lambda server: busy)
    monkeypatch.setattr(submitting.access, "refusal", lambda server: None)
    assert submitting.submit(job, "http://h:1", {}) == 0
    with pytest.raises(ConfigError, match=r"-1 is under way with other options: .*; submit those"):
        submitting.submit(asked(demo, options=("--fresh",)), "http://h:1", {})
    busy.refuse = ["x"]
    with pytest.raises(RunError, match=r"^http://h:1: gone; submit again$"):
        submitting.submit(job, "http://h:1", {})


def send(cluster: Cluster, demo: Recipe, folder: Path) -> str:
    return submitting._send(cluster, asked(demo), "demo-1", folder, {"A": "b"}, 0.5, 0)


def test_send__waits_for_the_agent(
    demo: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting.time, "sleep", lambda _: None)
    cluster = Cluster([], JobStatus.PENDING, refuse=["No available agent to submit job"])
    assert send(cluster, demo, tmp_path) == "demo-1"
    (job,) = cluster.submitted
    assert job["runtime_env"] == {"working_dir": str(tmp_path), "env_vars": {"A": "b"}}
    assert (job["entrypoint_num_cpus"], job["entrypoint_num_gpus"]) == (0.5, 0)


def test_send__somebody_was_faster_or_the_server_says_no(demo: Recipe, tmp_path: Path) -> None:
    taken = Cluster([], JobStatus.PENDING, refuse=["Job with submission_id x already exists."])
    assert send(taken, demo, tmp_path / "a") == "demo-1"
    assert taken.submitted == []
    with pytest.raises(RunError, match="demo-1 was refused: too large"):
        send(Cluster([], JobStatus.PENDING, refuse=["too\nlarge"]), demo, tmp_path / "b")
