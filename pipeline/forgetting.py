"""forget: take faces out of everything a run has stored, and keep them out from then on.

The one exception to "columns are only added". First every file that names one of the faces is
written anew below `RUN/forgetting/new`, then a journal says what goes where, then it goes there.
Killed before the journal, nothing has happened; killed after it, calling again finishes, and no
other command works on the run meanwhile.

Digests follow the content: a stage whose rows left gets the digest of what it holds now, and later
stages name that one. What has *learned* from the faces cannot unlearn: such models and distilled
sets are listed and marked, and the run refuses to train them again unless asked with --fresh.

A face is meant as a picture: who has the same bytes under another id leaves as well. Out of reach
are sources, exports, and a tracking server. Of a run on S3 other nodes hold copies: each removes
its own when it next opens the run's scratch folder or that model; SECURITY.md says what is left on
one that never does. Cost: the id columns of all that is stored, a copy of
every file that held one of the faces.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import is_teacher
from pipeline.claim import DRIVERS, WHOLE, claimed
from pipeline.config import digest, parse
from pipeline.errors import RunError
from pipeline.job import COMMAND_FILE, command_of, forgotten
from pipeline.journal import HOME, Rewrite, apply, close, interrupted
from pipeline.made import Made, finished, made_with
from pipeline.packs import content_digest
from pipeline.plan import Plan
from pipeline.pool import removed_by
from pipeline.posix import sweep
from pipeline.purging import (
    LedgerChange,
    Purge,
    counts_without,
    duplicate_groups,
    is_ledger,
    lists_any,
    manifest,
    purge_chosen,
    purge_ledger,
    purge_table,
    purge_teacher,
    roles_without,
)
from pipeline.report import ReportConfig, collect, write_report
from pipeline.rounds import LABELS_FILE, learnable
from pipeline.run import FORGOTTEN, FORGOTTEN_LIST, IDENTITY, PLAN_FILE, Artifact, Run
from pipeline.schema import label_codes, matrix
from pipeline.sources.extents import content_fingerprint
from pipeline.sources.removals import Removals, blind
from pipeline.sources.rest import GONE_FILE, Gone
from pipeline.storage import Location, to_json
from pipeline.tables import read_table
from pipeline.tracing import ACTIVE, backbone_of, find, roles_of, saw, unfinished, unknown
from pipeline.training.distilled import GRID, PROVENANCE, STATEMENT
from pipeline.training.distilling import CHOSEN
from pipeline.training.handed import LABELED_FILE
from pipeline.training.runs import FOLDS_FILE, PREVIEWS, TEACHER, TRAIN

REPORT = "report.html"
LEARNING = (*TRAIN, "experts", *ACTIVE)
"""Stages that train."""
APART = (HOME, "cache", "train", DRIVERS, "mlflow-artifacts")
"""Folders of a run that hold no table of a stage."""

NAMED = 3
"""Entries of a list that matched nothing and are named."""


@dataclass
class Forgotten:
    """What was taken out, and what had learned from it."""

    faces: int = 0
    same_bytes: int = 0  # of them, not listed themselves
    files: int = 0
    saw: dict[str, dict[str, int]] = field(default_factory=dict)  # generation -> faces by role
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What a person is told."""
        also = f", {self.same_bytes} of them by the bytes of another" if self.same_bytes else ""
        said = [f"forgot {_faces(self.faces)}{also}; {self.files} files written again"]
        for made, roles in self.saw.items():
            each = ", ".join(f"{n} {role}" for role, n in roles.items())
            said.append(f"{made} learned from {each}; marked, --fresh trains it without them")
        return said + self.notes


def forget(root: Location, ids: Location) -> Forgotten:
    """Take the faces of a list out of a run.

    Args:
        root: the run folder.
        ids: a removal list: ids, sha256 or groups.

    Raises:
        RunError: no run, or another driver works on it.
        SourceError: no such list.
    """
    listed = Removals.load(ids)
    run = Run(root)
    if not _stages(run):
        raise RunError(f"{root}: expected a run folder with a stage; found none")
    with claimed(root, WHOLE):
        if interrupted(root):
            _apply(run)
        told = _prepare(run, listed)
        _apply(run)
    return told


