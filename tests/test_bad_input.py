"""Proves that bad input ends in one clear line and exit code 2, or in a quarantined row.

Everything goes through the command; nothing that did not finish has a done.json.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.command import Ended, omnifer
from PIL import Image

from pipeline.schema import EMOTIONS
from pipeline.storage import location

pytestmark = pytest.mark.ray
FACES = 8


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Bench:
    """Good data and a recipe for it, to be spoiled in one place."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.run = at / "run"
        for i in range(FACES):
            for part, seed in (("train", 0), ("test", 100)):
                file = at / "labeled" / part / EMOTIONS[i % 2] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(seed + i))
        (at / "folder").mkdir()
        for i in range(FACES):
            (at / "folder" / f"{i}.png").write_bytes(png(200 + i))
        self.write_pool({"image": [png(300 + i) for i in range(FACES)]})
        self.recipe = {
            "name": "small",
            "labeled": {"kind": "folder", "path": str(at / "labeled")},
            "pool": [{"kind": "parquet", "name": "table", "path": str(at / "pool.parquet")}],
            "stream": {"object_store_mb": 300, "cpus": 2},
            "tracking": {"uri": "off"},
            "error_budget": 0.5,
        }

    def write_pool(self, columns: dict[str, list[bytes]]) -> None:
        pq.write_table(pa.table(columns), self.at / "pool.parquet")

    def folder_pool(self) -> None:
        self.recipe["pool"] = [{"kind": "folder", "name": "files", "path": str(self.at / "folder")}]

    def survey(self, *sets: str) -> Ended:
        file = self.at / "small.yaml"
        file.write_text(yaml.safe_dump(self.recipe), encoding="utf-8")
        chosen = [part for item in sets for part in ("--set", item)]
        return omnifer("run", file, "--run", self.run, "--until", "survey", *chosen)

    def finished(self) -> set[str]:
        return {path.parent.parent.name for path in self.run.glob("*/*/done*.json")}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def labels_nowhere(bench: Bench) -> None:
    bench.recipe["labeled"] |= {"path": str(bench.at / "gone")}


def labels_empty(bench: Bench) -> None:
    (bench.at / "empty").mkdir()
    bench.recipe["labeled"] |= {"path": str(bench.at / "empty")}


def class_unknown(bench: Bench) -> None:
    (bench.at / "labeled" / "train" / "happiness").rename(bench.at / "labeled/train/hapiness")


def labels_no_folder(bench: Bench) -> None:
    bench.recipe["labeled"] |= {"path": str(bench.at / "pool.parquet")}


def table_column(bench: Bench) -> None:
    pool = str(bench.at / "pool.parquet")
    bench.recipe["labeled"] = {"kind": "ferplus", "path": pool}


def table_truncated(bench: Bench) -> None:
    pool_truncated(bench)
    table_column(bench)


def votes_nowhere(bench: Bench) -> None:
    bench.recipe["labeled"] = {"kind": "ferplus", "path": str(bench.at / "gone.csv")}


def removals_nowhere(bench: Bench) -> None:
    bench.recipe["removals"] = str(bench.at / "gone.txt")


def pool_nowhere(bench: Bench) -> None:
    (bench.at / "pool.parquet").unlink()


def pool_empty(bench: Bench) -> None:
    bench.folder_pool()
    for file in (bench.at / "folder").iterdir():
        file.unlink()


def pool_column(bench: Bench) -> None:
    bench.recipe["pool"][0]["image_column"] = "picture"


def pool_type(bench: Bench) -> None:
    pq.write_table(pa.table({"image": ["a", "b"]}), bench.at / "pool.parquet")


def pool_truncated(bench: Bench) -> None:
    file = bench.at / "pool.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def pool_not_parquet(bench: Bench) -> None:
    (bench.at / "pool.parquet").write_bytes(png(1))


def pool_no_rows(bench: Bench) -> None:
    empty = pa.table({"image": pa.array([], pa.binary())})
    pq.write_table(empty, bench.at / "pool.parquet")


