"""Proves the sums behind a prediction on pipelines that can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.planning.forecast import (
    Machine,
    Part,
    Spent,
    Step,
    average,
    choose,
    stream_time,
    train_time,
)


def step(name: str, seconds: float, workers: float = 1, cpu: float = 0.0, **more: bool) -> Step:
    return Step(name, [Part(name, Spent(seconds, cpu), **more)], workers)


def test_stream_time__slowest_step_decides_and_the_others_fill_the_pipeline() -> None:
    steps = [step("read", 0.01), step("embed", 0.04), step("score", 0.02)]
    span = stream_time(steps, faces=1000, slices=10, machine=Machine(cores=8))
    assert span.bottleneck == "embed"
    # ten slices of 100 faces: 10 x 4 s in embed, and one slice's read and score before and after
    assert span.seconds == pytest.approx(40 + 1 + 2)


def test_stream_time__workers_share_whole_slices() -> None:
    steps = [step("embed", 0.04, workers=4)]
    # ten slices for four workers are three rounds, of 4 s each
    assert stream_time(steps, 1000, 10, Machine(8)).seconds == pytest.approx(12)
    assert stream_time(steps, 1000, 8, Machine(8)).seconds == pytest.approx(2 * 125 * 0.04)
    # more workers than slices are no help
    many = [step("embed", 0.04, workers=100)]
    assert stream_time(many, 1000, 10, Machine(200)).seconds == pytest.approx(4)


def test_stream_time__cores_decide_where_everything_wants_them() -> None:
    steps = [step("read", 0.01, math.inf, 0.01), step("embed", 0.01, math.inf, 0.03)]
    span = stream_time(steps, 1000, 100, Machine(cores=2), slice_cpu=0.05)
    assert span.bottleneck == "cores (embed 67%)"
    assert span.bounds[span.bottleneck] == pytest.approx((1000 * 0.04 + 100 * 0.05) / 2)


def test_stream_time__network_decides_for_fat_faces() -> None:
    steps = [step("read", 0.001, 10)]
    machine = Machine(cores=100, network=1e6)
    span = stream_time(steps, 1000, 10, machine, face_bytes=1e4)
    assert (span.bottleneck, span.seconds) == ("network", pytest.approx(10))
    half = Machine(cores=100, network=1e6, efficiency=0.5)
    assert stream_time(steps, 1000, 10, half, face_bytes=1e4).seconds == pytest.approx(20)


def test_stream_time__decoding_beside_the_forward_costs_the_longer_of_the_two() -> None:
    parts = [
        Part("decode", Spent(0.02, 0.02), beside=True),
        Part("forward", Spent(0.03, 0.03), gpu=True, beside=True),
        Part("write", Spent(0.01, 0.0)),
    ]
    span = stream_time([Step("embed", parts, 1)], 100, 1, Machine(8))
    assert span.seconds == pytest.approx(100 * (0.03 + 0.01))
    assert span.bottleneck == "forward"
    # a GPU ten times as fast leaves decoding as the longer one, and takes no core
    fast = stream_time([Step("embed", parts, 1, gpus=1)], 100, 1, Machine(8, gpu_factor=10))
    assert fast.seconds == pytest.approx(100 * (0.02 + 0.01))
    assert fast.bottleneck == "decode"
    assert fast.bounds["cores (decode 100%)"] == pytest.approx(100 * 0.02 / 8)


def test_stream_time__two_streams_of_one_gpu_are_no_faster_on_it() -> None:
    parts = [Part("forward", Spent(0.1, 0.1), gpu=True)]
    machine = Machine(8, gpu_factor=10)
    for workers in (1, 2, 4):
        span = stream_time([Step("embed", parts, workers, gpus=1)], 1000, 100, machine)
        assert span.seconds == pytest.approx(10)


def test_stream_time__slower_cores_take_longer() -> None:
    steps = [step("embed", 0.04, 1, 0.04)]
    assert stream_time(steps, 100, 1, Machine(4, core_speed=0.5)).seconds == pytest.approx(8)


@pytest.mark.parametrize(("faces", "slices"), [(0, 0), (0, 3), (10, 0)])
def test_stream_time__nothing_to_do_takes_no_time(faces: float, slices: int) -> None:
    assert stream_time([step("read", 1)], faces, slices, Machine(1)).seconds == 0


def test_train_time__passes_over_the_rate() -> None:
    assert train_time(6000, 300, Machine(2)).seconds == pytest.approx(20)
    assert train_time(6000, 300, Machine(8, gpu_factor=10)).seconds == pytest.approx(2)


def test_train_time__workers_that_the_cores_hold() -> None:
    assert train_time(6000, 300, Machine(8), workers=4, threads=2).seconds == pytest.approx(5)
    assert train_time(6000, 300, Machine(4), workers=4, threads=2).seconds == pytest.approx(10)
    several = Machine(8, efficiency=0.5)
    assert train_time(6000, 300, several, workers=4, threads=2).seconds == pytest.approx(10)
    assert train_time(6000, 300, several).seconds == pytest.approx(20)  # one process loses nothing


def test_average__sources_count_by_their_faces_not_by_their_probes() -> None:
    values = {"a": [(1.0, 10.0), (3.0, 30.0)], "b": [(10.0, 5.0)]}
    assert average(values, {"a": 300.0, "b": 100.0}) == pytest.approx((300 * 2.5 + 100 * 10) / 400)
    assert average({"a": []}, {"a": 3.0}) == 0


def test_choose__one_in_every_stretch() -> None:
    assert choose(100, 4, [0.0] * 4) == [0, 25, 50, 75]
    assert choose(100, 4, [0.999] * 4) == [24, 49, 74, 99]
    assert choose(3, 10, [0.5] * 10) == [0, 1, 2]
    assert choose(0, 4, [0.5] * 4) == []
