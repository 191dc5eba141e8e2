"""Proves dynamic thresholds on Aff-Wild2's layout: eight classes, macro-F1, videos kept whole."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labeled import writers
from PIL import Image

from pipeline import conduct, stages, synthetic
from pipeline.recipe import load
from pipeline.report.collect import collect
from pipeline.schema import EMOTIONS
from pipeline.tables import read_table
from pipeline.training.handed import LABELED_FILE
from pipeline.training.runs import FOLDS_FILE
from pipeline.training.watching import guesses_at

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "other")
OTHER = "contempt"  # what is drawn for a class that no eighth emotion stands for
VIDEOS, EACH, EVERY = 16, 24, 10
PEOPLE = {3: "v03_left", 4: "v03_right"}
"""Two people of one video."""
NET = "{name: compact_resnet, args: {widths: [8, 16]}, size: 32, color: rgb, dropout: 0}"
SMALL = (
    "tracking.uri='off'",
    "train={use_gpu: false}",
    "slice_faces=64",
    "stream.object_store_mb=300",
    f"teach={{folds: 2, steps: 60, batch: 32, lr: 0.005, imbalance: logit_adjust, model: {NET}}}",
    "embed={dtype: fp32}",
    "score={}",
    f"student.model={NET}",
    "student.steps=120",
    "student.lr=0.005",
    "student.ema=0.9",
    "student.labeled_batch=16",
    "student.mined_batch=16",
    "student.online.thresholds.floor=null",  # so small a network is never sure of a face
    "student.online.epoch_steps=null",
    "evaluate.draws=200",
)


def picture(seed: int, index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(synthetic.draw(seed, [index], 48)[0]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_videos(root: Path) -> dict[str, str]:
    """Every tenth frame of each video has a face; the label of each by its picture's path."""
    drawn = synthetic.facts(0, np.arange(3000)).label
    chosen = [np.flatnonzero(drawn == code)[:EACH] for code in range(len(EMOTIONS))]
    names, labels = writers.AFFWILD2_HEADER.lower().split(","), {}
    for number in range(VIDEOS):
        video = PEOPLE.get(number, f"v{number:02d}")
        codes = []
        for kind, emotion in zip(chosen, EMOTIONS, strict=True):
            label = "other" if emotion == OTHER else emotion
            for index in kind[number::VIDEOS]:
                path = f"cropped_aligned/{video}/{len(codes) + 1:05d}.jpg"
                writers.text(root / path, picture(0, int(index)))
                labels[path] = label
                codes += [names.index(label), *[-1] * (EVERY - 1)]
        folder = "Validation_Set" if number >= VIDEOS * 3 // 4 else "Train_Set"
        file = root / "EXPR_Recognition_Challenge" / folder / f"{video}.txt"
        writers.text(file, "\n".join([writers.AFFWILD2_HEADER, *map(str, codes)]) + "\n")
    return labels


def macro_f1(said: pa.Table) -> float:
    """Mean of the classes' F1, by counting."""
    pairs = list(zip(said["label"].to_pylist(), said["student"].to_pylist(), strict=True))
    scores = []
    for name in CLASSES:
        hits = pairs.count((name, name))
        either = sum(true == name for true, _ in pairs) + sum(own == name for _, own in pairs)
        scores.append(2 * hits / either if either else 0.0)
    return float(np.mean(scores))


@pytest.mark.cluster
@pytest.mark.usefixtures("local_ray")
def test_dtm_affwild2__runs_from_videos_to_thresholds_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = write_videos(tmp_path / "abaw")
    faces = [picture(1, index) for index in range(160)]
    pq.write_table(pa.table({"image": pa.array(faces, pa.binary())}), tmp_path / "pool.parquet")
    monkeypatch.setenv("OMNIFER_LABELED", str(tmp_path / "abaw"))
    monkeypatch.setenv("OMNIFER_POOL", str(tmp_path / "pool.parquet"))
    recipe = load(RECIPES / "dtm-affwild2.yaml", SMALL)
    assert recipe.labeled.every == EVERY
    online = recipe.student.online
    assert online is not None
    assert (online.thresholds.rule, online.low, online.low_weight) == ("dtm", "contrastive", 0.2)
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)

    roles: dict[str, set[str]] = {}
    for stage in ("labeled", "test"):
        for row in read_table(job.run.artifact(stage).dir / LABELED_FILE).to_pylist():
            assert row["label"] == labels[row["id"].removeprefix("affwild2/")]
            assert Path(row["id"]).parent.name.split("_")[0] == row["group"]
            roles.setdefault(row["group"], set()).add(row["role"])
    assert {role for own in roles.values() for role in own} == {"train", "test"}
    assert all(len(own) == 1 for own in roles.values())
    assert len(roles) == VIDEOS - 1
    folds = read_table(job.run.artifact("teach").dir / FOLDS_FILE, ["id", "fold"]).to_pylist()
    taught = {(Path(row["id"]).parent.name.split("_")[0], row["fold"]) for row in folds}
    assert {fold for _, fold in taught} == {0, 1}
    assert len(taught) == len({video for video, _ in taught}) > VIDEOS // 2

    at = job.run.artifact("evaluate").dir
    metrics, said = (at / stages.METRICS_FILE).read_json(), read_table(at / stages.PREDICTIONS_FILE)
    assert metrics["label_names"] == list(CLASSES)
    assert set(said["label"].to_pylist()) == set(CLASSES)
    student = metrics["models"]["student"]
    assert student["macro_f1"]["value"] == pytest.approx(macro_f1(said))
    assert student["macro_f1_large"] == student["macro_f1"]  # all eight are asked for

    model = job.run.artifact("student").dir / "model"
    history = (model / "history.json").read_json()
    assert [row["step"] for row in history] == [50, 100, 120]
    cuts = [[row[f"cut_{name}"] for name in CLASSES] for row in history]
    assert all(0 < cut <= online.thresholds.beta + 1e-6 for row in cuts for cut in row)
    assert len({tuple(row) for row in cuts}) == 3
    course = collect(job.run, "dtm", "c", False).course
    assert course is not None
    assert course.cuts == dict(zip(CLASSES, zip(*cuts, strict=True), strict=True))
    assert course.known == 0  # nobody knows what the pool's faces show
    assert all(len(read_table(guesses_at(model / "guesses", s))) == 160 for s in (50, 100, 120))
    assert "While the student learned" in (tmp_path / "run" / "report.html").read_text()


def test_recipes__both_learn_from_the_pool_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIFER_LABELED", "unused")
    monkeypatch.setenv("OMNIFER_POOL", "unused")
    folders, videos = (load(RECIPES / f"{name}.yaml") for name in ("dtm", "dtm-affwild2"))
    assert folders.student == videos.student
    assert folders.select == videos.select
