"""Who trains, validates, tests or is mined: the split of a labeled set by seed.

Faces that belong together are one unit and never parted: the faces of one group where the data has
groups, else exact copies (same bytes). Units are ordered by sha256 of seed and unit, so a split
depends neither on row order nor on a library's random numbers, and a larger fraction holds the
smaller one of the same seed (exactly where every unit is one face).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.schema import label_codes

ROLES = ("train", "validation", "test", "rest")


class DevelopmentConfig(Config):
    """A fixed set of labeled training faces, the same for every run seed and fraction."""

    count: int = Field(default=3000, ge=1)
    seed: int = 0
    role: Literal["exclude", "test"] = "exclude"  # test: it is the test set, the given one is not


@dataclass(frozen=True)
class Split:
    """The role of every face."""

    roles: list[str | None]  # train | validation | test | rest; null: left out
    left_out: dict[str, int]  # faces by why


def split(
    records: pa.Table,
    label_names: Sequence[str],
    *,
    fraction: float | None,
    validation: float | None,
    development: DevelopmentConfig | None,
    seed: int,
) -> Split:
    """Roles of the faces of a RECORDS table.

    Labeled training faces: the development set leaves first, then `fraction` of what remains is
    chosen per class, then `validation` of the chosen is taken out of training. Other training
    faces, labeled or not, are `rest`. Rest faces that share a unit with a development or a
    validation face are left out. The chosen number per class is the share, rounded half up, and at
    least 1.

    Args:
        records: RECORDS, with the data's own split in `role`.
        label_names: classes; codes index them.
        fraction: share of the labels that training may see, (0, 1]; None: all.
        validation: share of the chosen faces, (0, 1); None: the data's own validation split.
        development: see :class:`DevelopmentConfig`.
        seed: of `fraction` and `validation`.

    Raises:
        SourceError: no labeled training face, or fewer than the development set needs.
    """
    own = np.array([role or "" for role in records["role"].to_pylist()], dtype=np.str_)
    codes = label_codes(records["label"].to_pylist(), label_names)
    units = unit_keys(records)
    roles = np.where(codes >= 0, own, "").astype("<U16")
    free = own == "train"
    left_out = {"no_label": int(((own == "validation") | (own == "test"))[codes < 0].sum())}
    left_out["other_split"] = int((own == "").sum())
    if development is not None:
        held = draw_development(units, free & (codes >= 0), development)
        copies = free & np.isin(units, units[held])
        if development.role == "test":
            left_out["other_test"] = int((roles == "test").sum())
            roles[roles == "test"] = ""
        roles[copies] = ""
        roles[held] = "test" if development.role == "test" else ""
        left_out["development"] = int(copies.sum() - held.sum() * (development.role == "test"))
        free &= ~copies
    labeled = free & (codes >= 0)
    if not labeled.any():
        raise SourceError(f"labeled set: no labeled training face among {len(records)} rows")
    chosen = labeled
    if fraction is not None:
        chosen = draw_share(codes, units, labeled, fraction, f"fraction {seed}")
    roles[free & ~chosen] = "rest"
    if validation is not None:
        held = draw_share(codes, units, chosen, validation, f"validation {seed}")
        roles[held] = "validation"
        copies = (roles == "rest") & np.isin(units, units[held])
        left_out["shares_unit_with_validation"] = int(copies.sum())
        roles[copies] = ""
    return Split([str(role) or None for role in roles], {k: n for k, n in left_out.items() if n})


def parted_groups(groups: Sequence[str | None], roles: Sequence[str | None]) -> list[str]:
    """Where the data's own splits part what belongs together; the splits drawn here never do.

    Args:
        groups: of the faces; null belongs to nobody.
        roles: of the faces; `rest` counts as `train`, for the pool is learned from.

    Returns:
        One line for each two splits that share groups: how many, one of them, and how many faces of
        the judged split they are.
    """
    owned: dict[str, Counter[str]] = {
        "train": Counter(),
        "validation": Counter(),
        "test": Counter(),
    }
    totals: Counter[str] = Counter()
    for group, role in zip(groups, roles, strict=True):
        own = "train" if role == "rest" else role
        if own in owned:
            totals[own] += 1
            if group is not None:
                owned[own][group] += 1
    lines = []
    for seen, judged in (("train", "test"), ("train", "validation"), ("validation", "test")):
        both = sorted(owned[seen].keys() & owned[judged].keys())
        if both:
            faces = sum(owned[judged][group] for group in both)
            lines.append(
                f"{len(both):,} group(s), such as {both[0]!r}, are in both {seen} and {judged}: "
                f"{faces:,} of {totals[judged]:,} {judged} faces share a person or a video with "
                f"{seen}, so figures on them are too high; split the table by group"
            )
    return lines


def unit_keys(records: pa.Table) -> np.ndarray:
    """Key (N,) of the unit each face belongs to: its group, else the sha256 of its bytes."""
    keys = []
    pairs = zip(records["group"].to_pylist(), records["image"], strict=True)
    for group, image in pairs:
        if group is not None:
            keys.append(f"group {group}")
        else:
            keys.append(hashlib.sha256(image.as_buffer() or b"").hexdigest())
    return np.array(keys, dtype=np.str_)


def draw_share(
    codes: np.ndarray, units: np.ndarray, among: np.ndarray, share: float, salt: str
) -> np.ndarray:
    """Whole units holding about `share` of each class, at least one face of each.

    Units are asked in the order of their salted hash, first those that fit into round(share * n_c)
    of every class, then those that bring the counts closer to it: small units reach it exactly.

    Args:
        codes: class of each face (N,).
        units: unit of each face (N,).
        among: faces to draw from (N,) bool; all have codes >= 0.
        share: in (0, 1].
        salt: names the draw and its seed.

    Returns:
        The drawn faces (N,) bool.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i in np.flatnonzero(among):
        members[str(units[i])].append(int(i))
    sizes = np.bincount(codes[among])
    missing = np.where(sizes > 0, np.maximum(np.floor(share * sizes + 0.5), 1), 0).astype(int)
    drawn = np.zeros(len(codes), dtype=bool)
    ordered = _order(members, salt)
    skipped = []
    for unit in ordered:
        held = np.bincount(codes[members[unit]], minlength=len(missing))
        if (held <= missing).all():
            drawn[members[unit]] = True
            missing -= held
        else:
            skipped.append((unit, held))
    for unit, held in skipped:
        if np.abs(missing - held).sum() < np.abs(missing).sum():
            drawn[members[unit]] = True
            missing -= held
    for code in np.flatnonzero(sizes):
        if not (codes[drawn] == code).any():
            with_class = [unit for unit in ordered if (codes[members[unit]] == code).any()]
            drawn[members[min(with_class, key=lambda unit: len(members[unit]))]] = True
    return drawn


def draw_development(
    units: np.ndarray, labeled: np.ndarray, config: DevelopmentConfig
) -> np.ndarray:
    """The development set (N,) bool: whole units in salted order, `count` labeled faces exactly.

    Raises:
        SourceError: fewer labeled faces, or units too large to add up to `count`.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i in np.flatnonzero(labeled):
        members[str(units[i])].append(int(i))
    drawn = np.zeros(len(units), dtype=bool)
    left = config.count
    for unit in _order(members, f"development {config.seed}"):
        if len(members[unit]) <= left:
            drawn[members[unit]] = True
            left -= len(members[unit])
    if left:
        raise SourceError(
            f"labeled.development: {config.count} faces asked for, {config.count - left} found "
            f"among {int(labeled.sum())} labeled training faces"
        )
    return drawn


def _order(units: dict[str, list[int]], salt: str) -> list[str]:
    return sorted(units, key=lambda unit: hashlib.sha256(f"{salt}:{unit}".encode()).digest())
