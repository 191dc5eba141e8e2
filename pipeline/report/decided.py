"""What the decided pool says: counts, yield, purity by threshold, faces kept and rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import thresholds
from pipeline.errors import RecordError
from pipeline.images import decode
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.report.facts import Explorer, Face, Gallery, Level, Yield
from pipeline.report.pool import (
    COLUMNS,
    STEPS,
    THRESHOLDS,
    Sample,
    Tally,
    pixels_of,
    steps_of,
    walk,
)
from pipeline.run import PLAN_FILE, POINTS_FILE, TRUTH_FILE, Artifact
from pipeline.schema import REASONS, TRUTH, label_codes, label_names_of
from pipeline.tables import read_table
from pipeline.training.runs import FOLDS_FILE

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds of the short table; all of them steps of the long one."""
START = 0.8
"""Where the explorer opens, unless the operating point has one threshold for all classes."""
PER_STEP = 4
"""Faces that the explorer holds per step of the confidence."""


def decided(
    done: Mapping[str, Artifact],
    point: Mapping[str, Any],
    truth: pa.Table,
    size: int,
    show_faces: bool,
) -> dict[str, Any]:
    """Fields of the facts that come from the pool.

    Args:
        done: finished stages by name, those of :data:`pipeline.report.pool.COLUMNS` among them.
        point: the operating point, as stored.
        truth: TRUTH.
        size: faces per gallery.
        show_faces: whether kept faces are wanted as mined; thumbnails do for blurred ones.
    """
    at = done["survey"].dir
    plan = Plan(at / str((at / PLAN_FILE).read_json()["file"]))
    ledgers = {stage: Ledger(done[stage].dir) for stage in COLUMNS}
    if "twins" in done:  # guard's columns, and what embeddings found
        ledgers["guard"] = Ledger(done["twins"].dir)
    walked = walk(ledgers, plan, truth, size, PER_STEP)
    tally = walked.tally
    mined = Ledger(done["mine"].dir) if show_faces and "mine" in done else None
    explorer = explore(tally, _points(done["score"]), point, walked.ladder) if tally.cells else None
    known, kept = tally.known.total(), tally.reasons["selected"]
    return {
        "pool": {"faces": tally.faces, "usable": tally.usable, "kept": kept},
        "purity": tally.right.total() / known if known else None,
        "purity_known": known,
        "utilization": kept / tally.faces if tally.faces else None,
        "reasons": {r: tally.reasons[r] for r in reversed(REASONS) if tally.reasons[r]},
        "yields": _yields(tally, point),
        "explorer": explorer,
        "levels": tuple(v for v in explorer.levels if v.threshold in LEVELS) if explorer else (),
        "guard": _twins(tally),
        "duplicates": tally.duplicates,
        "quarantine": dict(tally.quarantine.most_common()),
        "galleries": _galleries(tally, walked.drawn, mined, _labels(done.get("teach"))),
    }


def truth_of(survey: Artifact | None) -> pa.Table:
    """The hidden truth, TRUTH, empty where there is none."""
    if survey is None or not (survey.dir / TRUTH_FILE).exists():
        return TRUTH.empty_table()
    return read_table(survey.dir / TRUTH_FILE, TRUTH.names)


def _points(score: Artifact) -> pa.Table | None:
    at = score.dir / POINTS_FILE
    return read_table(at, ["pseudo_label", "confidence", "label"]) if at.exists() else None


def explore(
    tally: Tally, points: pa.Table | None, point: Mapping[str, Any], ladder: Sequence[Sample]
) -> Explorer:
    """Every threshold's worth.

    Args:
        tally: with scored faces.
        points: out-of-fold pseudo_label, confidence and label of labeled faces, `label_names` in
            the metadata; None: nothing is estimated.
        point: the operating point, as stored.
        ladder: faces to look at.
    """
    names = label_names_of(points.schema) if points is not None else tuple(sorted(tally.cells))
    none = np.zeros((3, STEPS + 1), np.int64)
    cells = np.stack([tally.cells.get(name, none) for name in names])  # (K, 3, T)
    above = np.flip(np.flip(cells, 2).cumsum(2), 2)
    judge = _Judge(points, names)
    floor = point.get("confidence")
    start = START if floor is None or isinstance(floor, dict) else round(floor * STEPS) / STEPS
    return Explorer(
        classes=names,
        levels=tuple(
            judge.level(step, above[:, :, step], tally.faces) for step in range(STEPS + 1)
        ),
        start=start,
        faces=tuple(
            Face(s.id, s.confidence, pixels, s.pseudo_label or "")
            for s in ladder
            if (pixels := _thumbnail(s)) is not None
        ),
    )


