"""Proves the rounds of active learning: who is asked, what is trained on, kept and resumed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline import active
from pipeline.acquisition.functions import ACQUISITIONS, READS
from pipeline.active import ActiveConfig, Oracle, Round, first_rows, points, rounds
from pipeline.config import parse
from pipeline.errors import ConfigError, IdentityError
from pipeline.storage import to_json

NAMES = ("neutral", "happiness", "sadness")
FACES, TEST = 60, 12


class Counter:
    """A learner whose model is the rows it saw: right on as many test faces as it has tens."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, tuple[int, ...]]] = []
        self.looked: list[tuple[tuple[str, ...], int, int]] = []

    def train(self, rows: np.ndarray, number: int) -> tuple[tuple[int, ...], float]:
        self.trained.append((number, tuple(rows.tolist())))
        return tuple(rows.tolist()), 100.0

    def look(
        self, model: tuple[int, ...], columns: Sequence[str], labeled: np.ndarray, seed: int
    ) -> tuple[Mapping[str, Any], float]:
        assert tuple(np.flatnonzero(labeled)) == model
        self.looked.append((tuple(columns), int(labeled.sum()), seed))
        sure = np.linspace(0.4, 0.9, FACES)  # row 0 is the least sure
        probs = np.stack([sure, 0.6 * (1 - sure), 0.4 * (1 - sure)], 1)
        x = np.random.default_rng(0).normal(size=(FACES, 4)).astype(np.float32)
        made = {
            "probs": probs,
            "embeddings": x,
            "passes": np.stack([probs, probs[:, ::-1]]),
            "boundary": sure,
        }
        return {name: made[name] for name in columns}, 10.0

    def say(self, model: tuple[int, ...]) -> np.ndarray:
        right = np.arange(TEST) < len(model) // 10
        return np.where(right, oracle().test, (oracle().test + 1) % 3)


def oracle() -> Oracle:
    labels = np.arange(FACES) % 3
    return Oracle([f"f{i}" for i in range(FACES)], labels, np.arange(TEST) % 3, NAMES)


def config(**more: Any) -> ActiveConfig:
    return parse(ActiveConfig, {"start": 0.2, "step": 0.1, "rounds": 4, **more})


def asked(curve: Sequence[Round]) -> list[set[int]]:
    return [{int(name[1:]) for name in one.chosen} for one in curve]


def test_rounds__train_on_all_labels_so_far_and_ask_for_the_next() -> None:
    learner = Counter()
    curve = rounds(oracle(), learner, config(), "least_confidence", 0)
    first = set(first_rows(oracle().labels, config(), 0).tolist())
    wanted = [sorted(first)]
    # The faces are less sure the lower their row, whatever the round: counted by hand.
    for _ in range(3):
        left = [row for row in range(FACES) if row not in wanted[-1]]
        wanted.append(sorted([*wanted[-1], *left[:6]]))
    assert [rows for _, rows in learner.trained] == [tuple(rows) for rows in wanted]
    assert [number for number, _ in learner.trained] == [0, 1, 2, 3]
    assert [one.labels for one in curve] == [12, 18, 24, 30]
    assert asked(curve) == [
        set(after) - set(before) for before, after in itertools.pairwise(wanted)
    ] + [set()]
    assert [look[:2] for look in learner.looked] == [(("probs",), n) for n in (12, 18, 24)]


def test_rounds__say_what_each_training_is_worth() -> None:
    curve = rounds(oracle(), Counter(), config(), "random", 0)
    # 12, 18, 24 and 30 labels: right on the first 1, 1, 2 and 3 of 12 test faces.
    assert [one.accuracy for one in curve] == [1 / 12, 1 / 12, 2 / 12, 3 / 12]
    assert [active.unpack(one.correct, TEST).sum() for one in curve] == [1, 1, 2, 3]
    assert curve[3].recall == dict.fromkeys(NAMES, 0.25)
    # 3 right and 3 wrongly said of 4 each: F1 = 2 x 1 / (4 + 4) in every class.
    assert curve[3].macro_f1 == pytest.approx(0.25)
    assert sum(curve[2].class_counts.values()) == 24
    assert [one.passes for one in curve] == [110, 110, 110, 100]


