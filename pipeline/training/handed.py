"""Labeled and mined faces as training sees them, opened from artifacts on whatever node trains.

A training function gets a `Handed`: places and crops, nothing large. Each node packs the faces into
its own cache once. The cache's folder is named by what is in it: ids, bytes, boxes and landmarks,
and how the faces are cut, colored and decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.boxes import boxes_in_crop
from pipeline.config import Config, digest
from pipeline.errors import ConfigError, SourceError
from pipeline.images import DECODER, Color, Crop
from pipeline.ledger import Ledger
from pipeline.models import ModelConfig
from pipeline.packs import content_digest
from pipeline.plan import Plan
from pipeline.ranking import stable_hash
from pipeline.run import open_scratch
from pipeline.schema import OK, label_codes, label_names_of
from pipeline.sources.removals import Removals
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training.data import LabeledFaces, MinedFaces
from pipeline.training.faces import ChosenFaces, Faces, GrayAsColor, Row, pack_faces

LABELED_FILE = "labeled.parquet"
FACES_FILE = "faces.parquet"
CUT_BY = ("box", "landmarks")
"""Columns that say which part of an image is the face."""


class Handed(Config):
    """Where a training function finds its faces; travels as JSON."""

    labeled: str
    """Folder of the labeled set."""
    guard: str | None
    """Folder of guard; None before guard has run."""
    crop: Crop
    color: Color
    """Of the labeled set."""
    scratch: str
    """Cache folder on the node."""
    mined: str | None = None
    """Ledger of the mined set."""
    plan: str | None = None
    """Plan that the mined set was made under."""
    views: dict[str, tuple[Crop, Color]] = Field(default_factory=dict)
    """Crop and color of each pool source."""
    removals: str | None = None
    """File of faces that must not be read."""
    annotated: str | None = None
    """Folder of pool faces that people labeled."""


@dataclass(frozen=True)
class JoinedFaces:
    """Several stores one behind the other."""

    parts: Sequence[Faces]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Faces (B, C, S, S) uint8 at the positions (B,)."""
        ends = np.cumsum([len(part) for part in self.parts])
        owner = np.searchsorted(ends, index, side="right")
        out: np.ndarray | None = None
        for number in np.unique(owner):
            here = owner == number
            found = self.parts[number].take(index[here] - (ends[number] - len(self.parts[number])))
            if out is None:
                out = np.empty((len(index), *found.shape[1:]), found.dtype)
            out[here] = found
        if out is None:
            return self.parts[0].take(index)
        return out


def usable(rows: pa.Table, faces: pa.Table, removals: Removals) -> pa.Table:
    """LABELED rows that decode and are on no removal list; `faces` are their FACES rows."""
    kept = rows.filter(pc.equal(faces["status"], OK))
    return kept.filter(pa.array(~removals.hits(kept))) if removals else kept


def labeled_rows(handed: Handed, roles: Sequence[str]) -> pa.Table:
    """LABELED rows of some roles that decode, may be read and are no twin of a test face.

    The column `source` names the pool source of faces that people labeled; they train as well, come
    last, those of one source together, and are cropped as their source says. It is null for all
    others.

    Raises:
        SourceError: no such row.
    """
    at = location(handed.labeled)
    rows, faces = read_table(at / LABELED_FILE), read_table(at / FACES_FILE)
    if handed.guard is not None:
        twins = read_table(location(handed.guard) / LABELED_FILE, ["twin_of"])["twin_of"]
        rows, faces = rows.filter(pc.is_null(twins)), faces.filter(pc.is_null(twins))
    removals = Removals.load(None if handed.removals is None else location(handed.removals))
    kept = usable(rows, faces, removals)
    kept = kept.filter(pc.is_in(kept["role"], pa.array(list(roles))))
    kept = kept.append_column("source", pa.nulls(kept.num_rows, pa.string()))
    if handed.annotated is not None and "train" in roles:
        at = location(handed.annotated)
        added = usable(read_table(at / LABELED_FILE), read_table(at / FACES_FILE), removals)
        kept = pa.concat_tables([kept, *(rows for _, rows in _by_source(added, handed.views))])
    if kept.num_rows == 0:
        raise SourceError(f"labeled: no usable face has role {' or '.join(roles)}")
    return kept


