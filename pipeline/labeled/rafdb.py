"""RAF-DB, basic emotions: 15,339 photographs of the web, each rated by about forty people.

    basic/EmoLabel/list_patition_label.txt     `train_00001.jpg 5`; mirrors mend the file's name
    basic/Image/aligned/train_00001_aligned.jpg, basic/Image/original/train_00001.jpg
    basic/Annotation/manual/train_00001_manu_attri.txt
        five lines `x<TAB>y`: eyes, nose, mouth corners; then gender, race, age as codes
    train/1/*.jpg, test/7/*.jpg                what mirrors make of it

The list names the originals, aligned files insert `_aligned`; train numbers have five digits, test
numbers four; codes start at 1. Landmarks are of the original pictures; how the aligned ones were
made of them is not published. Which eye comes first is not either: the points are put into the
order that the picture shows. Gender, race and age are what annotators saw, not what people are.

Cost: landmarks and attributes are one small read per face.

Source: Li, Deng, Du, Reliable Crowdsourcing and Deep Locality-Preserving Learning for Expression
    Recognition in the Wild, CVPR 2017.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import model_validator

from pipeline.alignment import seen_order
from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.codes import RAFDB, SCHEMES, emotion_of, label_names
from pipeline.labeled.files import ListedFace, child, lines_of, read_listed
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.records import Records
from pipeline.storage import Location, location

NAMES = label_names("rafdb")
SUM_TOLERANCE = 0.02  # the shares are rounded
AGREEMENT = 0.5  # a wrong order of columns agrees with the labels about as often as chance

OFFICIAL = {
    "train": {
        "faces": 12_271, "surprise": 1_290, "fear": 281, "disgust": 717, "happiness": 4_772,
        "sadness": 1_982, "anger": 705, "neutral": 2_524,
    },
    "test": {
        "faces": 3_068, "surprise": 329, "fear": 74, "disgust": 160, "happiness": 1_185,
        "sadness": 478, "anger": 162, "neutral": 680,
    },
}  # fmt: skip


ATTRIBUTES = {
    "perceived_gender": ("male", "female", "unsure"),
    "perceived_race": ("Caucasian", "African-American", "Asian"),
    "perceived_age": ("0-3", "4-19", "20-39", "40-69", "70+"),
}
"""Words of the data set's codes, in the order of its lines behind the landmarks."""
POINTS = 5


class RafdbSet(Config):
    """RAF-DB basic as distributed, or a mirror's folders of codes."""

    kind: Literal["rafdb"] = "rafdb"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder `basic`, or a mirror's folder of train/1..7 and test/1..7
    split: Literal["train", "test"] | None = None  # read only this one
    image: Literal["aligned", "original"] = "aligned"
    soft: bool = False  # read the raters' shares of EmoLabel/distribution_basic.txt too
    landmarks: bool = False  # read the five of Annotation/manual; of original images only
    attributes: bool = False  # read perceived gender, race and age there, for subgroups

    @model_validator(mode="after")
    def _landmarks_are_of_originals(self) -> RafdbSet:
        if self.landmarks and self.image != "original":
            raise ValueError("landmarks are those of the original images; set image: original")
        return self

    def records(self, name: str) -> Records:
        """Read the set.

        Raises:
            SourceError: a missing file, a line of another form.
            LabelError: a code outside 1-7, or shares that do not fit the labels.
        """
        root = location(self.path)
        official = {role: n for role, n in OFFICIAL.items() if self.split in (None, role)}
        annotated = self.soft or self.landmarks or self.attributes
        folder = child(root, "EmoLabel") if annotated else child(root, "EmoLabel", *OFFICIAL)
        if folder.name in OFFICIAL:
            mirror = FolderSet(path=self.path, split=self.split, names=dict(SCHEMES["rafdb"]))
            return Records(mirror.records(name).table, NAMES, official=official)
        listed = _listed(child(folder, "list_patition_label.txt", "list_partition_label.txt"))
        listed = {
            picture: label
            for picture, label in listed.items()
            if self.split in (None, _role(picture))
        }
        faces = [self._face(root, picture, label) for picture, label in listed.items()]
        soft = _soft(folder / "distribution_basic.txt", listed) if self.soft else None
        return Records(read_listed(name, root, faces, soft), NAMES, official=official)

    def _face(self, root: Location, picture: str, label: str | None) -> ListedFace:
        face = ListedFace(self._file(root, picture), _role(picture), label)
        if not (self.landmarks or self.attributes):
            return face
        stem = picture.rpartition(".")[0]
        points, perceived = _annotated(root / "Annotation" / "manual" / f"{stem}_manu_attri.txt")
        return replace(
            face,
            landmarks=points if self.landmarks else None,
            perceived=perceived if self.attributes else {},
        )

    def _file(self, root: Location, picture: str) -> Location:
        stem, dot, suffix = picture.rpartition(".")
        inserted = "_aligned" if self.image == "aligned" else ""
        return root / "Image" / self.image / f"{stem}{inserted}{dot}{suffix}"


