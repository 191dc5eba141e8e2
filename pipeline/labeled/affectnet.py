"""AffectNet with eight emotions, in both releases.

    2017  Manually_Annotated_file_lists/{training,validation}.csv, with or without a header line
          Manually_Annotated_Images/103/29a31ebf....JPG: whole pictures, faces by their boxes
          automatically_annotated.csv and Automatically_Annotated_Images: the same, labeled by
          a network; training faces only
    2021  {train,val}_set/images/5.jpg: faces
          {train,val}_set/annotations/5_exp.npy: a 0-d array, the code as text
          {train,val}_set/annotations/5_lnd.npy: 136 numbers

Of the 68 landmarks five are kept: the middles of the eyes, the tip of the nose, the corners of the
mouth. Those of 2017 are in the pixels of the whole picture; those of 2021 are taken to be in the
pixels of the crop, which no document says, so they are read only where `landmarks` asks for them.
Rows of 2017 without an emotion (codes 8-10) or without a face box (negative width) are left out.
The test set was never published: `held_out` says what the validation set is here.

Cost: pictures of 2017 are kept whole, 100 GB and more for all of them: read a part, or crop once
and use the folder kind. 2021 is two small reads per face.

Source: Mollahosseini, Hasani, Mahoor, AffectNet, arXiv 1708.03985.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from pipeline.alignment import five_of_68
from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.codes import emotion_of, label_names
from pipeline.labeled.files import IMAGE_SUFFIXES, ListedFace, child, read_listed
from pipeline.labeled.records import HeldOut, Records
from pipeline.schema import require_columns
from pipeline.storage import Location, location

COLUMNS = (
    "subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
    "facial_landmarks", "expression", "valence", "arousal",
)  # fmt: skip
READ = {
    "subDirectory_filePath": pa.string(),
    "expression": pa.int64(),
    "facial_landmarks": pa.string(),
    **{f"face_{side}": pa.float64() for side in ("x", "y", "width", "height")},
}
SETS = {"train": "train_set", "validation": "val_set"}
LISTS = {
    "train": "training.csv",
    "validation": "validation.csv",
    "automatic": "automatically_annotated.csv",
}
FOLDERS_2017 = {
    "manual": ("Manually_Annotated_Images", "Manually_Annotated_file_lists"),
    "automatic": (
        "Automatically_Annotated_Images",
        "Automatically_annotated_file_list",
        "Automatically_Annotated_file_lists",
        "Manually_Annotated_file_lists",
    ),
}
"""Pictures, then where the list may lie."""
AUTOMATIC = "training labels are a network's (automatically_annotated.csv)"

OFFICIAL = {
    "train": {
        "neutral": 74_874, "happiness": 134_415, "sadness": 25_459, "surprise": 14_090,
        "fear": 6_378, "disgust": 3_803, "anger": 24_882, "contempt": 3_750,
    },
    "validation": dict.fromkeys(label_names("affectnet"), 500),
}  # fmt: skip
"""Manual annotations of 2017; the validation set of 2021 lacks one face."""


class AffectnetSet(Config):
    """AffectNet, whichever release the folder holds."""

    kind: Literal["affectnet"] = "affectnet"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str  # the folder of the release's own folders
    split: Literal["train", "validation"] | None = None  # read only this one
    held_out: HeldOut = "test"
    classes: Literal[7, 8] = 8  # 7: faces of contempt are left out
    annotation: Literal["manual", "automatic"] = "manual"  # of training faces; release of 2017
    landmarks: bool = False  # of the release of 2021, one more read per face; 2017: always read

    def records(self, name: str) -> Records:
        """Read the set.

        Raises:
            SourceError: neither release, a missing file, or a list with other columns.
            LabelError: a code that the release does not define.
        """
        root = location(self.path)
        is_2021 = any((root / folder).is_dir() for folder in SETS.values())
        faces: list[ListedFace] = []
        dropped: Counter[str] = Counter()
        for split in SETS if self.split is None else (self.split,):
            role = "train" if split == "train" else self.held_out
            if is_2021:
                if self.annotation == "automatic":
                    raise SourceError(f"{root}: release of 2021; `automatic` is of 2017")
                faces += _faces_2021(child(root, SETS[split]), role, self.landmarks)
            else:
                automatic = self.annotation == "automatic" and split == "train"
                images, listed = _list_of(root, "automatic" if automatic else split)
                faces += _faces_2017(images, listed, role, dropped)
        names = label_names("affectnet")[: self.classes]
        kept = [face for face in faces if face.label in names]
        dropped["contempt"] += len(faces) - len(kept)
        return Records(
            read_listed(name, root, kept),
            names,
            rules={"protocol": AUTOMATIC} if self.annotation == "automatic" else {},
            dropped=dropped,
            official=self._official(names),
            photos=not is_2021,
        )

    def _official(self, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
        """Published numbers of the wanted splits and classes, by role."""
        return {
            "train" if split == "train" else self.held_out: {
                "faces": sum(counts[name] for name in names),
                **{name: counts[name] for name in names},
            }
            for split, counts in OFFICIAL.items()
            if self.split in (None, split) and (split, self.annotation) != ("train", "automatic")
        }


# -- 2017 -----------------------------------------------------------------------------------------


def _list_of(root: Location, what: str) -> tuple[Location, Location]:
    """Folder of the pictures, and the list, which some copies keep in another folder."""
    images, *folders = FOLDERS_2017["automatic" if what == "automatic" else "manual"]
    found = [root / name for name in folders if (root / name / LISTS[what]).exists()]
    return root / images, child(found[0] if found else root, LISTS[what])


def _faces_2017(
    images: Location, listed: Location, role: str, dropped: Counter[str]
) -> list[ListedFace]:
    faces = []
    for row, line in enumerate(_read_list(listed)):
        label = emotion_of(str(line["expression"]), "affectnet", f"{listed} row {row}")
        x, y, width, height = (line[f"face_{side}"] for side in ("x", "y", "width", "height"))
        if label is None:
            dropped["no_emotion"] += 1
        elif width is None or height is None or width <= 0 or height <= 0:
            dropped["no_face_box"] += 1
        else:
            file = images / line["subDirectory_filePath"].strip()
            points = _five(line["facial_landmarks"], f"{listed} row {row}")
            box = (x, y, x + width, y + height)
            faces.append(ListedFace(file, role, label, box=box, landmarks=points))
    return faces


def _five(text: str | None, where: str) -> list[float] | None:
    """Five landmarks out of `x1;y1;x2;y2;...`; None where there are none."""
    if not text or not text.strip():
        return None
    try:
        numbers = np.array(text.strip().strip(";").split(";"), np.float64)
        return five_of_68(numbers.reshape(68, 2)).ravel().tolist()
    except ValueError as err:
        raise SourceError(f"{where}: {text[:40]!r}...; expected 136 landmark numbers") from err


def _read_list(file: Location) -> list[dict[str, Any]]:
    """Rows of a list; some copies lost the header line, and none of theirs may be lost with it."""
    data = file.read_bytes()
    first = data[: data.find(b"\n") + 1 or None].decode("utf-8", "replace").strip()
    names = [name.strip().strip('"') for name in first.split(",")]
    has_header = COLUMNS[0] in names
    if has_header:
        require_columns(names, READ, file.uri)
    elif len(names) != len(COLUMNS):
        raise SourceError(f"{file}: {len(names)} columns, no header; expected {len(COLUMNS)}")
    try:
        table = pcsv.read_csv(
            pa.BufferReader(data),
            read_options=pcsv.ReadOptions(
                column_names=names if has_header else COLUMNS, skip_rows=int(has_header)
            ),
            convert_options=pcsv.ConvertOptions(column_types=READ, include_columns=list(READ)),
        )
    except pa.ArrowInvalid as err:
        raise SourceError(f"{file}: expected CSV: {str(err).splitlines()[0]}") from err
    return table.to_pylist()


# -- 2021 -----------------------------------------------------------------------------------------


def _faces_2021(folder: Location, role: str, landmarks: bool) -> list[ListedFace]:
    annotations = folder / "annotations"
    faces = []
    for file in (folder / "images").files(IMAGE_SUFFIXES):
        stem = file.name.rpartition(".")[0]
        code_file = annotations / f"{stem}_exp.npy"
        code = _code(code_file)
        label = emotion_of(code, "affectnet", str(code_file))
        if label is None:
            raise LabelError(f"{code_file}: emotion code {code}; this release has 0-7")
        points = _landmarks(annotations / f"{stem}_lnd.npy") if landmarks else None
        faces.append(ListedFace(file, role, label, landmarks=points))
    return faces


def _landmarks(file: Location) -> list[float]:
    """Five landmarks out of an array of 136 numbers, or texts of numbers; never a pickle."""
    try:
        values = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        return five_of_68(values.astype(np.float64).reshape(68, 2)).ravel().tolist()
    except (ValueError, TypeError, EOFError) as err:
        raise SourceError(f"{file}: expected 136 landmark numbers: {err}") from err


def _code(file: Location) -> str:
    """The code in a 0-d array of text or number; a pickle in its place is never opened."""
    try:
        value = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        return str(int(value[()]))
    except (ValueError, TypeError, EOFError) as err:
        raise LabelError(f"{file}: expected one emotion code: {err}") from err