BEFORE_THE_PASS: list[tuple[Callable[[Bench], None], tuple[str, ...], set[str]]] = [
    (labels_nowhere, ("{at}/gone: no such",), set()),
    (labels_empty, ("{at}/empty", "no image in it"), set()),
    (labels_no_folder, ("{at}/pool.parquet", "no such folder"), set()),
    (class_unknown, ("{at}/labeled/train/hapiness/", "did you mean 'happiness'"), set()),
    (table_column, ("{at}/pool.parquet", "missing column", "found: image"), set()),
    (table_truncated, ("{at}/pool.parquet", "Parquet"), set()),
    (votes_nowhere, ("{at}/gone.csv",), set()),
    (removals_nowhere, ("{at}/gone.txt",), set()),
    (pool_nowhere, ("{at}/pool.parquet",), {"labeled", "test"}),
    (pool_empty, ("{at}/folder", "no image in it"), {"labeled", "test"}),
    (
        pool_column,
        ("{at}/pool.parquet", "missing column picture; found: image"),
        {"labeled", "test"},
    ),
    (pool_type, ("{at}/pool.parquet column image", "type string"), {"labeled", "test"}),
    (pool_truncated, ("{at}/pool.parquet", "broken Parquet"), {"labeled", "test"}),
    (pool_not_parquet, ("{at}/pool.parquet", "broken Parquet"), {"labeled", "test"}),
    (pool_no_rows, ("{at}/pool.parquet", "without a row"), {"labeled", "test"}),
]


@pytest.mark.parametrize(
    ("spoil", "said", "finished"), BEFORE_THE_PASS, ids=[c[0].__name__ for c in BEFORE_THE_PASS]
)
def test_one_line__before_the_pass(
    bench: Bench,
    spoil: Callable[[Bench], None],
    said: tuple[str, ...],
    finished: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.pool.start_ray", _no_ray)
    spoil(bench)
    ended = bench.survey()
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1
    for text in said:
        assert text.format(at=bench.at) in ended.err
    assert bench.finished() == finished


def _no_ray(config: object) -> None:
    raise AssertionError("got as far as the pass")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("labeled.fraction=0", "labeled.folder.fraction: Input should be greater than 0"),
        ("labeled.fraction=1.5", "labeled.folder.fraction: Input should be less than or equal"),
        ("labeled.validation=1", "labeled.folder.validation: Input should be less than 1"),
        ("error_budget=-0.1", "error_budget: Input should be greater than or equal to 0"),
        ("pool.0.crop.fraction=2", "pool.0.parquet.crop.fraction: "),
        ("pool.0.imagecolumn=x", "unknown key 'pool.0.parquet.imagecolumn'; did you mean 'image_"),
        ("pool.0.kind=parket", "pool.0: Input tag 'parket'"),
        ("pool=[]", "pool: Tuple should have at least 1 item"),
    ],
)
def test_one_line__impossible_setting(bench: Bench, item: str, said: str) -> None:
    ended = bench.survey(item)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert not bench.run.exists()


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    yield
    ray.shutdown()


def test_pass__corrupt_images_become_rows_and_a_corrupt_shard_one_line(
    bench: Bench, ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """One Ray for both: bad images are rows of a finished survey; a bad shard finishes nothing."""
    images = [png(300 + i) for i in range(FACES)]
    images[2] = images[2][:60]
    images[5] = b"no image at all"
    bench.write_pool({"image": images})
    assert bench.survey().code == 0
    assert bench.finished() == {"labeled", "test", "survey"}
    rows = _surveyed(bench)
    assert [row["status"] for row in rows].count("ok") == FACES - 2
    assert {i: rows[i]["reason"] for i in (2, 5)} == {2: "truncated", 5: "not_an_image"}
    capfd.readouterr()

    bench.run = bench.at / "other"
    bench.write_pool({"image": [png(400 + i) for i in range(FACES)]})
    shard = bench.at / "pool.parquet"
    data = bytearray(shard.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)  # the footer stays whole
    shard.write_bytes(data)
    ended = bench.survey()
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert f"{shard}: broken Parquet" in ended.err
    assert bench.finished() == {"labeled", "test"}
    assert "Traceback" not in capfd.readouterr().err

    bench.run = bench.at / "third"
    bench.write_pool({"image": [images[5]] * FACES})
    ended = bench.survey()
    assert ended.code == 1
    assert "8 of 8 faces are quarantined, more than the budget of 50.0%" in ended.err
    assert bench.finished() == {"labeled", "test"}


def _surveyed(bench: Bench) -> list[dict[str, object]]:
    from pipeline.ledger import Ledger
    from pipeline.plan import Plan

    (at,) = (bench.run / "survey").glob("g001-*")
    (plan,) = at.glob("plan-*.parquet")
    tables = Ledger(location(at)).tables(Plan(location(plan)))
    return [row for _, table in tables for row in table.to_pylist()]
