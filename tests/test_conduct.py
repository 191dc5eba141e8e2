"""Proves what a run says: its results in 80 columns, its line per stage, its order of stages."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.s3 import s3_bucket as s3
from rich.console import Console

from pipeline import conduct
from pipeline.claim import WHOLE, claimed
from pipeline.config import parse
from pipeline.errors import ConfigError, RunError
from pipeline.job import Job
from pipeline.recipe import Recipe
from pipeline.run import Artifact
from pipeline.storage import location

RECIPE = {
    "name": "small",
    "labeled": {"kind": "synthetic", "count": 40},
    "pool": [{"kind": "synthetic", "count": 100}],
    "tracking": {"uri": "off"},
}


class Listener:
    """A tracker that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def open(self) -> None:
        self.heard.append("open")

    def close(self, ok: bool) -> None:
        self.heard.append(ok)


def test_driving__a_driver_that_is_refused_says_nothing(tmp_path: Path) -> None:
    run, tracker = SimpleNamespace(root=location(tmp_path)), Listener()
    job: Any = SimpleNamespace(run=run, part=WHOLE, tracker=tracker)
    with (
        claimed(run.root, WHOLE),
        pytest.raises(RunError, match="being worked on"),
        conduct.driving(job),
    ):
        pass
    assert tracker.heard == []  # MLflow's run is the other driver's
    with conduct.driving(job):
        pass
    assert tracker.heard == ["open", True]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.021, "high": value + 0.021}


def metrics(real: bool = False, per_seed: int = 1) -> dict[str, Any]:
    def model(accuracy: float, passes: float) -> dict[str, Any]:
        return {
            "accuracy": interval(accuracy),
            "mean_class_accuracy": interval(accuracy - 0.05),
            "macro_f1": interval(accuracy - 0.04),
            "passes": passes,
        }

    return {
        "models": {
            "teacher": model(0.6, 25_600),
            "control_a": model(0.61, 960_000),
            "control_b": model(0.62, 123_456_789),
            "student": model(0.634, 123_456_789),
        },
        "gain": {
            "over": "control_b",
            "accuracy": {"value": 0.014, "low": -0.003, "high": 0.031},
            "real": real,
            "per_seed": [0.014] * per_seed,
        },
        "pool": {"purity": 0.813, "known": 5_800, "utilization": 0.42, "pool": 6_000},
    }


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return conduct.start(
        parse(Recipe, RECIPE), str(tmp_path / "run"), fresh=False, show_faces=False
    )


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(conduct, "console", Console(file=text, width=80, highlight=False))
    return text


def evaluated(job: Job, found: dict[str, Any]) -> None:
    stage = job.open("evaluate", {})
    (stage.dir / conduct.METRICS_FILE).write_json(found)
    stage.finish("d" * 64)


def test_start__keeps_the_resolved_recipe_and_makes_no_stage(job: Job) -> None:
    root = job.run.root.local_path()
    assert [path.name for path in root.iterdir()] == ["recipe-0001.json"]
    stored = (job.run.root / "recipe-0001.json").read_json()
    assert parse(Recipe, stored) == job.recipe


def test_start__the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = parse(Recipe, {**RECIPE, "run": str(tmp_path / "a")})
    at = [
        conduct.start(recipe, given, fresh=False, show_faces=False).run.root.name
        for given in (None, str(tmp_path / "b"))
    ]
    assert at == ["a", "b"]


def test_show_results__fits_80_columns_with_one_line_per_model(
    job: Job, printed: io.StringIO
) -> None:
    evaluated(job, metrics())
    conduct.show_results(job)
    lines = printed.getvalue().splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in table] == [
        *("teacher", "control A", "control B", "student"),
    ]
    assert "63.40%" in table[-1]
    assert "61.3-65.5" in table[-1]
    assert "123,456,789" in table[-1]
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└") <= 80


def test_show_results__explains_the_second_student_where_there_is_one(
    job: Job, printed: io.StringIO
) -> None:
    found = metrics()
    evaluated(job, found)
    conduct.show_results(job)
    assert "share" not in printed.getvalue()
    found["models"]["student_share"] = found["models"]["student"]
    (job.run.artifact("evaluate").dir / conduct.METRICS_FILE).write_json(found)
    conduct.show_results(job)
    assert printed.getvalue().count("student, share") == 2  # its row, and what it is


def test_show_results__says_gain_purity_utilization_seconds_and_report(
    job: Job, printed: io.StringIO
) -> None:
    evaluated(job, metrics())
    conduct.show_results(job)
    text = " ".join(printed.getvalue().split())
    assert "gain student minus control B, the better control: +1.40 points" in text
    assert "(95 % -0.30 to +3.10)" in text
    assert "purity 81.3% of 5,800 mined faces" in text
    assert "utilization 42.0% of 6,000 faces" in text
    assert re.search(r"evaluate +[0-9.]+ *\n", printed.getvalue())
    assert printed.getvalue().endswith(f"report: {job.run.root / 'report.html'}\n")


