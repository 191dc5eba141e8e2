"""Tables, ledgers, teachers and distilled sets without some faces.

Every function writes the new version of a file where `staged` says, and leaves the old one alone;
who called puts them in place together. Rows of forgotten faces leave; columns that point at them
(twins, neighbors, where a distilled image started) lose the pointer and keep their row.

Cost: the id columns of everything, and a copy of each file that held one of the faces.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.artifacts import CALIBRATION
from pipeline.commits import Commit, parse_seal, record_at, seal_name, seal_record, tally
from pipeline.config import digest
from pipeline.packs import content_digest, row_ranges, write_pack
from pipeline.parquet import Writer
from pipeline.plan import Plan
from pipeline.run import Artifact
from pipeline.schema import OK
from pipeline.similarity import prototypes
from pipeline.sources.index import source_of
from pipeline.storage import Location, to_json
from pipeline.tables import open_stored, read_table, write_table
from pipeline.training.distilled import GRID, IMAGES, LABELS, grid, load_distilled

Staged = Callable[[Location], Location]
"""Where the new version of a file of the run is written."""

POINTERS = ("twin_of", "duplicate_group", "neighbor_ids", "origin", "nearest")
"""Columns that name other faces than the row's own."""
GONE = "forgotten"
"""Stands for a forgotten face where a name must stay: whose twin left stays left."""
SAME = 0.999
"""Cosine from which a prototype is one face's own embedding."""


@dataclass(frozen=True)
class Purge:
    """Faces that leave, and new names of the duplicate groups that were called after one."""

    ids: frozenset[str]
    groups: Mapping[str, str | None] = field(default_factory=dict)

    def hit(self, table: pa.Table) -> np.ndarray:
        """Mask (N,) of rows that leave; all stay where the table has no ids."""
        if "id" not in table.column_names:
            return np.zeros(table.num_rows, dtype=bool)
        return np.asarray(pc.is_in(table["id"], pa.array(sorted(self.ids), pa.string())))

    def touches(self, table: pa.Table) -> bool:
        """Whether a table (of ids and pointers at least) names one of the faces."""
        if self.hit(table).any():
            return True
        names = pa.array(sorted(self.ids), pa.string())
        for name in POINTERS:
            if name in table.column_names:
                column = table[name].combine_chunks()
                if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
                    column = column.flatten()
                if pc.any(pc.is_in(column, names)).as_py():
                    return True
        return False

    def rest(self, table: pa.Table) -> pa.Table:
        """The rows that stay, without pointers to those that left."""
        kept = table.filter(pa.array(~self.hit(table)))
        for place, field_ in enumerate(kept.schema):
            if field_.name in POINTERS:
                values = [self._pointer(field_.name, v) for v in kept[field_.name].to_pylist()]
                kept = kept.set_column(place, field_, pa.array(values, field_.type))
        return kept

    def _pointer(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._pointer(name, one) for one in value]
        if value not in self.ids:
            return value
        if name == "duplicate_group":
            return self.groups.get(value)
        return GONE if name == "twin_of" else None


def named(schema: pa.Schema) -> list[str]:
    """Columns of a table that may name a face."""
    return [name for name in ("id", *POINTERS) if name in schema.names]


def purge_table(at: Location, staged: Staged, purge: Purge) -> pa.Table | None:
    """Write a Parquet file again without the faces; its dropped rows, or None if it held none.

    A row group in memory at a time.
    """
    dropped = []
    with open_stored(at) as file:
        columns = named(file.schema)
        groups = range(len(file.bounds) - 1)
        if not columns or not any(purge.touches(file.read(columns, row_group=g)) for g in groups):
            return None
        with staged(at).replacing() as sink, Writer(sink, file.schema) as writer:
            for group in groups:
                table = file.read(row_group=group)
                narrow = [n for n in ("id", "role", "label") if n in table.column_names]
                dropped.append(table.filter(pa.array(purge.hit(table))).select(narrow))
                writer.write(purge.rest(table))
    return pa.concat_tables(dropped)


# -- ledgers --------------------------------------------------------------------------------------


@dataclass
class LedgerChange:
    """What became of a ledger: the commits of every seal written again, and what left."""

    seals: dict[str, list[Commit]] = field(default_factory=dict)
    dropped: int = 0
    decided: Counter[tuple[str, str]] = field(default_factory=Counter)  # (label, reason)


def is_ledger(at: Location) -> bool:
    """Whether a generation keeps its rows slice by slice."""
    return (at / "seals").exists() or (at / "commits").exists()


