"""Plans are repeatable, removed faces do not appear, and a removal renames only what it hits."""

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.s3 import s3_bucket

from pipeline.errors import SourceError
from pipeline.plan import Plan
from pipeline.sources.folder import FolderPool
from pipeline.sources.parquet import ParquetPool
from pipeline.sources.reader import Earlier, fetch, keyed, plan_slices, read_slice
from pipeline.sources.removals import Removals
from pipeline.sources.rest import RestPool
from pipeline.sources.synthetic import SyntheticPool
from pipeline.storage import location
from pipeline.synthetic import draw, encode

NOTHING = Earlier(Removals(), "", lambda key: None, lambda key: None)


@pytest.fixture
def at(tmp_path):
    return location(tmp_path / "plan")


@pytest.fixture
def sources(tmp_path):
    """A Parquet file of 20 faces of five people, a folder of 7, and 12 drawn ones."""
    images = [encode(face) for face in draw(5, np.arange(27), 16)]
    table = pa.table({"image": images[:20], "who": [f"g{i // 4}" for i in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    for i, image in enumerate(images[20:]):
        file = tmp_path / "photos" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(image)
    return {
        "table": ParquetPool(path=str(tmp_path / "a.parquet"), group_column="who"),
        "photos": FolderPool(path=str(tmp_path / "photos")),
        "drawn": SyntheticPool(count=12, size=16),
    }


def survey(slices, sources, removals, before=None):
    """What a survey under a removal list knows of each slice, beside what one before it does."""
    plan, known = {s.key.split(".")[0]: s for s in slices}, {}
    for s in slices:
        table = read_slice(s, sources, removals)
        hashes = [hashlib.sha256(image).digest() for image in table["image"].to_pylist()]
        known[s.key] = table.select(["id", "group"]).append_column("sha256", pa.array(hashes))
    return Earlier(removals, "", plan.get, lambda key: known.get(key, before and before.faces(key)))


def killed(slices, removals, before):
    """The same of a survey that was killed before it committed anything."""
    return Earlier(removals, "", {s.key.split(".")[0]: s for s in slices}.get, before.faces)


def test_plan_slices__keys_sources_and_faces(sources, at):
    slices = list(plan_slices(sources, 5, at))
    assert [s.key for s in slices] == [f"s{i:07d}" for i in range(9)]
    assert [s.source for s in slices] == ["table"] * 4 + ["photos"] * 2 + ["drawn"] * 3
    assert [s.faces for s in slices] == [5, 5, 5, 5, 5, 2, 4, 4, 4]
    assert list(plan_slices(sources, 5, at)) == slices
    assert Plan.write(at / "plan.parquet", slices).slices() == slices


def test_read_slice__ids_name_source_shard_and_position(sources, at):
    slices = list(plan_slices(sources, 5, at))
    ids = [read_slice(s, sources)["id"][0].as_py() for s in slices]
    assert ids[1] == "table/a.parquet#5"
    assert ids[4] == "photos/0.png"
    assert ids[7] == "drawn/seed1#4"
    every = [i for s in slices for i in read_slice(s, sources)["id"].to_pylist()]
    assert len(set(every)) == 39


def test_read_slice__sources_travel(sources, at):
    slices = list(plan_slices(sources, 5, at))
    travelled = pickle.loads(pickle.dumps(sources))
    assert read_slice(slices[4], travelled).equals(read_slice(slices[4], sources))


def test_fetch__same_bytes_as_the_slice(sources, at):
    for s in plan_slices(sources, 5, at):
        whole = read_slice(s, sources)
        last, first = (whole["position"][i].as_py() for i in (-1, 0))
        some = fetch(s, [last, first], sources)
        assert some.equals(pa.concat_tables([whole.slice(0, 1), whole.slice(len(whole) - 1)]))


def test_fetch__position_of_another_slice(sources, at):
    for s in list(plan_slices(sources, 5, at))[1::3]:
        with pytest.raises(SourceError, match=f"position {s.stop} asked for; it holds {s.start}-"):
            fetch(s, [s.start, s.stop], sources)


def test_read_slice__removed_faces_do_not_appear(sources, at):
    slices = list(plan_slices(sources, 5, at))
    photo = read_slice(slices[4], sources)["image"][1].as_py()
    removals = Removals(
        ids=frozenset(["drawn/seed1#4"]),
        sha256=frozenset([hashlib.sha256(photo).digest()]),
        groups=frozenset(["g1"]),
    )
    left = [len(read_slice(s, sources, removals)) for s in slices]
    assert left == [4, 2, 5, 5, 4, 2, 4, 3, 4]


def test_keyed__a_removal_renames_only_what_it_hits(sources, at):
    slices = list(plan_slices(sources, 5, at))
    earlier = survey(slices, sources, Removals())
    removals = Removals(groups=frozenset(["g1"]))
    now = [keyed(s, removals, earlier) for s in slices]
    changed = [i for i, (a, b) in enumerate(zip(slices, now, strict=True)) if a.key != b.key]
    assert changed == [0, 1]
    assert now[0].key == f"s0000000.r{removals.digest[:8]}"
    assert now[0].group == slices[0].group
    Plan.write(at / "plan.parquet", now)


def test_keyed__a_grown_list_keeps_what_it_had_removed(sources, at):
    slices = list(plan_slices(sources, 5, at))
    first = Removals(groups=frozenset(["g1"]))
    then = [keyed(s, first, survey(slices, sources, Removals())) for s in slices]
    second = Removals(groups=frozenset(["g1"]), ids=frozenset(["drawn/seed1#4"]))
    now = [keyed(s, second, survey(then, sources, first)) for s in slices]
    changed = [i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a.key != b.key]
    assert changed == [7]


def test_keyed__the_same_list_keeps_every_key(sources, at):
    slices = list(plan_slices(sources, 5, at))
    removals = Removals(groups=frozenset(["g1"]))
    then = [keyed(s, removals, survey(slices, sources, Removals())) for s in slices]
    assert [keyed(s, removals, survey(then, sources, removals)) for s in slices] == then


def test_keyed__faces_that_come_back_rename_their_slice(sources, at):
    slices = list(plan_slices(sources, 5, at))
    first = Removals(groups=frozenset(["g1"]))
    earlier = survey(slices, sources, first)  # a first plan that already had a list: base keys
    now = [keyed(s, Removals(), earlier) for s in slices]
    changed = [i for i, (a, b) in enumerate(zip(slices, now, strict=True)) if a.key != b.key]
    assert changed == [0, 1]


@pytest.mark.parametrize("first", [Removals(), Removals(groups=frozenset(["g0"]))])
def test_keyed__a_killed_survey_is_taken_up_under_its_keys(sources, at, first):
    """The second list's slices, whether or not the first plan had a list, and no others."""
    slices = list(plan_slices(sources, 5, at))
    begun = survey(slices, sources, first)
    second = Removals(groups=frozenset(["g0", "g1"]))
    then = [keyed(s, second, begun) for s in slices]
    assert [i for i in range(9) if then[i] != slices[i]] == [0, 1]
    assert [keyed(s, second, killed(then, second, begun)) for s in slices] == then
    some = survey(then[:1], sources, second, before=begun)
    halfway = Earlier(
        second, "", {s.key: t for s, t in zip(slices, then, strict=True)}.get, some.faces
    )
    assert [keyed(s, second, halfway) for s in slices] == then


def test_keyed__a_grown_list_whose_survey_was_killed(sources, at):
    """Who was removed before does not come back, whether the list grew, shrank or stayed."""
    slices = list(plan_slices(sources, 5, at))
    begun = survey(slices, sources, Removals())
    first, second = (Removals(groups=frozenset(groups)) for groups in (["g1"], ["g1", "g4"]))
    then = [keyed(s, first, begun) for s in slices]
    finished = survey(then, sources, first, before=begun)
    grown = [keyed(s, second, finished) for s in slices]
    assert [i for i in range(9) if grown[i] != then[i]] == [3]
    left = killed(grown, second, finished)
    assert [keyed(s, second, left) for s in slices] == grown
    assert [keyed(s, first, left) for s in slices] == then
    other = Removals(ids=frozenset(["drawn/seed1#4"]))
    keys = [keyed(s, other, left).key for s in slices]
    assert keys[3] == slices[3].key  # that one is whole under its base key
    assert [i for i in range(9) if keys[i] != slices[i].key] == [7]


def test_keyed__faces_that_come_back_and_the_survey_was_killed(sources, at):
    slices = list(plan_slices(sources, 5, at))
    begun = survey(slices, sources, Removals(groups=frozenset(["g1"])))
    then = [keyed(s, Removals(), begun) for s in slices]
    assert [keyed(s, Removals(), killed(then, Removals(), begun)) for s in slices] == then
    assert [i for i in range(9) if then[i] != slices[i]] == [0, 1]


def test_keyed__never_surveyed_or_changed_keeps_the_base_key(sources, at):
    slices = list(plan_slices(sources, 5, at))
    removals = Removals(groups=frozenset(["g1"]))
    assert keyed(slices[0], removals, None) == slices[0]
    assert keyed(slices[0], removals, NOTHING) == slices[0]
    assert keyed(slices[0], removals, killed(slices, Removals(), NOTHING)) == slices[0]


def test_read_slice__from_s3(sources, at, tmp_path):
    with s3_bucket() as bucket:
        for file in [tmp_path / "a.parquet", *(tmp_path / "photos").iterdir()]:
            (bucket / str(file.relative_to(tmp_path))).write_bytes(file.read_bytes())
        remote = {
            "table": ParquetPool(path=f"{bucket}/a.parquet", group_column="who"),
            "photos": FolderPool(path=f"{bucket}/photos"),
        }
        theirs = [read_slice(s, remote) for s in plan_slices(remote, 5, bucket / "plan")]
    ours = [read_slice(s, sources) for s in plan_slices(sources, 5, at)]
    assert theirs == ours[: len(theirs)]


def test_read_slice__changed_shard(sources, at, tmp_path):
    slices = list(plan_slices(sources, 5, at))
    pq.write_table(pa.table({"image": [b"x"] * 20, "who": ["g"] * 20}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a.parquet: changed since it was planned"):
        read_slice(slices[0], sources)
    other = {**sources, "drawn": SyntheticPool(count=12, size=16, draw_seed=2)}
    with pytest.raises(SourceError, match="synthetic/seed1: changed since it was planned"):
        read_slice(slices[8], other)


def test_read_slice__unknown_source(sources, at):
    slices = list(plan_slices(sources, 5, at))
    with pytest.raises(SourceError, match=r"source 'drawn' is not in the recipe; found: table"):
        read_slice(slices[8], {"table": sources["table"]})


def test_plan_slices__rest_needs_a_labeled_set(at):
    with pytest.raises(SourceError, match="pool source 'left': kind 'rest' needs"):
        list(plan_slices({"left": RestPool()}, 5, at))
