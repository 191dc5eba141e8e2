"""What every labeled reader yields, and how native class and split names become ours.

A native class name goes through the reader's own `names` first, then through the alias table; a
name that neither knows is an error, never a new class and never an order of sorting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from pydantic import BeforeValidator

from pipeline.config import Config
from pipeline.errors import LabelError, SourceError
from pipeline.labeled.codes import SCHEMES
from pipeline.schema import BOX, EMOTIONS, LANDMARKS, OTHER, PERCEIVED, emotion

RECORDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("role", pa.string()),  # train | validation | test by the data's own split, or null
        pa.field("label", pa.string()),  # an emotion name; null where the face has none
        pa.field("soft", pa.list_(pa.float32())),  # over the reader's label_names, or null
        pa.field("group", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("box", BOX),
        pa.field("landmarks", LANDMARKS),
        *(pa.field(name, pa.string()) for name in PERCEIVED),
    ]
)
"""One row per labeled face, before the recipe's split."""

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("training",),
    "validation": ("val", "valid"),
    "test": ("testing",),
}
"""Roles and how data sets spell them."""


class MapOther(Config):
    """Count faces of the class `other` as another emotion."""

    map: str


def _class_names(value: Any) -> Any:
    if isinstance(value, str):
        if value not in SCHEMES:
            raise ValueError(f"no scheme of codes; known: {', '.join(SCHEMES)}")
        return dict(SCHEMES[value])
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


ClassNames = Annotated[dict[str, str | None], BeforeValidator(_class_names)]
"""What a data set's own class names or codes mean, or the data set whose codes they are (`rafdb`).

YAML reads codes as numbers; here they are text.
"""

HeldOut = Literal["test", "validation"]
"""Role of a published validation set whose test labels are not public.

Papers report on it, so it is the test set by default; `validation` frees it for choosing.
"""

LabelPolicy = Literal["keep", "drop"] | MapOther
"""What becomes of faces of the class `other`; has no default where a set holds such faces."""


@dataclass(frozen=True)
class Records:
    """Labeled faces of one data set."""

    table: pa.Table  # RECORDS
    label_names: tuple[str, ...]
    rules: dict[str, Any] = field(default_factory=dict)
    """Faces that get a label, per vote rule and native split; `protocol` where a split differs."""
    dropped: Mapping[str, int] = field(default_factory=dict)  # faces not in the table, by why
    official: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Published numbers for these settings: role -> `faces` and, where known, each emotion."""
    photos: bool = False  # whole pictures, maybe of several people: a crop must be said


def unlike_official(records: Records) -> list[str]:
    """Where a set differs from the published one; a subset is no error.

    Returns:
        One line per number, such as `train: 3 faces; published: 12,271`.
    """
    rows = zip(records.table["role"].to_pylist(), records.table["label"].to_pylist(), strict=True)
    found = Counter(row for row in rows if row[1] is not None)
    lines = []
    for role, published in records.official.items():
        counts = {label: n for (own, label), n in found.items() if own == role}
        counts["faces"] = sum(counts.values())
        lines += [
            f"{role}: {counts.get(name, 0):,} {name}; published: {n:,}"
            for name, n in published.items()
            if counts.get(name, 0) != n
        ]
    return lines


def labels_present(labels: Sequence[str | None]) -> tuple[str, ...]:
    """The emotions that occur, in canonical order."""
    found = set(labels)
    return tuple(name for name in (*EMOTIONS, OTHER) if name in found)


def split_role(native: str) -> str | None:
    """The role of a native split name, None if it is no split name."""
    folded = native.strip().lower()
    for role, spellings in SPLITS.items():
        if folded == role or folded in spellings:
            return role
    return None


def resolve_labels(
    native: Sequence[str | None],
    names: Mapping[str, str | None],
    policy: LabelPolicy | None,
    where: Callable[[int], str],
) -> list[str | None]:
    """Emotion names of native class names; None where there is none or it is dropped.

    Args:
        native: class names or codes as the data set writes them.
        names: the recipe's own translations; null drops a class.
        policy: what becomes of `other`.
        where: file and row of an index, for messages.

    Raises:
        LabelError: a name nobody knows, or `other` without a policy.
    """
    known: dict[str | None, str | None] = {None: None}
    labels = []
    for i, name in enumerate(native):
        if name not in known:
            known[name] = _resolve(str(name), names, policy, where(i))
        labels.append(known[name])
    return labels


def _resolve(
    name: str, names: Mapping[str, str | None], policy: LabelPolicy | None, where: str
) -> str | None:
    if name in names:
        translated = names[name]
        if translated is None:
            return None
    else:
        translated = name
    try:
        label = emotion(translated, where)
    except LabelError as err:
        raise LabelError(f"{err}; other classes are told by `names`, as in {{1: fear}}") from err
    if label != OTHER or policy == "keep":
        return label
    if policy is None:
        raise LabelError(
            f"{where}: class 'other' needs label_policy: keep, drop or {{map: <emotion>}}"
        )
    return None if policy == "drop" else emotion(policy.map, "label_policy.map")


def image_bytes(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Encoded images of a binary column or of a struct with a binary field `bytes`.

    Raises:
        SourceError: any other type.
    """
    names = [field.name for field in column.type] if pt.is_struct(column.type) else []
    values = pc.struct_field(column, "bytes") if "bytes" in names else column
    kind = values.type
    if not (pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_null(kind)):
        raise SourceError(f"{where}: type {column.type}; expected binary or struct<bytes, path>")
    return values.combine_chunks().cast(pa.large_binary())


def box_floats(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Boxes as :data:`pipeline.schema.BOX`; null where the column is.

    Raises:
        SourceError: not a list of numbers, or not 4 of them.
    """
    return _floats(column, BOX, where)


def landmark_floats(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Landmarks as :data:`pipeline.schema.LANDMARKS`; null where the column is.

    Raises:
        SourceError: not a list of numbers, or not 10 of them.
    """
    return _floats(column, LANDMARKS, where)


def _floats(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.Array:
    try:
        return column.combine_chunks().cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        expected = f"lists of {kind.list_size} numbers"
        raise SourceError(f"{where}: type {column.type}; expected {expected}") from err


def records_table(
    ids: Sequence[str],
    roles: Sequence[str | None],
    labels: Sequence[str | None],
    images: pa.Array | Sequence[bytes],
    *,
    soft: np.ndarray | None = None,
    groups: pa.Array | None = None,
    boxes: pa.Array | None = None,
    landmarks: pa.Array | None = None,
    perceived: Mapping[str, Sequence[str | None]] | None = None,
) -> pa.Table:
    """A RECORDS table; a row of zeros in `soft` (N, K) means no soft label."""
    shares = None if soft is None else [row if row.any() else None for row in soft]
    columns = (ids, roles, labels, shares, groups, images, boxes, landmarks)
    known = [(perceived or {}).get(name) for name in PERCEIVED]
    arrays = [
        pa.nulls(len(ids), field.type) if values is None else _array(values, field.type)
        for values, field in zip([*columns, *known], RECORDS, strict=True)
    ]
    return pa.table(arrays, schema=RECORDS)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
