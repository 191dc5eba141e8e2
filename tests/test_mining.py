"""Proves that mining stores exactly the selected faces, with the bytes that were surveyed."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import LedgerError
from pipeline.ledger import Ledger, Slice
from pipeline.mining import Miner, check_bytes, read_selection
from pipeline.schema import (
    MINED,
    SELECTION,
    label_names_of,
    scores_schema,
    with_label_names,
)
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import plan_slices, read_slice
from pipeline.storage import Location, location

NAMES = ("neutral", "happiness", "sadness")
FACES = pa.schema(
    [
        ("id", pa.string()),
        ("position", pa.int64()),
        ("group", pa.string()),
        ("sha256", pa.binary(32)),
    ]
)


class Pool:
    """Ten faces of invented bytes in a Parquet file, surveyed, scored and selected in a ledger."""

    def __init__(self, root: Location, chosen: Sequence[int], tampered: Sequence[int] = ()) -> None:
        self.root = root
        images = [bytes([i]) * (20 + i) for i in range(10)]
        path = root.local_path() / "faces.parquet"
        pq.write_table(pa.table({"image": images, "who": [f"p{i // 2}" for i in range(10)]}), path)
        self.sources = {"web": ParquetPool(path=str(path), group_column="who")}
        (self.slice,) = plan_slices(self.sources, 100, root / "plan")
        read = read_slice(self.slice, self.sources)
        ids = read["id"].to_pylist()
        digests = [hashlib.sha256(image).digest() for image in images]
        for i in tampered:
            digests[i] = hashlib.sha256(b"what survey saw").digest()
        groups, places = read["group"], read["position"]
        faces = pa.table(
            [read["id"], places, groups, pa.array(digests, pa.binary(32))], FACES.names
        )
        self._commit("survey", faces.cast(FACES))

        probs = np.random.default_rng(0).dirichlet(np.ones(3), 10).astype(np.float32)
        schema = with_label_names(scores_schema(3, 1), NAMES)
        empty = pa.nulls(10, pa.string())
        columns = {name: pa.nulls(10, schema.field(name).type) for name in schema.names[6:]}
        scores = {
            "id": pa.array(ids),
            "status": pa.array(["ok"] * 10),
            "reason": empty,
            "probs": pa.FixedSizeListArray.from_arrays(pa.array(probs.ravel()), 3),
            "pseudo_label": pa.array(np.array(NAMES)[probs.argmax(1)]),
            "confidence": pa.array(probs.max(1)),
        }
        self.scores = pa.table({**scores, **columns}).cast(schema)
        self._commit("score", self.scores)

        kept = np.isin(np.arange(10), chosen)
        self.selection = pa.table(
            [
                pa.array(ids),
                pa.array(kept),
                pa.array(np.where(kept, "selected", "class_cap")),
                self.scores["pseudo_label"],
                pa.array(np.full(10, 0.5, np.float32), mask=~kept),
            ],
            schema=SELECTION,
        )
        self._commit("select", self.selection)

    def _commit(self, stage: str, table: pa.Table) -> None:
        Ledger(self.root / stage).commit(self.slice, table)

    def miner(self) -> Miner:
        at = {name: self.root / name for name in ("select", "score", "survey")}
        return Miner(
            self.root / "mine", at["select"], at["score"], at["survey"], self.sources, "t" * 64, "r"
        )

    def mine(self) -> tuple[pa.Table, pa.Table]:
        tiny = self.miner()(self.slice, read_selection(self.root / "select", self.slice))
        return tiny, Ledger(self.root / "mine").read(self.slice.key)


@pytest.fixture
def root(tmp_path) -> Location:
    return location(tmp_path)


def test_miner__stores_the_selected_faces_with_all_that_is_known(root: Location) -> None:
    pool = Pool(root, chosen=[7, 2, 5])
    tiny, mined = pool.mine()
    assert mined.schema.equals(with_label_names(MINED, NAMES))
    assert label_names_of(mined.schema) == NAMES
    assert mined["position"].to_pylist() == [2, 5, 7]
    assert mined["image"].to_pylist() == [bytes([i]) * (20 + i) for i in (2, 5, 7)]
    assert mined["group"].to_pylist() == ["p1", "p2", "p3"]
    expected = pool.scores.take([2, 5, 7])
    assert mined["id"].to_pylist() == expected["id"].to_pylist()
    assert mined["soft"].to_pylist() == expected["probs"].to_pylist()
    assert mined["label"].to_pylist() == expected["pseudo_label"].to_pylist()
    assert set(mined["source"].to_pylist()) == {"web"}
    assert set(mined["teacher"].to_pylist()) == {"t" * 64}
    assert tiny["rows"].to_pylist() == [3]
    assert sum(tiny[name][0].as_py() for name in NAMES) == 3


def test_miner__commit_names_what_it_read(root: Location) -> None:
    pool = Pool(root, chosen=[1])
    pool.mine()
    commit = Ledger(root / "mine").find(pool.slice.key)
    assert commit is not None
    for stage in ("select", "score", "survey"):
        source = Ledger(root / stage).find(pool.slice.key)
        assert source is not None
        assert commit.reads[stage] == source.sha256


def test_miner__nothing_selected_is_a_commit_and_opens_no_source(root: Location) -> None:
    pool = Pool(root, chosen=[])
    pool.sources = {}
    tiny, mined = pool.mine()
    assert len(mined) == 0
    assert mined.schema.equals(with_label_names(MINED, NAMES))
    assert tiny["rows"].to_pylist() == [0]


def test_miner__changed_bytes_name_the_face_and_commit_nothing(root: Location) -> None:
    pool = Pool(root, chosen=[2, 3], tampered=[3])
    with pytest.raises(LedgerError, match=r"web/faces\.parquet#3: bytes hash to"):
        pool.mine()
    assert Ledger(root / "mine").find(pool.slice.key) is None


def test_check_bytes__of_one_face(root: Location) -> None:
    pool = Pool(root, chosen=[3])
    surveyed = Ledger(root / "survey").read(pool.slice.key).slice(3, 1)
    read = read_slice(pool.slice, pool.sources).slice(3, 1)
    check_bytes(pool.slice, surveyed, read)
    other = read.set_column(3, "image", pa.array([b"other"], pa.large_binary()))
    with pytest.raises(LedgerError, match=r"web/faces\.parquet#3: bytes hash to"):
        check_bytes(pool.slice, surveyed, other)
    gone = read.set_column(3, "image", pa.nulls(1, pa.large_binary()))
    with pytest.raises(LedgerError, match="bytes hash to nothing"):
        check_bytes(pool.slice, surveyed, gone)


def test_miner__tables_that_do_not_line_up(root: Location) -> None:
    pool = Pool(root, chosen=[3])
    with pytest.raises(LedgerError, match="faces of score and select differ"):
        pool.miner()(pool.slice, pool.selection.slice(1))


def test_miner__missing_input(root: Location) -> None:
    pool = Pool(root, chosen=[3])
    other = Slice(**{**pool.slice.__dict__, "key": "s0000009"})
    with pytest.raises(LedgerError, match="s0000009 has no commit of select"):
        pool.miner()(other, pool.selection)


def test_miner__a_renamed_face_is_wholly_of_its_new_class(root: Location) -> None:
    pool = Pool(root, chosen=[2, 5, 7])
    labels = pool.selection["label"].to_pylist()
    labels[5] = NAMES[(NAMES.index(labels[5]) + 1) % 3]
    changed = pool.selection.set_column(3, SELECTION.field("label"), pa.array(labels))
    pool.miner()(pool.slice, changed)
    mined = Ledger(root / "mine").read(pool.slice.key)
    expected = pool.scores.take([2, 5, 7])["probs"].to_pylist()
    expected[1] = [float(name == labels[5]) for name in NAMES]
    assert mined["label"].to_pylist() == [labels[i] for i in (2, 5, 7)]
    assert mined["soft"].to_pylist() == expected
