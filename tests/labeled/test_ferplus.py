"""FER2013 and FERPlus join by row, in both layouts, and real counts match the published ones."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import LabelError, SourceError
from pipeline.images import decode
from pipeline.labeled.codes import FER2013 as CODES
from pipeline.labeled.fer2013 import Fer2013Set
from pipeline.labeled.ferplus import VOTES, FerplusSet
from pipeline.labeled.reader import LabeledFerplus, read_labeled
from pipeline.labeled.splits import DevelopmentConfig
from pipeline.schema import EMOTIONS
from pipeline.synthetic import draw, encode

N = 12
USAGE = ["Training"] * 8 + ["PublicTest"] * 3 + ["PrivateTest"]


@pytest.fixture
def faces():
    return draw(3, np.arange(N), 48)


@pytest.fixture
def ballots():
    """Row i: nine votes for emotion i % 8, one for the next; row 5 is no face, row 6 a tie."""
    table = np.zeros((N, 10), dtype=np.int8)
    for i in range(N):
        table[i, i % 8], table[i, (i + 1) % 8] = 9, 1
    table[5] = [0] * 9 + [10]
    table[6] = [5, 5] + [0] * 8
    return table


@pytest.fixture
def parquet(tmp_path, faces, ballots):
    columns = {
        "usage": USAGE,
        "emotion": pa.array([i % 7 for i in range(N)], pa.int8()),
        "image": [encode(face) for face in faces],
        **{name: ballots[:, k] for k, name in enumerate(VOTES)},
    }
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    return str(tmp_path / "set.parquet")


@pytest.fixture
def folder(tmp_path, faces, ballots):
    """The two files as distributed: other column orders, blanks in the header, CRLF, lost names."""
    lines = ["emotion, Usage, pixels"]
    lines += [
        f"{i % 7},{USAGE[i]},{' '.join(map(str, face.ravel()))}" for i, face in enumerate(faces)
    ]
    (tmp_path / "icml_face_data.csv").write_text("\n".join(lines) + "\n")
    order = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]
    order += ["unknown", "NF"]
    lines = [",".join(["Usage", "Image name", *order])]
    for i in range(N):
        counts = [str(ballots[i, VOTES.index(name)]) for name in order]
        lines.append(",".join([USAGE[i], "" if i == 5 else "fer0000001.png", *counts]))
    (tmp_path / "fer2013new.csv").write_bytes("\r\n".join(lines).encode() + b"\r\n")
    return str(tmp_path)


def test_ferplus__labels_and_roles_by_row(parquet):
    table = FerplusSet(path=parquet).records("ferplus").table
    want = [EMOTIONS[i % 8] for i in range(N)]
    want[5] = want[6] = None
    assert table["label"].to_pylist() == want
    assert table["role"].to_pylist() == ["train"] * 8 + ["test"] * 3 + [None]
    assert table["id"][7].as_py() == "ferplus/set.parquet#7"
    assert table["soft"][0].as_py() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert table["soft"][5].as_py() is None


def test_ferplus__csv_pair_equals_parquet(parquet, folder):
    ours = FerplusSet(path=parquet).records("x").table
    theirs = FerplusSet(path=folder).records("x").table
    for column in ("role", "label", "soft", "image"):
        assert ours[column].to_pylist() == theirs[column].to_pylist()


def test_ferplus__csv_keeps_every_pixel(folder, faces):
    images = FerplusSet(path=folder).records("x").table["image"].to_pylist()
    for image, face in zip(images, faces, strict=True):
        np.testing.assert_array_equal(decode(image), face)


def test_ferplus__split_reads_one_usage(parquet):
    table = FerplusSet(path=parquet, split="PrivateTest").records("x").table
    assert table["id"].to_pylist() == ["x/set.parquet#11"]
    with pytest.raises(SourceError, match="no row of split 'Test'; found: PrivateTest"):
        FerplusSet(path=parquet, split="Test").records("x")


def test_ferplus__rules_are_counted(parquet):
    rules = FerplusSet(path=parquet).records("x").rules
    assert rules["majority"] == {"Training": 6, "PublicTest": 3, "PrivateTest": 1}
    assert rules["multi_target"]["Training"] == 7


def test_ferplus__shifted_votes_are_refused(folder, tmp_path):
    votes = tmp_path / "fer2013new.csv"
    lines = votes.read_bytes().split(b"\r\n")
    votes.write_bytes(b"\r\n".join([lines[0], *lines[2:]]))
    with pytest.raises(SourceError, match=r"11 rows, icml_face_data.csv has 12"):
        FerplusSet(path=folder).records("x")
    votes.write_bytes(b"\r\n".join([lines[0], *lines[2:-1], lines[1], b""]))
    with pytest.raises(SourceError, match="row 7: usage PublicTest"):
        FerplusSet(path=folder).records("x")


def test_ferplus__missing_votes_are_named(parquet, tmp_path):
    table = pq.read_table(parquet).drop_columns(["contempt"])
    pq.write_table(table, tmp_path / "less.parquet")
    with pytest.raises(SourceError, match="missing column contempt"):
        FerplusSet(path=str(tmp_path / "less.parquet")).records("x")
    with pytest.raises(SourceError, match="expected a Parquet file"):
        FerplusSet(path=str(tmp_path / "nowhere")).records("x")


def test_fer2013__codes(parquet, folder):
    for path in (parquet, folder):
        records = Fer2013Set(path=path).records("fer2013")
        assert records.table["label"].to_pylist() == [CODES[i % 7] for i in range(N)]
        assert records.label_names == EMOTIONS[:7]


def test_fer2013__unknown_code_names_the_row(parquet, tmp_path):
    table = pq.read_table(parquet)
    codes = pa.array([0, 1, 7] + [0] * (N - 3), pa.int8())
    bad = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(table.column_names.index("emotion"), "emotion", codes), bad)
    with pytest.raises(LabelError, match=r"bad.parquet row 2: emotion code 7; expected 0-6"):
        Fer2013Set(path=str(bad)).records("x")


# -- the real set ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set")
    return str(Path(os.environ["OMNIFER_DATA"]) / "fer2013" / "fer2013.parquet")


@pytest.mark.real
def test_real__counts(real):
    found = read_labeled(LabeledFerplus(path=real))
    roles = found.counts["roles"]
    assert sum(roles["train"].values()) == 25_060
    assert sum(roles["test"].values()) == 3_199
    assert [roles["test"][name] for name in EMOTIONS] == [1182, 865, 351, 415, 62, 24, 287, 13]
    assert found.table.num_rows == 28_709 + 3_199
    assert found.truth.num_rows == 0


@pytest.mark.real
def test_real__tenth_of_the_labels(real):
    found = read_labeled(LabeledFerplus(path=real, fraction=0.1))
    full = read_labeled(LabeledFerplus(path=real)).counts["roles"]["train"]
    tenth = found.counts["roles"]["train"]
    assert tenth == {name: int(n / 10 + 0.5) for name, n in full.items()}
    assert found.truth.num_rows == 25_060 - sum(tenth.values())
    assert sum(found.counts["roles"]["rest"].values()) == 28_709 - sum(tenth.values())


@pytest.mark.real
def test_real__development_is_fixed(real):
    held = []
    for seed, fraction in ((0, 0.1), (1, None)):
        config = LabeledFerplus(
            path=real, fraction=fraction, seed=seed, development=DevelopmentConfig(role="test")
        )
        table = read_labeled(config).table
        roles = np.array(table["role"].to_pylist())
        held.append(table.filter(pa.array(roles == "test")))
        others = set(table.filter(pa.array(roles != "test"))["image"].to_pylist())
        assert not others & set(held[-1]["image"].to_pylist())
    assert held[0].num_rows == 3_000
    assert held[0]["id"].to_pylist() == held[1]["id"].to_pylist()


@pytest.mark.real
def test_real__training_twins_of_the_test_set(real):
    table = pq.read_table(real, columns=["usage", "image"])
    pixels = [decode(image).tobytes() for image in table["image"].to_pylist()]
    usage = table["usage"].to_pylist()
    rows = list(zip(usage, pixels, strict=True))
    test = {face for where, face in rows if where == "PublicTest"}
    train = {face for where, face in rows if where == "Training"}
    assert sum(where == "Training" and face in test for where, face in rows) == 351
    assert sum(where == "PublicTest" and face in train for where, face in rows) == 280
