"""The mined set as people carry it off: Parquet, WebDataset tars, or the layout of Hugging Face.

Faces with their pseudo-label, the teacher's probabilities and where they came from, and beside them
a data statement. Only a finished stage is read, so packs that are sealed; group ids stay behind,
and of places only the file's name leaves.

Cost: one read of the mined set; memory is one row group of a pack, whatever the set's size.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from pipeline.cards import data_statement
from pipeline.errors import ConfigError, RecordError, RunError
from pipeline.images import JPEG, format_of
from pipeline.ledger import Ledger
from pipeline.lineage import rules
from pipeline.made import Made, in_use, plan_of, recipe_of
from pipeline.parquet import table_writer
from pipeline.run import METRICS_FILE, POINT_FILE, Run
from pipeline.schema import label_names_of, with_label_names
from pipeline.storage import Location

PER_FILE = 10_000
"""Faces of a file: about 100 MB of 10 KB faces."""
README = "README.md"

CARRIED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("soft", pa.list_(pa.float32()), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("box", pa.list_(pa.float32())),
        pa.field("landmarks", pa.list_(pa.float32())),
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
    ]
)
COLUMNS = (
    "`image` holds the encoded bytes as in the source; `label` the pseudo-label; `soft` the",
    "teacher's calibrated probabilities of the classes in their order; `weight` (0, 1] what a",
    "training should count the face with; `confidence` the largest probability; `box` and",
    "`landmarks` (5 points, x y) pixels of the face, where the source has them; `source`, `shard`,",
    "`position` and `sha256` (of the bytes) where the face is from; `teacher` and `rule` the",
    "digests of what labeled and what kept it.",
)

Write = Callable[[IO[bytes], Iterable[pa.Table], int, tuple[str, ...]], None]
"""Writes CARRIED tables, the first face's number and the class names into a file."""


@dataclass
class MinedCounts:
    """What was written."""

    faces: int = 0
    files: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        each = ", ".join(f"{name} {n:,}" for name, n in self.labels.most_common())
        return f"{self.faces:,} mined faces in {self.files} files: {each}"


def export_mined(run_at: Location, kind: str, out: Location) -> MinedCounts:
    """Write a run's mined set into a new folder; the statement (README.md) comes last.

    Raises:
        ConfigError: another format, or something lies at `out`.
        RunError: the run has no finished mined set, or it is empty.
    """
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind!r}: expected {', '.join(FORMATS)} with --mined")
    if out.children() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out}: expected a folder that is not there or empty")
    run = Run(run_at)
    mined = in_use(run, "mine")
    plan = None if mined is None else plan_of(mined)
    if mined is None or plan is None:
        raise RunError(f"{run_at}: no finished mined set; run `omnifer mine` first")
    total = int(mined.facts["rows"])
    if not total:
        raise RunError(f"{run_at}: the mined set is empty; loosen search or select")
    name, write = FORMATS[kind]
    tables = (table for _, table in Ledger(mined.dir).tables(plan))
    counts, names = MinedCounts(files=math.ceil(total / PER_FILE)), _names(mined)
    pieces = _cut(_counted(tables, counts), PER_FILE)
    for number in range(counts.files):
        first = number * PER_FILE
        here = min(PER_FILE, total - first)
        with (out / name.format(number, counts.files)).replacing() as sink:
            write(sink, _take(pieces, here), first, names)
    statement = data_statement(
        recipe_of(mined)[1]["name"],
        facts_of(mined, counts),
        names,
        COLUMNS,
        _hub(total, names) if kind == "hf" else None,
    )
    (out / README).write_text(statement)
    return counts


def facts_of(mined: Made, counts: MinedCounts) -> dict[str, Any]:
    """What the statement says: yield per class, purity where known, sources, thresholds."""
    run, recipe = mined.run, recipe_of(mined)[1]
    selected, judged = in_use(run, "select"), in_use(run, "evaluate")
    purity = (judged.dir / METRICS_FILE).read_json()["pool"] if judged else {}
    known = {name: f"{row['purity']:.1%}" for name, row in purity.get("per_class", {}).items()}
    facts: dict[str, Any] = {"faces": counts.faces}
    per_class = selected.facts["per_class"] if selected else {}
    for name, n in counts.labels.most_common():
        seen = sum(per_class.get(name, {}).values())
        share = f" of {seen:,} that the teacher saw so ({n / seen:.1%})" if seen else ""
        right = f"; {known[name]} right where the truth is known" if name in known else ""
        facts[f"kept as {name}"] = f"{n:,}{share}{right}"
    if purity.get("purity") is None:
        facts["purity"] = "unknown: no face of the pool has a known label"
    else:
        facts["purity"] = f"{purity['purity']:.1%} of {purity['known']:,} faces with a known label"
    kinds = {s.get("name") or f"{s['kind']}{i}": s["kind"] for i, s in enumerate(recipe["pool"])}
    for source, n in counts.sources.most_common():
        facts[f"from source {source}"] = f"{n:,} faces ({kinds.get(source, 'unknown kind')})"
    if selected:
        facts["thresholds"] = rules((selected.dir / POINT_FILE).read_json())
    facts["labeled set that the teacher learned from"] = recipe["labeled"]["kind"]
    facts["code"] = mined.facts.get("code", "not recorded")
    return facts


