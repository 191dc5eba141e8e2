"""Aff-Wild2 as the ABAW challenge gives it for expressions: one code per frame of a video.

    EXPR_Recognition_Challenge/{Train_Set,Validation_Set}/<video>.txt   header, frames 1, 2...
    cropped_aligned/<video>/00001.jpg                                   faces of 112 x 112

The header names the classes, whose number changed between the years. Frames without a face have no
file, frames of code -1 no emotion: both are left out and counted. `<video>_left` and `_right` are
two people in one video; a video is a group.

Neighboring frames are all but copies: `every` takes one of so many to train on. Validation videos
are read whole, for the challenge judges every frame of them. Cost: one listing per video, one read
per frame; all 2.6 million frames would take 10 GB and more.

Source: Kollias, Zafeiriou, Expression, Affect, Action Unit Recognition: Aff-Wild2, arXiv
    1910.04855.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import LabelError
from pipeline.labeled.files import ListedFace, child, lines_of, read_listed
from pipeline.labeled.records import HeldOut, LabelPolicy, Records, labels_present, resolve_labels
from pipeline.storage import Location, location

SETS = {"train": "Train_Set", "validation": "Validation_Set"}
NO_EMOTION = "-1"


class Affwild2Set(Config):
    """Aff-Wild2, frames of its videos."""

    kind: Literal["affwild2"] = "affwild2"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder of EXPR_Recognition_Challenge and cropped_aligned
    split: Literal["train", "validation"] | None = None  # read only this one
    held_out: HeldOut = "test"
    every: int = Field(default=1, ge=1)  # frames 1, 1 + every, ... of training videos
    label_policy: LabelPolicy | None = None  # what becomes of the class `other`

    def records(self, name: str) -> Records:
        """Read the set.

        Raises:
            SourceError: a missing folder or file.
            LabelError: a code that the header does not name, or `other` without a policy.
        """
        root = location(self.path)
        images = child(root, "cropped_aligned")
        challenge = root / "EXPR_Recognition_Challenge"
        sets = challenge if challenge.is_dir() else root
        faces: list[ListedFace] = []
        dropped: Counter[str] = Counter()
        for split in SETS if self.split is None else (self.split,):
            role = "train" if split == "train" else self.held_out
            for video in child(sets, SETS[split]).children():
                if video.name.endswith(".txt"):
                    every = self.every if split == "train" else 1
                    faces += self._frames(video, images, role, every, dropped)
        return Records(
            read_listed(name, root, faces),
            labels_present([face.label for face in faces]),
            dropped=dropped,
        )

    def _frames(
        self, video: Location, images: Location, role: str, every: int, dropped: Counter[str]
    ) -> list[ListedFace]:
        """Faces of one video, one of `every` frames; line k below the header is frame k."""
        (where, header), *frames = lines_of(video) or [(f"{video} line 1", "")]
        classes = resolve_labels(header.split(","), {}, self.label_policy, lambda _: where)
        name = video.name.removesuffix(".txt")
        folder = images / name
        there = {file.name for file in folder.children()}
        group = re.sub(r"_(left|right)$", "", name)
        faces = []
        for k in range(1, len(frames) + 1, every):
            code = _code(*frames[k - 1], len(classes))
            label = None if code is None else classes[code]
            if label is None:
                dropped["no_emotion" if code is None else "other"] += 1
            elif f"{k:05d}.jpg" not in there:
                dropped["no_face"] += 1
            else:
                faces.append(ListedFace(folder / f"{k:05d}.jpg", role, label, group))
        return faces


def _code(where: str, text: str, classes: int) -> int | None:
    """The code of a frame; None for the one that says that there is no emotion."""
    code = text.strip()
    if code == NO_EMOTION:
        return None
    if not code.isdecimal() or int(code) >= classes:
        raise LabelError(f"{where}: emotion code {code!r}; expected -1 to {classes - 1}")
    return int(code)
