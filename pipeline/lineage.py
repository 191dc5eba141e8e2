"""From a model or a distilled set back to what made it: run, code, teacher, thresholds, every face.

Nothing here runs or trains: see :mod:`pipeline.made` for how a step back is found. Cost: a few
small files; the faces are read from narrow columns, a row group at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import CONFIG, WEIGHTS, is_teacher
from pipeline.config import digest
from pipeline.errors import ModelError
from pipeline.ledger import Ledger
from pipeline.made import Made, find_model, home_of, made_with, plan_of, recipe_of
from pipeline.parquet import Writer
from pipeline.run import FORGOTTEN, IDENTITY, POINT_FILE
from pipeline.schema import OK
from pipeline.storage import Location
from pipeline.tables import read_table
from pipeline.training.distilled import IMAGES
from pipeline.training.handed import FACES_FILE, LABELED_FILE
from pipeline.training.runs import FOLDS_FILE

LEARNED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),  # which training saw it
        pa.field("role", pa.string(), nullable=False),  # labeled | mined | pool (without a label)
        pa.field("label", pa.string()),  # what was learned: given, or the teacher's
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string()),  # null for labeled faces
        pa.field("position", pa.int64()),
        pa.field("sha256", pa.binary(32)),  # of the encoded bytes
    ]
)
"""One row for every face and training that led to a model."""


@dataclass
class Lineage:
    """What is known of a model; `missing` says what is not, and why."""

    model: Location
    made: Made
    facts: dict[str, Any] = field(default_factory=dict)
    trainings: list[Made] = field(default_factory=list)  # whose faces led to the model
    missing: list[str] = field(default_factory=list)


# -- asking ---------------------------------------------------------------------------------------


def lineage(at: Location) -> Lineage:
    """What a model, a teacher or a distilled set was made from.

    Raises:
        ModelError: no model there, or its folder lies in no run.
    """
    model = find_model(at)
    made = home_of(model)
    if made is None:
        raise ModelError(f"{model}: lies in no run folder, and only a run knows what it came from")
    found = Lineage(model, made)
    run, inputs = made.run, made.inputs
    number, recipe = recipe_of(made)
    found.facts = {
        "model": model.uri,
        "stage": made.stage,
        "run": run.root.uri,
        "recipe": f"{recipe['name']} ({number}, digest {digest(recipe)[:12]})",
        "code": made.facts.get("code", "not recorded: made before OmniFER noted it"),
        "seed": made.identity.get("seed"),
        "digest": made.digest,
        "weights": {a.parent.name: a.sha256 for a in _weights(model)},
        "passes": made.facts.get("passes"),
        "share of the mined faces": made.identity.get("mined_share"),
        "pretraining data": _pretraining_data(made),
    }
    if (made.dir / FORGOTTEN).exists():
        found.facts["forgotten since"] = (made.dir / FORGOTTEN).read_json()["faces"]
    found.trainings = trainings(found)
    if "teacher" in inputs:
        teacher = made_with(run, "teach", inputs["teacher"])
        found.facts["teacher"] = inputs["teacher"]
        _note(found, "teacher", teacher)
    for stage in ("mine", "distill"):
        source = next((m for m in found.trainings if m.stage == stage), None)
        if source is not None and stage == "mine":
            found.facts |= _decided(source, found.missing)
        elif source is not None and source is not made:
            keys = ("method", "ipc", "faces")
            found.facts["distilled set"] = {"digest": source.digest} | {
                key: source.facts[key] for key in keys if key in source.facts
            }
    found.facts |= counts(found)
    return found


def said(found: Lineage) -> list[str]:
    """The facts as lines, and what could not be found."""
    lines = []
    for name, value in found.facts.items():
        if value is not None and value != {}:
            if isinstance(value, dict):
                value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
            lines.append(f"{name}: {_short(value)}")
    return [*lines, *(f"not found: {line}" for line in found.missing)]


def _short(value: Any) -> Any:
    """A number as people read it; the rest as it is."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else round(value, 4)
    return value


