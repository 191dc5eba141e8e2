"""Proves that a probe takes a slice through the actors' own steps and stores what they would."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.flow import tiny
from helpers.s3 import s3_bucket

from pipeline.ledger import Ledger
from pipeline.planning import probing
from pipeline.planning.probing import (
    STAGES,
    Prober,
    Requests,
    clock,
    counted,
    random_teacher,
    usable_cores,
)
from pipeline.planning.sampling import Pool, plan_pool
from pipeline.recipe import Recipe
from pipeline.schema import FACES, embeddings_schema, scores_schema
from pipeline.storage import Location, location

CLASSES = ("neutral", "happiness", "sadness")
STEPS = {
    "read",
    "survey",
    "decode",
    "forward",
    "score",
    "survey write",
    "embed write",
    "score write",
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prober(recipe: Recipe, pool: Pool, at: Location) -> Prober:
    return Prober(recipe, pool.sources, random_teacher(recipe, CLASSES, 50), None, at)


def pool_of(recipe: Recipe, tmp_path: Path) -> Pool:
    work = location(tmp_path / "work")
    return plan_pool(recipe.sources(), recipe.slice_faces, work, rest=None, seed=0)


def test_probe__every_step_of_a_slice_and_what_the_actors_would_commit(tmp_path: Path) -> None:
    recipe = tiny("pool.0.count=100", "slice_faces=50")
    pool = pool_of(recipe, tmp_path)
    at = location(tmp_path / "scratch")
    measuring = prober(recipe, pool, at)
    slices = pool.plan.slices()
    probes = [measuring.probe(slice) for slice in slices]
    assert all(set(probe.spent) == STEPS for probe in probes)
    assert all(cost.seconds > 0 and cost.cpu > 0 for p in probes for cost in p.spent.values())
    assert [probe.faces for probe in probes] == [50, 50]
    assert all(probe.read_bytes > 50 * 100 for probe in probes)
    assert all(probe.requests["read"] == Requests() for probe in probes)
    teacher = random_teacher(recipe, CLASSES, 50)
    schemas = (
        FACES,
        embeddings_schema(teacher.width, 2, 3),
        scores_schema(3, recipe.score.neighbors),
    )
    for stage, schema in zip(STAGES, schemas, strict=True):
        table = Ledger(at / stage).read(slices[0].key)
        assert table.schema.remove_metadata() == schema
        assert table.num_rows == 50
    sealed = measuring.seal(location(tmp_path / "work"))
    assert sealed.seconds > 0
    assert len((at / "embed" / "seals").children()) == 1


def test_probe__long_slices_are_cut_short_and_stored_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "FACES", 16)
    recipe = tiny("pool.0.count=100", "slice_faces=100")
    pool = pool_of(recipe, tmp_path)
    decoded: list[int] = []
    describe = probing.describe
    monkeypatch.setattr(
        probing, "describe", lambda t, *a, **k: decoded.append(len(t)) or describe(t, *a, **k)
    )
    at = location(tmp_path / "scratch")
    probe = prober(recipe, pool, at).probe(pool.plan.slices()[0])
    assert set(decoded) == {16}
    assert probe.faces == 100
    assert Ledger(at / "survey").read("s0000000").num_rows == 100


def test_probe__counts_the_requests_that_a_store_bills(tmp_path: Path) -> None:
    recipe = tiny("pool.0.count=30", "slice_faces=30")
    pool = pool_of(recipe, tmp_path)
    with s3_bucket() as bucket:
        at = bucket / "scratch"
        probe = prober(recipe, pool, at).probe(pool.plan.slices()[0])
        held = sorted(file.uri.removeprefix(at.uri) for file in at.files([""]))
    puts = {stage: probe.requests[stage].puts for stage in STAGES}
    # what a slice leaves is what was put: attempt, part and commit; score notes no attempt
    assert puts == {"survey": 3, "embed": 3, "score": 2}
    assert len(held) == sum(puts.values())
    assert probe.requests["embed"].gets > probe.requests["survey"].gets  # find, and read back
    assert probe.requests["read"] == Requests()


def test_counted__nothing_is_printed_and_the_logger_is_as_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("s3fs")
    before = (logger.level, list(logger.filters))
    with counted() as seen:
        logger.debug("CALL: %s - %s - %s", "put_object", (), {})
        logger.debug("CALL: %s - %s - %s", "get_object", (), {})
        logger.debug("CALL: %s - %s - %s", "delete_objects", (), {})
        logger.debug("something else")
    assert seen.requests == Requests(puts=1, gets=1)
    assert (logger.level, list(logger.filters)) == before
    assert caplog.records == []


def test_random_teacher__is_what_the_recipe_would_train() -> None:
    recipe = tiny("teach.folds=3", "teach.sub_prototypes=2")
    teacher = random_teacher(recipe, CLASSES, 40)
    assert [member.config for member in teacher.members] == [recipe.teach.model] * 3
    assert teacher.bank.shape == (40, teacher.width)
    assert teacher.prototypes.shape == (6, teacher.width)
    np.testing.assert_allclose(teacher.bank.norm(dim=1), 1, rtol=1e-5)


def test_clock__sleeping_is_no_core_time() -> None:
    with clock() as took:
        time.sleep(0.2)
    assert took.seconds == pytest.approx(0.2, abs=0.15)
    assert took.cpu < 0.1
    assert took.per(10).seconds == pytest.approx(took.seconds / 10)


def test_clock__work_is_core_time_and_waiting_for_a_core_is_not_counted() -> None:
    with clock() as took:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert took.cpu >= 0.3
    assert took.cpu * 0.99 <= took.seconds < 0.8  # busy neighbors or not


def test_usable_cores__no_more_than_there_are() -> None:
    assert 0 < usable_cores(1, seconds=0.1) <= 1
