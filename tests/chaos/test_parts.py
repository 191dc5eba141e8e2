"""Proves that drivers which share a pass leave what one driver alone would have left."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import flow

from pipeline import conduct, pool
from pipeline.claim import Part
from pipeline.errors import ConfigError, PartDone
from pipeline.plan import number_of

LATER = ("embed", "score", "search", "select", "mine", "twins", "distill", "student", "evaluate")


def test_part__two_drivers_leave_what_one_would(
    tiny_run: Path, tmp_path: Path, local_ray: None
) -> None:
    root = flow.copy(tiny_run, tmp_path / "run", without=(*LATER, "control_a", "control_b"))
    job = flow.start(flow.tiny(flow.UNTRACKED), root)
    first, second = replace(job, part=Part(1, 2)), replace(job, part=Part(2, 2))
    with pytest.raises(PartDone, match="embed: part 1/2 is done; other parts are not"):
        conduct.run_one(first, "embed")
    slices = pool.pool_plan(job).slices()
    mine = {f"{s.start}-{s.stop}" for s in slices if first.part.owns(number_of(s.key))}
    assert set(flow.reads(job)) == mine
    assert 0 < len(mine) < len(slices)
    with pytest.raises(PartDone):  # nothing of its own is left
        conduct.run_one(first, "embed")
    conduct.run_one(second, "embed")
    assert sorted(flow.reads(job)) == sorted(f"{s.start}-{s.stop}" for s in slices)
    conduct.run_one(first, "score")
    for stage in ("embed", "score"):
        whole = next(tiny_run.glob(f"{stage}/g*/manifest.json"))
        shared = next(root.glob(f"{stage}/g*/manifest.json"))
        assert shared.read_bytes() == whole.read_bytes()


def test_part_of__only_passes_are_shared() -> None:
    assert conduct.part_of("embed", "2/3") == Part(2, 3)
    with pytest.raises(ConfigError, match="teach is one driver's work; shared are survey, embed"):
        conduct.part_of("teach", "2/3")
