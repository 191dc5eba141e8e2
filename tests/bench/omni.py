"""The paper's recipe on S3 from end to end: cells `omni-tsv` and `omni-rec` of the bench formats.

jobs/recipes/omni-msceleb.yaml is run as it is; SETS says what is set, and why. Its labels are faces
of FER2013 laid out as RAF-DB, its pool the LFW faces, cut to 112 px and recycled, as MS-Celeb TSV
or as an InsightFace .rec. Labels, pool, ledger, artifacts and models lie on an S3 server in this
process (moto, which keeps everything in memory). A secret is planted in the environment and looked
for in what the command printed, in Ray's logs and in every object of the run.
"""

from __future__ import annotations

import base64
import itertools
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import simplejpeg
from PIL import Image

from pipeline import s3
from pipeline.labeled.codes import FER2013, RAFDB
from pipeline.run import Run
from pipeline.stages import STAGES
from pipeline.storage import Location
from tests.bench.harness import ROOT, Cell, Context, call, python
from tests.helpers import real
from tests.helpers.s3 import s3_bucket
from tests.labeled import writers as sets
from tests.sources.writers import insightface, tsv_line, write_rec

RECIPE = ROOT / "jobs" / "recipes" / "omni-msceleb.yaml"
ASKED = tuple(name for name in STAGES if name != "pretrain")
"""Stages that the recipe asks for."""
NAME = "formats"
SIDE = 112
QUALITY = 85
LABELED = {"Training": 2_000, "PublicTest": 500}
NET = "{name: convnet, size: 32, color: rgb, args: {width: 32, depth: 3}, dropout: 0.0}"
SETS: Mapping[str, str] = {
    "stream={cpus: 2, gpus: 0, in_flight: 2, object_store_mb: 1000}": "two cores, no GPU",
    "train.use_gpu=false": "no GPU",
    "embed={batch: 64, flip: false}": "no GPU: fp32, one actor",
    f"teach.model={NET}": "what two cores train in a minute",
    "teach.folds=2": "the same",
    "teach.steps=120": "the same",
    "teach.batch=64": "the same",
    "teach.lr=0.01": "so few steps",
    "teach.ema=null": "so few steps are no average",
    "teach.augment=plain": "so few steps",
    f"student.model={NET}": "as the teacher",
    "student.steps=60": "what two cores train in a minute",
    "student.lr=0.01": "so few steps",
    "student.ema=null": "so few steps are no average",
    "student.labeled_batch=32": "what two cores train in a minute",
    "student.mined_batch=64": "the same",
    "distill.net={name: convnet, size: 32, color: rgb, args: {width: 8, depth: 2}, dropout: 0}": (
        "sees what the teacher sees"
    ),
    "distill.steps=5": "what two cores train in a minute",
    "distill.ipc=1": "the same",
    "search={trials: 8, target_purity: 0.4}": "so weak a teacher is seldom right",
    "evaluate.draws=200": "what two cores do in a minute",
}
"""What is set, and why; the rest is the recipe's."""
POOLS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "omni-rec": ("faces.rec", ()),
    "omni-tsv": ("faces.tsv", ("pool.0.kind=msceleb_tsv",)),  # as the recipe's own comment says
}
QUICK_FACES, QUICK_UNTIL = 2_000, "mine"
QUICK_LABELED = {"Training": 600, "PublicTest": 150}
QUICK_SETS = ("slice_faces=512", "teach.steps=10", "search=null", "select.policy=all")
"""Of `--quick`: slices of the recipe's size would leave it one, and so short a teaching nothing."""
STREAMED = ("survey", "embed", "score", "select", "mine")


def cells(quick: bool) -> list[Cell]:
    """One run per format of the pool; `--quick` has three minutes, which are enough for one."""
    faces = QUICK_FACES if quick else 50_000
    small = QUICK_SETS if quick else ()
    made = []
    for name, (_, own) in list(POOLS.items())[-1 if quick else 0 :]:
        given = (*SETS, *own, *small)
        until = QUICK_UNTIL if quick else None
        made_of = {"faces": faces, "sets": list(given), "until": until}
        made.append(Cell(name, "omni", 0, made_of, NAME, sets=given))
    return made


