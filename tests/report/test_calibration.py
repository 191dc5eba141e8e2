"""Reliability before and after the temperature is as a closed form says; files: test_collect.py."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.calibration import OutOfFold, calibration
from pipeline.report.facts import Bin


def _found(temperature: float) -> OutOfFold:
    """Ten faces with odds of 81 to 1, nine of them right; ten more with even odds, five right."""
    logits = np.repeat([[np.log(81.0), 0.0], [0.0, 0.0]], 10, axis=0)
    labels = np.array([0] * 9 + [1] + [0] * 5 + [1] * 5)
    ids = tuple(f"l#{i}" for i in range(20))
    return OutOfFold(("neutral", "happiness"), ids, labels, logits, temperature)


def test_calibration__its_temperature_takes_the_gap_away() -> None:
    found = calibration(_found(2.0))  # the root of 81 to 1 is 9 to 1, and 9 of 10 are right
    assert (found.temperature, found.faces) == (2.0, 20)
    assert found.before == (Bin(0.5, 0.5, 10), Bin(pytest.approx(81 / 82), 0.9, 10))
    assert found.after == (Bin(0.5, 0.5, 10), Bin(pytest.approx(0.9), 0.9, 10))
    assert found.ece_before == pytest.approx((81 / 82 - 0.9) / 2)
    assert found.ece_after == pytest.approx(0, abs=1e-12)


def test_calibration__a_temperature_of_one_changes_nothing() -> None:
    found = calibration(_found(1.0))
    assert found.before == found.after
    assert found.ece_before == found.ece_after > 0.03
