"""The mined set leaves whole: every face once, with bytes, label, probabilities, statement."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import flow

from pipeline import mined_sets, pool
from pipeline.errors import ConfigError, RunError
from pipeline.mined_sets import export_mined
from pipeline.recognizing import recognize_pool
from pipeline.storage import location


@pytest.fixture(scope="module")
def mined(tiny_run: Path) -> list[dict]:
    """The mined rows, read another way."""
    job = flow.start(flow.tiny(flow.UNTRACKED), tiny_run)
    tables = [table for _, table in pool.ledger(job, "mine").tables(pool.pool_plan(job))]
    return pa.concat_tables(tables).to_pylist()


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mined_sets, "PER_FILE", 100)


def names(tiny_run: Path) -> list[str]:
    return json.loads(next(tiny_run.glob("evaluate/*/metrics.json")).read_text())["label_names"]


def test_export_mined__parquet_holds_every_face_in_order(mined, tiny_run, tmp_path) -> None:
    counts = export_mined(location(tiny_run), "parquet", location(tmp_path))
    files = sorted(tmp_path.glob("part-*.parquet"))
    sizes = [pq.read_metadata(file).num_rows for file in files]
    assert sizes == [100] * (len(mined) // 100) + [len(mined) % 100]
    assert files[-1].name == f"part-{len(files) - 1:05d}-of-{len(files):05d}.parquet"
    rows = pa.concat_tables(pq.read_table(file) for file in files)
    assert rows.num_rows == len(mined) == counts.faces
    for left, was in zip(rows.to_pylist(), mined, strict=True):
        same = ("id", "image", "label", "weight", "confidence", "source", "position", "teacher")
        assert {k: left[k] for k in same} == {k: was[k] for k in same}
        assert left["soft"] == was["soft"]
        assert left["sha256"] == was["sha256"].hex()
    assert rows.schema.metadata[b"label_names"].decode().split(",") == names(tiny_run)
    assert "group" not in rows.column_names


def test_export_mined__webdataset_members_belong_together(mined, tiny_run, tmp_path) -> None:
    export_mined(location(tiny_run), "webdataset", location(tmp_path))
    seen: dict[str, dict[str, bytes]] = {}
    for at in sorted(tmp_path.glob("mined-*.tar")):
        with tarfile.open(at) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                seen.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    assert sorted(seen) == [f"{i:09d}" for i in range(len(mined))]
    for number, was in enumerate(mined):
        parts = seen[f"{number:09d}"]
        assert set(parts) == {"png", "cls", "json"}
        assert parts["png"] == was["image"]
        facts = json.loads(parts["json"])
        assert names(tiny_run)[int(parts["cls"])] == facts["label"] == was["label"]
        assert max(facts["probs"], key=facts["probs"].get) == was["label"]


def test_export_mined__hf_is_read_again_as_a_pool_and_names_its_labels(
    mined, tiny_run, tmp_path
) -> None:
    export_mined(location(tiny_run), "hf", location(tmp_path))
    files = sorted((tmp_path / "data").glob("*.parquet"))
    assert files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    info = json.loads(pq.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
    assert info["image"] == {"_type": "Image"}
    assert info["label"] == {"names": names(tiny_run), "_type": "ClassLabel"}
    assert set(info) == set(pq.read_schema(files[0]).names)
    rows = pa.concat_tables(pq.read_table(file) for file in files).to_pylist()
    assert [row["image"]["bytes"] for row in rows] == [was["image"] for was in mined]
    assert [info["label"]["names"][row["label"]] for row in rows] == [w["label"] for w in mined]
    assert recognize_pool(str(tmp_path / "data")).config["kind"] == "parquet"
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert head["configs"][0]["data_files"][0]["path"] == "data/train-*.parquet"


def test_export_mined__the_statement_counts_what_is_there(mined, tiny_run, tmp_path) -> None:
    export_mined(location(tiny_run), "parquet", location(tmp_path))
    text = (tmp_path / "README.md").read_text()
    labels = [row["label"] for row in mined]
    for name in set(labels):
        assert f"- kept as {name}: {labels.count(name)} of " in text
    pool_facts = json.loads(next(tiny_run.glob("evaluate/*/metrics.json")).read_text())["pool"]
    assert f"- purity: {pool_facts['purity']:.1%} of {pool_facts['known']} faces" in text
    assert f"- from source pool: {len(mined)} faces (synthetic)" in text
    assert "machine-generated" in text
    assert "Removal contact" in text
    assert "MS-Celeb-1M was withdrawn" in text
    assert str(tiny_run) not in text


def test_export_mined__faults_of_a_person_are_one_line(tiny_run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="expected parquet, webdataset, hf"):
        export_mined(location(tiny_run), "timm", location(tmp_path / "out"))
    with pytest.raises(RunError, match="no finished mined set; run `omnifer mine` first"):
        export_mined(location(tmp_path), "hf", location(tmp_path / "out"))
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="not there or empty"):
        export_mined(location(tiny_run), "hf", location(tmp_path))


def test_cut__files_end_where_they_should() -> None:
    tables = [pa.table({"x": list(range(n))}) for n in (3, 0, 7, 1, 4)]
    rows = [x for table in tables for x in table["x"].to_pylist()]
    pieces = mined_sets._cut(tables, 4)
    files = [
        [x for piece in mined_sets._take(pieces, n) for x in piece["x"].to_pylist()]
        for n in (4, 4, 4, 3)
    ]
    assert [len(file) for file in files] == [4, 4, 4, 3]
    assert [x for file in files for x in file] == rows