def _faces(count: int) -> str:
    return "1 face" if count == 1 else f"{count:,} faces"


# -- writing the new files ------------------------------------------------------------------------


def _prepare(run: Run, listed: Removals) -> Forgotten:
    root = run.root
    close(root)
    found, same = find(run, listed)
    told, plan, ids = Forgotten(len(found), same), Rewrite(root), frozenset(found)
    gone = forgotten(root)
    missed = [
        entry
        for entry in unknown(run, listed)
        if not {blind(kind, entry.encode()) for kind in ("id", "group")} & gone
    ]
    if missed:
        more = f" and {len(missed) - NAMED:,} more" if len(missed) > NAMED else ""
        told.notes.append(
            f"{len(missed):,} of the list are no face and no group of this run, and are kept out "
            f"from now on: {', '.join(missed[:NAMED])}{more}"
        )
    marks = _marks(run, ids, told)
    if found:
        for stage in _stages(run):
            for folder in run.folders(stage):
                _generation(run, stage, folder, ids, plan)
        for folder, left in unfinished(run, LEARNING, ids):
            told.notes.append(f"{folder}: rounds, models and checkpoints removed")
            for at in left:
                plan.drop(at)
        _elsewhere(root, ids, plan)
        for at, values in marks.items():
            plan.staged(at).write_json(values)
        _identities(run, marks, plan)
        if (root / REPORT).exists():
            plan.drop(root / REPORT)
            (root / HOME / REPORT).write_bytes(b"made again once the rest is in place")
        plan.drop(root / "cache")
    known = gone | listed.all_blinded
    known |= {blind("id", face.encode()) for face in found}
    known |= {blind("sha256", value) for value in found.values() if value is not None}
    _plans(run, known, plan)
    plan.staged(root / FORGOTTEN_LIST).write_bytes(to_json(sorted(v.hex() for v in known)))
    told.files = len(plan.put)
    if any("pretrain" in made or "distill" in made for made in told.saw):
        for at in (root / "mlflow-artifacts").files((".png",)):
            plan.drop(at)
        told.notes.append("pictures on a tracking server are out of reach; remove them there")
    plan.ready()
    return told


def _stages(run: Run) -> list[str]:
    return [c.name for c in run.root.children() if c.name not in APART and run.folders(c.name)]


def _marks(run: Run, ids: frozenset[str], told: Forgotten) -> dict[Location, dict[str, Any]]:
    """Marks of the generations that learned from the faces."""
    wanted = pa.array(sorted(ids), pa.string())
    trained = roles_of(run, wanted)["train"]
    marks: dict[Location, dict[str, Any]] = {}
    for stage in LEARNING if ids else ():
        for folder in run.folders(stage):
            if stage in ACTIVE:
                hits = [Counter({"labeled": trained})]
                start = backbone_of(folder)
                if start and (made := made_with(run, "pretrain", start)):
                    hits[0].update(saw(made, wanted))
            else:
                hits = [saw(made, wanted) for made in finished(run, stage, folder)]
            if (hit := next((h for h in hits if h.total()), None)) is not None:
                told.saw[f"{stage} {folder.name}"] = dict(hit)
                mark = folder / FORGOTTEN
                before = mark.read_json()["faces"] if mark.exists() else 0
                marks[mark] = {"faces": before + hit.total(), "last": dict(hit)}
    return marks


