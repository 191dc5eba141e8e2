"""What kind of labeled set or pool is at a path, by the names and columns it is distributed with.

Nothing is guessed from numbers: a folder of classes named 0 to 6 is not recognized as labeled,
since every data set counts its emotions differently.

Cost: a listing, of at most 2,000 names; of a table its footer.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.types as pt

from pipeline.errors import LabelError, SourceError
from pipeline.labeled.files import IMAGE_SUFFIXES
from pipeline.labeled.records import split_role
from pipeline.schema import EMOTIONS, emotion
from pipeline.sources.extents import is_pattern, shards
from pipeline.sources.lance import SUFFIX, datasets, is_dataset, schema_of
from pipeline.storage import Location, location
from pipeline.tables import open_table

Role = Literal["labeled", "pool"]

SIGNS: Sequence[tuple[Role, str, tuple[tuple[str, ...], ...]]] = (
    ("labeled", "ferplus", (("fer2013new.csv",), ("fer2013.csv", "icml_face_data.csv"))),
    ("labeled", "fer2013", (("fer2013.csv", "icml_face_data.csv"),)),
    ("labeled", "ferplus", (("FER2013Train",), ("FER2013Valid",))),
    ("labeled", "rafdb", (("EmoLabel",), ("Image",))),
    ("labeled", "affectnet", (("Manually_Annotated_file_lists",),)),
    ("labeled", "affectnet", (("train_set",), ("val_set",))),
    ("labeled", "ckplus", (("cohn-kanade-images",), ("Emotion",))),
    ("labeled", "kdef", (("AF01",), ("AM01", "BF01"))),
    ("labeled", "expw", (("label", "label.lst"), ("origin",))),
    ("labeled", "sfew", (("Train",), ("Val",), ("Test", "Train_Aligned_Faces"))),
    ("labeled", "affwild2", (("EXPR_Recognition_Challenge",),)),
)
"""Role and kind of folders that hold one name out of each of these groups."""

SUFFIXES: Mapping[str, tuple[Role, str]] = {
    ".tsv": ("pool", "msceleb_tsv"),
    ".rec": ("pool", "recordio"),
    ".tar": ("pool", "webdataset"),
    ".tar.gz": ("pool", "webdataset"),
    ".tgz": ("pool", "webdataset"),
    ".zip": ("pool", "zip"),
    ".parquet": ("pool", "parquet"),
    ".lance": ("pool", "lance"),
}
VOTES = {"usage", "neutral", "contempt", "NF"}
"""Columns of FERPlus votes beside FER2013 pixels."""
PIXELS = {"emotion", "pixels"}
"""Columns of FER2013's csv files."""
CODES = {"usage", "image", "emotion"}
"""Columns of FER2013 as Parquet."""
LABEL_COLUMNS = ("label", "emotion", "expression")
IMAGE_COLUMNS = ("image", "img", "jpg", "face")
PATH_COLUMNS = (*IMAGE_COLUMNS, "path", "file", "filename", "file_name")
GROUP_COLUMNS = ("group", "person", "person_id", "subject", "subject_id", "identity", "video")
LONGEST = 65_536  # bytes of a header
LISTED = 2000  # names that recognition looks at


@dataclass(frozen=True)
class Found:
    """What is at a path.

    Attributes:
        role: of the recipe's `labeled` or `pool`.
        config: what to write there.
        why: what gave it away.
    """

    role: Role
    config: dict[str, Any]
    why: str


def recognize(path: str) -> Found:
    """Tell what kind of labeled set or pool a path holds.

    Raises:
        SourceError: nothing there, or nothing that any reader knows; names what was seen.
    """
    if is_pattern(path):
        files = shards(path, ())
        found = _file(_there(files[0]))
        why = f"{len(files):,} numbered files; {found.why}"
        return Found(found.role, {**found.config, "path": path}, why)
    at = _there(location(path))
    if not at.is_dir() or is_dataset(at):
        return _file(at)
    names = {child.name for child in at.children()}
    for role, kind, groups in SIGNS:
        held = [next((name for name in group if name in names), None) for group in groups]
        if all(held):
            return Found(
                role, {"kind": kind, "path": path}, f"holds {' and '.join(map(str, held))}"
            )
    if "train.csv" in names and set(_header(at / "train.csv")) >= PIXELS:
        return Found("labeled", {"kind": "fer2013", "path": path}, "holds train.csv of pixels")
    if any(name.endswith(SUFFIX) for name in names):
        found = _file(datasets(path)[0])
        return Found(found.role, {**found.config, "path": path}, f"Lance datasets; {found.why}")
    suffixes = (*SUFFIXES, *IMAGE_SUFFIXES)
    listed = [file.uri for file in itertools.islice(at.files(suffixes), LISTED)]
    containers = Counter(s for uri in listed for s in SUFFIXES if uri.lower().endswith(s))
    if 2 * containers.total() > len(listed):
        suffix = max(containers, key=lambda s: (containers[s], len(s)))
        first = next(uri for uri in listed if uri.lower().endswith(suffix))
        found = _file(Location(first))
        config = {**found.config, "path": path}
        return Found(found.role, config, f"{containers[suffix]:,} {suffix} files; {found.why}")
    listed = [uri for uri in listed if uri.lower().endswith(IMAGE_SUFFIXES)]
    if not listed:
        seen = ", ".join(sorted(names)[:5]) or "nothing"
        raise SourceError(f"{at}: no format that is known; it holds {seen}")
    return _folder(at, path, listed)


