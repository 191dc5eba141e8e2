"""Proves which labeled and mined faces training gets to see, and in which order."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import sealing
from pipeline.boxes import FALLBACK
from pipeline.errors import ConfigError, SourceError
from pipeline.images import Crop, face
from pipeline.labeled.synthetic import SyntheticSet
from pipeline.ledger import Ledger
from pipeline.models import ModelConfig
from pipeline.plan import Plan, Slice
from pipeline.schema import BOX, GUARD, LABELED, LANDMARKS, OK, QUARANTINED, with_label_names
from pipeline.storage import Location, location
from pipeline.survey import describe
from pipeline.tables import read_table, write_table
from pipeline.training.data import MinedFaces
from pipeline.training.faces import ArrayFaces
from pipeline.training.handed import (
    FACES_FILE,
    LABELED_FILE,
    Handed,
    JoinedFaces,
    labeled_rows,
    open_labeled,
    open_mined,
    share_of,
)

COUNT = 12
MODEL = ModelConfig(size=16)
BOX_FIELD = LABELED.field("box")


@pytest.fixture
def handed(tmp_path: Path) -> Handed:
    """Twelve faces: 0-7 train, 8-9 validation, 10-11 rest; face 1 is broken, face 2 a twin."""
    records = SyntheticSet(count=COUNT, test_count=0, rule="probability").records("set").table
    roles = ["train"] * 8 + ["validation"] * 2 + ["rest"] * 2
    images = records["image"].to_pylist()
    images[1] = b"no image"
    columns = {name: records[name] for name in LABELED.names if name != "role"}
    columns |= {
        "role": pa.array(roles),
        "image": pa.array(images, pa.large_binary()),
        "label": pa.array(["neutral", "happiness"] * 6),
        "soft": pa.nulls(COUNT, LABELED.field("soft").type),
    }
    names = with_label_names(LABELED, ("neutral", "happiness"))
    table = pa.table([columns[name] for name in LABELED.names], schema=names)
    read = table.select(["id", "group", "image", "box", "landmarks"])
    read = read.append_column("position", pa.array(range(COUNT), pa.int64()))
    read = read.append_column("reason", pa.nulls(COUNT, pa.string()))
    read = read.append_column("detail", pa.nulls(COUNT, pa.string()))
    faces = describe(read, Crop(), "gray", threads=1)
    assert faces["status"].to_pylist() == [OK, QUARANTINED] + [OK] * 10
    twins = [None if i != 2 else "test/0" for i in range(COUNT)]
    guard = pa.table({n: pa.nulls(COUNT, GUARD.field(n).type) for n in GUARD.names})
    guard = guard.set_column(guard.schema.get_field_index("twin_of"), "twin_of", pa.array(twins))
    at = location(tmp_path)
    write_table(at / "labeled" / LABELED_FILE, table)
    write_table(at / "labeled" / FACES_FILE, faces)
    write_table(at / "guard" / LABELED_FILE, guard)
    return Handed(
        labeled=(at / "labeled").uri,
        guard=(at / "guard").uri,
        crop=Crop(),
        color="gray",
        scratch=str(tmp_path / "cache"),
    )


def numbers(table: pa.Table) -> list[int]:
    return [int(face.rpartition("#")[2]) for face in table["id"].to_pylist()]


def test_labeled_rows__decodes_has_the_role_and_is_no_twin(handed: Handed) -> None:
    assert numbers(labeled_rows(handed, ("train",))) == [0, 3, 4, 5, 6, 7]
    assert numbers(labeled_rows(handed, ("validation", "rest"))) == [8, 9, 10, 11]
    unguarded = handed.model_copy(update={"guard": None})
    assert numbers(labeled_rows(unguarded, ("train",))) == [0, 2, 3, 4, 5, 6, 7]


def test_labeled_rows__removed_faces_leave(handed: Handed, tmp_path: Path) -> None:
    every = labeled_rows(handed, ("train",))
    listed = tmp_path / "removed.txt"
    listed.write_text(f"{every['id'][0].as_py()}\n{every['group'][1].as_py()}\n")
    left = labeled_rows(handed.model_copy(update={"removals": str(listed)}), ("train",))
    group = every["group"][1].as_py()
    expected = [i for i in range(1, len(every)) if every["group"][i].as_py() != group]
    assert numbers(left) == [numbers(every)[i] for i in expected]


def test_labeled_rows__nobody_left_is_an_error(handed: Handed) -> None:
    with pytest.raises(SourceError, match="no usable face has role test"):
        labeled_rows(handed, ("test",))


def test_open_labeled__faces_codes_and_groups_line_up(handed: Handed) -> None:
    data, rows = open_labeled(handed, MODEL)
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]  # 0 3 4 5 6 7 of neutral, happiness, ...
    assert data.groups == rows["group"].to_pylist()
    assert data.faces.take(np.arange(6)).shape == (6, 1, 16, 16)


def test_open_labeled__packs_of_before_a_forget_leave_the_node(
    handed: Handed, tmp_path: Path
) -> None:
    name, other = "omnifer-1000-0123456789abcdef", "omnifer-1000-0123456789abcdee"
    for folder in (name, f"{name}-00000001", other):
        (tmp_path / folder / "labeled-1").mkdir(parents=True)
    now = tmp_path / f"{name}-00000002"
    open_labeled(handed.model_copy(update={"scratch": str(now)}), MODEL)
    left = [at.name for at in tmp_path.iterdir() if "0123456789" in at.name]
    assert sorted(left) == sorted([now.name, other])


def test_open_labeled__one_face_without_a_person_parts_nobody(handed: Handed) -> None:
    at = location(handed.labeled) / LABELED_FILE
    table = read_table(at)
    column = table.schema.get_field_index("group")
    groups = table["group"].to_pylist()

    def groups_with(given: list[str | None]) -> list[str] | None:
        write_table(at, table.set_column(column, "group", pa.array(given, pa.string())))
        found = open_labeled(handed, MODEL)[0].groups
        return None if found is None else list(found)

    ids = labeled_rows(handed, ("train",))["id"].to_pylist()
    known = groups_with(groups)
    assert known is not None
    assert groups_with([*groups[:3], None, *groups[4:]]) == [known[0], ids[1], *known[2:]]
    assert groups_with([None] * len(groups)) is None


def test_open_labeled__boxes_follow_the_crop_if_asked(handed: Handed) -> None:
    at = location(handed.labeled)
    table, faces = read_table(at / LABELED_FILE), read_table(at / FACES_FILE)
    side = faces["width"][0].as_py()
    boxes = [None if i == 4 else [i, i, side / 2, side / 2] for i in range(COUNT)]
    column = table.schema.get_field_index("box")
    write_table(at / LABELED_FILE, table.set_column(column, BOX_FIELD, pa.array(boxes, BOX)))
    handed = handed.model_copy(update={"crop": Crop(fraction=0.5)})
    assert open_labeled(handed, MODEL)[0].boxes is None
    found = open_labeled(handed, MODEL, boxes=True)[0].boxes
    start = [(i - side / 4) / (side / 2) for i in (0, 3, 4, 5, 6, 7)]
    expected = np.array([[s, s, 0.5, 0.5] for s in start])
    expected[2] = FALLBACK
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def annotated(handed: Handed, tmp_path: Path) -> Handed:
    """The same with three faces that people labeled: of film, web and film."""
    table = read_table(location(handed.labeled) / LABELED_FILE)
    rows = table.take([0, 3, 4]).set_column(0, table.schema.field("id"), pa.array(list("abc")))
    rows = rows.append_column("source", pa.array(["film", "web", "film"]))
    known = rows.schema.get_field_index("group")
    rows = rows.set_column(known, "group", pa.array([None, "g", None], pa.string()))
    faces = read_table(location(handed.labeled) / FACES_FILE).take([0, 3, 4])
    faces = faces.set_column(0, faces.schema.field("id"), pa.array(list("abc")))
    at = location(tmp_path) / "annotated"
    write_table(at / LABELED_FILE, rows)
    write_table(at / FACES_FILE, faces)
    views = {"web": (Crop(fraction=0.5), "gray"), "film": (Crop(), "gray")}
    return handed.model_copy(update={"annotated": at.uri, "views": views})


def test_labeled_rows__annotated_faces_come_last_by_source(annotated: Handed) -> None:
    rows = labeled_rows(annotated, ("train",))
    assert rows["id"].to_pylist()[-3:] == ["b", "a", "c"]
    assert rows["source"].to_pylist() == [None] * 6 + ["web", "film", "film"]
    assert labeled_rows(annotated, ("validation", "rest")).num_rows == 4
    assert rows.schema.metadata == labeled_rows(annotated, ("rest",)).schema.metadata


def test_labeled_rows__removed_annotated_faces_leave(annotated: Handed, tmp_path: Path) -> None:
    listed = tmp_path / "removed.txt"
    listed.write_text("a\n")
    rows = labeled_rows(annotated.model_copy(update={"removals": str(listed)}), ("train",))
    assert rows["id"].to_pylist()[-2:] == ["b", "c"]


def test_open_labeled__annotated_faces_are_cropped_as_their_source(annotated: Handed) -> None:
    data, rows = open_labeled(annotated, MODEL, boxes=True)
    pixels = data.faces.take(np.arange(9))
    # Face b is face 3 seen more closely; a and c are faces 0 and 4 as they were.
    np.testing.assert_array_equal(pixels[7], pixels[0])
    np.testing.assert_array_equal(pixels[8], pixels[2])
    images = rows["image"].to_pylist()
    closer = face(images[6], crop=Crop(fraction=0.5), color="gray", size=16)
    np.testing.assert_array_equal(pixels[6], closer)
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 0]
    assert data.boxes is not None
    assert data.boxes.shape == (9, 4)
    groups = rows["group"].to_pylist()
    assert data.groups == [*groups[:6], "g", "a", "c"]  # a face of no group is one by itself


def test_open_labeled__other_bytes_under_the_same_ids_are_packed_anew(handed: Handed) -> None:
    index, at = np.arange(6), location(handed.labeled) / LABELED_FILE
    before = open_labeled(handed, MODEL)[0].faces.take(index)
    table = read_table(at)
    images = table["image"].to_pylist()
    images[3], images[4] = images[4], images[3]
    place = table.schema.get_field_index("image")
    column = pa.array(images, pa.large_binary())
    write_table(at, table.set_column(place, table.schema.field("image"), column))
    np.testing.assert_array_equal(
        open_labeled(handed, MODEL)[0].faces.take(index), before[[0, 2, 1, 3, 4, 5]]
    )


def test_open_labeled__another_view_is_packed_beside_the_first(
    handed: Handed, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, (data, rows) = np.arange(6), open_labeled(handed, MODEL)
    closer = handed.model_copy(update={"crop": Crop(fraction=0.5)})
    found = open_labeled(closer, MODEL)[0].faces.take(index)
    image = rows["image"][5].as_py()
    np.testing.assert_array_equal(
        found[5], face(image, crop=Crop(fraction=0.5), color="gray", size=16)
    )
    in_color = MODEL.model_copy(update={"color": "rgb"})
    gray = open_labeled(handed, in_color)[0].faces.take(index)
    colored = open_labeled(handed.model_copy(update={"color": "rgb"}), in_color)[0]
    np.testing.assert_array_equal(gray, np.repeat(data.faces.take(index), 3, axis=1))
    assert len(open_labeled(handed, in_color)[0].faces) == 6
    assert colored.faces.take(index).shape[1] == 3
    for module in ("faces", "handed"):
        monkeypatch.setattr(f"pipeline.training.{module}.DECODER", "another")
    again = open_labeled(handed, MODEL)[0].faces.take(index)
    np.testing.assert_array_equal(again, data.faces.take(index))


def test_joined_faces__as_one_array() -> None:
    pixels = np.arange(7 * 4, dtype=np.uint8).reshape(7, 1, 2, 2)
    joined = JoinedFaces([ArrayFaces(pixels[:2]), ArrayFaces(pixels[2:3]), ArrayFaces(pixels[3:])])
    index = np.array([6, 0, 2, 2, 3, 1])
    assert len(joined) == 7
    np.testing.assert_array_equal(joined.take(index), pixels[index])
    assert joined.take(np.array([], np.int64)).shape == (0, 1, 2, 2)


def mined_in(at: Location, images: list[bytes], cache: Path) -> Handed:
    """Six mined faces in three slices: of web, film and web."""
    sources = ["web", "film", "web"]
    slices = [
        Slice(f"s{i:07d}", 0, source, "memory", 2 * i, 2 * i + 2, "f", 2)
        for i, source in enumerate(sources)
    ]
    plan, ledger = Plan.write(at / "plan.parquet", slices), Ledger(at / "mine")
    hashes = [hashlib.sha256(image).digest() for image in images]
    for i, slice in enumerate(slices):
        ledger.commit(slice, pa.table({
            "id": [f"{slice.source}/{n}" for n in (2 * i, 2 * i + 1)],
            "soft": pa.array([[n / 10, 1 - n / 10] for n in (2 * i, 2 * i + 1)],
                             pa.list_(pa.float32(), 2)),
            "weight": pa.array([float(2 * i), float(2 * i + 1)], pa.float32()),
            "source": [slice.source] * 2,
            "image": pa.array(images[2 * i : 2 * i + 2], pa.large_binary()),
            "sha256": pa.array(hashes[2 * i : 2 * i + 2], pa.binary(32)),
            "box": pa.nulls(2, BOX),
            "landmarks": pa.nulls(2, LANDMARKS),
        }))  # fmt: skip
    sealing.seal(ledger, plan)
    return Handed(
        labeled=at.uri, guard=None, crop=Crop(), color="gray", scratch=str(cache),
        mined=(at / "mine").uri, plan=plan.at.uri,
        views={"film": (Crop(), "gray"), "web": (Crop(), "gray")},
    )  # fmt: skip


def test_open_mined__rows_of_two_sources_stay_together(tmp_path: Path) -> None:
    images = SyntheticSet(count=6, test_count=0).records("x").table["image"].to_pylist()
    handed = mined_in(location(tmp_path), images, tmp_path / "cache")
    mined = open_mined(handed, MODEL)
    assert mined.weight.tolist() == [2, 3, 0, 1, 4, 5]  # film's faces first, as in `views`
    assert mined.source == ["film"] * 2 + ["web"] * 4
    np.testing.assert_allclose(mined.soft[:, 0], mined.weight / 10, atol=1e-6)
    alone = open_mined(handed, MODEL).faces.take(np.arange(6))
    assert len({face.tobytes() for face in alone}) == 6
    turned = mined_in(location(tmp_path) / "turned", images[::-1], tmp_path / "cache")
    other = open_mined(turned, MODEL).faces.take(np.arange(6))  # the same ids and cache
    np.testing.assert_array_equal(other[[1, 0, 5, 4, 3, 2]], alone)


def test_open_labeled__votes_become_targets_in_the_order_of_the_rows(handed: Handed) -> None:
    at = location(handed.labeled) / LABELED_FILE
    table = read_table(at)
    shares = [[i / 20, 1 - i / 20] for i in range(COUNT)]
    place = table.schema.get_field_index("soft")
    soft = pa.array(shares, LABELED.field("soft").type)
    write_table(at, table.set_column(place, LABELED.field("soft"), soft))
    data, rows = open_labeled(handed, MODEL, votes=True)
    numbers = [int(name.rpartition("#")[2]) for name in rows["id"].to_pylist()]
    assert numbers == [0, 3, 4, 5, 6, 7]  # 1 is broken, 2 a twin
    assert data.soft is not None
    np.testing.assert_allclose(data.soft, [shares[i] for i in numbers], rtol=1e-6)
    assert open_labeled(handed, MODEL)[0].soft is None


def test_open_labeled__what_a_person_answered_is_one_vote(annotated: Handed) -> None:
    at = location(annotated.labeled) / LABELED_FILE
    table = read_table(at)
    place = table.schema.get_field_index("soft")
    soft = pa.array([[0.25, 0.75]] * COUNT, LABELED.field("soft").type)
    write_table(at, table.set_column(place, LABELED.field("soft"), soft))
    data, _ = open_labeled(annotated, MODEL, votes=True)
    assert data.soft is not None
    assert data.soft[:6].tolist() == [[0.25, 0.75]] * 6
    assert data.soft[6:].tolist() == [[0, 1], [1, 0], [1, 0]]


def test_open_labeled__faces_without_votes_are_counted(handed: Handed) -> None:
    with pytest.raises(ConfigError, match="6 of 6 faces have no votes"):
        open_labeled(handed, MODEL, votes=True)


def test_share_of__is_a_part_that_grows_and_hangs_on_no_order() -> None:
    count = 200
    images = np.arange(count, dtype=np.uint8)[:, None, None, None]
    soft, weight = np.eye(count, dtype=np.float32), np.linspace(0.1, 1, count)
    ids = [f"p/a#{row}" for row in range(count)]
    source = ["p" if row % 2 else "q" for row in range(count)]
    mined = MinedFaces(ArrayFaces(images), soft, weight, source, ids)
    found = {share: share_of(mined, share) for share in (0.001, 0.1, 0.5, 1.0)}
    assert [len(one) for one in found.values()] == [1, 20, 100, 200]
    for one, larger in itertools.pairwise(found.values()):
        assert set(one.ids) < set(larger.ids)
    part = found[0.1]
    rows = [ids.index(face) for face in part.ids]
    assert rows == sorted(rows)
    assert part.faces.take(np.array([3, 0, 19]))[:, 0, 0, 0].tolist() == [
        rows[3], rows[0], rows[19]
    ]  # fmt: skip
    assert (part.soft.argmax(1) == rows).all()
    assert (part.weight == weight[rows]).all()
    assert list(part.source) == [source[row] for row in rows]
    back = np.arange(count)[::-1]
    turned = MinedFaces(ArrayFaces(images[back]), soft[back], weight[back], source[::-1], ids[::-1])
    assert set(share_of(turned, 0.1).ids) == set(part.ids)