def duplicate_groups(at: Location, ids: frozenset[str]) -> dict[str, str | None]:
    """New names of duplicate groups called after a forgotten face: the smallest id that stays.

    None where fewer than two are left.
    """
    members: dict[str, set[str]] = {}
    for file in [*(at / "packs").children(), *_parts(at)]:
        with open_stored(file) as open_file:
            if "duplicate_group" not in open_file.schema.names:
                return {}
            table = open_file.read(["id", "duplicate_group"])
        hit = pc.is_in(table["duplicate_group"], pa.array(sorted(ids), pa.string()))
        for row in table.filter(hit).to_pylist():
            members.setdefault(row["duplicate_group"], set()).add(row["id"])
    left = {name: sorted(rows - ids) for name, rows in members.items()}
    return {name: rows[0] if len(rows) > 1 else None for name, rows in left.items()}


def purge_ledger(at: Location, staged: Staged, purge: Purge) -> LedgerChange:
    """Write packs, seals, parts and commits of a ledger again where they hold one of the faces."""
    change = LedgerChange()
    for seal in (at / "seals").children():
        name = seal.name.removesuffix(".json")
        pack = at / "packs" / f"{name}.parquet"
        entries = parse_seal(seal)
        with open_stored(pack) as file:
            columns, groups = named(file.schema), range(len(file.bounds) - 1)
            narrow = (file.read(columns, row_group=group) for group in groups)
            if not any(purge.touches(table) for table in narrow):
                continue
            commits: list[Commit] = []
            ranges = [(first, first + commit.rows) for commit, first in entries]
            tables = zip(entries, row_ranges(file, ranges), strict=True)
            with staged(pack).replacing() as sink:
                write_pack(sink, _purged(at, staged, purge, tables, commits, change))
        change.seals[name] = commits
        staged(seal).write_json(seal_record(commits))
    for part in _parts(at):
        _purge_part(at, part, staged, purge, change)
    return change


def _purged(
    at: Location,
    staged: Staged,
    purge: Purge,
    tables: Iterator[tuple[tuple[Commit, int], pa.Table]],
    commits: list[Commit],
    change: LedgerChange,
) -> Iterator[pa.Table]:
    """Tables of a pack without the faces; their commits are added to `commits`."""
    for (commit, _), table in tables:
        if not purge.touches(table):
            commits.append(commit)
            yield table
            continue
        new, rest = _again(commit, table, purge, change)
        commits.append(new)
        record = record_at(at, commit.key)
        if record.exists():
            staged(record).write_bytes(to_json(asdict(new)))
        yield rest


def _purge_part(
    at: Location, part: Location, staged: Staged, purge: Purge, change: LedgerChange
) -> None:
    table = read_table(part)
    if not purge.touches(table):
        return
    key = part.name.rpartition("-")[0]
    record = record_at(at, key)
    commit = Commit(**record.read_json()) if record.exists() else None
    write_table(staged(part), purge.rest(table))
    if commit is not None and commit.file == part.name:
        new, _ = _again(commit, table, purge, change)
        staged(record).write_bytes(to_json(asdict(new)))


def _again(
    commit: Commit, table: pa.Table, purge: Purge, change: LedgerChange
) -> tuple[Commit, pa.Table]:
    """The commit of a slice whose table lost rows, and that table."""
    rest, left = purge.rest(table), table.filter(pa.array(purge.hit(table)))
    bad = 0
    if "status" in left.column_names:
        bad = pc.sum(pc.not_equal(left["status"], OK)).as_py() or 0
    change.dropped += left.num_rows
    if "reason" in left.column_names and "selected" in left.column_names:
        pairs = zip(left["label"].to_pylist(), left["reason"].to_pylist(), strict=True)
        change.decided.update((label or "", reason) for label, reason in pairs)
    new = replace(
        commit,
        rows=rest.num_rows,
        quarantined=max(0, commit.quarantined - bad),
        sha256=content_digest(rest),
    )
    return new, rest


def manifest(at: Location, plan: Plan, change: LedgerChange) -> dict[str, Any]:
    """The manifest that a ledger has once a change is in place; as Ledger.manifest."""

    def commits(name: str) -> list[Commit]:
        if name in change.seals:
            return change.seals[name]
        return [commit for commit, _ in parse_seal(at / "seals" / f"{name}.json")]

    return tally(commits(seal_name(slices)) for slices in plan.groups())


def _parts(at: Location) -> list[Location]:
    return [part for group in (at / "parts").children() for part in group.children()]


