"""CK+: sequences from a neutral face to the peak of a posed emotion, 593 of 123 people.

    cohn-kanade-images/S005/001/S005_001_00000011.png      frames, numbered from 1
    Emotion/S005/001/S005_001_00000011_emotion.txt         `   3.0000000e+00`

327 sequences have an emotion. Where the file is missing the sequence has none: its frames keep
their row without a label, and can be mined. The emotion is that of the last frames; the first one
is neutral. There is no official split: everything is `train`, and a person is a group.
CK+48, class folders of cropped faces, is read by the folder kind.

Source: Lucey et al., The Extended Cohn-Kanade Dataset (CK+), CVPR Workshops 2010.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.codes import emotion_of, label_names
from pipeline.labeled.files import ListedFace, child, lines_of, read_listed
from pipeline.labeled.records import Records
from pipeline.storage import Location, location

SEQUENCES = 327
"""Published sequences that have an emotion."""


class CkplusSet(Config):
    """CK+, some frames of every sequence."""

    kind: Literal["ckplus"] = "ckplus"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder of cohn-kanade-images and Emotion
    frames: int = Field(default=3, ge=1)  # last frames of a sequence, which show its emotion
    neutral: bool = False  # the first frame of a labeled sequence too, as neutral

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a code outside 0-7."""
        root = location(self.path)
        images = child(root, "cohn-kanade-images")
        emotions = child(root, "Emotion")
        faces = []
        for person in images.children():
            for sequence in person.children():
                label = _emotion(emotions / person.name / sequence.name)
                faces += self._frames(sequence, label, person.name)
        per_sequence = self.frames + self.neutral
        official = {"train": {"faces": SEQUENCES * per_sequence}}
        return Records(read_listed(name, root, faces), label_names("ckplus"), official=official)

    def _frames(self, sequence: Location, label: str | None, person: str) -> list[ListedFace]:
        """The first frame is never taken for the emotion, however short the sequence."""
        pictures = [at for at in sequence.children() if at.name.lower().endswith(".png")]
        neutral = pictures[:1] if self.neutral and label is not None else []
        return [
            *(ListedFace(at, "train", "neutral", person) for at in neutral),
            *(ListedFace(at, "train", label, person) for at in pictures[1:][-self.frames :]),
        ]


def _emotion(folder: Location) -> str | None:
    """Emotion of a sequence; None where its folder is missing or empty."""
    files = [at for at in folder.children() if at.name.endswith("_emotion.txt")]
    if not files:
        return None
    if len(files) > 1:
        raise SourceError(f"{folder}: {len(files)} emotion files; expected one")
    lines = lines_of(files[0])
    if len(lines) != 1:
        raise LabelError(f"{files[0]}: {len(lines)} lines; expected one emotion code")
    where, text = lines[0]
    try:
        code = float(text)
    except ValueError as err:
        raise LabelError(f"{where}: {text.strip()!r}; expected an emotion code") from err
    return emotion_of(f"{code:g}", "ckplus", where)
