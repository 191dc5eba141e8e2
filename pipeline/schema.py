"""Vocabulary: emotions and their spellings, column names, Arrow schemas, reasons.

Emotions are names everywhere; integers appear only beside the `label_names` they index. Tables of
a slice hold one row per face, in the order the source yields them, in every stage: faces,
embeddings, scores and selection of one slice line up row by row, and bad faces keep their row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import LabelError, SourceError

EMOTIONS: tuple[str, ...] = (
    "neutral",
    "happiness",
    "sadness",
    "surprise",
    "fear",
    "disgust",
    "anger",
    "contempt",
)
"""Canonical order (AffectNet's, whose first seven are the usual seven classes)."""

OTHER = "other"
"""A ninth class that a few data sets define (Aff-Wild2). Mapping it away is an explicit policy."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "neutral": ("ne", "neutrality"),
    "happiness": ("happy", "ha", "joy", "smile"),
    "sadness": ("sad", "sa"),
    "surprise": ("surprised", "su"),
    "fear": ("fearful", "afraid", "af", "fe", "scared"),
    "disgust": ("disgusted", "di"),
    "anger": ("angry", "an", "mad"),
    "contempt": ("contemptuous", "co"),
    OTHER: ("others",),
}


def emotion(name: str, where: str = "") -> str:
    """Canonical emotion of a class name; case, blanks and a trailing underscore do not count.

    Raises:
        LabelError: the name is in no vocabulary; the message offers the nearest spelling.
    """
    folded = name.strip().strip("_").lower()
    if folded in ALIASES:
        return folded
    for canonical, spellings in ALIASES.items():
        if folded in spellings:
            return canonical
    known = [*ALIASES, *(s for spellings in ALIASES.values() for s in spellings if len(s) > 2)]
    near = difflib.get_close_matches(folded, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(ALIASES)}"
    raise LabelError(f"{where + ': ' if where else ''}unknown class name {name!r}{hint}")


def class_name(name: str) -> str:
    """A class name of settings, which compare names as they stand: no spelling but the canonical.

    Raises:
        ValueError: any other name; the message offers the nearest.
    """
    if name in ALIASES:
        return name
    spelled = {one: own for own, others in ALIASES.items() for one in (own, *others)}
    near = difflib.get_close_matches(name.strip().lower(), spelled, n=1)
    hint = f"; did you mean {spelled[near[0]]!r}?" if near else f"; known: {', '.join(ALIASES)}"
    raise ValueError(f"unknown class name {name!r}{hint}")


# -- status and reasons ---------------------------------------------------------------------------

OK = "ok"
QUARANTINED = "quarantined"

REASONS: tuple[str, ...] = (
    # why a face is quarantined (RecordError.reason, FACES.reason)
    "empty",
    "unreadable",
    "not_an_image",
    "truncated",
    "too_large",
    "unsupported",
    "blank",
    "crashed",  # decoding it ended or blocked the process
    "no_face",  # a detector found none in the photo
    "no_landmarks",  # the crop aligns faces, and the source has no landmarks of this one
    "bad_landmarks",  # on a line, in one point, or not like a face
    # why a face is not selected (SELECTION.reason), in the order the rules are asked
    "quarantined",
    "twin_of_test",
    "twin_of_validation",
    "labeled",  # a person labeled it, so it trains under that label
    "duplicate",
    "below_confidence",
    "prototype_disagrees",
    "neighbors_disagree",
    "below_class_threshold",
    "impure_cluster",
    "cluster_disagrees",
    "group_cap",
    "class_cap",
    "selected",
)

# -- Arrow schemas --------------------------------------------------------------------------------

BOX = pa.list_(pa.float32(), 4)
"""x0 y0 x1 y1 in pixels of the decoded picture after its EXIF turn; the first one spans 0 to 1."""

LANDMARKS = pa.list_(pa.float32(), 10)
"""x and y of the left eye, right eye, tip of the nose, left and right corner of the mouth.

Left is what an upright picture shows on its left: the person's right. Pixels as those of BOX.
"""

READ = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # where in the shard: row, byte, index
        pa.field("group", pa.string()),  # opaque; serves splitting and capping only
        pa.field("image", pa.large_binary()),  # encoded bytes; null if the record is unreadable
        pa.field("box", BOX),  # if the source has it
        pa.field("landmarks", LANDMARKS),  # if the source has them
        pa.field("reason", pa.string()),  # null, or why the record could not be read
        pa.field("detail", pa.string()),  # beside a reason: what was found, at which byte
    ]
)
"""What a source yields for one slice."""

FACES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # ok | quarantined
        pa.field("reason", pa.string()),
        pa.field("sha256", pa.binary(32)),  # of the encoded bytes
        pa.field("pixel_sha256", pa.binary(32)),  # of the decoded, uncropped pixels and their shape
        pa.field("phash", pa.uint64()),  # 64-bit DCT hash of the cropped gray face
        pa.field("phash_flip", pa.uint64()),  # the same of its mirror image
        pa.field("thumbnail", pa.binary(256)),  # 16x16 gray of the cropped face, row-major uint8
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("brightness", pa.float32()),  # mean gray level, 0-255
        pa.field("contrast", pa.float32()),  # standard deviation of the gray level, 0-255
        pa.field("sharpness", pa.float32()),  # variance of the Laplacian at 48 px
        pa.field("detail", pa.string()),  # of a quarantined face: what reader or decoder said
        pa.field("head", pa.binary()),  # of a quarantined face: its first HEAD bytes
    ]
)
"""survey: one row per face."""

HEAD = 32
"""Bytes that tell what a file is that is no picture."""

QUARANTINE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("sha256", pa.binary(32)),
        pa.field("head", pa.binary()),
    ]
)
"""survey: the faces that cannot be used, and enough to find out why."""

GUARD = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("twin_of", pa.string()),  # id of the test or validation face, or null
        pa.field("twin_kind", pa.string()),  # pixels | phash | flip | embedding
        pa.field("twin_role", pa.string()),  # test | validation
        pa.field("duplicate_group", pa.string()),  # smallest id of the group; null if alone
    ]
)
"""guard: one row per pool face, in slice order."""

PERCEIVED = ("perceived_gender", "perceived_race", "perceived_age")
"""What annotators saw in a face, in the words of its data set; for subgroups in evaluation only.

Null unless the recipe asks a labeled set for it. Nothing trains on it.
"""

LABELED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),  # train | validation | test | rest
        pa.field("label", pa.string()),  # an emotion name; null where only a rest face
        pa.field("soft", pa.list_(pa.float32())),  # over label_names, sums to 1; null if none
        pa.field("group", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("box", BOX),
        pa.field("landmarks", LANDMARKS),
        *(pa.field(name, pa.string()) for name in PERCEIVED),
    ]
)
"""Labeled faces with their split, one file for all roles; `label_names` is in the metadata."""

TRUTH = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("label", pa.string())])
"""Hidden truth of pool faces, where it exists. Only evaluate and report open it."""


def embeddings_schema(width: int, members: int, classes: int) -> pa.Schema:
    """embed: unit-length float16 embedding and the raw logits of each teacher member."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("embedding", pa.list_(pa.float16(), width)),  # null for a bad face
            pa.field("logits", pa.list_(pa.float32(), members * classes)),  # member-major
        ]
    )