def measure(cell: Cell, context: Context) -> dict[str, Any]:
    """Write labels and pool to S3, run the recipe to its end, tell what came of it."""
    if real.missing():
        raise RuntimeError(real.MISSING)
    faces, watch, secret = cell.identity["faces"], Watch(), secrets.token_urlsafe(30)
    with (
        tempfile.TemporaryDirectory(prefix="omni-") as folder,
        s3_bucket(watch, secret) as runs,
    ):
        bucket = runs.parent
        pool = bucket / "pool" / POOLS[cell.name][0]
        began = time.monotonic()
        size = upload_pool(pool, faces, Path(folder))
        counts = QUICK_LABELED if cell.identity["until"] else LABELED
        labels = upload_labels(bucket / "rafdb" / "basic", Path(folder) / "basic", counts)
        uploaded, root = time.monotonic() - began, runs / cell.name
        watch.begin(root)
        log, ray = context.cache / NAME / f"{cell.name}.log", Path(folder) / "r"
        log.unlink(missing_ok=True)
        env = {
            "OMNIFER_LABELED": labels.uri,
            "OMNIFER_POOL": pool.uri,
            "RAY_TMPDIR": str(ray),  # so that its logs are this run's alone
        }
        settings = [part for item in cell.sets for part in ("--set", item)]
        argv = python("-m", "pipeline.cli", "run", str(RECIPE), "--run", root.uri, *settings)
        until = cell.identity["until"]
        argv += ["--until", until] if until else []
        ray.mkdir()
        began = time.monotonic()
        call(argv, context, log, env)
        ran = time.monotonic() - began
        run = Run(root)
        names = [name for name in ASKED if name != "report"]
        names = names[: names.index(until or names[-1]) + 1]
        if "search=null" in cell.sets:
            names.remove("search")
        done = {name: run.artifact(name) for name in names}
        decided: Counter[str] = Counter()
        for reasons in done["select"].facts["per_class"].values():
            decided.update(reasons)
        return {
            "n": faces,
            "faces": faces,
            "pool_mb": round(size / 1e6),
            "upload_seconds": round(uploaded, 1),
            "run_seconds": round(ran, 1),
            "rows": {name: done[name].facts["rows"] for name in STREAMED},
            "quarantined": done["survey"].facts["quarantined"],
            "selected": decided["selected"],
            "decided": dict(decided),
            "seconds_per_stage": {n: round(a.facts["seconds"], 1) for n, a in done.items()},
            "requests": dict(watch.methods),
            "requests_per_stage": dict(watch.stages),
            "until": until or "report",
            "report": (root / "report.html").exists(),
            "leaks": leaks(secret, [log, *ray.rglob("*")], root),
            "command": f"python -m tests.bench.{NAME} --only {cell.name}",
        }


class Watch:
    """Counts requests by method and by the stage that was under way; `begin` starts it."""

    def __init__(self) -> None:
        self.methods: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self._root: str | None = None
        self._finished = -1

    def begin(self, root: Location) -> None:
        """Count from now on; what is written below `root` tells the stage."""
        self._root = root.uri.removeprefix("s3:/") + "/"

    def __call__(self, method: str, path: str) -> None:
        if self._root is None:
            return
        self.methods[method] += 1
        names = list(ASKED)
        self.stages[names[min(self._finished + 1, len(names) - 1)]] += 1
        stage, _, rest = path.removeprefix(self._root).partition("/")
        if method == "PUT" and stage in names and rest.rpartition("/")[2].startswith("done"):
            self._finished = max(self._finished, names.index(stage))


def upload_pool(at: Location, count: int, work: Path) -> int:
    """Write `count` faces, more than there are: they come again under other ids; bytes written."""
    faces = list(itertools.islice(small_faces(), count))
    chosen = itertools.islice(itertools.cycle(faces), count)
    if at.name.endswith(".tsv"):
        numbers: dict[str, int] = {}
        with at.replacing() as file:
            for i, (image, group) in enumerate(chosen):
                person = numbers.setdefault(group, len(numbers))
                file.write(tsv_line(image, person, i) + b"\n")
        return at.size()
    people: dict[str, list[bytes]] = {}
    for image, group in chosen:
        people.setdefault(group, []).append(image)
    write_rec(work / at.name, insightface(list(people.values())))
    for name in (at.name, at.name.replace(".rec", ".idx")):
        s3.filesystem().put(str(work / name), (at.parent / name).uri)
    return at.size()


def small_faces() -> Iterator[tuple[bytes, str]]:
    """The middle of every LFW picture, which is the face, at 112 px; and its group."""
    for data, group in real.lfw():
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        height, width = pixels.shape[:2]
        box = (width // 4, height // 4, width - width // 4, height - height // 4)
        face = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
        yield simplejpeg.encode_jpeg(np.asarray(face), QUALITY), group


def upload_labels(at: Location, work: Path, counts: Mapping[str, int]) -> Location:
    """Write faces of FER2013 as RAF-DB is distributed, by its own codes."""
    parts = {usage: real.fer2013(usage, count) for usage, count in counts.items()}
    codes: dict[str, int] = {}
    for usage, stem in (("Training", "train_{:05d}.jpg"), ("PublicTest", "test_{:04d}.jpg")):
        for i, code in enumerate(parts[usage][1], start=1):
            codes[stem.format(i)] = 1 + RAFDB.index(FER2013[code])
    pixels = np.concatenate([faces for faces, _ in parts.values()])
    with patch.object(sets, "draw", lambda seed, rows, size: pixels[rows % len(pixels)]):
        sets.rafdb(work, codes)
    shutil.rmtree(work / "Image" / "original")  # not read
    s3.filesystem().put(f"{work}/", f"{at.uri}/", recursive=True)
    return at


def leaks(secret: str, files: Iterable[Path], root: Location) -> list[str]:
    """Names of the files and objects that hold the secret, as such or in base64."""
    forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))
    found = []
    for file in files:
        if file.is_file() and any(form in file.read_bytes() for form in forms):
            found.append(file.name)
    for at in root.files(("",)):
        if any(form in at.read_bytes() for form in forms):
            found.append(at.uri)
    return found


def judge(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every face is a row of every pass, something was selected and mined, no secret came out."""
    faults = []
    for name, record in records.items():
        found = record["metrics"]
        wanted = dict.fromkeys(STREAMED, found["faces"]) | {"mine": found["selected"]}
        faults += [
            f"{name}: {stage} has {found['rows'][stage]:,} rows of {rows:,}"
            for stage, rows in wanted.items()
            if found["rows"][stage] != rows
        ]
        faults += [f"{name}: {where} holds the planted secret" for where in found["leaks"]]
        if not found["selected"]:
            faults.append(f"{name}: nothing is selected")
        if found["until"] == "report" and not found["report"]:
            faults.append(f"{name}: no report")
    return faults
