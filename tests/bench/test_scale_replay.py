"""Proves the replay of a pass on many nodes against closed forms and the plan's own arithmetic."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.planning.forecast import Machine, Part, Spent, Step, stream_time
from tests.bench import scale_model
from tests.bench.scale_replay import Chance, Costs, replay, shares

CALM, FREE = Chance(), Costs()


@pytest.mark.parametrize(("slices", "nodes", "per_node"), [(1, 1, 1), (10, 3, 1), (97, 4, 5)])
def test_replay__without_trouble_is_rounds_of_slices(
    slices: int, nodes: int, per_node: int
) -> None:
    found = replay(slices, 2.5, nodes, per_node, FREE, CALM)
    assert found.seconds == pytest.approx(math.ceil(slices / (nodes * per_node)) * 2.5)
    assert (found.deaths, found.lost) == (0, 0)


def test_replay__agrees_with_the_arithmetic_of_omnifer_plan() -> None:
    faces, slices, nodes, each = 8_192_000, 1000, 30, 0.0005
    step = Step("embed", [Part("forward", Spent(each, each), gpu=True)], workers=nodes)
    machine = Machine(cores=1e9, gpu_factor=1.0)
    expected = stream_time([step], faces, slices, machine).seconds
    found = replay(slices, faces / slices * each, nodes, 1, FREE, CALM)
    assert found.seconds == pytest.approx(expected)


def test_replay__a_death_costs_what_was_in_hand_and_the_wait() -> None:
    """One node, dead 25 s into slices of 10 s: 5 s are lost, the next node comes 40 s later."""
    found = replay(7, 10.0, 1, 1, FREE, Chance(away=40.0), deaths=[25.0])
    assert found.seconds == pytest.approx(7 * 10 + 5 + 40)
    assert (found.deaths, found.lost) == (1, 1)


def test_replay__a_node_takes_all_its_slices_with_it() -> None:
    found = replay(8, 10.0, 1, 4, FREE, Chance(away=0.0), deaths=[15.0])
    assert found.lost == 4
    assert found.seconds == pytest.approx(10 + 5 + 10)


def test_replay__others_do_the_work_of_a_node_that_never_returns() -> None:
    """Two nodes do 3 of 9 slices each, then one does the rest; the fourth was lost half done."""
    found = replay(9, 10.0, 2, 1, FREE, Chance(away=math.inf), deaths=[35.0])
    assert found.seconds == pytest.approx(30 + (9 - 6) * 10)
    late = replay(9, 10.0, 2, 1, FREE, Chance(away=math.inf), deaths=[30.0])
    assert late.lost == 0  # it died between two slices
    assert late.seconds == pytest.approx(30 + 3 * 10)


def test_replay__the_driver_is_the_limit_of_many_nodes() -> None:
    found = replay(500, 2.0, 500, 1, Costs(dispatch=0.01), CALM)
    assert found.seconds == pytest.approx(500 * 0.01 + 2.0)
    one = replay(20, 2.0, 1, 1, Costs(dispatch=0.01), CALM)
    assert one.seconds == pytest.approx(20 * 2.01)


def test_replay__the_store_is_the_limit_of_many_writes() -> None:
    costs = Costs(writes=7, write_rate=70.0, reads=1, read_rate=100.0)
    found = replay(300, 2.0, 300, 1, costs, CALM)
    assert found.seconds == pytest.approx(2.0 + 300 * 0.1)


def test_replay__commits_and_what_surrounds_the_stream_are_added() -> None:
    costs = Costs(listing=0.1, commit=0.5, sealing=0.2)
    found = replay(12, 2.0, 3, 1, costs, CALM)
    assert found.streamed == pytest.approx(4 * 2.5)
    assert found.seconds == pytest.approx(4 * 2.5 + 12 * 0.3)


def test_replay__stragglers_are_as_many_as_asked_and_as_slow() -> None:
    """On one node the sum of all slices is the time: slices and seed decide who is slow."""
    chance = Chance(seed=3, straggler_share=0.1, straggler_factor=4.0)
    rng = random.Random(3)
    slow = sum(rng.random() < 0.1 for _ in range(2000))
    assert 150 < slow < 250
    found = replay(2000, 1.0, 1, 1, FREE, chance)
    assert found.seconds == pytest.approx(2000 + 3 * slow)
    assert replay(50, 1.0, 50, 1, FREE, chance).seconds == 4.0  # all wait for the slowest


def test_replay__nodes_die_at_the_rate_asked() -> None:
    """One node at work W seconds dies W / lifetime times; half a slice is lost each time."""
    chance = Chance(seed=5, lifetime=100.0, away=30.0)
    found = replay(20_000, 1.0, 1, 1, FREE, chance)
    assert found.deaths == pytest.approx(200, rel=0.2)
    assert found.seconds == pytest.approx(20_000 + found.deaths * 30.5, rel=0.01)
    assert found == replay(20_000, 1.0, 1, 1, FREE, chance)


def test_shares__a_cost_that_is_all_of_the_surroundings() -> None:
    whole, found = shares(100, 1.0, 10, 1, Costs(sealing=0.1, commit=1.0), CALM)
    assert whole.seconds == pytest.approx(10 * 2 + 10)
    assert found["sealing"] == pytest.approx(10 / 30)
    assert found["commits"] == pytest.approx(10 / 30)
    assert found["listing"] == found["dispatch"] == found["store rates"] == 0


def _found(driver_ms: float = 10.0) -> dict[str, object]:
    """Measurements that are easy to add up."""
    cpu = dict.fromkeys(("commit", "seal", "sweep", "manifest", "pending"), 1000.0)
    asked = {
        "slice": {"PUT": 5.0, "GET": 4.0, "HEAD": 1.0},
        "seal": {"GET": 2.0, "HEAD": 1.0},
        "sweep": {"HEAD": 7.0},
        "manifest": {},
        "pending": {"LIST": 0.002},
    }
    both = {}
    for name, slices, grown in (("slices-10k", 10_000, 2.0), ("slices-100k", 100_000, 3.8)):
        memory = {"plan": 20.0, "pending": grown, "committed": 3.0, "account": 1.0}
        disk = {"slices": slices, "cpu_microseconds": cpu, "memory_mb": memory}
        both[name] = {"disk": disk, "s3": {"requests": asked}}
    return {**both, "dispatch": {"driver_ms": driver_ms}}


def test_costs__are_core_seconds_by_faces_and_waits_by_requests() -> None:
    found = scale_model.costs(_found(), 8 * 1024)
    assert found.listing == pytest.approx(0.001 + 0.002 * 0.05)
    assert found.dispatch == pytest.approx(0.01)
    # embed and score: 8 ms for the rows, two for sweep and manifest, two requests for a table, four
    # tables at a time, and one record and seven removals that wait sixteen at a time
    assert found.sealing == pytest.approx(2 * (0.008 + 0.002 + 0.05 * (2 / 4 + 8 / 16)))
    assert (found.writes, found.reads) == (5, 5)
    assert found.commit == 0.0  # half a second, behind the forward of the other slice


def test_costs__a_commit_longer_than_the_forward_shows() -> None:
    few = 64
    work, commit = scale_model.work_seconds(few), 2 * 0.001 * few / 1024 + 10 * 0.05
    assert work < commit
    assert scale_model.costs(_found(), few).commit == pytest.approx((work + commit) / 2 - work)


def test_spread__no_more_nodes_than_groups() -> None:
    one = scale_model.costs(_found(), 8 * 1024)
    assert scale_model.spread(one, 1024, 30).sealing == pytest.approx(one.sealing)
    assert scale_model.spread(one, 10 * 1024, 3).sealing == pytest.approx(one.sealing / 3)
    assert scale_model.spread(one, 10 * 1024, 30).sealing == pytest.approx(one.sealing / 10)


def test_memory_per_slice__is_what_grows() -> None:
    assert scale_model.memory_per_slice(_found()) == {
        "plan": 0.0, "pending": 20.0, "committed": 0.0, "account": 0.0,
    }  # fmt: skip


def test_first__names_the_fewest_nodes_above_a_tenth() -> None:
    rows = [
        {"faces": 10, "nodes": nodes, "shares": {"listing": 0.0, "sealing": share}}
        for nodes, share in ((1, 0.05), (3, 0.1), (10, 0.2), (30, 0.4))
    ]
    assert scale_model.first(rows) == {"listing": {"10": None}, "sealing": {"10": 10}}