def scores_schema(classes: int, neighbors: int) -> pa.Schema:
    """score: everything that decisions are made of; no decision."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("probs", pa.list_(pa.float32(), classes)),  # calibrated, [0, 1], sums to 1
            pa.field("pseudo_label", pa.string()),  # arg max of probs
            pa.field("confidence", pa.float32()),  # max of probs, [0, 1]
            pa.field("margin", pa.float32()),  # first minus second of probs, [0, 1]
            pa.field("disagreement", pa.float32()),  # Jensen-Shannon among members, nats
            pa.field("prototype_label", pa.string()),
            pa.field("prototype_similarity", pa.float32()),  # cosine, [-1, 1]
            pa.field("prototype_margin", pa.float32()),  # best minus second class, cosine
            pa.field("neighbor_label", pa.string()),
            pa.field("neighbor_agreement", pa.float32()),  # share of the vote, [0, 1]
            pa.field("neighbor_similarity", pa.float32()),  # cosine to the nearest
            pa.field("neighbor_ids", pa.list_(pa.string(), neighbors)),
        ]
    )


CLUSTERS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("cluster", pa.int32()),  # null for a bad face
    ]
)
"""clusters: one row per pool face, in slice order."""

SELECTION = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # the first rule that failed
        pa.field("label", pa.string()),
        pa.field("weight", pa.float32()),  # (0, 1]; null if not selected
    ]
)
"""select: one row per pool face, in slice order."""

MINED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("soft", pa.list_(pa.float32()), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("box", BOX),
        pa.field("landmarks", LANDMARKS),
        pa.field("source", pa.string(), nullable=False),  # the recipe's name of the source
        pa.field("shard", pa.string(), nullable=False),  # uri of what the face was read from
        pa.field("position", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),  # sha256 of the weights that scored it
        pa.field("rule", pa.string(), nullable=False),  # digest of the operating point
    ]
)
"""mine: the pseudo-labeled set people carry off."""

# -- small vocabulary that crosses layers ----------------------------------------------------------

AllReduce = Callable[[Any], Any]
"""Sum of a tensor over all training workers; the identity where there is one."""


def with_label_names(schema: pa.Schema, label_names: Sequence[str]) -> pa.Schema:
    """The schema with the class names that its `soft` and `probs` columns are indexed by."""
    metadata = dict(schema.metadata or {})
    metadata[b"label_names"] = ",".join(label_names).encode()
    return schema.with_metadata(metadata)


def label_names_of(schema: pa.Schema) -> tuple[str, ...]:
    """Inverse of :func:`with_label_names`; raises SourceError where the names are missing."""
    names = (schema.metadata or {}).get(b"label_names")
    if names is None:
        raise SourceError("table carries no label_names in its schema metadata")
    return tuple(names.decode().split(","))


def require_columns(have: Iterable[str], need: Iterable[str], where: str) -> None:
    """Raise SourceError naming the missing columns, the place and the columns that are there."""
    present = list(have)
    missing = [name for name in need if name not in present]
    if missing:
        listed = ", ".join(present) or "none"
        raise SourceError(f"{where}: missing column {', '.join(missing)}; found: {listed}")


def label_codes(names: Sequence[str | None], label_names: Sequence[str]) -> np.ndarray:
    """Integer codes (N,) int64 of label names; -1 for null."""
    code = {name: i for i, name in enumerate(label_names)}
    return np.array([-1 if n is None else code[n] for n in names], dtype=np.int64)


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Lists of `width` numbers, none null -> (N, width) float32, a copy."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(column), width)