def counts(found: Lineage) -> dict[str, Any]:
    """Faces by role, source and label."""
    tally: dict[str, Counter[str]] = {}
    for table in faces(found):
        for row in (
            table.select(["stage", "role", "source", "label"])
            .group_by(["stage", "role", "source", "label"])
            .aggregate([([], "count_all")])
            .to_pylist()
        ):
            name = f"{row['role']} faces of {row['source']} ({row['stage']})"
            tally.setdefault(name, Counter())[row["label"] or "-"] += row["count_all"]
    return {
        name: {"all": each.total(), **dict(sorted(each.items()))} for name, each in tally.items()
    }


def write_faces(found: Lineage, out: Location) -> int:
    """Write a LEARNED table of every face; returns how many rows."""
    rows = 0
    with out.replacing() as sink, Writer(sink, LEARNED) as writer:
        for table in faces(found):
            writer.write(table)
            rows += table.num_rows
    return rows


def faces(found: Lineage) -> Iterator[pa.Table]:
    """LEARNED rows of all trainings, in pieces."""
    for made in found.trainings:
        if made.stage == "mine":
            yield from _mined(made)
        elif made.stage == "pretrain":
            yield from _pool(made)
        else:
            yield _labeled(made, found.missing)


# -- which trainings ------------------------------------------------------------------------------


def trainings(found: Lineage) -> list[Made]:
    """Stages that say which faces a model learned from: teach and its kin, mine, pretrain."""
    made, run = found.made, found.made.run
    kept: list[Made] = []

    def add(one: Made | None, name: str) -> None:
        _note(found, name, one)
        if one is not None and all((one.stage, one.dir) != (k.stage, k.dir) for k in kept):
            kept.append(one)

    def follow(one: Made) -> None:
        inputs = one.inputs
        # A training with the teacher's labeled faces has the same digest of them.
        if "labeled" in inputs and one.stage != "guard":
            add(one, one.stage)
        if "mined" in inputs and not _beside_distilled(one):
            add(made_with(run, "mine", inputs["mined"]), "mined set")
        if "pretrain" in inputs:
            add(made_with(run, "pretrain", inputs["pretrain"]), "pre-training")
        if one.stage == "pretrain":
            add(one, "pre-training")
        for name, stage in (("distilled", "distill"), ("distill", "distill")):
            if name in inputs:
                before = made_with(run, stage, inputs[name])
                _note(found, "distilled set", before)
                if before is not None:
                    follow(before)
        if one.stage == "tuned" and (teacher := made_with(run, "teach", inputs["teacher"])):
            follow(teacher)

    follow(made)
    return kept


def _beside_distilled(made: Made) -> bool:
    return "distilled" in made.inputs


def _note(found: Lineage, what: str, one: Made | None) -> None:
    line = f"{what}: no generation of the run has that digest any more"
    if one is None and line not in found.missing:
        found.missing.append(line)


@dataclass(frozen=True)
class _Weights:
    parent: Location
    sha256: str


def _weights(model: Location) -> Iterator[_Weights]:
    """sha256 of every weights file of a model, as its config.json has it."""
    if (model / IMAGES).exists():
        return
    folders: Sequence[Location] = [model]
    if is_teacher(model):
        folders = (model / "members").children()
    elif not (model / WEIGHTS).exists():
        folders = [child for child in model.children() if (child / WEIGHTS).exists()]
    for folder in folders:
        yield _Weights(folder, (folder / CONFIG).read_json()["omnifer"]["sha256"])


def _pretraining_data(made: Made) -> str:
    for name in ("student", "teach", "config", "pretrain"):
        model = made.identity.get(name) or made.inputs.get(name)
        if isinstance(model, dict) and isinstance(model.get("model"), dict):
            return str(model["model"].get("pretraining_data") or "none")
    return "see the teacher"


def _decided(mined: Made, missing: list[str]) -> dict[str, Any]:
    """Thresholds that chose the mined faces."""
    selected = made_with(mined.run, "select", mined.inputs["select"])
    if selected is None:
        missing.append("thresholds: no generation of select has that digest any more")
        return {}
    point = rules((selected.dir / POINT_FILE).read_json())
    return {"operating point": {"digest": selected.facts["rule"], **point}}


