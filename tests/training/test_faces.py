"""Proves that both kinds of store give the same faces, appear whole, and refuse other settings."""

import itertools
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.alignment import TEMPLATES
from pipeline.errors import SourceError
from pipeline.images import Align, Color, Crop, face
from pipeline.training.faces import (
    ArrayFaces,
    ChosenFaces,
    Faces,
    PackedFaces,
    Row,
    _unfinished,
    pack_faces,
)

CROP = Crop(box=True)


def rows(count: int = 5) -> list[Row]:
    rng = np.random.default_rng(0)
    made: list[Row] = []
    for i in range(count):
        file = BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file, "JPEG")
        made.append((file.getvalue(), (2.0, 4.0, 22.0 + i, 34.0), None))
    return made


def pack(
    at: Path,
    given: Iterable[Row],
    *,
    count: int = 5,
    color: Color = "rgb",
    memory: int | None = None,
) -> Faces:
    return pack_faces(given, count, crop=CROP, color=color, size=12, at=at, memory=memory)


def test_pack_faces__both_kinds_hold_what_images_face_gives(tmp_path: Path) -> None:
    array, packed = pack(tmp_path / "a", rows()), pack(tmp_path / "p", rows(), memory=100)
    assert isinstance(array, ArrayFaces)
    assert isinstance(packed, PackedFaces)
    index = np.array([4, 0, 0, 2])
    taken = array.take(index)
    assert taken.shape == (4, 3, 12, 12)
    assert np.array_equal(taken, packed.take(index))
    data, box, _ = rows()[4]
    assert np.array_equal(taken[0], face(data, crop=CROP, color="rgb", size=12, box=box))
    assert len(array) == len(packed) == 5


def test_packed_faces__a_face_without_box(tmp_path: Path) -> None:
    given = [(data, None, None) for data, _, _ in rows()]
    stores = [
        pack_faces(given, 5, crop=Crop(), color="gray", size=8, at=tmp_path / str(m), memory=m)
        for m in (0, 10_000)
    ]
    assert np.array_equal(stores[0].take(np.arange(5)), stores[1].take(np.arange(5)))


def test_pack_faces__aligned_by_its_landmarks(tmp_path: Path) -> None:
    points = (TEMPLATES["centered"] * 20 + [5, 12]).ravel().tolist()
    given = [(data, None, points if i else None) for i, (data, _, _) in enumerate(rows())]
    crop = Crop(fraction=0.5, align=Align(template="centered", missing="box"))
    given[0] = (given[0][0], (1.0, 2.0, 21.0, 22.0), None)
    stores = [
        pack_faces(given, 5, crop=crop, color="rgb", size=12, at=tmp_path / str(m), memory=m)
        for m in (0, 10_000)
    ]
    assert isinstance(stores[0], PackedFaces)
    taken = stores[0].take(np.arange(5))
    assert np.array_equal(taken, stores[1].take(np.arange(5)))
    upright = Image.open(BytesIO(given[2][0])).crop((5, 12, 25, 32))
    expected = np.asarray(upright.resize((12, 12), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.abs(taken[2].astype(int) - expected).mean() < 20  # unrelated noise: 50
    assert np.array_equal(
        taken[0], face(given[0][0], crop=Crop(box=True), color="rgb", size=12, box=given[0][1])
    )


@pytest.mark.parametrize("memory", [0, None])
def test_pack_faces__opens_what_is_there_without_reading_again(
    tmp_path: Path, memory: int | None
) -> None:
    def never() -> Iterator[Row]:
        raise AssertionError("the rows were read again")
        yield

    first = pack(tmp_path / "a", rows(), memory=memory)
    again = pack(tmp_path / "a", never(), memory=memory)
    assert np.array_equal(first.take(np.arange(5)), again.take(np.arange(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("memory", [0, None])
def test_pack_faces__two_at_once_read_the_rows_once(tmp_path: Path, memory: int | None) -> None:
    left = f"{_unfinished(tmp_path / 'a')}-0123abcd"  # by a packer that was killed
    (tmp_path / left).mkdir()
    read: list[int] = []
    both = threading.Barrier(2)

    def slowly(own: int) -> Iterator[Row]:
        read.append(own)
        for row in rows():
            time.sleep(0.02)
            yield row

    def packer(own: int) -> Faces:
        both.wait()
        return pack(tmp_path / "a", slowly(own), memory=memory)

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(packer, range(2))
    assert len(read) == 1
    assert np.array_equal(one.take(np.arange(5)), other.take(np.arange(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_pack_faces__keeps_no_list_of_a_large_pack(tmp_path: Path) -> None:
    row = (b"not read", (1.0, 2.0, 3.0, 4.0), None)
    tracemalloc.start()
    pack(tmp_path / "a", itertools.repeat(row, 20_000), count=20_000, memory=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000 * 100


def test_pack_faces__other_settings_are_refused(tmp_path: Path) -> None:
    pack(tmp_path / "a", rows())
    with pytest.raises(SourceError, match="packed with color rgb, expected gray"):
        pack(tmp_path / "a", rows(), color="gray")


@pytest.mark.parametrize("memory", [0, None])
@pytest.mark.parametrize("count", [4, 6])
def test_pack_faces__another_number_leaves_nothing(
    tmp_path: Path, memory: int | None, count: int
) -> None:
    with pytest.raises(SourceError, match=f"5 were given, expected {count}"):
        pack(tmp_path / "a", rows(), count=count, memory=memory)
    assert not list(tmp_path.iterdir())


def test_pack_faces__a_broken_face_is_named(tmp_path: Path) -> None:
    given = rows()
    given[3] = (b"no image", None, None)
    with pytest.raises(SourceError, match="training face 3: "):
        pack(tmp_path / "a", given)
    assert not list(tmp_path.iterdir())


def test_chosen__take_by_their_own_positions() -> None:
    store = ArrayFaces(np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1))
    some = ChosenFaces(store, np.array([5, 0, 9]))
    assert len(some) == 3
    assert some.take(np.array([2, 0])).ravel().tolist() == [9, 5]
