"""What a run has made is found by a path, by its digest, and by digests it had before."""

from pathlib import Path

import pytest
from helpers import flow

from pipeline.errors import ModelError
from pipeline.made import find_model, finished, home_of, made_with, named_model
from pipeline.run import Run
from pipeline.storage import location
from pipeline.training.runs import TEACHER


@pytest.fixture(scope="module")
def job(tiny_run: Path) -> flow.LoggedJob:
    return flow.start(flow.tiny(flow.UNTRACKED), tiny_run)


def test_find_model__a_run_a_stage_and_a_folder_are_named_alike(job, tiny_run) -> None:
    student = job.run.artifact("student").dir / "model"
    for at in (location(tiny_run), location(tiny_run / "student"), student):
        assert find_model(at) == named_model(at) == student
    teach = job.run.artifact("teach").dir
    assert find_model(location(tiny_run / "teach")) == teach / TEACHER
    assert find_model(location(tiny_run / "distill")) == job.run.artifact("distill").dir
    with pytest.raises(ModelError, match="expected a run folder"):
        find_model(location(tiny_run / "survey"))


def test_named_model__says_what_a_run_lacks_and_leaves_other_folders_alone(tmp_path) -> None:
    assert named_model(location(tmp_path)) == location(tmp_path)
    run = Run(location(tmp_path / "run"))
    run.recipe({"name": "x"})
    with pytest.raises(ModelError, match="a run whose student is not finished; name what is, suc"):
        named_model(run.root)


def test_made_with__finds_a_generation_that_is_no_longer_in_use(tmp_path) -> None:
    for seed in range(2):
        run = Run(location(tmp_path), fresh=True)
        run.open("teach", {"seed": seed, "inputs": {}}).finish(f"d{seed}")
    found = made_with(Run(location(tmp_path)), "teach", "d0")
    assert found is not None
    assert found.identity["seed"] == 0
    assert made_with(run, "teach", "d2") is None


def test_made_with__knows_digests_from_before_faces_were_forgotten(tmp_path) -> None:
    run = Run(location(tmp_path))
    stage = run.open("mine", {"inputs": {}})
    stage.finish("new")
    record = (stage.dir / "done.json").read_json()
    (stage.dir / "done.json").write_json({**record, "before": ["old"]})
    found = made_with(run, "mine", "old")
    assert found is not None
    assert found.digest == "new"


def test_home_of__a_model_knows_its_generation(job, tiny_run, tmp_path) -> None:
    student = job.run.artifact("student")
    home = home_of(student.dir / "model")
    assert home is not None
    assert (home.stage, home.dir, home.digest) == ("student", student.dir, student.digest)
    member = job.run.artifact("teach").dir / TEACHER / "members" / "0"
    assert home_of(member).stage == "teach"
    assert home_of(location(tmp_path)) is None
    assert [m.digest for m in finished(job.run, "student", student.dir)] == [student.digest]
