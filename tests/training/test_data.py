"""Proves that batches are pure functions of seed, step, stream and rank, with stated chances."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.augment import GEOMETRY, plain, strong, weak
from pipeline.errors import ConfigError
from pipeline.training.data import (
    Batches,
    LabeledFaces,
    Stream,
    cap_shares,
    class_chances,
    mass_chances,
    seed_of,
)
from pipeline.training.faces import ArrayFaces

CPU = torch.device("cpu")


def stream(count: int = 10, batch: int = 4, **changes: object) -> Stream:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    made = Stream("labeled", ArrayFaces(pixels), batch, {"x": plain}, 8, {"y": np.arange(count)})
    return replace(made, **changes)


def one_worker(seed: int = 0) -> Batches:
    return Batches(seed, 0, 1, CPU)


def test_draw__every_face_once_per_epoch_in_another_order() -> None:
    with one_worker() as batches:
        drawn = np.concatenate([batches.draw(stream(), step) for step in range(10)])
    epochs = drawn.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_draw__steps_may_come_in_any_order() -> None:
    with one_worker() as one, one_worker() as other:
        forth = [one.draw(stream(), step) for step in range(8)]
        back = [other.draw(stream(), step) for step in reversed(range(8))][::-1]
    assert np.array_equal(forth, back)


def test_draw__rows_are_all_that_is_drawn_from() -> None:
    rows = np.array([7, 2, 5])
    with one_worker() as batches:
        drawn = np.concatenate([batches.draw(stream(rows=rows), step) for step in range(3)])
        chances = stream(rows=rows, probabilities=np.array([0.0, 1.0, 0.0]))
        assert set(batches.draw(chances, 0)) == {2}
    assert np.bincount(drawn)[[2, 5, 7]].tolist() == [4, 4, 4]


def test_draw__with_probabilities_follows_them() -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.2])
    with one_worker() as batches:
        drawn = batches.draw(stream(4, 20_000, probabilities=probabilities), 0)
    shares = np.bincount(drawn, minlength=4) / 20_000
    assert shares == pytest.approx(probabilities, abs=0.015)
    assert shares[1] == 0


def test_at__the_ranks_share_one_batch() -> None:
    with one_worker() as whole, Batches(0, 0, 2, CPU) as first, Batches(0, 1, 2, CPU) as second:
        one = whole.at([stream()], 3, last=True)["labeled"]
        parts = [b.at([stream()], 3, last=True)["labeled"] for b in (first, second)]
    assert np.array_equal(one.index, np.concatenate([p.index for p in parts]))
    assert torch.equal(one.views["x"], torch.cat([p.views["x"] for p in parts]))
    assert torch.equal(one.targets["y"], torch.from_numpy(one.index))


def test_at__drawn_ahead_is_what_would_be_drawn_then() -> None:
    drawn = stream(views={"w": weak, "s": strong})
    with one_worker() as ahead, one_worker() as fresh:
        for step in range(4):
            a = ahead.at([drawn], step, last=False)["labeled"]
            b = fresh.at([replace(drawn)], step, last=True)["labeled"]
            assert np.array_equal(a.index, b.index)
            assert all(torch.equal(a.views[v], b.views[v]) for v in ("w", "s"))
    assert not torch.equal(a.views["w"], a.views["s"])


def test_at__maps_are_of_the_very_views_and_change_nothing() -> None:
    views = {"w": weak, "s": strong}
    bare, asked = stream(views=views), stream(views=views, geometry={"s": GEOMETRY["strong"]})
    with one_worker(3) as batches:
        without = batches.at([bare], 5, last=True)["labeled"]
        found = batches.at([asked], 5, last=True)["labeled"]
    assert without.maps == {}
    assert set(found.maps) == {"s"}
    assert all(torch.equal(without.views[v], found.views[v]) for v in views)
    generator = torch.Generator().manual_seed(seed_of(3, 5, "labeled", "s", 0))
    assert torch.equal(found.maps["s"], GEOMETRY["strong"](4, generator))


def test_at__a_changed_stream_is_drawn_anew() -> None:
    first = stream(probabilities=np.eye(10)[0])
    with one_worker() as batches:
        batches.at([first], 0, last=False)
        changed = replace(first, probabilities=np.eye(10)[9])
        assert set(batches.at([changed], 1, last=True)["labeled"].index) == {9}


def test_at__a_batch_that_cannot_be_shared_is_refused() -> None:
    with Batches(0, 0, 3, CPU) as batches, pytest.raises(ConfigError, match=r"batch of 4 .* 3"):
        batches.at([stream()], 0, last=True)


def test_stream__nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="labeled: no faces"):
        stream(rows=np.array([], np.int64))
    with pytest.raises(ConfigError, match="2 probabilities, 10 faces"):
        stream(probabilities=np.array([0.5, 0.5]))


def test_seed_of__differs_by_every_part_and_fits_torch() -> None:
    seeds = {seed_of(s, step, name) for s in range(5) for step in range(5) for name in "ab"}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)


def test_labeled_faces__soft_targets_come_first() -> None:
    faces = ArrayFaces(np.zeros((2, 1, 8, 8), np.uint8))
    labels, soft = np.array([0, 1]), np.full((2, 2), 0.5)
    assert LabeledFaces(faces, labels).targets is labels
    assert LabeledFaces(faces, labels, soft).targets.dtype == np.float32


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_class_chances__classes_share_draws_by_n_to_one_minus_power(power: float) -> None:
    labels = np.repeat([0, 1, 3], [100, 25, 4])
    chances = class_chances(labels, power)
    expected = np.array([100.0, 25.0, 0.0, 4.0]) ** (1 - power)
    expected[2] = 0
    assert np.bincount(labels, chances) == pytest.approx(expected / expected.sum())


def test_mass_chances__one_hot_is_class_chances() -> None:
    labels = np.repeat([0, 1, 2], [100, 25, 4])
    chances = mass_chances(np.eye(3)[labels], 0.5, cap=100.0)
    assert chances == pytest.approx(class_chances(labels, 0.5))


def test_mass_chances__no_face_above_the_cap() -> None:
    labels = np.repeat([0, 1], [9999, 1])
    free = mass_chances(np.eye(2)[labels], 1.0, cap=1e9)
    capped = mass_chances(np.eye(2)[labels], 1.0, cap=5.0)
    assert free[-1] == pytest.approx(0.5)
    # 5 times the mean rate of before the cut
    assert capped[-1] / capped[0] == pytest.approx(5 / 0.5, rel=1e-3)


def test_cap_shares__lowers_one_and_raises_the_others_alike() -> None:
    chances = np.array([0.4, 0.4, 0.1, 0.1])
    capped = cap_shares(chances, ["web", "web", "film", "lab"], {"web": 0.25, "gone": 0.1})
    assert capped == pytest.approx([0.125, 0.125, 0.375, 0.375])
    assert cap_shares(chances, ["web", "web", "film", "lab"], {"web": 0.9}) is not None


def test_cap_shares__raising_may_push_another_source_over() -> None:
    chances = np.array([0.7, 0.2, 0.1])
    capped = cap_shares(chances, ["web", "film", "lab"], {"web": 0.3, "film": 0.3})
    assert capped == pytest.approx([0.3, 0.3, 0.4])


def test_cap_shares__a_gap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"web 0.3 leave a gap"):
        cap_shares(np.array([0.5, 0.5]), ["web", "web"], {"web": 0.3})