def open_labeled(
    handed: Handed, model: ModelConfig, *, boxes: bool = False, votes: bool = False
) -> tuple[LabeledFaces, pa.Table]:
    """Training faces at a model's size and color, and their rows.

    Args:
        handed: where they are.
        model: the network that sees them.
        boxes: with their boxes.
        votes: with their soft labels as targets.

    Raises:
        ConfigError: soft labels are asked for and a face has none.
    """
    rows = labeled_rows(handed, ("train",))
    data = pack_labeled(rows, handed, model)
    if votes:
        data = replace(data, soft=soft_labels(rows))
    return replace(data, boxes=_boxes(rows, handed)) if boxes else data, rows


def soft_labels(rows: pa.Table) -> np.ndarray:
    """Soft labels (N, K) float32 of LABELED rows; what a person answered is one vote.

    Raises:
        ConfigError: a face of the labeled set has none.
    """
    votes, names = rows["soft"], label_names_of(rows.schema)
    asked = pc.and_(pc.is_null(votes), pc.is_valid(rows["source"])).to_numpy()
    silent = votes.null_count - int(asked.sum())
    if silent:
        raise ConfigError(
            f"labeled: {silent} of {len(votes)} faces have no votes; candidates: derived needs none"
        )
    soft = np.zeros((len(votes), len(names)), np.float32)
    given = pc.drop_null(votes).combine_chunks().flatten().to_numpy()
    soft[~asked] = given.reshape(-1, len(names))
    codes = label_codes(rows["label"].filter(pa.array(asked)).to_pylist(), names)
    soft[asked, codes] = 1
    return soft


def pack_labeled(rows: pa.Table, handed: Handed, model: ModelConfig) -> LabeledFaces:
    """LABELED rows, all with a label, as a training set."""
    names = label_names_of(rows.schema)
    parts = [
        pack_rows(own, "labeled", crop, color, handed, model)
        for (crop, color), own in _by_source(rows, _views(handed))
    ]
    groups = rows["group"].to_pylist()
    if None in groups:
        # Faces of people who are known stay in one fold, also beside faces of whom nothing is.
        pairs = zip(groups, rows["id"].to_pylist(), strict=True)
        groups = [group or face for group, face in pairs] if any(groups) else None
    return LabeledFaces(
        parts[0] if len(parts) == 1 else JoinedFaces(parts),
        label_codes(rows["label"].to_pylist(), names),
        groups=groups,
    )


def _views(handed: Handed) -> dict[str | None, tuple[Crop, Color]]:
    """How faces are cropped and colored: None is the labeled set, then the pool sources."""
    views: dict[str | None, tuple[Crop, Color]] = {None: (handed.crop, handed.color)}
    views.update(handed.views)
    return views


def _by_source(
    rows: pa.Table, views: Mapping[Any, tuple[Crop, Color]]
) -> Iterator[tuple[tuple[Crop, Color], pa.Table]]:
    """Each view and its rows, views without rows left out."""
    for name, view in views.items():
        source = rows["source"]
        own = rows.filter(pc.is_null(source) if name is None else pc.equal(source, name))
        if own.num_rows:
            yield view, own


def _boxes(rows: pa.Table, handed: Handed) -> np.ndarray:
    """Boxes (N, 4) of LABELED rows in shares of their crops."""
    homes = [at for at in (handed.labeled, handed.annotated) if at is not None]
    sizes = ["id", "width", "height"]
    faces = pa.concat_tables(read_table(location(at) / FACES_FILE, sizes) for at in homes)
    found = []
    for (crop, _), own in _by_source(rows, _views(handed)):
        seen = faces.take(pc.index_in(own["id"], faces["id"].combine_chunks()))
        size = list(zip(seen["width"].to_pylist(), seen["height"].to_pylist(), strict=True))
        box, landmarks = (own[name].to_pylist() for name in CUT_BY)
        found.append(boxes_in_crop(box, landmarks, crop, size))
    return np.concatenate(found)