def rules(point: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of an operating point as people read them: a cut above 1 keeps no face."""
    cuts = point.get("cuts") or {}
    found = {name: point.get(name) for name in ("confidence", "prototype", "neighbors")}
    return {**found, "cuts": {k: "keeps none" if v > 1 else round(v, 4) for k, v in cuts.items()}}


# -- their faces ----------------------------------------------------------------------------------


def _labeled(made: Made, missing: list[str]) -> pa.Table:
    """Faces of the labeled set that a training saw.

    The teachers wrote down theirs; who has the same digest of labeled faces had the same.
    """
    wanted = made.inputs["labeled"]
    for folder in reversed(made.run.folders("teach")):
        if not (folder / FOLDS_FILE).exists():
            continue
        if (folder / IDENTITY).read_json()["inputs"]["labeled"] == wanted:
            return _of_folds(made, read_table(folder / FOLDS_FILE, ["id", "label"]))
    line = f"labeled faces of {made.stage}: no teacher of the run learned from the same ones"
    if line not in missing:
        missing.append(line)
    return LEARNED.empty_table()


def _of_folds(made: Made, folds: pa.Table) -> pa.Table:
    known: dict[str, bytes] = {}
    kinds: dict[str, str] = {}
    for stage in ("labeled", "annotated"):
        for folder in made.run.folders(stage):
            if (folder / LABELED_FILE).exists():
                rows = read_table(folder / FACES_FILE, ["id", "sha256"]).to_pydict()
                known |= dict(zip(rows["id"], rows["sha256"], strict=True))
                told = (folder / IDENTITY).read_json().get("labeled", {})
                kinds |= dict.fromkeys(rows["id"], told.get("kind", stage))
    ids = folds["id"].to_pylist()
    count = len(ids)
    columns = {
        "id": folds["id"],
        "stage": pa.repeat(made.stage, count),
        "role": pa.repeat("labeled", count),
        "label": folds["label"],
        "source": pa.array([kinds.get(face, "labeled") for face in ids], pa.string()),
        "shard": pa.nulls(count, pa.string()),
        "position": pa.nulls(count, pa.int64()),
        "sha256": pa.array([known.get(face) for face in ids], pa.binary(32)),
    }
    return pa.table(columns, schema=LEARNED)


def _mined(made: Made) -> Iterator[pa.Table]:
    plan = plan_of(made)
    if plan is None:
        return
    columns = ["id", "label", "source", "shard", "position", "sha256"]
    for _, table in Ledger(made.dir).tables(plan, columns):
        yield _learned(table, "mine", "mined")


def _pool(made: Made) -> Iterator[pa.Table]:
    """Faces of the pool that a backbone was pre-trained on: those that decode and have no twin."""
    surveyed = made_with(made.run, "survey", made.inputs["survey"])
    guarded = made_with(made.run, "guard", made.inputs["guard"])
    plan = plan_of(made)
    if surveyed is None or guarded is None or plan is None:
        return
    columns = ["id", "position", "status", "sha256"]
    pairs = zip(
        Ledger(surveyed.dir).tables(plan, columns),
        Ledger(guarded.dir).tables(plan, ["twin_of"]),
        strict=True,
    )
    for (slice, table), (_, twins) in pairs:
        good = pc.and_(pc.equal(table["status"], OK), pc.is_null(twins["twin_of"]))
        kept, shard = table.filter(good), slice.shard
        count = kept.num_rows
        named = {"label": None, "source": slice.source, "shard": shard}
        for name, value in named.items():
            kept = kept.append_column(name, pa.array([value] * count, pa.string()))
        yield _learned(kept, "pretrain", "pool")


def _learned(table: pa.Table, stage: str, role: str) -> pa.Table:
    columns = {name: table[name] for name in table.column_names if name in LEARNED.names}
    columns |= {
        "stage": pa.array([stage] * table.num_rows, pa.string()),
        "role": pa.array([role] * table.num_rows, pa.string()),
    }
    return pa.Table.from_arrays(
        [columns[name].cast(LEARNED.field(name).type) for name in LEARNED.names], schema=LEARNED
    )
