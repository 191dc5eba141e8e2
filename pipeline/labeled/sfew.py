"""SFEW 2.0: stills of films with seven emotions.

    Train/Angry/*.png, Val/Happy/*.png                              whole frames
    Train_Aligned_Faces/Angry/*.png, Val_Aligned_Faces_new/...      faces
    Test/*.png                                                      no labels: never read

`held_out` says what the validation set is here.

Source: Dhall et al., Video and Image Based Emotion Recognition Challenges in the Wild: EmotiW
    2015, ICMI 2015.
"""

from __future__ import annotations

from typing import Literal

from pipeline.config import Config
from pipeline.labeled.files import IMAGE_SUFFIXES, ListedFace, child, read_listed
from pipeline.labeled.records import HeldOut, Records
from pipeline.schema import EMOTIONS, emotion
from pipeline.storage import Location, location

FOLDERS = {
    ("train", "frame"): ("Train",),
    ("validation", "frame"): ("Val",),
    ("train", "aligned"): ("Train_Aligned_Faces",),
    ("validation", "aligned"): ("Val_Aligned_Faces_new", "Val_Aligned_Faces"),
}
OFFICIAL = {"train": {"faces": 958}, "validation": {"faces": 436}}
"""Whole frames; some have no aligned face."""


class SfewSet(Config):
    """SFEW, whole frames or aligned faces."""

    kind: Literal["sfew"] = "sfew"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder of Train and Val
    split: Literal["train", "validation"] | None = None  # read only this one
    held_out: HeldOut = "test"
    image: Literal["aligned", "frame"] = "aligned"

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a folder that names no emotion."""
        root = location(self.path)
        roles = {"train": "train", "validation": self.held_out}
        wanted = [split for split in roles if self.split in (None, split)]
        faces = [
            face
            for split in wanted
            for face in _faces(child(root, *FOLDERS[split, self.image]), roles[split])
        ]
        published = wanted if self.image == "frame" else ()
        return Records(
            read_listed(name, root, faces),
            EMOTIONS[:7],
            official={roles[split]: OFFICIAL[split] for split in published},
        )


def _faces(folder: Location, role: str) -> list[ListedFace]:
    """The class is the innermost folder: some archives repeat the name of the split."""
    return [
        ListedFace(file, role, emotion(file.parent.name, str(file)))
        for file in folder.files(IMAGE_SUFFIXES)
    ]
