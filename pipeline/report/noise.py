"""Labels that may be wrong: labeled faces on which the teachers, out of fold, say otherwise.

Source: Northcutt, Jiang and Chuang, Confident Learning, arXiv 1911.00068: thresholds and counts of
section 3.1, equation 1 and 2; self-confidence of section 3.2.1.
Departs: the counts are shown as they are, not calibrated to the class sizes; nothing is pruned. The
faces that are shown are those whose suggested label is the most probable one as well: a class that
teachers are never sure of has a low threshold and is suggested at a tenth of the probability.
Cost: the narrow columns of the labeled faces; their pictures, if faces are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import RecordError
from pipeline.images import decode
from pipeline.report.calibration import OutOfFold
from pipeline.report.facts import Face, Noise
from pipeline.report.pool import pixels_of
from pipeline.run import Artifact
from pipeline.storage import Location
from pipeline.tables import open_table, read_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

BATCH = 1024  # rows with pictures that are held at once


def confident(
    probs: NDArray[np.floating], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What each face confidently is, and how often each label is confidently each class.

    Args:
        probs: (N, K), of a model that has not seen the face.
        labels: (N,) given codes.

    Returns:
        suggested codes (N,), -1 where no class reaches the mean probability of its own faces; the
        most probable where several do. Counts (K, K) of given (row) and suggested label.
    """
    classes = probs.shape[1]
    cut = np.full(classes, np.inf)  # of a class without faces: nothing reaches it
    for code in np.unique(labels):
        cut[code] = probs[labels == code, code].mean()
    reached = np.where(probs >= cut, probs, -1.0)
    suggested = np.where(reached.max(1) >= 0, reached.argmax(1), -1).astype(np.int64)
    counts = np.zeros((classes, classes), np.int64)
    known = suggested >= 0
    np.add.at(counts, (labels[known], suggested[known]), 1)
    return suggested, counts


def noise(found: OutOfFold, homes: Sequence[Artifact], size: int, show_faces: bool) -> Noise:
    """The labeled faces that train, as their teachers see them.

    Args:
        found: what the teachers say of them.
        homes: stages that hold labeled faces.
        size: faces of the gallery.
        show_faces: whether their own pixels are wanted; thumbnails do for blurred ones.
    """
    names, labels, probs = found.label_names, found.labels, found.probs()
    suggested, counts = confident(probs, labels)
    own = probs[np.arange(len(labels)), labels]
    doubted = np.flatnonzero((suggested == probs.argmax(1)) & (suggested != labels))
    worst = doubted[np.argsort(own[doubted], kind="stable")][:size]
    ids = [found.ids[row] for row in worst]
    pixels = _pictures(homes, ids, show_faces)
    return Noise(
        label_names=names,
        faces=len(labels),
        agreement=float((probs.argmax(1) == labels).mean()),
        counts=counts,
        suspects=tuple(
            Face(
                face,
                float(own[row]),
                pixels[face],
                f"labeled {names[labels[row]]}, seems {names[suggested[row]]} "
                f"{probs[row, suggested[row]]:.2f}",
            )
            for face, row in zip(ids, worst.tolist(), strict=True)
            if face in pixels
        ),
    )


def _pictures(
    homes: Sequence[Artifact], ids: Sequence[str], show_faces: bool
) -> dict[str, np.ndarray]:
    wanted = pa.array(ids, pa.string())
    found: dict[str, np.ndarray] = {}
    for home in homes:
        faces = read_table(home.dir / FACES_FILE, ["id", "thumbnail"])
        rows = faces.filter(pc.and_(pc.is_in(faces["id"], wanted), pc.is_valid(faces["thumbnail"])))
        found |= {row["id"]: pixels_of(row["thumbnail"]) for row in rows.to_pylist()}
        for face, image in _images(home.dir / LABELED_FILE, wanted) if show_faces else ():
            try:
                found[face] = decode(image)
            except RecordError:
                continue  # the thumbnail stands in
    return found


def _images(at: Location, wanted: pa.Array) -> Iterator[tuple[str, bytes]]:
    with open_table(at, ["id", "image"]) as file:
        for batch in file.iter_batches(BATCH, columns=["id", "image"]):
            rows = batch.filter(pc.is_in(batch["id"], wanted))
            yield from zip(rows["id"].to_pylist(), rows["image"].to_pylist(), strict=True)
