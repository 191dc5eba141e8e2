"""Ranges of a gzip file are those of the unpacked bytes, inflated once where they come in order."""

import gzip
import itertools

import numpy as np
import pytest

from pipeline.sources import inflating
from pipeline.sources.inflating import MOST_KEPT, PIECE, Unpacked, unpacked
from pipeline.storage import location

DATA = (np.random.default_rng(0).integers(0, 64, 5 * PIECE + 77, np.uint8)).tobytes()


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    found: list[Unpacked] = []
    monkeypatch.setattr(inflating, "_kept", found)
    yield found
    for one in found:
        one.close()


@pytest.fixture
def at(tmp_path):
    halves = (DATA[: len(DATA) // 3], DATA[len(DATA) // 3 :])  # two members, as pigz and cat write
    (tmp_path / "a.tgz").write_bytes(b"".join(gzip.compress(half) for half in halves))
    return location(tmp_path / "a.tgz")


@pytest.fixture
def opened(monkeypatch):
    made = []

    class Counted(Unpacked):
        def __init__(self, at, mark=""):
            made.append(at)
            super().__init__(at, mark)

    monkeypatch.setattr(inflating, "Unpacked", Counted)
    return made


def ranges(at, bounds, mark="m"):
    found = []
    for start, stop in bounds:
        with unpacked(at, mark, start) as file:
            found.append(file.range(start, stop))
    return found


def test_range__is_a_slice_of_the_unpacked_bytes(at):
    rng = np.random.default_rng(1)
    for _ in range(20):
        cuts = np.sort(rng.integers(0, len(DATA) + 1000, 8)).tolist()
        bounds = list(itertools.pairwise(cuts))
        assert ranges(at, bounds) == [DATA[start:stop] for start, stop in bounds]
    assert ranges(at, [(0, 1 << 40), (5, 5)]) == [DATA, b""]


def test_unpacked__in_order_the_file_is_opened_once(at, opened):
    bounds = [(start, start + 1000) for start in range(0, len(DATA), 50_000)]
    ranges(at, bounds)
    assert len(opened) == 1
    ranges(at, bounds[:1])
    assert len(opened) == 2
    ranges(at, bounds[-1:], mark="replaced")
    assert len(opened) == 3


def test_unpacked__few_are_kept_and_none_that_failed(at, kept):
    for i in range(2 * MOST_KEPT):
        ranges(at, [(0, 1)], mark=str(i))
    assert [one.made_of[1] for one in kept] == [str(i) for i in range(MOST_KEPT, 2 * MOST_KEPT)]
    with pytest.raises(ZeroDivisionError), unpacked(at, "7", 0):
        1 / 0  # noqa: B018
    assert len(kept) == MOST_KEPT - 1


@pytest.mark.parametrize("damage", ["cut", "second member is none"])
def test_range__a_damaged_file_ends_at_one_byte_for_every_reader(at, tmp_path, damage):
    data = (tmp_path / "a.tgz").read_bytes()
    second = data.rindex(b"\x1f\x8b\x08")
    spoiled = data[: len(data) // 2] if damage == "cut" else data[:second] + b"?" * 5000
    (tmp_path / "a.tgz").write_bytes(spoiled)
    whole = b"".join(ranges(at, [(0, len(DATA))]))
    assert PIECE < len(whole) < len(DATA)
    for step in (PIECE // 3, PIECE + 5, 3 * PIECE):
        bounds = [(start, start + step) for start in range(0, len(DATA), step)]
        assert b"".join(ranges(at, bounds, mark=str(step))) == whole
    last = len(whole) - 10
    assert ranges(at, [(last, len(DATA))], mark="late") == [whole[last:]]
