"""Proves what the counters of a pass count; that Ray exports them is proved in tests/jobs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import ray.util.metrics

from pipeline import telemetry


def test_counted__faces_bad_ones_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[tuple[Any, ...]] = Counter()

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name, self.keys = name, tag_keys

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0  # as Ray's
            assert tuple(tags) == self.keys
            seen[(self.name, *tags.values())] += value

    monkeypatch.setattr(ray.util.metrics, "Counter", Fake)
    counted = telemetry.Counted("embed")
    counted.add(10, 1, {"fear": 4, "anger": 5})
    counted.add(7, 0, {"fear": 0, "anger": 7})
    counted.add(0, 0, {})
    assert seen == {
        ("omnifer_faces", "embed"): 17,
        ("omnifer_faces_quarantined", "embed"): 1,
        ("omnifer_faces_yielded", "embed", "fear"): 4,
        ("omnifer_faces_yielded", "embed", "anger"): 12,
    }
