"""read_labeled: roles, hidden truth, given test sets, removals, and what it refuses."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from labeled import writers
from pipeline.config import Config, parse
from pipeline.errors import ConfigError, SourceError
from pipeline.labeled.folder import FolderSet
from pipeline.labeled.reader import (
    LabeledFolder,
    LabeledSource,
    LabeledSynthetic,
    LabeledTable,
    read_labeled,
)
from pipeline.schema import EMOTIONS, LABELED, label_names_of
from pipeline.sources.removals import Removals
from pipeline.synthetic import draw, encode

SMALL = {"kind": "synthetic", "count": 120, "test_count": 40, "size": 16}


def labeled(**values):
    return TypeAdapter(LabeledSource).validate_python({**SMALL, **values})


def roles(found, role):
    return found.table.filter(pa.array([r == role for r in found.table["role"].to_pylist()]))


@pytest.fixture
def photos(tmp_path):
    """A folder set: train and test, four faces of three classes each."""
    for part, split in enumerate(("train", "test")):
        for k, name in enumerate(("happy", "sad", "fear")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, face in enumerate(draw(part, np.arange(4 * k, 4 * k + 4), 16)):
                (folder / f"{i}.png").write_bytes(encode(face))
    return str(tmp_path)


def test_read_labeled__table_is_ordered_by_role_and_names_its_labels():
    found = read_labeled(labeled(fraction=0.3, validation=0.2))
    order = found.table["role"].to_pylist()
    assert [*dict.fromkeys(order)] == ["train", "validation", "test", "rest"]
    assert found.table.schema.equals(LABELED)
    assert label_names_of(found.table.schema) == EMOTIONS == found.label_names


def test_read_labeled__rest_labels_are_hidden_and_kept_as_truth():
    found = read_labeled(labeled(fraction=0.3))
    rest = roles(found, "rest")
    assert rest["label"].null_count == rest["soft"].null_count == len(rest)
    everything = read_labeled(labeled())
    labels = dict(zip(everything.table["id"].to_pylist(), everything.table["label"].to_pylist(),
                      strict=True))  # fmt: skip
    truth = dict(zip(*(found.truth[name].to_pylist() for name in ("id", "label")), strict=True))
    assert truth
    assert truth == {i: labels[i] for i in rest["id"].to_pylist() if labels[i] is not None}


def test_read_labeled__counts_add_up():
    found = read_labeled(labeled(fraction=0.3))
    total = sum(n for role in found.counts["roles"].values() for n in role.values())
    assert total == len(found.table)
    assert total + sum(found.counts["left_out"].values()) == 160


def test_read_labeled__recipe_seed_where_the_set_has_none():
    ids = [
        roles(read_labeled(config, seed=seed), "train")["id"].to_pylist()
        for config, seed in ((labeled(fraction=0.3), 5), (labeled(fraction=0.3, seed=5), 9))
    ]
    assert ids[0] == ids[1]


def test_read_labeled__removals():
    full = read_labeled(labeled()).table
    first, group = full["id"][0].as_py(), full["group"][1].as_py()
    found = read_labeled(labeled(), Removals(ids=frozenset([first]), groups=frozenset([group])))
    assert first not in found.table["id"].to_pylist()
    assert group not in found.table["group"].to_pylist()
    assert found.counts["left_out"]["removed"] >= 2


def test_read_labeled__test_path_of_the_same_kind(photos, tmp_path):
    other = tmp_path.parent / f"{tmp_path.name}-other"
    (other / "sad").mkdir(parents=True)
    (other / "sad" / "a.png").write_bytes(encode(draw(9, [0], 16)[0]))
    found = read_labeled(LabeledFolder(path=photos, test=str(other)))
    assert roles(found, "test")["id"].to_pylist() == ["folder-test/sad/a.png"]
    assert found.counts["left_out"] == {"other_split": 12}


def test_read_labeled__groups_that_a_table_parts_are_told(tmp_path):
    def write(name, people, splits):
        columns = {
            "image": [encode(face) for face in draw(len(name), np.arange(len(people)), 16)],
            "label": ["happy", "sad", "fear"][: len(people)],
            "person": people,
            "split": splits,
        }
        pq.write_table(pa.table(columns), tmp_path / name)
        return str(tmp_path / name)

    own = {"split_column": "split", "group_column": "person"}
    at = write("a.parquet", ["p1", "p2", "p1"], ["train", "train", "test"])
    (line,) = read_labeled(LabeledTable(path=at, **own)).counts["parted_groups"]
    assert line.startswith("1 group(s), such as 'p1', are in both train and test: 1 of 1 test face")
    whole = write("ab.parquet", ["p1", "p2", "p3"], ["train", "train", "test"])
    assert read_labeled(LabeledTable(path=whole, **own)).counts["parted_groups"] == []
    (line,) = read_labeled(LabeledTable(path=whole, test=at, **own)).counts["parted_groups"]
    assert "1 of 1 test faces" in line


def test_read_labeled__test_set_of_another_kind(photos, tmp_path):
    table = pa.table(
        {
            "image": [encode(face) for face in draw(7, np.arange(3), 16)],
            "label": ["happy", "contempt", "sad"],
            "part": ["test", "test", "train"],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    test = {"kind": "table", "path": str(tmp_path / "t.parquet"), "split_column": "part"}
    config = {"kind": "folder", "path": photos, "test": {**test, "split": "test"}}
    found = read_labeled(TypeAdapter(LabeledSource).validate_python(config))
    assert roles(found, "test")["id"].to_pylist() == ["table-test/t.parquet#0"]
    assert found.counts["left_out"]["test_label_not_in_training"] == 1


def test_read_labeled__of_a_given_set_its_test_split(photos):
    labels = Counter(happiness=4, sadness=4, fear=4)
    whole = LabeledFolder(path=photos, test=FolderSet(path=photos, name="other"))
    found = read_labeled(whole)
    ids = roles(found, "test")["id"].to_pylist()
    assert found.counts["roles"]["test"] == labels
    assert all(name.startswith("other/test/") for name in ids)  # of training faces none
    assert found.counts["left_out"] == {"other_split": 12, "test_other_split": 12}
    named = FolderSet(path=photos, name="other", split="train")
    found = read_labeled(whole.model_copy(update={"test": named}))
    assert found.counts["roles"]["test"] == labels
    assert found.counts["left_out"] == {"other_split": 12}


def test_read_labeled__whole_photos_want_a_crop(photos, tmp_path):
    at = tmp_path.parent / f"{tmp_path.name}-expw"
    writers.expw(at, [f"{name}.jpg 0 20 30 70 90 60.5 3" for name in "abc"])
    test = {"kind": "folder", "path": photos, "split": "test"}
    photo = {"kind": "expw", "path": str(at), "test": test}

    def read(**values):
        return read_labeled(TypeAdapter(LabeledSource).validate_python({**photo, **values}))

    with pytest.raises(ConfigError, match=r"expw holds whole photos, faces by their boxes; say"):
        read()
    for crop in ({"box": True}, {"fraction": 1}):
        assert len(roles(read(crop=crop), "train")) == 3
    faces = {"kind": "folder", "path": photos, "test": {"kind": "expw", "path": str(at)}}
    with pytest.raises(ConfigError, match=r"folder's test set holds whole photos"):
        read(**faces)


def test_read_labeled__development_replaces_the_test_set():
    found = read_labeled(labeled(development={"count": 20, "role": "test"}, test="/not/read"))
    assert len(roles(found, "test")) == 20
    assert all("seed0#" in i for i in roles(found, "test")["id"].to_pylist())


def test_read_labeled__two_validation_sets(photos, tmp_path):
    (tmp_path / "val" / "sad").mkdir(parents=True)
    (tmp_path / "val" / "sad" / "0.png").write_bytes(encode(draw(9, [0], 16)[0]))
    with pytest.raises(SourceError, match="has a validation split of its own"):
        read_labeled(LabeledFolder(path=photos, validation=0.2))
    assert len(roles(read_labeled(LabeledFolder(path=photos)), "validation")) == 1


def test_read_labeled__no_test_face():
    with pytest.raises(SourceError, match="no test face"):
        read_labeled(labeled(test_count=0))


def test_read_labeled__same_id_twice(photos):
    test = LabeledFolder(path=photos, split="train").model_copy(update={"name": "folder"})
    config = LabeledFolder(path=photos, name="folder").model_copy(update={"test": test})
    with pytest.raises(SourceError, match=r"two faces have the id 'folder/train/fear/0.png'"):
        read_labeled(config)


def test_labeled_source__faults_are_config_errors():
    class Holder(Config):
        labeled: LabeledSource

    with pytest.raises(ConfigError, match=r"labeled.synthetic.fraction.*less than or equal to 1"):
        parse(Holder, {"labeled": {**SMALL, "fraction": 3}})
    with pytest.raises(ConfigError, match=r"'labeled.synthetic.fractoin'; did you mean"):
        parse(Holder, {"labeled": {**SMALL, "fractoin": 0.1}})


def test_read_labeled__left_out_by_the_reader_and_unlike_the_published_set(tmp_path):
    for split, rows in (("training", ["a.jpg", "b.jpg"]), ("validation", ["c.jpg"])):
        boxes = [(name, (0, 0, 9 if name != "b.jpg" else -1, 9), 2) for name in rows]
        writers.affectnet_2017(tmp_path, split, boxes)
    config = {"kind": "affectnet", "path": str(tmp_path), "crop": {"box": True}}
    found = read_labeled(TypeAdapter(LabeledSource).validate_python(config))
    assert found.counts["roles"] == {"train": {"sadness": 1}, "test": {"sadness": 1}}
    assert found.counts["left_out"] == {"no_face_box": 1}
    assert "test: 1 faces; published: 4,000" in found.counts["unlike_official"]


def test_synthetic__roles_votes_and_people():
    records = LabeledSynthetic(count=60, test_count=20, size=16).records("s")
    assert records.table["role"].to_pylist() == ["train"] * 60 + ["test"] * 20
    assert records.table["label"].null_count < 30
    assert records.table["group"][0].as_py().startswith("seed0-")
    again = LabeledSynthetic(count=60, test_count=20, size=16).records("s")
    assert again.table.equals(records.table)
