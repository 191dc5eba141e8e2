"""Opens any labeled set and splits it: roles, label names, hidden truth, counts.

Cost: all labeled bytes are in memory once (FERPlus: 60 MB; AffectNet: about 10 GB).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, SourceError
from pipeline.images import Color, Crop
from pipeline.labeled.affectnet import AffectnetSet
from pipeline.labeled.affwild2 import Affwild2Set
from pipeline.labeled.ckplus import CkplusSet
from pipeline.labeled.expw import ExpwSet
from pipeline.labeled.fer2013 import Fer2013Set
from pipeline.labeled.ferplus import FerplusSet
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.kdef import KdefSet
from pipeline.labeled.rafdb import RafdbSet
from pipeline.labeled.records import RECORDS, Records, unlike_official
from pipeline.labeled.sfew import SfewSet
from pipeline.labeled.splits import ROLES, DevelopmentConfig, parted_groups, split
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.labeled.table import TableSet
from pipeline.schema import LABELED, TRUTH, with_label_names

_ROLE = RECORDS.get_field_index("role")

LabeledData = Annotated[
    FerplusSet
    | Fer2013Set
    | RafdbSet
    | AffectnetSet
    | SfewSet
    | ExpwSet
    | Affwild2Set
    | KdefSet
    | CkplusSet
    | FolderSet
    | TableSet
    | SyntheticSet,
    Field(discriminator="kind"),
]
"""A data set as such: where and how to read it, no split."""


class LabeledConfig(Config):
    """How a labeled set is split and seen; the other fields are those of its kind."""

    fraction: float | None = Field(default=None, gt=0, le=1)  # share of the labels; None: all
    seed: int | None = None  # of fraction and validation; None: the recipe's
    validation: float | None = Field(default=None, gt=0, lt=1)  # share of the chosen labels
    development: DevelopmentConfig | None = None
    test: str | LabeledData | None = None
    """None: the set's own test split; a path: the same kind. All faces of a set without a split of
    its own, or of the one that `split` names; else those of its test split."""
    crop: Crop = Crop()
    color: Color = "gray"


class LabeledFerplus(FerplusSet, LabeledConfig):
    """FERPlus, split."""


class LabeledFer2013(Fer2013Set, LabeledConfig):
    """FER2013, split."""


class LabeledRafdb(RafdbSet, LabeledConfig):
    """RAF-DB, split."""


class LabeledAffectnet(AffectnetSet, LabeledConfig):
    """AffectNet, split."""


class LabeledSfew(SfewSet, LabeledConfig):
    """SFEW, split."""


class LabeledExpw(ExpwSet, LabeledConfig):
    """ExpW, split."""


class LabeledAffwild2(Affwild2Set, LabeledConfig):
    """Aff-Wild2, split."""


class LabeledKdef(KdefSet, LabeledConfig):
    """KDEF, split."""


class LabeledCkplus(CkplusSet, LabeledConfig):
    """CK+, split."""


class LabeledFolder(FolderSet, LabeledConfig):
    """Class folders, split."""


class LabeledTable(TableSet, LabeledConfig):
    """A table, split."""


class LabeledSynthetic(SyntheticSet, LabeledConfig):
    """Drawn faces, split."""


LabeledSource = Annotated[
    LabeledFerplus
    | LabeledFer2013
    | LabeledRafdb
    | LabeledAffectnet
    | LabeledSfew
    | LabeledExpw
    | LabeledAffwild2
    | LabeledKdef
    | LabeledCkplus
    | LabeledFolder
    | LabeledTable
    | LabeledSynthetic,
    Field(discriminator="kind"),
]
"""The recipe's `labeled`."""


class Removing(Protocol):
    """Tells which faces of a table (id, group, image) must not be read: a removal list."""

    def hits(self, table: pa.Table) -> np.ndarray:
        """Mask (N,) bool."""
        ...


@dataclass(frozen=True)
class LabeledSet:
    """Labeled faces by role."""

    table: pa.Table  # LABELED: train, validation, test, rest in this order; label_names in metadata
    label_names: tuple[str, ...]
    truth: pa.Table  # TRUTH: rest faces that have a label
    counts: dict[str, Any]
    """Rules, roles (n per class), left_out (n per reason), unlike_official and parted_groups
    (lines); JSON-able."""


def read_labeled(
    config: LabeledSource, removals: Removing | None = None, *, seed: int = 0
) -> LabeledSet:
    """Read a labeled set and its test set, without removed faces, and split it.

    Args:
        config: the recipe's `labeled`.
        removals: faces that no reader may yield.
        seed: the recipe's, where `config.seed` is None.

    Raises:
        ConfigError: whole photos, and no crop is said.
        SourceError: a path, file or column is missing; no training or no test face; two
            validation sets; an id that occurs twice.
        LabelError: a class name or code that nobody knows.
    """
    name = config.name or config.kind
    data = config.records(name)
    _require_crop(name, data, config.crop)
    left_out = Counter(data.dropped)
    table = _without_removed(data.table, removals, left_out)
    if config.validation is not None and "validation" in table["role"].to_pylist():
        raise SourceError(f"labeled: {name} has a validation split of its own; drop `validation`")
    tested_inside = config.development is not None and config.development.role == "test"
    given = None if tested_inside else _test_records(config, name)
    if given is not None:
        _require_crop(f"{name}'s test set", given, config.crop)
        own = [None if role == "test" else role for role in table["role"].to_pylist()]
        table = table.set_column(_ROLE, RECORDS.field("role"), pa.array(own, pa.string()))
    done = split(
        table,
        data.label_names,
        fraction=config.fraction,
        validation=config.validation,
        development=config.development,
        seed=seed if config.seed is None else config.seed,
    )
    left_out.update(done.left_out)
    roles = done.roles
    groups = table["group"].to_pylist()
    if given is not None:
        test = _without_removed(_as_test(given, data.label_names, left_out), removals, left_out)
        table = pa.concat_tables([table, test])
        roles = [*roles, *["test"] * len(test)]
        # groups of another kind of set are other people, whatever they are called
        alike = isinstance(config.test, str) or getattr(config.test, "kind", None) == config.kind
        groups += test["group"].to_pylist() if alike else [None] * len(test)
    return _assemble(table, roles, data, left_out, parted_groups(groups, roles))


