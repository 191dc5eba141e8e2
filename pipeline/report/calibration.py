"""What the teachers say of labeled faces that they have not seen, and how sure they were.

Reliability stands before and after the temperature is divided by, on the very faces that it was
fitted on: it is one number for all of them, and says of other faces what it says of these.
Cost: the narrow columns of the labeled faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from pipeline.metrics import calibration_error, reliability
from pipeline.report.facts import Bin, Calibration
from pipeline.run import Artifact
from pipeline.schema import label_codes, label_names_of, matrix
from pipeline.tables import open_stored, read_table
from pipeline.training.handed import LABELED_FILE
from pipeline.training.runs import FOLDS_FILE


@dataclass(frozen=True)
class OutOfFold:
    """Labeled faces that train, each as the one teacher saw it that was not taught by it."""

    label_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,) given codes
    logits: NDArray[np.float64]  # (N, K), not calibrated
    temperature: float

    def probs(self, temperature: float | None = None) -> NDArray[np.float64]:
        """Probabilities (N, K) at a temperature; None: at the fitted one."""
        return softmax(self.logits / (temperature or self.temperature), axis=1)


def out_of_fold(teach: Artifact, homes: Sequence[Artifact]) -> OutOfFold | None:
    """What the folds of a finished teach hold; None where there are none.

    Args:
        teach: finished.
        homes: stages that hold labeled faces.
    """
    if not homes or not (teach.dir / FOLDS_FILE).exists():
        return None
    folds = read_table(teach.dir / FOLDS_FILE, ["id", "label", "logits"])
    if not folds.num_rows:
        return None
    with open_stored(homes[0].dir / LABELED_FILE) as file:
        names = label_names_of(file.schema)
    return OutOfFold(
        label_names=names,
        ids=tuple(folds["id"].to_pylist()),
        labels=label_codes(folds["label"].to_pylist(), names),
        logits=matrix(folds["logits"], len(names)).astype(np.float64),
        temperature=float(teach.facts.get("temperature", 1.0)),
    )


def calibration(found: OutOfFold) -> Calibration:
    """Reliability at temperature 1 and at the fitted one."""
    before, after = found.probs(1.0), found.probs()
    return Calibration(
        temperature=found.temperature,
        faces=len(found.labels),
        before=bins_of(reliability(before, found.labels)),
        after=bins_of(reliability(after, found.labels)),
        ece_before=calibration_error(before, found.labels),
        ece_after=calibration_error(after, found.labels),
    )


def bins_of(curve: Sequence[dict[str, float]]) -> tuple[Bin, ...]:
    """Rows of :func:`pipeline.metrics.reliability` as the page has them."""
    return tuple(Bin(b["confidence"], b["accuracy"], int(b["n"])) for b in curve)
