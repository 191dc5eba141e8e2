"""Proves learning from votes in one run: teachers with a decoder, a student with candidate sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import flow

from pipeline import conduct, stages
from pipeline.recipe import load

ROOT = Path(__file__).parents[2]
SMALL = (
    flow.UNTRACKED,
    "search=null",
    "distill=null",
    "tune=null",
    "labeled.rule=voted",
    "select={policy: all}",
    "student.steps=30",
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.cluster]


def shipped(monkeypatch: pytest.MonkeyPatch, candidates: str) -> tuple[str, ...]:
    """What makes the recipe weak, as the shipped one has it, with a decoder of a small network."""
    monkeypatch.setenv("OMNIFER_LABELED", "unused")
    monkeypatch.setenv("OMNIFER_POOL", "unused")
    recipe = load(ROOT / "jobs" / "recipes" / "weak.yaml")
    partial, student = recipe.teach.partial, recipe.student
    assert partial is not None
    assert student.candidates is not None
    return (
        f"teach.partial={partial.model_dump_json()}",
        "teach.partial.decoder={width: 16, depth: 1, heads: 2}",
        f"teach.partial.candidates={candidates}",
        f"student.targets={student.targets}",
        f"student.candidates={student.candidates.model_dump_json()}",
    )


@pytest.mark.parametrize("candidates", ["votes", "derived"])
def test_weak__runs_from_votes_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidates: str
) -> None:
    recipe = flow.tiny(*SMALL, *shipped(monkeypatch, candidates))
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)
    teach = job.run.artifact("teach").facts
    assert teach["candidates"].startswith(f"{candidates}, ")
    trained = recipe.teach.trainings * recipe.teach.steps * recipe.teach.batch
    assert teach["passes"] > trained
    metrics = (job.run.artifact("evaluate").dir / stages.METRICS_FILE).read_json()
    assert metrics["protocol"]["candidates"] == teach["candidates"]
    assert metrics["models"]["student"]["votes"]["kl"]["value"] > 0
    assert set(metrics["gain"]["votes"]) == {"kl", "brier"}
    assert "KL to votes" in (tmp_path / "run" / "report.html").read_text()
