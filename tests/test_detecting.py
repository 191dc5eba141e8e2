"""Photos become a pool once: parts that appear whole, continue, and refuse other settings."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.command import omnifer
from helpers.yunet import write_yunet
from test_detection import BLUE, GREEN, RED, photo, png

from pipeline import detecting
from pipeline.detecting import ABOUT, detect
from pipeline.detection import DetectConfig, YuNet
from pipeline.errors import IdentityError, SourceError
from pipeline.images import Align, Crop
from pipeline.labeled.table import TableSet
from pipeline.sources.parquet import ParquetPool
from pipeline.storage import location
from pipeline.survey import describe

PHOTOS = {
    "a/0.png": photo([(20, 10, 8, RED), (4, 6, 16, GREEN)]),
    "a/1.png": photo([]),
    "b/2.png": photo([(7, 3, 32, BLUE)]),
    "b/3.png": photo([(5, 5, 16, GREEN)]),
    "b/4.png": photo([(30, 12, 8, RED)]),
}
IDS = ["a/0.png#0", "a/0.png#1", "a/1.png", "b/2.png#0", "b/3.png#0", "b/4.png#0", "b/5bad.png"]
COUNTS = {"photos": 6, "faces": 5, "no_face": 1, "unreadable": 1}


@pytest.fixture
def config(tmp_path):
    return DetectConfig(model=str(write_yunet(tmp_path / "yunet.onnx")))


@pytest.fixture
def photos(tmp_path):
    for name, pixels in PHOTOS.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels))
    (tmp_path / "photos/b/5bad.png").write_bytes(b"no image")
    return location(tmp_path / "photos")


@pytest.fixture
def out(tmp_path):
    return location(tmp_path / "faces.parquet")


def pool(out):
    columns = {"id": "id", "group": "group", "box": "box", "landmarks": "landmarks"}
    names = {f"{key}_column": name for key, name in columns.items()}
    return ParquetPool(path=out.uri, reason_column="reason", **names)


def test_detect__what_it_writes_is_a_pool(photos, config, out):
    assert detect(photos, out, config, threads=2) == COUNTS
    source = pool(out)
    tables = [source.read(extent) for extent in source.slices(100)]
    assert [name for table in tables for name in table["id"].to_pylist()] == IDS
    (extent,) = source.slices(100)
    faces = describe(tables[0], Crop(align=Align(template="centered")), "gray", threads=1)
    reasons = [None, None, "no_face", None, None, None, "not_an_image"]
    assert faces["reason"].to_pylist() == reasons
    again = source.read(extent, [4, 1])
    assert again["id"].to_pylist() == [IDS[1], IDS[4]]
    assert again["image"].to_pylist() == [tables[0]["image"].to_pylist()[i] for i in (1, 4)]


def test_detect__with_labels_it_is_a_labeled_table(photos, config, out, tmp_path):
    detect(photos, out, config)
    table = pq.read_table(out.local_path() / "part-00000.parquet")
    table = table.append_column("label", [["fear"] * table.num_rows]).filter(
        np.array([reason is None for reason in table["reason"].to_pylist()])
    )
    pq.write_table(table, tmp_path / "labeled.parquet")
    records = TableSet(
        path=str(tmp_path / "labeled.parquet"), group_column="group", box_column="box",
        landmarks_column="landmarks",
    ).records("x")  # fmt: skip
    assert records.table["landmarks"].null_count == 0
    assert records.table["group"].to_pylist()[:2] == ["a/0.png"] * 2


def test_detect__continues_and_gives_the_same(photos, config, out, tmp_path, monkeypatch):
    monkeypatch.setattr(detecting, "PHOTOS", 2)
    monkeypatch.setattr(detecting, "READS", 1)
    whole = location(tmp_path / "whole")
    detect(photos, whole, config)

    class Killed(YuNet):
        left = 3

        def __call__(self, pixels):
            if pixels.shape == (240, 320, 3):
                type(self).left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        detect(photos, out, config, detector=Killed(config), threads=1)
    kept = (out / "part-00000.parquet").stamp()
    assert not (out / "part-00001.parquet").exists()
    assert detect(photos, out, config) == COUNTS
    assert (out / "part-00000.parquet").stamp() == kept
    for number in range(3):
        name = f"part-{number:05d}.parquet"
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    source = pool(out)
    ids = [name for e in source.slices(100) for name in source.read(e)["id"].to_pylist()]
    assert ids == IDS


def test_detect__the_model_is_recorded_and_others_are_refused(photos, config, out):
    detect(photos, out, config)
    sha256 = YuNet(config).sha256
    assert (out / ABOUT).read_json()["model"] == sha256
    metadata = pq.read_metadata(out.local_path() / "part-00000.parquet").metadata
    assert sha256.encode() in metadata[b"detector"]
    with pytest.raises(IdentityError, match=r"(?s)other --out.*  score: 0.6 -> 0.9"):
        detect(photos, out, config.model_copy(update={"score": 0.9}))
    (photos / "b" / "6.png").write_bytes(png(PHOTOS["a/1.png"]))
    with pytest.raises(IdentityError, match=r"  photos: "):
        detect(photos, out, config)


def test_detect__one_photo_and_a_table_of_photos(photos, config, out, tmp_path):
    assert detect(photos / "b" / "2.png", out, config)["faces"] == 1
    import pyarrow as pa

    table = pa.table({"image": [png(pixels) for pixels in PHOTOS.values()]})
    pq.write_table(table, tmp_path / "p.parquet")
    detect(location(tmp_path / "p.parquet"), location(tmp_path / "o"), config)
    ids = pq.read_table(tmp_path / "o/part-00000.parquet")["id"].to_pylist()
    assert ids[:3] == ["p.parquet#0#0", "p.parquet#0#1", "p.parquet#1"]


def test_verb__detects_and_names_what_is_wrong(photos, config, out):
    ended = omnifer("detect", photos.uri, "--model", config.model, "--out", out.uri)
    assert ended.code == 0
    assert "'faces': 5, 'no_face': 1, 'unreadable': 1" in ended.out
    ended = omnifer("detect", photos.uri, "--model", config.model, "--out", out.uri, "--score", "2")
    assert ended.code == 2
    assert "omnifer detect: score: " in ended.err
    ended = omnifer("detect", photos.uri, "--model", out.uri + "/x", "--out", out.uri)
    assert ended.code == 2
    assert "no such file" in ended.err


def test_detect__bad_places(photos, config, out, tmp_path):
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match="expected a folder for the parts"):
        detect(photos, location(tmp_path / "file.parquet"), config)
    with pytest.raises(SourceError, match="no such file"):
        detect(location(tmp_path / "gone"), out, config)
