"""Numbers of a pass for Prometheus: Ray exports them beside its own, from the driver's node.

    ray_omnifer_faces_total{stage}               faces that came out of a pass
    ray_omnifer_faces_quarantined_total{stage}   those of them that became rows with a reason
    ray_omnifer_faces_yielded_total{stage,label} counts per class, where a stage has them

They count from the driver's start and forget with it; what is exact is in the run folder.
infra/monitoring draws them.
"""

from __future__ import annotations

from collections.abc import Mapping

FACES = "omnifer_faces"
QUARANTINED = "omnifer_faces_quarantined"
YIELDED = "omnifer_faces_yielded"


class Counted:
    """Counters of one pass; Ray must be up when they are made."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter

        self._stage = {"stage": stage}
        self._faces = Counter(FACES, "Faces that came out of a pass.", ("stage",))
        self._bad = Counter(QUARANTINED, "Faces that became rows with a reason.", ("stage",))
        self._labels = Counter(YIELDED, "Faces of a pass by class.", ("stage", "label"))

    def add(self, faces: int, bad: int, labels: Mapping[str, int]) -> None:
        """Count what one slice gave: all its faces, the bad ones, and counts by class."""
        for counter, amount in ((self._faces, faces), (self._bad, bad)):
            if amount:  # Ray refuses to count nothing
                counter.inc(amount, self._stage)
        for label, amount in labels.items():
            if amount:
                self._labels.inc(amount, {**self._stage, "label": label})