def _role(picture: str) -> str:
    return picture.partition("_")[0]


def _listed(file: Location) -> dict[str, str | None]:
    """Emotion of each original's name, in the order of the list."""
    listed = {}
    for where, line in lines_of(file):
        picture, _, code = line.strip().rpartition(" ")
        if _role(picture) not in OFFICIAL:
            raise SourceError(f"{where}: {line!r}; expected a name train_* or test_* and a code")
        listed[picture] = emotion_of(code, "rafdb", where)
    return listed


def _annotated(file: Location) -> tuple[list[float], dict[str, str]]:
    """Landmarks, and perceived attributes by name, of one face."""
    lines = lines_of(file)
    if len(lines) != POINTS + len(ATTRIBUTES):
        raise SourceError(f"{file}: {len(lines)} lines; expected {POINTS + len(ATTRIBUTES)}")
    points = []
    for where, line in lines[:POINTS]:
        try:
            x, y = map(float, line.split())
        except ValueError as err:
            raise SourceError(f"{where}: {line!r}; expected x and y") from err
        points.append((x, y))
    perceived = {}
    for (where, line), (name, words) in zip(lines[POINTS:], ATTRIBUTES.items(), strict=True):
        code = line.strip()
        if not (code.isdecimal() and int(code) < len(words)):
            raise LabelError(f"{where}: {name} {code!r}; expected 0-{len(words) - 1}")
        perceived[name] = words[int(code)]
    return seen_order(np.array(points)).ravel().tolist(), perceived


def _soft(file: Location, listed: dict[str, str | None]) -> np.ndarray:
    """Raters' shares (N, 7) in the order of NAMES; the file's columns are codes 1 to 7.

    No document says so, hence the check against the labels.
    """
    shares = {}
    for where, line in lines_of(file):
        picture, *values = line.split()
        shares[picture] = _shares(values, where)
    missing = next((picture for picture in listed if picture not in shares), None)
    if missing is not None:
        raise SourceError(f"{file}: no line for {missing}")
    native = np.array([shares[picture] for picture in listed], np.float32).reshape(-1, len(RAFDB))
    labels = np.array([RAFDB.index(str(label)) for label in listed.values()])
    agree = float((native.argmax(axis=1) == labels).mean()) if len(labels) else 1.0
    if agree < AGREEMENT:
        raise LabelError(
            f"{file}: the largest share is the label's in {agree:.0%} of the lines; "
            "the columns are not in the order of the codes"
        )
    return native[:, [RAFDB.index(label) for label in NAMES]]


def _shares(values: list[str], where: str) -> np.ndarray:
    try:
        shares = np.array(values, np.float64)
    except ValueError as err:
        raise SourceError(f"{where}: {' '.join(values)!r}; expected 7 shares") from err
    total = float(shares.sum())
    if len(shares) != len(RAFDB) or (shares < 0).any() or abs(total - 1) > SUM_TOLERANCE:
        raise SourceError(f"{where}: {len(shares)} shares, sum {total:g}; expected 7, sum 1")
    return shares / total
