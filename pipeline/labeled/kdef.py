"""KDEF: 70 people, seven emotions, five angles, two sessions, posed; 4,900 pictures of 562 x 762.

    KDEF/AF01/AF01AFS.JPG     session A, female, person 01, afraid, straight

Names are read by position: `AF` opens the name of every woman's first session and means afraid
further on. Angles have one letter or two. There is no official split: everything is `train`, and
a person is a group, in both sessions.

Source: Lundqvist, Flykt, Oehman, The Karolinska Directed Emotional Faces, 1998.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.files import IMAGE_SUFFIXES, ListedFace, read_listed
from pipeline.labeled.records import Records
from pipeline.schema import EMOTIONS, emotion
from pipeline.storage import Location, location

Angle = Literal["FL", "HL", "S", "HR", "FR"]
PICTURE = re.compile(
    r"(?P<session>[AB])(?P<person>[FM]\d\d)(?P<emotion>AF|AN|DI|HA|NE|SA|SU)(?P<angle>FL|HL|S|HR|FR)"
)
DEFECTS = {
    **dict.fromkeys(("AF31V", "AM31H"), "misnamed"),
    **dict.fromkeys(("AM05ANFR", "BM10ANFR"), "misshapen"),
    **dict.fromkeys(
        ("AF01SUFR", "AF10AFFR", "AF11NEHL", "AF20DIHL", "AM25DIFL", "AM34DIFR", "BF13NEHR"),
        "nearly_black",
    ),
}
"""Known defects of the distributed files; survey finds what other black pictures there may be."""

NAMES = EMOTIONS[:7]
PEOPLE, SESSIONS = 70, 2


class KdefSet(Config):
    """KDEF, the pictures of some angles."""

    kind: Literal["kdef"] = "kdef"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str
    angles: tuple[Angle, ...] = Field(default=("S",), min_length=1)  # full, half, straight

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a name of another form."""
        root = location(self.path)
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder")
        faces = []
        dropped: Counter[str] = Counter()
        for file in root.files(IMAGE_SUFFIXES):
            stem = file.name.rpartition(".")[0].upper()
            if stem in DEFECTS:
                dropped[DEFECTS[stem]] += 1
                continue
            parts = _parts(stem, file)
            if parts["angle"] in self.angles:
                label = emotion(parts["emotion"])
                faces.append(ListedFace(file, "train", label, group=parts["person"]))
        table = read_listed(name, root, faces)
        return Records(table, NAMES, dropped=dropped, official={"train": self._official()})

    def _official(self) -> dict[str, int]:
        """Published pictures of the wanted angles, less the defects."""
        wanted = PEOPLE * SESSIONS * len(NAMES) * len(set(self.angles))
        named = filter(None, map(PICTURE.fullmatch, DEFECTS))
        return {"faces": wanted - sum(match["angle"] in self.angles for match in named)}


def _parts(stem: str, file: Location) -> dict[str, str]:
    match = PICTURE.fullmatch(stem)
    if match is None:
        raise LabelError(f"{file}: expected a name such as AF01ANS or BM35SUHL")
    return match.groupdict()
