"""ExpW: photographs of the web, 91,793 faces found by a detector, labels in one list.

    label/label.lst      name face_id top left right bottom confidence code
    origin/name.jpg      whole pictures; the face is what the box holds

Boxes are top, left, right, bottom, in this order. A picture may hold several faces: they are one
group. There is no official split: everything is `train`.

Source: Zhang, Luo, Loy, Tang, From Facial Expression Recognition to Interpersonal Relation
    Prediction, arXiv 1609.06426.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.labeled.codes import emotion_of, label_names
from pipeline.labeled.files import ListedFace, child, lines_of, read_listed
from pipeline.labeled.records import Records
from pipeline.storage import Location, location

FIELDS = 8


class ExpwSet(Config):
    """ExpW, one row per face."""

    kind: Literal["expw"] = "expw"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder of label.lst, or of label/label.lst, and origin
    min_confidence: float | None = None  # of the detector, in its own unbounded unit; None: all

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a code outside 0-6."""
        root = location(self.path)
        images = child(root, "origin")
        faces = []
        dropped: Counter[str] = Counter()
        for where, line in lines_of(child(root, "label.lst", "label/label.lst")):
            face, confidence = _face(images, line, where)
            if self.min_confidence is not None and confidence < self.min_confidence:
                dropped["below_confidence"] += 1
            elif face.box is None or face.box[0] >= face.box[2] or face.box[1] >= face.box[3]:
                dropped["empty_box"] += 1
            else:
                faces.append(face)
        table = read_listed(name, root, faces)
        return Records(table, label_names("expw"), dropped=dropped, photos=True)


def _face(images: Location, line: str, where: str) -> tuple[ListedFace, float]:
    """The face of one line and the detector's confidence."""
    fields = line.split()
    if len(fields) != FIELDS:
        raise SourceError(f"{where}: {len(fields)} columns; expected {FIELDS}")
    picture, number, *numbers, code = fields
    try:
        top, left, right, bottom, confidence = map(float, numbers)
    except ValueError as err:
        raise SourceError(f"{where}: {' '.join(numbers)!r}; expected box and confidence") from err
    label = emotion_of(code, "expw", where)
    box = (left, top, right, bottom)
    return ListedFace(images / picture, "train", label, picture, box, number), confidence