class _Judge:
    """Estimates purity on labeled faces, out of fold, in the proportions of what is kept."""

    def __init__(self, points: pa.Table | None, names: tuple[str, ...]) -> None:
        self.steps, self.predicted, self.labels = (np.zeros(0, np.int64) for _ in range(3))
        if points is not None:
            points = points.filter(pc.is_valid(points["pseudo_label"]))
            self.steps = steps_of(points["confidence"])
            self.predicted, self.labels = (
                label_codes(points[name].to_pylist(), names) for name in ("pseudo_label", "label")
            )

    def level(self, step: int, above: np.ndarray, faces: int) -> Level:
        """One threshold; `above` (K, 3) counts faces, known and right at or above it."""
        kept, known, right = above.sum(0).tolist()
        passed = self.steps >= step
        mix = above[:, 0]
        worth = thresholds.estimate(passed, self.predicted, self.labels, len(mix), mix=mix)
        judged = bool(passed.any() and kept)
        return Level(
            threshold=float(THRESHOLDS[step]),
            kept=kept,
            share=kept / faces,
            purity=right / known if known else None,
            known=known,
            estimated=worth.purity if judged else None,
            labeled=int(passed.sum()),
            by_class=tuple(
                (n, p if judged and n else None)
                for n, p in zip(mix.tolist(), worth.precision.tolist(), strict=True)
            ),
        )


def _yields(tally: Tally, point: Mapping[str, Any]) -> tuple[Yield, ...]:
    names = point.get("label_names") or sorted({label for label, _ in tally.by_class} - {""})
    floor = point.get("confidence")
    rows = []
    for name in names:
        cut = (point.get("cuts") or {}).get(name)
        own = floor.get(name) if isinstance(floor, dict) else floor
        limits = [value for value in (cut, own) if value is not None]
        known = tally.known[name]
        rows.append(
            Yield(
                label=name,
                pool=sum(n for (label, _), n in tally.by_class.items() if label == name),
                kept=tally.by_class[name, "selected"],
                threshold=max(limits) if limits else None,
                purity=tally.right[name] / known if known else None,
                known=known,
            )
        )
    return tuple(rows)


def _twins(tally: Tally) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (kind, role), number in sorted(tally.twins.items()):
        found.setdefault(kind, {})[role] = number
    return found


def _galleries(
    tally: Tally,
    drawn: Mapping[tuple[str, str], list[Sample]],
    mined: Ledger | None,
    labels: Mapping[str, str],
) -> tuple[Gallery, ...]:
    kept = [s for (reason, _), samples in drawn.items() if reason == "selected" for s in samples]
    whole = _mined_faces(mined, kept) if mined else {}
    order = sorted(drawn, key=lambda key: (-REASONS.index(key[0]), key[1]))
    return tuple(
        Gallery(
            label or "no label",
            reason,
            tally.by_class[label, reason],
            tuple(
                Face(s.id, s.confidence, pixels, _near(s, labels))
                for s in drawn[reason, label]
                if (pixels := whole.get(s.id, _thumbnail(s))) is not None
            ),
        )
        for reason, label in order
    )


def _labels(teach: Artifact | None) -> dict[str, str]:
    """Label of each face in the teachers' bank, by id."""
    if teach is None or not (teach.dir / FOLDS_FILE).exists():
        return {}
    bank = read_table(teach.dir / FOLDS_FILE, ["id", "label"])
    return dict(zip(bank["id"].to_pylist(), bank["label"].to_pylist(), strict=True))


def _near(sample: Sample, labels: Mapping[str, str]) -> str:
    """The nearest labeled face in words; nothing of one that was forgotten since."""
    label = labels.get(sample.neighbor or "")
    return f"near {label} {sample.neighbor_similarity:.2f}" if label is not None else ""


def _mined_faces(mined: Ledger, samples: list[Sample]) -> dict[str, np.ndarray]:
    """Pixels of kept faces from the mined set; a face that is gone from it is left out."""
    found = {}
    wanted = {s.id for s in samples}
    for key in sorted({s.slice for s in samples}):
        table = mined.read(key, ["id", "image"])
        ids = table["id"].to_pylist()
        for i in (i for i, face_id in enumerate(ids) if face_id in wanted):
            try:
                found[ids[i]] = decode(table["image"][i].as_py())
            except RecordError:
                continue  # the thumbnail stands in
    return found


def _thumbnail(sample: Sample) -> np.ndarray | None:
    return None if sample.thumbnail is None else pixels_of(sample.thumbnail)
