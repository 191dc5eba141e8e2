"""Proves the stage: which faces it reads, what starts from it, what its controls start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import flow
from pydantic import ValidationError

from pipeline import pool, stages
from pipeline.artifacts import load_model, load_teacher
from pipeline.errors import ConfigError, ResourceError
from pipeline.flow import handed, started
from pipeline.images import Crop
from pipeline.judged import protocol_card
from pipeline.ledger import Ledger
from pipeline.models import ModelConfig
from pipeline.plan import Plan
from pipeline.sources.reader import plan_slices, read_slice
from pipeline.sources.removals import Removals
from pipeline.sources.synthetic import SyntheticPool
from pipeline.storage import location
from pipeline.survey import describe
from pipeline.training.handed import Handed
from pipeline.training.pretrain import PretrainJob, open_pool
from pipeline.training.pretraining import PretrainConfig
from pipeline.training.runs import PREVIEWS, TEACHER

NET = "{name: convnet, args: {width: 16}, size: 32, dropout: 0.0}"
SETS = (
    flow.UNTRACKED,
    f"pretrain={{model: {NET}, steps: 6, batch: 32, probe_every: 4}}",
    "teach.model.weights=pretrained",
    "teach.steps=2",
)
VIT = (
    "{name: vit_tiny_patch16_224, size: 32, dropout: 0, args: {img_size: 32, patch_size: 8, "
    "embed_dim: 24, depth: 1, num_heads: 2}}"
)


def job_of(tiny_run: Path, at: Path, *sets: str) -> flow.LoggedJob:
    flow.copy(tiny_run, at)
    return flow.start(flow.tiny(*SETS, *sets), at, fresh=True)


def test_pretrain__teachers_start_from_it(tiny_run: Path, tmp_path: Path) -> None:
    job = job_of(tiny_run, tmp_path / "run")
    made = stages.pretrain(job)
    assert made is not None
    assert made.facts["passes"] == 6 * 32 * 2
    assert {"first_loss", "last_loss", "first_knn", "last_knn"} <= made.facts.keys()
    probes = (made.dir / "probes.json").read_json()
    assert [probe["step"] for probe in probes] == [4.0, 6.0]
    backbone = load_model(made.dir / "backbone").net.state_dict()
    start = started(job, job.recipe.teach)
    assert start.model.weights.endswith("backbone")
    # Two steps of training away from it, not as far as another random start would be.
    teacher = stages.teach(job)
    taught = load_teacher(teacher.dir / TEACHER).members[0].net.state_dict()
    name = "blocks.0.weight"
    assert np.abs(taught[name] - backbone[name]).mean() < 0.02
    assert protocol_card(job)["pretraining_data"] == "600 faces of the run's pool, simclr"
    assert protocol_card(job)["passes"]["pretrain"] == made.facts["passes"]
    # The same again: found, not trained.
    again = flow.start(job.recipe, tmp_path / "run")
    assert stages.pretrain(again).dir.uri == made.dir.uri
    assert stages.teach(again).dir.uri == teacher.dir.uri


def test_pretrain__streamed_from_the_pool(tiny_run: Path, tmp_path: Path, local_ray: None) -> None:
    job = job_of(tiny_run, tmp_path / "run", "pretrain.read=streamed")
    made = stages.pretrain(job)
    assert made is not None
    assert (made.facts["faces"], made.facts["passes"]) == (600, 6 * 32 * 2)
    assert np.isfinite(made.facts["last_loss"])
    assert not list((job.run.root / "scratch").files([".npy"]))


def test_pretrain__streamed_needs_room_to_read(
    tiny_run: Path, tmp_path: Path, local_ray: None
) -> None:
    many = "train.stage_workers={pretrain: 2}"
    job = job_of(tiny_run, tmp_path / "run", "pretrain.read=streamed", many)
    with pytest.raises(ResourceError, match=r"pretrain would hang: 2\.5 CPUs needed at once, 2"):
        stages.pretrain(job)


def test_pretrain__leaves_out_twins_of_test_faces(tiny_run: Path, tmp_path: Path) -> None:
    job = job_of(tiny_run, tmp_path / "run")
    plan, guard = pool.pool_plan(job), pool.ledger(job, "guard")
    slice = next(iter(plan))
    survey = job.run.artifact("survey").dir
    given = PretrainJob(
        handed=handed(job),
        pretrain=job.recipe.pretrain,
        plan=pool.plan_at(survey).uri,
        survey=survey.uri,
        sources=job.sources,
        out="unused",
        checkpoints="unused",
        seed=0,
    )
    whole = open_pool(given)
    assert len(whole) == 600
    # A guard that says the third face of the first slice is a twin of a test face.
    other = job.run.root / "other-guard"
    marked = Ledger(other)
    for at, table in guard.tables(plan):
        if at.key == slice.key:
            twins = [None] * len(table)
            twins[2] = "test/1"
            place = table.schema.get_field_index("twin_of")
            column = pa.array(twins, pa.string())
            table = table.set_column(place, table.schema.field(place), column)
        marked.commit(at, table)
    changed = given.handed.model_copy(update={"guard": other.uri})
    less = open_pool(given.model_copy(update={"handed": changed}))
    assert len(less) == 599
    everything = whole.take(np.arange(600))
    assert np.array_equal(less.take(np.arange(599)), np.delete(everything, 2, axis=0))


def test_open_pool__a_pack_of_before_faces_left_is_not_taken(tmp_path: Path) -> None:
    """As on a node that packed the pool before `forget` wrote survey and guard again in place."""
    root = location(tmp_path)
    sources = {"pool": SyntheticPool(count=12, size=16), "more": SyntheticPool(count=4, size=16)}
    plan = Plan.write(root / "plan.parquet", plan_slices(sources, 6, root / "plan"))
    job = PretrainJob(
        handed=Handed(
            labeled="unused",
            guard=(root / "guard").uri,
            crop=Crop(),
            color="gray",
            scratch=str(tmp_path / "cache"),
            views={name: (Crop(), "gray") for name in sources},
        ),
        pretrain=PretrainConfig(model=ModelConfig(name="convnet", args={"width": 4}, size=16)),
        plan=plan.at.uri,
        survey=(root / "survey").uri,
        sources=sources,
        out="unused",
        checkpoints="unused",
        seed=0,
    )

    def write(gone: set[str], twins: set[str]) -> np.ndarray:
        for name in ("survey", "guard"):
            (root / name).remove_tree()
        for slice in plan:
            read = read_slice(slice, sources, Removals(frozenset(gone)))
            faces = describe(read, Crop(), "gray", threads=1)
            found = ["test/1" if face in twins else None for face in faces["id"].to_pylist()]
            guarded = faces.select(["id"]).append_column("twin_of", pa.array(found, pa.string()))
            Ledger(root / "survey").commit(slice, faces)
            Ledger(root / "guard").commit(slice, guarded)
        packed = open_pool(job)
        return packed.take(np.arange(len(packed)))

    whole = write(set(), set())
    assert len(whole) == 16
    for out in range(2):
        face = {f"pool/seed1#{out}"}
        assert np.array_equal(write(face, set()), np.delete(whole, out, axis=0))
        assert np.array_equal(write(set(), face), np.delete(whole, out, axis=0))
    packs = {at.name for at in (tmp_path / "cache").iterdir()}
    assert len(packs) == 4  # the other source is packed once
    assert np.array_equal(write(set(), set()), whole)
    assert {at.name for at in (tmp_path / "cache").iterdir()} == packs


def test_mae__keeps_pictures_of_what_it_fills_in(tiny_run: Path, tmp_path: Path) -> None:
    small = f"pretrain={{method: mae, model: {VIT}, steps: 3, batch: 16, probe_every: 3, "
    job = job_of(
        tiny_run,
        tmp_path / "run",
        small + "decoder: {width: 8, depth: 1, heads: 2}}",
        f"teach.model={VIT}",
    )
    made = stages.pretrain(job)
    assert [at.name for at in (made.dir / PREVIEWS).children()] == ["step-000003.png"]
    assert load_model(made.dir / "backbone").config.name == "vit_tiny_patch16_224"


def test_control__starts_from_nothing_and_counts_the_pretraining(
    tiny_run: Path, tmp_path: Path
) -> None:
    own = f"pretrain.model={flow.STUDENT}"
    given = ("teach.model.weights=null", "student.model.weights=pretrained", "student.steps=2")
    job = job_of(tiny_run, tmp_path / "run", own, *given)
    pretrained = stages.pretrain(job)
    student = stages.student(job)
    assert student.facts["passes"] > pretrained.facts["passes"]
    models = {name: job.run.artifact(name) for name in ("student", "control_a", "control_b")}
    nets = {name: load_model(at.dir / "model") for name, at in models.items()}
    assert nets["student"].config.weights.endswith("backbone")
    assert [nets[name].config.weights for name in ("control_a", "control_b")] == [None, None]
    passes = models["control_b"].facts["passes"]
    assert passes == pytest.approx(student.facts["passes"], rel=0.05)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("teach.model.weights=pretrained",), "the recipe has no pretrain"),
        (
            ("pretrain={model: {size: 32}}", "student.model.weights=pretrained"),
            "cannot start from pretrain.model, compact_resnet at 32 px gray",
        ),
    ],
)
def test_recipe__what_does_not_fit_is_named(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        flow.tiny(*sets)