def _generation(run: Run, stage: str, folder: Location, ids: frozenset[str], plan: Rewrite) -> None:
    """New versions of all files of one generation, and of its digest."""
    made = list(finished(run, stage, folder))
    if stage == "distill":
        _distilled(folder, ids, plan, made)
    if is_teacher(folder / TEACHER):
        _teacher(folder, ids, plan, made)
    change = LedgerChange()
    if is_ledger(folder):
        purge = Purge(ids, duplicate_groups(folder, ids))
        change = purge_ledger(folder, plan.staged, purge)
        for one in made if change.seals else ():
            new = manifest(folder, Plan(_plan_file(run, one)), change)
            facts = {**one.facts, "rows": new["rows"], "quarantined": new["quarantined"]}
            if "per_class" in facts:
                facts["per_class"] = counts_without(facts["per_class"], change.decided)
            _finish(plan, one, digest(new), change.dropped, facts)
            stored = folder / "manifest.json"
            plan.staged(stored).write_json({**new, "forgotten": change.dropped})
    own = {
        child.uri for kind in ("packs", "parts") for child in (folder / kind).files((".parquet",))
    }
    for table in folder.files((".parquet",)):
        if table.uri not in own and (left := purge_table(table, plan.staged, Purge(ids))):
            _table_gone(stage, folder, table, left, plan, made)


def _table_gone(
    stage: str, folder: Location, table: Location, left: pa.Table, plan: Rewrite, made: list[Made]
) -> None:
    """What follows from rows that left a table: the labeled stages are their table."""
    if table.name != LABELED_FILE or not left.num_rows:
        return
    if stage == "annotated":
        for one in made:
            views = one.inputs["views"]
            new = digest([content_digest(read_table(plan.staged(table))), views])
            per_class = Counter(one.facts["per_class"])
            per_class.subtract(left["label"].to_pylist())
            facts = {**one.facts, "per_class": dict(per_class)}
            _finish(plan, one, new, left.num_rows, {**facts, "faces": per_class.total()})
    if stage not in ("labeled", "test"):
        return
    roles, gone = read_table(table, ["id", "role"]), Gone.beside(table)
    lost = set(left["id"].to_pylist())
    before = [row for row in range(roles.num_rows + len(gone.roles)) if row not in gone.roles]
    rows = dict(gone.roles)
    for row, face, role in zip(
        before, roles["id"].to_pylist(), roles["role"].to_pylist(), strict=True
    ):
        if face in lost:
            rows[row] = role
    mark = gone.fingerprint or content_fingerprint(table)
    known = {"fingerprint": mark, "rows": sorted(rows.items())}
    plan.staged(folder / GONE_FILE).write_json(known)
    new = content_digest(read_table(plan.staged(table)))
    for one in made:
        facts = roles_without(Artifact(stage, folder, one.digest, one.facts), left)
        _finish(plan, one, new, left.num_rows, facts)


def _teacher(folder: Location, ids: frozenset[str], plan: Rewrite, made: list[Made]) -> None:
    identity = (folder / IDENTITY).read_json()
    folds = read_table(folder / FOLDS_FILE, ["id", "label", "logits"])
    at = folder / TEACHER
    names = (at / "calibration.json").read_json()["label_names"]
    logits = matrix(folds["logits"], len(names))
    correct = logits.argmax(1) == label_codes(folds["label"].to_pylist(), names)
    per_class, seed = identity["teach"]["sub_prototypes"], identity["seed"]
    new = purge_teacher(at, plan.staged, ids, correct, per_class, seed)
    for one in made if new is not None else ():
        gone = len(set(folds["id"].to_pylist()) & ids)
        _finish(plan, one, str(new), gone, one.facts)


def _distilled(folder: Location, ids: frozenset[str], plan: Rewrite, made: list[Made]) -> None:
    """Chosen faces leave the set; of learned ones the pictures that show how they started."""
    if not (folder / PROVENANCE).exists():
        return
    origins = read_table(folder / PROVENANCE, ["origin"])["origin"].to_pylist()
    gone = np.array([face in ids for face in origins], dtype=bool)
    if not gone.any():
        return
    for name in (PREVIEWS, "checkpoints"):
        plan.drop(folder / name)
    method = (folder / IDENTITY).read_json()["distill"]["method"]
    note = f"{gone.sum()} images started from faces that were forgotten since."
    if method in CHOSEN:
        new = purge_chosen(folder, plan.staged, gone)
        note = f"{gone.sum()} images were faces that were forgotten since, and left."
        for one in made:
            _finish(plan, one, new, int(gone.sum()), one.facts)
        if gone.all():
            plan.drop(folder / GRID)
    text = (folder / STATEMENT).read_text()
    plan.staged(folder / STATEMENT).write_text(f"{text}\n{note}\n")


