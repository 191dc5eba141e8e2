"""Every image is a row with probabilities by name, in flat memory, whatever the container."""

import csv
import gzip
import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import NAMES, tiny_model, tiny_teacher
from helpers.yunet import write_yunet
from PIL import Image
from pyarrow.csv import read_csv
from sources import writers

from pipeline import predicting
from pipeline.artifacts import load_model, save_model, save_teacher
from pipeline.detection import DetectConfig
from pipeline.embedding import EmbedConfig
from pipeline.errors import ConfigError, ModelError, SourceError
from pipeline.images import Align, Crop
from pipeline.predicting import learned_crop, predict
from pipeline.storage import location

CONFIG = EmbedConfig(batch=4, decode_threads=2)
COLUMNS = ["path", *(f"prob_{n}" for n in NAMES), "top1", "top2", "abstain", "status", "reason"]


def png(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def student(tmp_path):
    save_model(tiny_model(), location(tmp_path / "m"), {"temperature": 2.0})
    return location(tmp_path / "m")


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        file = tmp_path / "faces" / f"{'ab'[i % 2]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    (tmp_path / "faces" / "a" / "3bad.jpg").write_bytes(b"\xff\xd8\xff not an image")
    return location(tmp_path / "faces")


def run(model, path, out, **settings):
    counts = predict(model, path, out, config=CONFIG, **settings)
    return counts, pq.read_table(out)


def test_predict__folder_of_images_with_a_bad_one(student, folder, tmp_path):
    counts, table = run(student, folder, tmp_path / "x.parquet", abstain=0.5)
    assert table.column_names == COLUMNS
    rows = {row["path"]: row for row in table.to_pylist()}
    assert sorted(rows) == ["a/0.png", "a/2.png", "a/3bad.jpg", "a/4.png", "b/1.png", "b/3.png"]
    bad = rows.pop("a/3bad.jpg")
    assert bad["status"] == "quarantined"
    assert bad["reason"]
    assert all(bad[name] is None for name in COLUMNS[1:-2])
    for row in rows.values():
        probs = {name: row[f"prob_{name}"] for name in NAMES}
        assert sum(probs.values()) == pytest.approx(1, abs=1e-6)
        ranked = sorted(probs, key=lambda name: -probs[name])
        assert [row["top1"], row["top2"]] == ranked[:2]
        assert row["abstain"] == (max(probs.values()) < 0.5)
    abstained = sum(row["abstain"] for row in rows.values())
    assert counts == {"images": 6, "quarantined": 1, "abstained": abstained}


def test_predict__temperature_and_cut_of_the_command_line(student, folder, tmp_path):
    _, calm = run(student, folder, tmp_path / "x.parquet")
    assert [v for v in calm.column("abstain").to_pylist() if v is not None] == [False] * 5
    _, strict = run(student, folder, tmp_path / "y.parquet", abstain=1.0)
    assert [v for v in strict.column("abstain").to_pylist() if v is not None] == [True] * 5
    save_model(tiny_model(), location(tmp_path / "sharp"), {"temperature": 1.0})
    _, sharp = run(location(tmp_path / "sharp"), folder, tmp_path / "z.parquet")
    columns = [f"prob_{name}" for name in NAMES]

    def logits(table):
        good = table.filter(pa.compute.equal(table["status"], "ok")).select(columns)
        values = np.log(np.stack([good[c].to_numpy() for c in columns], axis=1))
        return values - values.mean(axis=1, keepdims=True)

    np.testing.assert_allclose(logits(sharp), 2 * logits(calm), atol=1e-4)


def test_predict__parquet_one_image_and_folder_agree(student, folder, tmp_path):
    _, want = run(student, folder, tmp_path / "x.parquet")
    want = {row["path"]: row for row in want.to_pylist()}
    pq.write_table(pa.table({"image": [png(i) for i in range(3)]}), tmp_path / "pool.parquet")
    _, table = run(student, location(tmp_path / "pool.parquet"), tmp_path / "y.parquet")
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == [f"pool.parquet#{i}" for i in range(3)]
    _, one = run(student, folder / "b" / "1.png", tmp_path / "z.parquet")
    assert one.to_pylist()[0]["path"] == "1.png"
    for row, path in [
        *zip(rows, ("a/0.png", "b/1.png", "a/2.png"), strict=True),
        (one.to_pylist()[0], "b/1.png"),
    ]:
        for name in NAMES:
            assert row[f"prob_{name}"] == pytest.approx(want[path][f"prob_{name}"], abs=1e-6)


FACES = [png(i) for i in range(6)]
BAD = b"\xff\xd8\xff not an image"
ALL = [*FACES[:3], BAD, *FACES[3:]]
NAMED = [(f"{i}.png", data) for i, data in enumerate(ALL)]


def zip_bytes():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in NAMED:
            archive.writestr(name, data)
    return out.getvalue()


def write_rec_flat(at):
    writers.write_rec(at, {i: writers.payload(data, 0.0, i) for i, data in enumerate(ALL)})


def write_folder(at):
    for name, data in NAMED:
        at.mkdir(exist_ok=True)
        (at / name).write_bytes(data)


KINDS = {
    "a": write_folder,
    "a.zip": lambda at: at.write_bytes(zip_bytes()),
    "a.tar": lambda at: at.write_bytes(writers.tar_bytes(NAMED)),
    "a.tar.gz": lambda at: at.write_bytes(gzip.compress(writers.tar_bytes(NAMED))),
    "a.tsv": lambda at: at.write_bytes(b"".join(writers.tsv_line(x) + b"\n" for x in ALL)),
    "a.rec": write_rec_flat,
    "a.parquet": lambda at: pq.write_table(pa.table({"img": ALL, "label": ["fear"] * 7}), at),
    "a.lance": lambda at: writers.write_lance(at, pa.table({"image": ALL}), 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_predict__every_kind_file_folder_and_pattern(student, tmp_path, monkeypatch, name):
    monkeypatch.setattr(predicting, "CHUNK", 3)
    _, want = run(student, folder_of(tmp_path), tmp_path / "x.parquet")
    data = tmp_path / "data"
    data.mkdir()
    stem, dot, suffix = name.partition(".")
    KINDS[name](data / f"{stem}-1{dot}{suffix}")
    pattern = f"{stem}-{{1..1}}{dot}{suffix}"
    paths = [f"{stem}-1{dot}{suffix}", pattern] if dot else [f"{stem}-1"]
    for path in paths:
        counts, table = run(student, location(data / path), tmp_path / "y.parquet")
        same_but_for_the_path(table, want)
        assert counts["quarantined"] == 1
    if dot:
        _, table = run(student, location(data), tmp_path / "z.parquet")
        same_but_for_the_path(table, want)
        first = table["path"][0].as_py()
        assert first.startswith(f"a-1.{suffix}"), first


def folder_of(tmp_path):
    write_folder(tmp_path / "plain")
    return location(tmp_path / "plain")


def same_but_for_the_path(table, want):
    assert table.num_rows == want.num_rows == len(ALL)
    assert len(set(table["path"].to_pylist())) == len(ALL)
    for row, other in zip(table.to_pylist(), want.to_pylist(), strict=True):
        assert (row["status"], row["reason"], row["top1"]) == tuple(
            other[key] for key in ("status", "reason", "top1")
        )
        if row["status"] == "ok":
            assert row["prob_neutral"] == pytest.approx(other["prob_neutral"], abs=1e-6)


def test_predict__labels_beside_the_pictures_are_not_looked_at(student, folder, tmp_path):
    for i, name in enumerate(("happy", "sad")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(i))
    _, table = run(student, location(tmp_path / "set"), tmp_path / "x.parquet")
    assert table["path"].to_pylist() == ["happy/a.png", "sad/a.png"]


def test_predict__a_broken_container_is_one_line(student, tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_bytes()[:300])
    with pytest.raises(SourceError, match=r"a\.zip: expected a zip file"):
        predict(student, location(tmp_path / "a.zip"), tmp_path / "x.parquet", config=CONFIG)
    assert not (tmp_path / "x.parquet").exists()


def test_predict__csv_says_the_same(student, folder, tmp_path):
    _, table = run(student, folder, tmp_path / "x.parquet")
    predict(student, folder, tmp_path / "x.csv", config=CONFIG)
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    for row, want in zip(rows, table.to_pylist(), strict=True):
        assert (row["path"], row["top1"]) == (want["path"], want["top1"] or "")
        if want["top1"]:
            assert float(row["prob_neutral"]) == pytest.approx(want["prob_neutral"], abs=1e-6)


def test_predict__chunks_do_not_change_rows(student, folder, tmp_path, monkeypatch):
    _, want = run(student, folder, tmp_path / "x.parquet")
    monkeypatch.setattr(predicting, "CHUNK", 2)
    _, table = run(student, folder, tmp_path / "y.parquet")
    for row, other in zip(table.to_pylist(), want.to_pylist(), strict=True):
        assert (row["path"], row["top1"], row["status"]) == (
            other["path"],
            other["top1"],
            other["status"],
        )
        if row["top1"]:
            assert row["prob_neutral"] == pytest.approx(other["prob_neutral"], abs=1e-6)


def test_predict__a_teacher_gives_the_mean_of_its_members(folder, tmp_path):
    teacher = tiny_teacher()
    save_teacher(teacher, location(tmp_path / "t"))
    _, table = run(location(tmp_path / "t"), folder, tmp_path / "x.parquet")
    each = []
    for i, member in enumerate(teacher.members):
        at = location(tmp_path / f"m{i}")
        save_model(member, at, {"temperature": teacher.temperature})
        each.append(run(at, folder, tmp_path / f"{i}.parquet")[1])
    for row, first, second in zip(*(t.to_pylist() for t in (table, *each)), strict=True):
        if row["status"] == "ok":
            mean = (first["prob_sadness"] + second["prob_sadness"]) / 2
            assert row["prob_sadness"] == pytest.approx(mean, abs=1e-6)
            assert row["abstain"] is False


def test_predict__crop_takes_the_center(student, folder, tmp_path):
    _, whole = run(student, folder, tmp_path / "x.parquet")
    _, center = run(student, folder, tmp_path / "y.parquet", crop=Crop(fraction=0.5))
    assert whole["prob_neutral"].to_pylist() != center["prob_neutral"].to_pylist()


def test_predict__crops_as_where_the_model_learned(student, folder, tmp_path):
    _, center = run(student, folder, tmp_path / "x.parquet", crop=Crop(fraction=0.5))
    said = {"temperature": 2.0, "crop": {"fraction": 0.5, "box": True, "margin": 0.2}}
    save_model(load_model(student), location(tmp_path / "n"), said)
    _, own = run(location(tmp_path / "n"), folder, tmp_path / "y.parquet")
    assert own["prob_neutral"].to_pylist() == center["prob_neutral"].to_pylist()
    assert learned_crop(said["crop"], detected=True) == Crop(box=True, margin=0.2)
    assert learned_crop({}, detected=False) == Crop()


def test_predict__what_cannot_be_done_is_said_and_nothing_is_left_behind(student, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"expected a name ending in .parquet or .csv"):
        predict(student, folder, tmp_path / "x.txt")
    with pytest.raises(SourceError, match="nowhere: no such file or folder"):
        predict(student, location(tmp_path / "nowhere"), tmp_path / "x.parquet", config=CONFIG)
    with pytest.raises(ModelError, match=r"expected model.safetensors"):
        predict(folder, folder, tmp_path / "x.parquet")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_predict__all_faces_of_photos(student, tmp_path, suffix):
    config = DetectConfig(model=str(write_yunet(tmp_path / "yunet.onnx")))
    pixels = np.full((120, 160, 3), 90, np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "b.png")
    for column in (24, 88):
        pixels[48:56, column : column + 8] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    out = tmp_path / f"x.{suffix}"
    aligned = Crop(align=Align(template="centered"))
    for crop in (None, aligned):
        photos = location(tmp_path / "photos")
        counts = predict(student, photos, out, config=CONFIG, detect=config, crop=crop)
        assert (counts["images"], counts["quarantined"]) == (3, 1)
        table = pq.read_table(out) if suffix == "parquet" else read_csv(out)
        assert table.column_names == [COLUMNS[0], "x0", "y0", "x1", "y1", *COLUMNS[1:]]
        rows = table.to_pylist()
        assert [row["path"] for row in rows] == ["a.png#0", "a.png#1", "b.png"]
        assert [row["x0"] for row in rows] == [28 - 20, 92 - 20, None]
        assert [row["y1"] for row in rows] == [52 + 24, 52 + 24, None]
        assert rows[2]["reason"] == "no_face"
        assert sum(rows[0][f"prob_{name}"] for name in NAMES) == pytest.approx(1, abs=1e-5)


def test_predict__aligning_needs_a_detector(student, folder, tmp_path):
    with pytest.raises(ConfigError, match="aligning needs landmarks"):
        predict(student, folder, tmp_path / "x.csv", crop=Crop(align=Align()))