@pytest.mark.parametrize("strategy", ACQUISITIONS)
def test_rounds__every_strategy_runs_and_sees_only_what_it_reads(strategy: str) -> None:
    learner = Counter()
    curve = rounds(oracle(), learner, config(rounds=3), strategy, 1)
    assert {look[0] for look in learner.looked} == {READS[strategy]}
    labels = set(learner.trained[-1][1])
    assert len(labels) == 24
    assert [len(rows) for rows in asked(curve)] == [6, 6, 0]


def test_rounds__a_sample_smaller_than_the_budget_is_refused_before_a_training() -> None:
    learner = Counter()
    small = config(look={"boundary_faces": 5})
    with pytest.raises(ConfigError, match="boundary_faces is 5, expected the 6 faces that deepf"):
        rounds(oracle(), learner, small, "deepfool", 0)
    assert not learner.trained
    rounds(oracle(), learner, small, "margin", 0)  # does not look at boundaries
    rounds(oracle(), learner, config(look={"boundary_faces": 6}), "deepfool", 0)


def test_rounds__first_labels_belong_to_the_seed_alone() -> None:
    firsts = {}
    for strategy in ("random", "margin", "badge"):
        for seed in (0, 1):
            learner = Counter()
            rounds(oracle(), learner, config(rounds=1), strategy, seed)
            firsts[strategy, seed] = learner.trained[0][1]
    assert firsts["random", 0] == firsts["margin", 0] == firsts["badge", 0]
    assert firsts["random", 1] == firsts["margin", 1] != firsts["random", 0]


def test_rounds__are_the_same_for_the_same_seed() -> None:
    one, same, other = (rounds(oracle(), Counter(), config(), "random", seed) for seed in (0, 0, 1))
    assert asked(one) == asked(same)
    assert asked(one) != asked(other)
    assert asked(one)[0] != asked(rounds(oracle(), Counter(), config(), "badge", 0))[0]


def test_rounds__labels_nobody_asked_for_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def peek(pool: Any, budget: int, rng: np.random.Generator) -> np.ndarray:
        seen.append((pool.labels[~pool.labeled] == -1).all())
        seen.append((pool.labels[pool.labeled] == oracle().labels[pool.labeled]).all())
        return np.flatnonzero(~pool.labeled)[:budget]

    monkeypatch.setitem(ACQUISITIONS, "glister", peek)
    rounds(oracle(), Counter(), config(), "glister", 0)
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.parametrize("finished", [1, 2, 4])
def test_rounds__continue_after_those_that_are_finished(finished: int) -> None:
    whole = rounds(oracle(), Counter(), config(), "badge", 3)
    learner, kept = Counter(), []
    stored = [Round.model_validate_json(one.model_dump_json()) for one in whole[:finished]]

    def keep(one: Round) -> Round:
        kept.append(one)
        return one

    again = rounds(oracle(), learner, config(), "badge", 3, done=stored, keep=keep)
    assert [number for number, _ in learner.trained] == list(range(finished, 4))
    assert asked(again) == asked(whole)
    assert [one.number for one in kept] == list(range(finished, 4))


def test_rounds__go_on_from_what_another_attempt_has_kept() -> None:
    theirs = ("f0", "f1", "f2", "f3", "f4", "f5")

    def keep(one: Round) -> Round:
        return one.model_copy(update={"chosen": theirs}) if one.number == 0 else one

    learner = Counter()
    curve = rounds(oracle(), learner, config(), "random", 0, keep=keep)
    assert curve[0].chosen == theirs
    assert set(range(6)) <= set(learner.trained[1][1])


def test_rounds__refuse_rounds_of_other_faces() -> None:
    done = rounds(oracle(), Counter(), config(rounds=2), "random", 0)[:1]
    strange = done[0].model_copy(update={"chosen": ("who",)})
    with pytest.raises(IdentityError, match="1 unknown ids asked for"):
        rounds(oracle(), Counter(), config(), "random", 0, done=[strange])
    fewer = done[0].model_copy(update={"labels": 5})
    with pytest.raises(IdentityError, match="5 labels, 0 unknown ids"):
        rounds(oracle(), Counter(), config(), "random", 0, done=[fewer])