# -- teachers and distilled sets ------------------------------------------------------------------


def purge_teacher(
    at: Location,
    staged: Staged,
    ids: frozenset[str],
    correct: np.ndarray,
    per_class: int,
    seed: int,
) -> str | None:
    """Take faces out of a teacher's bank; its new digest, or None if it knew none of them.

    Prototypes are means of many faces and stay, so that what was scored holds; where one of them is
    a single face's embedding they are made again.

    Args:
        at: teacher folder.
        staged: where new files are written.
        ids: the faces.
        correct: (N,) bool, whether each face of the bank was recognized out of fold.
        per_class: prototypes of a class.
        seed: of k-means.
    """
    known = (at / "bank_ids.json").read_json()
    keep = np.array([face not in ids for face in known], dtype=bool)
    if keep.all():
        return None
    stored = (at / CALIBRATION).read_json()
    bank = load_tensors((at / "bank.safetensors").read_bytes())
    own = load_tensors((at / "prototypes.safetensors").read_bytes())
    gone = bank["vectors"][torch.from_numpy(~keep)]
    bank = {name: value[torch.from_numpy(keep)].contiguous() for name, value in bank.items()}
    files = {"bank.safetensors": bank}
    if len(own["vectors"]) and float((own["vectors"] @ gone.T).max()) > SAME:
        vectors, owners = prototypes(
            bank["vectors"].numpy(),
            bank["labels"].numpy(),
            correct[keep],
            len(stored["label_names"]),
            per_class,
            seed,
        )
        files["prototypes.safetensors"] = {
            "vectors": torch.from_numpy(vectors),
            "labels": torch.from_numpy(owners),
        }
    for name, tensors in files.items():
        data = save_tensors(tensors)
        staged(at / name).write_bytes(data)
        stored["files"][name] = hashlib.sha256(data).hexdigest()
    left = [face for face, stays in zip(known, keep, strict=True) if stays]
    staged(at / "bank_ids.json").write_json(left)
    stored["bank_ids"] = digest(left)
    staged(at / CALIBRATION).write_json(stored)
    return digest({name: value for name, value in stored.items() if name != "meta"})


def purge_chosen(at: Location, staged: Staged, gone: np.ndarray) -> str:
    """Take real faces out of a distilled set that was chosen, not learned; its new digest.

    Args:
        at: folder of the set.
        staged: where new files are written.
        gone: (n,) bool, images that leave.
    """
    made, stays = load_distilled(at), np.flatnonzero(~gone)
    tensors = {"images": made.images, "soft": made.soft, "labels": made.labels}
    kept = {k: torch.from_numpy(np.ascontiguousarray(v[stays])) for k, v in tensors.items()}
    data = save_tensors(kept)
    staged(at / IMAGES).write_bytes(data)
    if len(stays):
        staged(at / GRID).write_bytes(grid(made.images[stays], len(made.label_names)))
    known = (at / LABELS).read_json()
    staged(at / LABELS).write_json({**known, "labels": [known["labels"][i] for i in stays]})
    return hashlib.sha256(data).hexdigest()


def roles_without(artifact: Artifact, dropped: pa.Table) -> dict[str, Any]:
    """Facts of the labeled stage after rows (role, label) left."""
    facts = dict(artifact.facts)
    roles = {role: dict(labels) for role, labels in facts.get("roles", {}).items()}
    for row in dropped.to_pylist():
        label = row["label"] or "unlabeled"
        if roles.get(row["role"], {}).get(label):
            roles[row["role"]][label] -= 1
    return {**facts, "roles": roles, "rows": facts["rows"] - dropped.num_rows}


def counts_without(
    per_class: dict[str, dict[str, int]], left: Counter[tuple[str, str]]
) -> dict[str, dict[str, int]]:
    """Faces per label and reason after some left."""
    counts = {label: dict(reasons) for label, reasons in per_class.items()}
    for (label, reason), n in left.items():
        counts[label][reason] -= n
    return {label: {r: n for r, n in reasons.items() if n} for label, reasons in counts.items()}


def lists_any(at: Location, ids: frozenset[str]) -> bool:
    """Whether a file is a source's index that lists one of the faces."""
    with open_stored(at) as file:
        if not {"path", "tail"} <= set(file.schema.names):
            return False
        source = source_of(at)
        for group in range(len(file.bounds) - 1):
            table = file.read(["path", "tail"], row_group=group).to_pylist()
            if any(f"{source}/{row['path']}{row['tail']}" in ids for row in table):
                return True
    return False