def test_run_all__select_ends_with_what_each_class_got(
    job: Job, monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    per_class = {
        "anger": {"selected": 30, "duplicate": 2, "below_confidence": 8},
        "": {"quarantined": 3},
    }
    made = Artifact("select", job.run.root, "abcdef0123456789", {"per_class": per_class})
    monkeypatch.setattr(conduct, "STAGES", {"select": lambda job: made})
    conduct.run_all(job, "select")
    rows = [line.split() for line in printed.getvalue().splitlines()[1:]]
    assert rows == [
        ["class", "pool", "kept", "share", "most", "left", "out", "for"],
        ["anger", "40", "30", "75.0%", "below", "confidence", "(8)"],
        ["none", "3", "0", "0.0%", "quarantined", "(3)"],
    ]


def test_show_results__purity_without_truth_is_unknown(job: Job, printed: io.StringIO) -> None:
    found = metrics()
    found["pool"] |= {"purity": None, "known": 0}
    evaluated(job, found)
    conduct.show_results(job)
    assert "purity       unknown of 0 mined faces" in printed.getvalue()


@pytest.mark.parametrize(
    ("real", "per_seed", "verdict"),
    [
        (False, 1, "one seed is a hint, not a finding"),
        (False, 3, "not shown to be real"),
        (True, 3, None),
    ],
)
def test_show_results__verdict_on_the_gain(
    job: Job, printed: io.StringIO, real: bool, per_seed: int, verdict: str | None
) -> None:
    evaluated(job, metrics(real, per_seed))
    conduct.show_results(job)
    text = " ".join(printed.getvalue().split())
    gain = text[text.index("gain ") : text.index(" purity ")]
    assert gain.endswith(f"; {verdict}" if verdict else ")")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []

    def stage(name: str) -> Any:
        def run(job: Job) -> Artifact | None:
            ran.append(name)
            if name == "teach":
                raise RunError("no")
            if name == "guard":
                return None
            return Artifact(name, job.run.root, "abcdef0123456789", {"rows": 1234, "seconds": 2.0})

        return run

    names = ("survey", "guard", "teach", "embed")
    monkeypatch.setattr(conduct, "STAGES", {name: stage(name) for name in names})
    return ran


def test_run_all__stops_at_until_and_prints_a_line_per_artifact(
    job: Job, stages: list[str], printed: io.StringIO
) -> None:
    conduct.run_all(job, "guard")
    assert stages == ["survey", "guard"]
    assert printed.getvalue() == "survey    abcdef012345  rows 1,234, 2.0 s\n"


def test_run_all__stops_at_the_first_failure(
    job: Job, stages: list[str], printed: io.StringIO
) -> None:
    with pytest.raises(RunError):
        conduct.run_all(job, None)
    assert stages == ["survey", "guard", "teach"]


def test_run_one__runs_nothing_else(job: Job, stages: list[str], printed: io.StringIO) -> None:
    conduct.run_one(job, "embed")
    assert stages == ["embed"]


def test_require_stage() -> None:
    conduct.require_stage(None)
    conduct.require_stage("mine")
    with pytest.raises(ConfigError, match="no stage 'mien'; did you mean 'mine'"):
        conduct.require_stage("mien")


@pytest.mark.parametrize("terminal", [True, False])
def test_show_facts__leave_none_out(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=terminal, width=80, highlight=False)
    monkeypatch.setattr(conduct, "console", shown)
    facts = {**{f"fact_{n}": n * 1000 for n in range(7)}, "winners_curse": 0.0123, "seconds": 2.0}
    conduct.show_facts("search    abc", {**facts, "code": "1+a"})
    lines = [line for line in screen.getvalue().splitlines() if line.strip()]
    assert len(lines) == (1 + 1 + 8 if terminal else 1)
    assert "2.0 s" in lines[0]
    curse = "winners curse" if terminal else "winners_curse"
    assert any(curse in line and "0.0123" in line for line in lines)
    assert any("6,000" in line for line in lines)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_run_one__what_training_left_is_tracked_wherever_the_run_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from mlflow import MlflowClient

    with contextlib.ExitStack() as stack:
        root = location(str(tmp_path / "run")) if place == "disk" else stack.enter_context(s3())
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        recipe = parse(Recipe, {**RECIPE, "tracking": {"uri": uri}})
        job = conduct.start(recipe, root.uri, fresh=False, show_faces=False)

        def pretrain(job: Job) -> Artifact:
            stage = job.open("pretrain", {})
            rows = [{"step": 4.0, "knn": 0.25}, {"step": 6.0, "knn": 0.5}]
            (stage.dir / "probes.json").write_json(rows)
            (stage.dir / "history.json").write_json([{"step": 6.0, "loss": 1.5}])
            for step in (4, 6):
                (stage.dir / "previews" / f"step-{step:06d}.png").write_bytes(b"picture")
            stage.finish("d" * 64, last_knn=0.5)
            return job.run.artifact("pretrain")

        monkeypatch.setitem(conduct.STAGES, "pretrain", pretrain)
        conduct.run_one(job, "pretrain")
        client = MlflowClient(uri)
        (run_id,) = job.tracker.runs.values()
        seen = [(m.step, m.value) for m in client.get_metric_history(run_id, "knn")]
        assert sorted(seen) == [(4, 0.25), (6, 0.5)]
        assert [m.step for m in client.get_metric_history(run_id, "loss")] == [6]
        assert client.get_run(run_id).data.metrics["last_knn"] == 0.5
        kept = [file.path for file in client.list_artifacts(run_id)]
        assert kept == ["step-000004.png", "step-000006.png"]
        at = Path(client.download_artifacts(run_id, kept[0], str(tmp_path)))
        assert at.read_bytes() == b"picture"