def _names(mined: Made) -> tuple[str, ...]:
    """Class names, which the packs carry."""
    plan = plan_of(mined)
    assert plan is not None
    _, table = next(Ledger(mined.dir).tables(plan, ["id"]))
    return label_names_of(table.schema)


def _counted(tables: Iterable[pa.Table], counts: MinedCounts) -> Iterator[pa.Table]:
    """Tables as they leave, counted on their way."""
    for table in tables:
        leaving = _carried(table)
        counts.faces += leaving.num_rows
        counts.labels.update(leaving["label"].to_pylist())
        counts.sources.update(leaving["source"].to_pylist())
        yield leaving


def _carried(table: pa.Table) -> pa.Table:
    """MINED rows as CARRIED ones."""
    columns: dict[str, Any] = {name: table[name] for name in CARRIED.names}
    columns["sha256"] = pa.array([value.hex() for value in table["sha256"].to_pylist()])
    shards = (shard.rstrip("/").rpartition("/")[2] for shard in table["shard"].to_pylist())
    columns["shard"] = pa.array(list(shards), pa.string())
    arrays = [columns[f.name].cast(f.type) for f in CARRIED]
    return pa.Table.from_arrays(arrays, schema=CARRIED)


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows; after every `rows` of them a table ends."""
    room = rows
    for table in tables:
        rest = table
        while rest.num_rows:
            piece = rest.slice(0, room)
            yield piece
            rest = rest.slice(piece.num_rows)
            room = room - piece.num_rows or rows


def _take(pieces: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Pieces that make up the next `rows` rows."""
    while rows > 0:
        piece = next(pieces)
        rows -= piece.num_rows
        yield piece


# -- formats --------------------------------------------------------------------------------------


def _parquet(
    sink: IO[bytes], tables: Iterable[pa.Table], first: int, names: tuple[str, ...]
) -> None:
    schema = with_label_names(CARRIED, names)
    with table_writer(sink, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _webdataset(
    sink: IO[bytes], tables: Iterable[pa.Table], first: int, names: tuple[str, ...]
) -> None:
    number = first
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for table in tables:
            for row in table.to_pylist():
                image = row.pop("image")
                facts = {**row, "probs": dict(zip(names, row["soft"], strict=True))}
                code = str(names.index(row["label"])).encode()
                suffixes = {_suffix(image): image, "cls": code, "json": json.dumps(facts).encode()}
                for suffix, data in suffixes.items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1


def _hugging_face(
    sink: IO[bytes], tables: Iterable[pa.Table], first: int, names: tuple[str, ...]
) -> None:
    schema = _hub_schema(names)
    number = first
    with table_writer(sink, schema) as writer:
        for table in tables:
            images = table["image"].to_pylist()
            paths = [f"{number + i:09d}.{_suffix(image)}" for i, image in enumerate(images)]
            number += len(images)
            columns = {name: table[name] for name in CARRIED.names}
            columns["image"] = pa.StructArray.from_arrays(
                [pa.array(images, pa.binary()), pa.array(paths)], fields=list(_IMAGE)
            )
            codes = [names.index(name) for name in table["label"].to_pylist()]
            columns["label"] = pa.array(codes, pa.int64())
            writer.write_table(pa.table(columns, schema=schema))


FORMATS: Mapping[str, tuple[str, Write]] = {
    "parquet": ("part-{:05d}-of-{:05d}.parquet", _parquet),
    "webdataset": ("mined-{:06d}.tar", _webdataset),
    "hf": ("data/train-{:05d}-of-{:05d}.parquet", _hugging_face),
}
"""Name of each file, by its number and how many there are, and what writes it."""

_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


def _hub_schema(names: Sequence[str]) -> pa.Schema:
    """CARRIED as the library `datasets` reads it: pictures decode, labels have names."""
    fields = {"image": _IMAGE, "label": pa.int64()}
    features: dict[str, Any] = {}
    for f in CARRIED:
        if f.name == "image":
            features[f.name] = {"_type": "Image"}
        elif f.name == "label":
            features[f.name] = {"names": list(names), "_type": "ClassLabel"}
        elif pa.types.is_list(f.type):
            features[f.name] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
        else:
            kind = "float32" if pa.types.is_float32(f.type) else str(f.type)
            features[f.name] = {"dtype": kind, "_type": "Value"}
    made = pa.schema([f.with_type(fields.get(f.name, f.type)) for f in CARRIED])
    info = json.dumps({"info": {"features": features}})
    return with_label_names(made.with_metadata({"huggingface": info}), names)


def _hub(total: int, names: Sequence[str]) -> dict[str, Any]:
    """Front matter by which the hub finds the files."""
    sizes = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
    size = next((word for most, word in sizes if total < most), "n>100K")
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    return {
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": files}],
        "label_names": list(names),
    }


def _suffix(image: bytes) -> str:
    """Of a file with these bytes."""
    try:
        return "jpg" if image.startswith(JPEG) else format_of(image).lower()
    except RecordError:
        return "bin"
