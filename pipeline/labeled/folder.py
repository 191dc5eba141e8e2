"""Labeled faces in folders named by class, below folders named by split where there are any.

    root/train/happy/0001.jpg        root/happy/0001.jpg
    root/test/Angry/x/17.png         root/4/17.png      with names: {4: happiness, ...}
                                                        or names: rafdb

Cost: every file is read whole, one after the other; on S3 some at a time.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.files import IMAGE_SUFFIXES, read_all
from pipeline.labeled.records import (
    ClassNames,
    LabelPolicy,
    Records,
    labels_present,
    records_table,
    resolve_labels,
    split_role,
)
from pipeline.storage import Location, location


class FolderSet(Config):
    """Class folders, matched by name and never by their order."""

    kind: Literal["folder"] = "folder"
    name: str | None = None  # prefix of the faces' ids; default: the kind
    path: str
    split: str | None = None  # read only this split folder: its name or train, validation, test
    names: ClassNames = Field(default_factory=dict)  # folder name -> emotion; null drops the class
    label_policy: LabelPolicy | None = None  # what becomes of the class `other`

    def records(self, name: str) -> Records:
        """Read the set; raises SourceError, or LabelError for a folder name nobody knows."""
        root = location(self.path)
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder")
        files = list(root.files(IMAGE_SUFFIXES))
        if not files:
            raise SourceError(f"{root}: no image in it ({' '.join(IMAGE_SUFFIXES)})")
        paths = [file.uri.removeprefix(root.uri + "/") for file in files]
        splits, classes = _split_and_class(paths, root)
        wanted = [i for i, folder in enumerate(splits) if _is_wanted(folder, self.split)]
        if not wanted:
            there = ", ".join(sorted({folder for folder in splits if folder})) or "none"
            raise SourceError(f"{root}: no image of split {self.split!r}; found: {there}")
        labels = resolve_labels(
            [classes[i] for i in wanted], self.names, self.label_policy,
            lambda i: f"{root}/{paths[wanted[i]]}",
        )  # fmt: skip
        kept = [(i, label) for i, label in zip(wanted, labels, strict=True) if label is not None]
        table = records_table(
            [f"{name}/{paths[i]}" for i, _ in kept],
            [split_role(splits[i]) if splits[i] else "train" for i, _ in kept],
            [label for _, label in kept],
            pa.array(read_all([files[i] for i, _ in kept]), pa.large_binary()),
        )
        return Records(table, labels_present(labels), {})


def _is_wanted(folder: str, split: str | None) -> bool:
    return split is None or folder == split or (bool(folder) and split_role(folder) == split)


def _split_and_class(paths: list[str], root: Location) -> tuple[list[str], list[str | None]]:
    """Split folder ("" where the set has none) and class folder of each path."""
    parts = [path.split("/") for path in paths]
    with_splits = all(split_role(part[0]) for part in parts)
    depth = 1 if with_splits else 0
    for path, part in zip(paths, parts, strict=True):
        if len(part) < depth + 2:
            raise LabelError(f"{root}/{path}: lies in no class folder")
    return [part[0] if with_splits else "" for part in parts], [part[depth] for part in parts]