def _finish(plan: Rewrite, made: Made, new: str, dropped: int, facts: dict[str, Any]) -> None:
    """A done file with the digest of what is there now, the old ones, and how much left."""
    name = "done.json" if made.plan is None else f"done-{made.plan}.json"
    total = int(made.facts.get("forgotten", 0)) + dropped
    record = {
        "digest": new,
        "before": [*made.before, made.digest],
        "facts": {**facts, "forgotten": total},
    }
    plan.staged(made.dir / name).write_bytes(to_json(record))
    plan.renamed[made.digest] = new


def _identities(run: Run, marks: dict[Location, Any], plan: Rewrite) -> None:
    """Let stages name their inputs as these are called now; what learned keeps what it learned."""
    for stage in _stages(run):
        for folder in run.folders(stage):
            at = folder / IDENTITY
            if folder / FORGOTTEN in marks or (folder / FORGOTTEN).exists() or not at.exists():
                continue
            old = at.read_json()
            new = _renamed(old, plan.renamed)
            if new != old:
                plan.staged(at).write_bytes(to_json(new))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _plans(run: Run, known: frozenset[bytes], plan: Rewrite) -> None:
    """Stored plans name whom they left out; from now on by digests."""
    for folder in run.folders("survey"):
        at = folder / PLAN_FILE
        if at.exists():
            stored = at.read_json()
            removed = removed_by(stored).all_blinded | known
            new = {"file": stored["file"], "removed": sorted(v.hex() for v in removed)}
            plan.staged(at).write_json(new)


def _plan_file(run: Run, made: Made) -> Location:
    for survey in run.folders("survey"):
        at = survey / f"plan-{made.plan}.parquet"
        if at.exists():
            return at
    raise RunError(f"{made.dir}: its plan {made.plan} is not in the run any more")


def _elsewhere(root: Location, ids: frozenset[str], plan: Rewrite) -> None:
    """Tables, lists and pages beside the stages: rounds of annotation, indexes of a source."""
    inside = {f"{root.uri}/{name}/" for name in (*APART, *_stages(Run(root)))}
    for at in root.files((".parquet", ".csv", ".txt", ".jsonl", ".html", ".md")):
        if any(at.uri.startswith(folder) for folder in inside) or at.name == REPORT:
            continue
        if at.name.endswith(".parquet"):
            if lists_any(at, ids):
                plan.drop(at)  # made again when the pool is planned next
            elif purge_table(at, plan.staged, Purge(ids)) and at.name == LABELS_FILE:
                old, new = (learnable(read_table(one)) for one in (at, plan.staged(at)))
                plan.renamed[content_digest(old)] = content_digest(new)
            continue
        lines = at.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not ids & set(re.split(r"[\s,;\"'<>|]+", line))]
        if len(kept) < len(lines):
            if at.name.endswith((".html", ".md")):
                plan.drop(at)
            else:
                plan.staged(at).write_text("".join(kept))


# -- putting them in place ------------------------------------------------------------------------


def _apply(run: Run) -> None:
    """Do what the journal says; safe to do again."""
    # The list first: whatever happens from here on, no reader yields the faces again.
    apply(run.root, FORGOTTEN_LIST)
    shutil.rmtree(run.scratch, ignore_errors=True)
    if run.root.is_local:
        sweep(run.root.uri, but=DRIVERS)  # where this call's own claim beats
    if (run.root / HOME / REPORT).exists():
        _report(run)
    close(run.root)


def _report(run: Run) -> None:
    """The page again, blurred: nobody asks here whether faces may be shown."""
    newest = [c for c in run.root.children() if c.name.startswith("recipe-")][-1]
    recipe = newest.read_json()
    command = "omnifer run RECIPE"
    if (run.root / COMMAND_FILE).exists():
        command = command_of(run.root)
    config = parse(ReportConfig, recipe.get("report", {}), where=newest.uri)
    write_report(run.root / REPORT, collect(run, str(recipe["name"]), command, False, config))
