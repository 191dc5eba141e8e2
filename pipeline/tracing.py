"""Whom a removal list means in a run, and which trainings learned from them.

Cost: narrow columns of what was surveyed and learned, a row group at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.lineage import Lineage, faces, trainings
from pipeline.made import Made, finished
from pipeline.run import FORGOTTEN, IDENTITY, Run
from pipeline.sources.removals import Removals
from pipeline.storage import Location
from pipeline.tables import open_stored, read_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE

ACTIVE = ("rounds", "active")
"""Stages of active learning; they train on labeled faces, and judge the test faces."""
LABELED = ("teach", "control_a", "control_b", *ACTIVE)
"""Stages that read labeled faces alone, unless they start from a backbone."""


def find(run: Run, listed: Removals) -> tuple[dict[str, bytes | None], int]:
    """Ids of the faces meant, with the digest of their bytes, and how many only share bytes."""
    hit: dict[str, bytes | None] = {}
    for table in known(run):
        for row in table.filter(pa.array(listed.hits(table))).to_pylist():
            hit[row["id"]] = row["sha256"]
    same = Removals(sha256=frozenset(value for value in hit.values() if value is not None))
    also: dict[str, bytes | None] = {}
    if same:
        for table in known(run):
            rows = table.filter(pa.array(same.hits(table))).to_pylist()
            also |= {row["id"]: row["sha256"] for row in rows if row["id"] not in hit}
    return {**hit, **also}, len(also)


def unknown(run: Run, listed: Removals) -> list[str]:
    """Ids and groups of a list that no face of the run has, in order."""
    left = listed.ids | listed.groups
    for table in known(run) if left else ():
        left = left.difference(table["id"].to_pylist(), table["group"].to_pylist())
    return sorted(left)


def known(run: Run) -> Iterator[pa.Table]:
    """id, group and sha256 of every face that any generation surveyed."""
    columns = ["id", "group", "sha256"]
    for stage in ("labeled", "test", "annotated"):
        for folder in run.folders(stage):
            if (folder / FACES_FILE).exists():
                yield read_table(folder / FACES_FILE, columns)
    for folder in run.folders("survey"):
        for kind in ("packs", "parts"):
            for file in (folder / kind).files((".parquet",)):
                with open_stored(file) as stored:
                    for group in range(len(stored.bounds) - 1):
                        yield stored.read(columns, row_group=group)


def roles_of(run: Run, ids: pa.Array) -> Counter[str]:
    """How many of the faces any labeled table of the run holds, by their role there."""
    seen: dict[str, set[str]] = {}
    for stage in ("labeled", "test", "annotated"):
        for folder in run.folders(stage):
            if (folder / LABELED_FILE).exists():
                rows = read_table(folder / LABELED_FILE, ["id", "role"])
                for row in rows.filter(pc.is_in(rows["id"], ids)).to_pylist():
                    seen.setdefault(row["role"], set()).add(row["id"])
    return Counter({role: len(faces) for role, faces in seen.items()})


def unfinished(
    run: Run, stages: Sequence[str], ids: frozenset[str]
) -> Iterator[tuple[Location, list[Location]]]:
    """Folders of trainings without an end that may have read the faces, and what they left.

    Rounds of active learning never end.
    """
    roles = roles_of(run, pa.array(sorted(ids), pa.string()))
    for stage in stages:
        for folder in run.folders(stage):
            read = stage not in LABELED or backbone_of(folder) is not None
            read = read or bool(roles["train"] or (stage in ACTIVE and roles["test"]))
            if read and not any(finished(run, stage, folder)):
                kept = (IDENTITY, FORGOTTEN)
                left = [child for child in folder.children() if child.name not in kept]
                if left:
                    yield folder, left


def backbone_of(folder: Location) -> str | None:
    """Digest of the run's backbone that a generation starts from; None: from nothing."""
    data = (folder / IDENTITY).find_bytes()
    found: str | None = json.loads(data or b"{}").get("inputs", {}).get("pretrain")
    return found


def saw(made: Made, ids: pa.Array) -> Counter[str]:
    """How many of the faces a training learned from, by role."""
    found = Lineage(made.dir, made)
    found.trainings = trainings(found)
    hit: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for table in faces(found):
        for row in table.filter(pc.is_in(table["id"], ids)).select(["id", "role"]).to_pylist():
            if (row["id"], row["role"]) not in seen:
                seen.add((row["id"], row["role"]))
                hit[row["role"]] += 1
    return hit