def open_mined(handed: Handed, model: ModelConfig) -> MinedFaces:
    """The mined set, sources one behind the other.

    Raises:
        SourceError: nothing was mined.
    """
    assert handed.mined is not None
    assert handed.plan is not None
    plan, ledger = Plan(location(handed.plan)), Ledger(location(handed.mined))
    columns = ["id", "sha256", "soft", "weight", "source", *CUT_BY]
    narrow = pa.concat_tables(table for _, table in ledger.tables(plan, columns))
    if narrow.num_rows == 0:
        raise SourceError(f"{handed.mined}: the mined set is empty; loosen search or select")
    order, parts = [], []
    source = narrow["source"].to_numpy(zero_copy_only=False)
    for name, (crop, color) in handed.views.items():
        rows = np.flatnonzero(source == name)
        if len(rows):
            order.append(rows)
            key = content_digest(narrow.select(["id", "sha256", *CUT_BY]).take(rows))[:12]
            images = _images(ledger, plan, name)
            parts.append(store(images, len(rows), f"mined-{key}", crop, color, handed, model))
    rows = np.concatenate(order)
    soft = narrow["soft"].combine_chunks().flatten().to_numpy().reshape(narrow.num_rows, -1)
    weight = narrow["weight"].to_numpy()
    ids = narrow["id"].take(pa.array(rows)).to_pylist()
    return MinedFaces(JoinedFaces(parts), soft[rows], weight[rows], source[rows].tolist(), ids)


def share_of(mined: MinedFaces, share: float) -> MinedFaces:
    """The same part of mined faces whatever else was mined: those with the smallest hashes of ids.

    A larger share holds the smaller one.

    Args:
        mined: with ids.
        share: of the faces, in (0, 1]; rounded, and one at least.
    """
    order = np.argsort(stable_hash(pa.array(mined.ids, pa.string())), kind="stable")
    rows = np.sort(order[: max(1, round(share * len(mined)))])
    return MinedFaces(
        ChosenFaces(mined.faces, rows),
        mined.soft[rows],
        mined.weight[rows],
        [mined.source[row] for row in rows],
        [mined.ids[row] for row in rows],
    )


def _images(ledger: Ledger, plan: Plan, source: str) -> Iterator[Row]:
    for slice, table in ledger.tables(plan, ["image", *CUT_BY]):
        if slice.source == source:
            yield from cut_rows(table)


def cut_rows(table: pa.Table) -> Iterator[Row]:
    columns = (table[name].to_pylist() for name in ("image", *CUT_BY))
    return zip(*columns, strict=True)


def pack_rows(
    rows: pa.Table, what: str, crop: Crop, color: Color, handed: Handed, model: ModelConfig
) -> Faces:
    """Faces of a table with id, image, box and landmarks, at a model's size and color."""
    key = content_digest(rows.select(["id", "image", *CUT_BY]))[:12]
    return store(cut_rows(rows), rows.num_rows, f"{what}-{key}", crop, color, handed, model)


def store(
    images: Iterator[Row],
    count: int,
    name: str,
    crop: Crop,
    color: Color,
    handed: Handed,
    model: ModelConfig,
) -> Faces:
    """Pack for a model; a gray source is stored gray for a model that sees color, and fills all
    three channels when it is taken.

    `name` says which faces these are and what their bytes are; how they are seen is added.
    """
    seen: Color = "gray" if "gray" in (color, model.color) else "rgb"
    view = digest([crop.model_dump(mode="json"), seen, DECODER])[:8]
    at = open_scratch(Path(handed.scratch)) / f"{name}-{view}-{model.color}{model.size}"
    packed = pack_faces(images, count, crop=crop, color=seen, size=model.size, at=at)
    return packed if seen == model.color else GrayAsColor(packed)