def _require_crop(name: str, data: Records, crop: Crop) -> None:
    """ConfigError where whole photos would pass for faces."""
    if data.photos and crop == Crop():
        raise ConfigError(
            f"labeled.crop: {name} holds whole photos, faces by their boxes; say {{box: true}}, "
            "with a margin if you like, or {fraction: 1} for whole photos"
        )


def _test_records(config: LabeledSource, name: str) -> Records | None:
    """The test set that the recipe gives, read; None for the set's own."""
    if config.test is None:
        return None
    if isinstance(config.test, str):
        if isinstance(config, SyntheticSet):
            raise SourceError(f"labeled.test {config.test!r}: drawn faces have no path")
        data = config.model_copy(update={"path": config.test, "split": None})
        return data.records(f"{name}-test")
    return config.test.records(config.test.name or f"{config.test.kind}-test")


def _as_test(given: Records, label_names: tuple[str, ...], left_out: Counter[str]) -> pa.Table:
    """Its faces whose label the training set knows; soft labels only over the same classes.

    Of a set with training and test faces only the latter: all the others were made to train on.
    """
    table, parts = given.table, set(given.table["role"].to_pylist())
    if "test" in parts and parts & {"train", "validation"}:
        table = table.filter(pc.equal(table["role"], "test"))
        left_out["test_other_split"] += len(given.table) - len(table)
    labels = table["label"].to_pylist()
    known = np.array([label in label_names for label in labels], dtype=bool)
    left_out["no_label"] += labels.count(None)
    left_out["test_label_not_in_training"] += int((~known).sum()) - labels.count(None)
    table = table.filter(pa.array(known))
    if given.label_names == label_names:
        return table
    soft = RECORDS.field("soft")
    return table.set_column(RECORDS.get_field_index("soft"), soft, pa.nulls(len(table), soft.type))


def _without_removed(
    table: pa.Table, removals: Removing | None, left_out: Counter[str]
) -> pa.Table:
    if removals is None:
        return table
    hit = removals.hits(table)
    left_out["removed"] += int(hit.sum())
    return table.filter(pa.array(~hit))


def _assemble(
    table: pa.Table,
    roles: list[str | None],
    data: Records,
    left_out: Counter[str],
    parted: list[str],
) -> LabeledSet:
    """Order by role, hide the labels of rest faces, count."""
    order = [i for role in ROLES for i, own in enumerate(roles) if own == role]
    named = [roles[i] for i in order]
    ordered = table.take(pa.array(order, pa.int64()))
    ids = ordered["id"].to_pylist()
    twice = next((name for name, n in Counter(ids).items() if n > 1), None)
    if twice is not None:
        raise SourceError(f"labeled: two faces have the id {twice!r}; give the test set a `name`")
    if "test" not in named:
        raise SourceError("labeled: no test face; give labeled.test or a development set as test")
    labels = ordered["label"].to_pylist()
    resting = pa.array([role == "rest" for role in named])
    columns = {name: ordered[name] for name in LABELED.names if name != "role"}
    for hidden in ("label", "soft"):
        blank = pa.nulls(len(ordered), LABELED.field(hidden).type)
        columns[hidden] = pc.if_else(resting, blank, columns[hidden].combine_chunks())
    columns["role"] = pa.array(named, pa.string())
    schema = with_label_names(LABELED, data.label_names)
    known = pc.and_(resting, ordered["label"].combine_chunks().is_valid())
    return LabeledSet(
        table=pa.table([columns[name] for name in LABELED.names], schema=schema),
        label_names=data.label_names,
        truth=ordered.select(TRUTH.names).filter(known).cast(TRUTH),
        counts={
            "rules": data.rules,
            "roles": _role_counts(named, labels),
            "left_out": {why: n for why, n in sorted(left_out.items()) if n},
            "unlike_official": unlike_official(data),
            "parted_groups": parted,
        },
    )


def _role_counts(
    roles: Sequence[str | None], labels: Sequence[str | None]
) -> dict[str, dict[str, int]]:
    """Faces per role and class; `unlabeled` where a rest face has no label at all."""
    counts: dict[str, dict[str, int]] = {role: {} for role in ROLES if role in roles}
    for (role, label), n in sorted(Counter(zip(roles, labels, strict=True)).items(), key=str):
        counts[str(role)][label or "unlabeled"] = n
    return counts
