"""The sample is the same in any order; a confidence reaches a step as select compares it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.report.pool import STEPS, THRESHOLDS, Sampler, steps_of


def test_sampler__same_faces_in_any_order() -> None:
    def rows(first: int) -> pa.Table:
        ids = [f"p#{i}" for i in range(first, first + 50)]
        return pa.table(
            {
                "id": ids,
                "reason": ["selected"] * 50,
                "label": ["fear"] * 50,
                "confidence": pa.array(np.linspace(0, 1, 50), pa.float32()),
                "thumbnail": pa.nulls(50, pa.binary(256)),
                "pseudo_label": ["fear"] * 50,
                "neighbor": pa.nulls(50, pa.string()),
                "neighbor_similarity": pa.nulls(50, pa.float32()),
            }
        )

    drawn = []
    for order in ((0, 50, 100), (100, 0, 50)):
        sampler = Sampler(7)
        for first in order:
            sampler.add("s", rows(first))
        drawn.append([s.id for s in sampler.drawn()["selected", "fear"]])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 7
    assert {int(i[2:]) // 50 for i in drawn[0]} != {0}


def test_steps_of__is_the_highest_threshold_that_a_confidence_reaches() -> None:
    rng = np.random.default_rng(0)
    exact = THRESHOLDS.astype(np.float32)  # each threshold itself, and its neighbors
    values = np.concatenate(
        [rng.random(500, np.float32), exact, np.nextafter(exact, np.float32(0))]
    )
    wanted = [max(i for i in range(STEPS + 1) if v >= exact[i]) for v in values]
    assert steps_of(pa.chunked_array([pa.array(values)])).tolist() == wanted