def recognize_pool(path: str) -> Found:
    """The same for whoever wants only the pictures: what labels there are is not looked at.

    Raises:
        SourceError: as :func:`recognize`.
    """
    found = recognize(path)
    if found.role == "pool":
        return found
    tables = _tables(path)
    if tables:
        with open_table(tables[0]) as file:
            return _column(tables[0], path, file.schema_arrow)
    return Found("pool", {"kind": "folder", "path": path}, found.why)


def suffix_of(name: str) -> str | None:
    """The suffix of a container file's name, one of SUFFIXES, or None."""
    return max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default=None)


def _tables(path: str) -> list[Location]:
    """The Parquet files that a path means."""
    if is_pattern(path) or not location(path).is_dir():
        files = shards(path, ())
    else:
        files = list(itertools.islice(location(path).files((".parquet",)), 1))
    return [at for at in files if at.name.lower().endswith(".parquet")]


def _there(at: Location) -> Location:
    if not at.exists():
        raise SourceError(f"{at}: no such file or folder")
    return at


def _file(at: Location) -> Found:
    suffix = suffix_of(at.name)
    if is_dataset(at):
        return _column(at, at.uri, schema_of(at), "lance")
    if at.name.lower().endswith(".csv"):
        return _csv(at)
    if suffix is None:
        known = ", ".join((*SUFFIXES, ".csv"))
        raise SourceError(f"{at}: no format that is known; expected {known}")
    role, kind = SUFFIXES[suffix]
    if kind != "parquet":
        return Found(role, {"kind": kind, "path": at.uri}, f"{suffix} file")
    with open_table(at) as file:
        schema = file.schema_arrow
    if set(schema.names) >= VOTES:
        return Found("labeled", {"kind": "ferplus", "path": at.uri}, "columns of FERPlus votes")
    if set(schema.names) >= CODES and pt.is_integer(schema.field("emotion").type):
        return Found("labeled", {"kind": "fer2013", "path": at.uri}, "columns of FER2013")
    return _table(at, schema.names) or _column(at, at.uri, schema)


def _csv(at: Location) -> Found:
    """A csv file: FER2013's pixels, or a table of paths and labels."""
    names = _header(at)
    if set(names) >= PIXELS:
        return Found("labeled", {"kind": "fer2013", "path": at.uri}, "columns of FER2013")
    found = _table(at, names, PATH_COLUMNS)
    if found is None:
        mark = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
        if mark is not None:
            raise SourceError(f"{at}: columns are parted by {mark!r}, expected commas")
        raise SourceError(
            f"{at}: no columns of pictures ({', '.join(PATH_COLUMNS)}) and labels "
            f"({', '.join(LABEL_COLUMNS)}); name yours by image_column and label_column of kind "
            f"table; found: {', '.join(names)}"
        )
    return found


def _header(at: Location) -> list[str]:
    """Column names of a csv file."""
    with at.open() as file:
        first = file.readline(LONGEST).decode("utf-8-sig", errors="replace")
    return [name.strip() for name in next(csv.reader([first]), [])]


def _table(
    at: Location, names: Sequence[str], pictures: Sequence[str] = IMAGE_COLUMNS
) -> Found | None:
    """A table of labeled pictures, by the names of its columns."""
    column = next((name for name in pictures if name in names), None)
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if column is None or label is None:
        return None
    table = {"kind": "table", "path": at.uri, "image_column": column, "label_column": label}
    table |= {"split_column": "split"} if "split" in names else {}
    group = next((name for name in GROUP_COLUMNS if name in names), None)
    table |= {} if group is None else {"group_column": group}
    return Found("labeled", table, f"columns {column} and {label}")


def _column(at: Location, path: str, schema: pa.Schema, kind: str = "parquet") -> Found:
    """A pool of a table's pictures, by the name of their column."""
    column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if column is None:
        raise SourceError(f"{at}: no column of images; found: {', '.join(schema.names)}")
    config = {"kind": kind, "path": path}
    config |= {} if column == "image" else {"image_column": column}
    return Found("pool", config, f"column {column} of type {schema.field(column).type}")


def _folder(at: Location, path: str, listed: Sequence[str]) -> Found:
    parts = [uri.removeprefix(at.uri).strip("/").split("/") for uri in listed]
    depth = 1 if all(len(p) > 2 and split_role(p[0]) for p in parts) else 0
    classes = sorted({p[depth] for p in parts if len(p) > depth + 1})
    if classes and all(len(p) > depth + 1 for p in parts) and all(map(_is_emotion, classes)):
        said = f"folders {', '.join(classes[:9])}"
        return Found("labeled", {"kind": "folder", "path": path}, said)
    config: dict[str, Any] = {"kind": "folder", "path": path}
    if classes and len(classes) > len(EMOTIONS):
        config["group_from"] = "parent"
    unknown = [name for name in classes if not _is_emotion(name)]
    said = f"image files, in {len(classes)} folders of no known class" if classes else "image files"
    if len(unknown) < len(classes):
        few = ", ".join(unknown[:5]) or "none, but there are images beside them"
        said = (
            f"image files; {len(classes) - len(unknown)} of {len(classes)} folders are classes, "
            f"not known: {few}; as labeled: kind folder with names: {{FOLDER: emotion}}"
        )
    return Found("pool", config, said)


def _is_emotion(name: str) -> bool:
    try:
        emotion(name)
    except LabelError:
        return False
    return True
