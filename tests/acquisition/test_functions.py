"""Proves what holds for every acquisition function: its answers, its refusals, its memory."""

import inspect
import tracemalloc
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest

from pipeline.acquisition.functions import ACQUISITIONS, READS
from pipeline.acquisition.interface import Acquisition, Pool
from pipeline.errors import ConfigError

from .pools import blobs

EVERY = pytest.mark.parametrize("function", ACQUISITIONS.values(), ids=ACQUISITIONS)
SAMPLING = {
    name: function
    for name, function in ACQUISITIONS.items()
    if "candidates" in inspect.signature(function).parameters
}


def ask(function: Acquisition, pool: Pool, budget: int, seed: int = 0) -> list[int]:
    """The answer, after checks of what every answer has to be."""
    before = {field.name: np.array(getattr(pool, field.name)) for field in fields(pool)}
    chosen = function(pool, budget, np.random.default_rng(seed))
    assert chosen.dtype == np.int64
    assert chosen.shape == (budget,)
    assert not pool.labeled[chosen].any()
    assert len(set(chosen.tolist())) == budget
    for name, column in before.items():
        np.testing.assert_array_equal(getattr(pool, name), column)
    return chosen.tolist()


def test_acquisitions__are_the_thirteen_by_their_names() -> None:
    eight = "entropy margin least_confidence badge glister coreset bald deepfool"
    cold = "typiclust probcover max_herding uncertainty_herding"
    assert set(ACQUISITIONS) == {"random", *eight.split(), *cold.split()}
    assert all(function.__name__ == name for name, function in ACQUISITIONS.items())


@EVERY
@pytest.mark.parametrize("labeled", [0, 1, 8, 59])
@pytest.mark.parametrize("budget", [1, 7, 60])
def test_answer__is_of_unlabeled_faces_each_once_up_to_all_of_them(
    function: Acquisition, labeled: int, budget: int
) -> None:
    pool = blobs(labeled=labeled)
    ask(function, pool, min(budget, 60 - labeled))


@EVERY
def test_answer__of_equal_faces_is_still_each_once(function: Acquisition) -> None:
    few = blobs(10, 0)
    columns = {
        field.name: np.repeat(getattr(few, field.name), 6, axis=int(field.name == "passes"))
        for field in fields(few)
    }
    pool = Pool(**columns)
    for labeled in (0, 7):
        pool.labeled[:labeled] = True
        ask(function, pool, 30)
        ask(function, pool, 60 - labeled)


@EVERY
def test_answer__of_one_face_repeated(function: Acquisition) -> None:
    columns = {
        field.name: np.repeat(
            np.array(getattr(blobs(1, 0), field.name)), 40, axis=int(field.name == "passes")
        )
        for field in fields(Pool)
    }
    ask(function, Pool(**columns), 25)


@EVERY
def test_answer__is_the_same_for_the_same_seed(function: Acquisition) -> None:
    pool = blobs()
    assert ask(function, pool, 20, seed=3) == ask(function, pool, 20, seed=3)


@pytest.mark.parametrize("name", ["random", "badge"])
def test_answer__of_random_functions_changes_with_the_seed(name: str) -> None:
    pool, function = blobs(), ACQUISITIONS[name]
    assert ask(function, pool, 20, seed=3) != ask(function, pool, 20, seed=4)


@pytest.mark.parametrize(
    "name", sorted(set(ACQUISITIONS) - {"random", "badge", "typiclust", "probcover"})
)
def test_answer__of_the_others_does_not(name: str) -> None:
    pool, function = blobs(), ACQUISITIONS[name]
    assert ask(function, pool, 20, seed=3) == ask(function, pool, 20, seed=4)


@EVERY
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_answer__of_other_floating_types(function: Acquisition, dtype: type) -> None:
    pool = blobs()
    assert pool.embeddings is not None
    assert pool.probs is not None
    ask(
        function,
        replace(pool, embeddings=pool.embeddings.astype(dtype), probs=pool.probs.astype(dtype)),
        20,
    )


@EVERY
@pytest.mark.parametrize("budget", [0, 53])
def test_refusal__of_a_budget_out_of_bounds(function: Acquisition, budget: int) -> None:
    with pytest.raises(ConfigError, match=f"budget is {budget}, expected 1 to 52"):
        function(blobs(), budget, np.random.default_rng(0))


NEEDS = {name: set(columns) for name, columns in READS.items()}
NEEDS["glister"] |= {"labels"}


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_refusal__of_a_missing_column_and_of_no_other(name: str) -> None:
    pool = blobs()
    optional = {field.name for field in fields(Pool)} - {"labeled"}
    enough = replace(pool, **dict.fromkeys(optional - NEEDS[name]))
    ask(ACQUISITIONS[name], enough, 5)
    for column in NEEDS[name]:
        with pytest.raises(ConfigError, match=f"^acquisition {name} needs {column} ") as caught:
            ask(ACQUISITIONS[name], replace(pool, **{column: None}), 5)
        assert "\n" not in str(caught.value)


def test_candidates__are_offered_by_every_function_that_compares_faces() -> None:
    compare = {name for name, columns in NEEDS.items() if "embeddings" in columns}
    assert set(SAMPLING) == compare


@pytest.mark.parametrize("function", SAMPLING.values(), ids=SAMPLING)
def test_candidates__are_a_sample_of_all_unlabeled_faces(function: Acquisition) -> None:
    pool, few = blobs(), partial(function, candidates=10)
    drawn = [ask(few, pool, 10, seed) for seed in range(40)]
    assert len({tuple(sorted(chosen)) for chosen in drawn}) == 40
    assert {row for chosen in drawn for row in chosen} == set(np.flatnonzero(~pool.labeled))
    assert ask(few, pool, 5, seed=1) == ask(few, pool, 5, seed=1)
    assert ask(partial(function, candidates=52), pool, 9) == ask(function, pool, 9)
    with pytest.raises(ConfigError, match="candidates is 10, expected the budget of 11 or more"):
        few(pool, 11, np.random.default_rng(0))


@EVERY
def test_memory__never_holds_all_pairs(function: Acquisition) -> None:
    pool = blobs(4000, 40)
    function(blobs(), 5, np.random.default_rng(0))  # what is imported late is not counted
    tracemalloc.start()
    try:
        function(pool, 200, np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4000**2 * 4 / 3  # bytes: a third of a matrix of float32