def test_rounds__end_when_everything_is_labeled() -> None:
    curve = rounds(oracle(), Counter(), config(start=0.5, step=0.25, rounds=3), "margin", 0)
    assert [one.labels for one in curve] == [30, 45, 60]


def test_first_rows__stratified_takes_the_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    rows = first_rows(labels, config(draw="stratified"), 0)
    assert np.bincount(labels[rows]).tolist() == [10, 4, 1]
    assert len(first_rows(labels, config(), 0)) == 14  # a fifth of 73, rounded down
    with pytest.raises(ConfigError, match=r"active.start: 0.01 of 73 faces is less than one"):
        first_rows(labels, config(start=0.01), 0)


def test_first_rows__are_the_papers_numbers() -> None:
    paper = ActiveConfig()
    labels = np.zeros(28_709, np.int64)
    assert len(first_rows(labels, paper, 0)) == 2_870
    assert active.share_of(paper.step, 28_709, "step") == 1_435


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strategies": ["marginn"]}, "no strategy 'marginn'; did you mean 'margin'?"),
        ({"strategies": ["random", "random"]}, "strategies: one is named twice"),
        ({"rounds": 20}, "20 rounds from 0.1 by 0.05 need more labels than there are"),
        (
            {"settings": {"badge": {"candidate": 5}}},
            "settings.badge: no setting 'candidate'; did you mean 'candidates'?",
        ),
        ({"settings": {"margin": {"candidates": 5}}}, "settings.margin: no setting 'candidates'"),
        ({"train": {"model": {"dropout": 0}}}, "train.model.dropout is 0"),
        ({"train": {"model": {"weights": "pretrained"}}}, "`starts` says what trainings start"),
    ],
)
def test_config__refuses_what_cannot_be_run(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ActiveConfig.model_validate(values)
    assert said in str(caught.value)


def test_config__binds_the_settings_of_a_function() -> None:
    bound = config(settings={"badge": {"candidates": 9}}).acquisition("badge")
    assert bound.keywords == {"candidates": 9}  # type: ignore[attr-defined]
    assert config().acquisition("badge").keywords == {}  # type: ignore[attr-defined]


def made(right: Sequence[int], recall: float = 0.5) -> Round:
    """A round as it is read back: its classes stand in the order of the alphabet."""
    one = Round(
        number=0,
        labels=6,
        class_counts=dict.fromkeys(NAMES, 2),
        accuracy=len(right) / TEST,
        macro_f1=0.5,
        recall={"neutral": 0.1, "happiness": recall, "sadness": None},
        correct=active.pack(np.isin(np.arange(TEST), right)),
        chosen=(),
        seconds=1.0,
        seconds_asking=0.0,
        passes=1.0,
    )
    return Round.model_validate_json(to_json(one.model_dump(mode="json")))


def test_points__are_means_over_seeds_and_differences_of_the_same_seeds() -> None:
    test = np.repeat([0, 1], [8, 4])  # happiness is the rarest that has faces
    curves = {
        "random": {0: [made([0, 1, 2])], 1: [made([0, 1])]},
        "margin": {0: [made([0, 1, 2, 3], 0.2), made([0])], 1: [made(range(6), 0.4)]},
        "bald": {0: [], 1: []},
    }
    found = points(curves, test, NAMES)
    assert found["bald"] == []
    (margin,) = found["margin"]  # the second round is not finished by seed 1
    assert margin.accuracy == (4 / 12, 6 / 12)
    assert margin.rarest == pytest.approx(0.3)
    assert margin.gap is not None
    assert margin.gap.value == pytest.approx((5 - 2.5) / 12)
    assert margin.gap.low <= margin.gap.value <= margin.gap.high
    assert found["random"][0].gap is None
    assert points({"margin": curves["margin"]}, test, NAMES)["margin"][0].gap is None
