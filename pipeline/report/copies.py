"""Copies among the labeled faces, and labeled faces that guard took out as twins.

Guard looks for twins of test and validation faces and for duplicates in the pool; among the labeled
faces nothing takes a copy out. Two things follow, and are counted: copies with different labels, of
which one is wrong, and copies in different folds, of which one taught the teacher that judges the
other. Copies are found as guard finds duplicates of the pool, with its cuts.
Cost: 5 s for 30,000 labeled faces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.guard import Duplicates, GuardConfig
from pipeline.report.facts import Copies, Face
from pipeline.report.pool import pixels_of
from pipeline.run import IDENTITY, Artifact
from pipeline.tables import read_table
from pipeline.training.handed import FACES_FILE, LABELED_FILE
from pipeline.training.runs import FOLDS_FILE

ROLES = ("train", "validation")
"""Whose label stands in the run for what people saw; of other faces it is the hidden truth."""
LOOKED_AT = ["id", "status", "pixel_sha256", "phash", "phash_flip", "thumbnail"]


def copies(
    homes: Sequence[Artifact], guard: Artifact, teach: Artifact | None, size: int
) -> Copies | None:
    """What there is of copies; None where labeled faces were not described.

    Args:
        homes: stages that hold labeled faces.
        guard: finished.
        teach: whose folds are looked at, if it is finished.
        size: most faces with a copy of another label that are shown.
    """
    described = [*(home.dir / FACES_FILE for home in homes), guard.dir / LABELED_FILE]
    if not homes or not all(at.exists() for at in described):
        return None
    rows = pa.concat_tables(
        [read_table(home.dir / LABELED_FILE, ["id", "role", "label"]) for home in homes]
    )
    faces = pa.concat_tables([read_table(home.dir / FACES_FILE, LOOKED_AT) for home in homes])
    left = _left(guard)
    there = pc.and_(pc.is_in(rows["role"], pa.array(ROLES)), pc.is_valid(rows["label"]))
    there = pc.and_not(there, pc.is_in(rows["id"], left["id"].combine_chunks()))
    rows, faces = rows.filter(there), faces.filter(there)
    stored = (guard.dir / IDENTITY).read_json()["guard"]
    found = Duplicates(GuardConfig.model_validate({**stored, "copies": None}))
    found.add(faces)
    return counted(rows, faces, found.groups(), _folds(teach), _twins(left), size)


def counted(
    rows: pa.Table,
    faces: pa.Table,
    groups: dict[str, str],
    folds: dict[str, int],
    twins: dict[str, dict[str, int]],
    size: int,
) -> Copies:
    """As :func:`copies`, from tables of the same faces and what was found.

    Args:
        rows: id and label.
        faces: thumbnail of the same rows.
        groups: of every face with a copy the smallest id among them.
        folds: of faces that train.
        twins: labeled faces that were taken out, by kind and role.
        size: most faces that are shown.
    """
    members: dict[str, list[tuple[str, str, bytes]]] = {}
    columns = (rows["id"], rows["label"], faces["thumbnail"])
    for face, label, thumbnail in zip(*(c.to_pylist() for c in columns), strict=True):
        if face in groups:
            members.setdefault(groups[face], []).append((face, label, thumbnail))
    torn = [own for own in members.values() if len({label for _, label, _ in own}) > 1]
    shown = [
        Face(face, None, pixels_of(thumbnail), f"picture {number}, labeled {label}")
        for number, own in enumerate(torn, 1)
        for face, label, thumbnail in own
    ]
    judged = [{folds[face] for face, _, _ in own if face in folds} for own in members.values()]
    return Copies(
        faces=len(rows),
        pictures=len(members),
        copies=sum(len(own) - 1 for own in members.values()),
        conflicting=len(torn),
        across=sum(len(seen) > 1 for seen in judged),
        shown=tuple(shown[:size]),
        twins=twins,
    )


def _folds(teach: Artifact | None) -> dict[str, int]:
    if teach is None or not (teach.dir / FOLDS_FILE).exists():
        return {}
    table = read_table(teach.dir / FOLDS_FILE, ["id", "fold"])
    return dict(zip(table["id"].to_pylist(), table["fold"].to_pylist(), strict=True))


def _left(guard: Artifact) -> pa.Table:
    """GUARD rows of the labeled faces that it took out."""
    table = read_table(guard.dir / LABELED_FILE, ["id", "twin_of", "twin_kind", "twin_role"])
    return table.filter(pc.is_valid(table["twin_of"]))


def _twins(left: pa.Table) -> dict[str, dict[str, int]]:
    pairs = zip(left["twin_kind"].to_pylist(), left["twin_role"].to_pylist(), strict=True)
    found: dict[str, dict[str, int]] = {}
    for (kind, role), number in sorted(Counter(pairs).items()):
        found.setdefault(kind, {})[role] = number
    return found
