"""Proves that a picture which kills every worker that decodes it ends as one quarantined row."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import images, screening, survey, synthetic
from pipeline.images import Crop
from pipeline.ledger import Ledger
from pipeline.placement import Operator, StreamConfig, Transform
from pipeline.plan import Plan, Slice
from pipeline.schema import READ
from pipeline.storage import Location, location
from pipeline.streaming import stream

POISON = synthetic.encode(synthetic.draw(1, [7])[0])
HEALTHY = synthetic.encode(synthetic.draw(0, [1])[0])
COUNT, FACES, BAD = 4, 5, (2, 3)  # face 3 of slice 2 is the poison

decode = images.decode


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Workers and their children import this module by the name that pytest gave it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[__name__.count(".")]))
        yield


def deadly(data: bytes) -> np.ndarray:
    if data == POISON:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data)


def read(slice: Slice) -> pa.Table:
    number = slice.start // FACES
    rows = range(slice.start, slice.stop)
    columns = {
        "id": [f"web/a#{row}" for row in rows],
        "position": list(rows),
        "group": [None for _ in rows],
        "image": [POISON if (number, row % FACES) == BAD else HEALTHY for row in rows],
        "box": [None for _ in rows],
        "landmarks": [None for _ in rows],
        "reason": [None for _ in rows],
        "detail": [None for _ in rows],
    }
    return pa.table(columns, schema=READ)


def make_surveyor(at: Location) -> Transform:
    """The real surveyor, in a process whose decoder dies of one picture."""
    images.decode = deadly
    survey.screen = partial(screening.screen, look=f"{__name__}:deadly")
    return survey.Surveyor(at, {"web": (Crop(), "gray")}, 1)


def test_poison__costs_one_face(local_ray: None, tmp_path: Path) -> None:
    plan = Plan.write(
        location(tmp_path / "plan"),
        [
            Slice(f"s{i:07d}", 0, "web", "/a", FACES * i, FACES * (i + 1), "f", FACES)
            for i in range(COUNT)
        ],
    )
    at = location(tmp_path / "survey")
    operators = [Operator(make_surveyor, (at,), "survey", pool=(1, 1), num_cpus=0.5)]
    config = StreamConfig(no_progress_seconds=120)
    out = list(stream(plan, read, operators, config))
    assert len(out) == COUNT
    found = {slice.key: table["reason"].to_pylist() for slice, table in Ledger(at).tables(plan)}
    crashed = {key: reasons.index("crashed") for key, reasons in found.items() if any(reasons)}
    assert crashed == {f"s{BAD[0]:07d}": BAD[1]}
    assert sum(reason is not None for reasons in found.values() for reason in reasons) == 1
