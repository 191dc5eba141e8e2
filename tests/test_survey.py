"""Proves that survey keeps one row per record in order, whatever the bytes, and commits it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import images, synthetic
from pipeline.alignment import TEMPLATES
from pipeline.images import Align, Crop
from pipeline.ledger import Ledger, Plan, Slice
from pipeline.schema import FACES, LANDMARKS, READ
from pipeline.storage import location
from pipeline.survey import Surveyor, describe


def read_table(encoded: list[bytes | None], reasons: dict[int, str] | None = None) -> pa.Table:
    count = len(encoded)
    return pa.table(
        {
            "id": [f"pool/a#{i}" for i in range(count)],
            "position": list(range(count)),
            "group": [f"g{i % 2}" for i in range(count)],
            "image": encoded,
            "box": [None] * count,
            "landmarks": [None] * count,
            "reason": [(reasons or {}).get(i) for i in range(count)],
            "detail": ["said" if i in (reasons or {}) else None for i in range(count)],
        },
        schema=READ,
    )


def mixed() -> pa.Table:
    face = synthetic.encode(synthetic.draw(0, [1])[0])
    blank = synthetic.encode(np.full((48, 48), 130, np.uint8))
    return read_table([face, blank, b"", face[:60], b"not an image", None, face], {6: "unreadable"})


def test_describe__one_row_per_record_with_its_reason() -> None:
    faces = describe(mixed(), Crop(), "gray", threads=2)
    assert faces.schema == FACES
    faces.validate(full=True)
    assert faces["id"].to_pylist() == [f"pool/a#{i}" for i in range(7)]
    assert faces["group"].to_pylist()[:2] == ["g0", "g1"]
    expected = [None, "blank", "empty", "truncated", "not_an_image", "unreadable", "unreadable"]
    assert faces["reason"].to_pylist() == expected
    assert faces["status"].to_pylist() == ["ok"] + ["quarantined"] * 6
    assert faces["thumbnail"].is_valid().to_pylist() == [True, True] + [False] * 5
    assert faces["sha256"].is_valid().to_pylist() == [True] * 5 + [False, True]
    heads = faces["head"].to_pylist()
    assert heads[:1] + heads[2:6] == [
        None,
        b"",
        mixed()["image"][3].as_py()[:32],
        b"not an image",
        None,
    ]
    details = faces["detail"].to_pylist()
    assert details[:2] == [None, None]
    assert details[2] == "0 bytes"
    assert details[6] == "said"


def test_describe__columns_are_those_of_the_cropped_face() -> None:
    pixels = synthetic.draw(0, [3], 80)[0]
    data = synthetic.encode(pixels)
    row = describe(read_table([data]), Crop(fraction=0.5), "gray", threads=1).to_pylist()[0]
    crop = pixels[20:60, 20:60]
    assert row["sha256"] == hashlib.sha256(data).digest()
    assert row["pixel_sha256"] == images.pixel_digest(pixels)
    assert (row["width"], row["height"]) == (80, 80)
    assert row["thumbnail"] == images.thumbnail(crop).tobytes()
    assert (row["phash"] ^ images.phash(crop)).bit_count() <= 2
    assert (row["phash_flip"] ^ images.phash(crop[:, ::-1])).bit_count() <= 2
    assert row["brightness"] == np.float32(crop.mean())
    assert abs(row["contrast"] - crop.std()) < 1e-3
    assert row["sharpness"] > 0


def test_describe__aligned_faces_are_hashed_as_the_template_shows_them() -> None:
    table = mixed()
    data = next(d for d in table["image"].to_pylist() if d is not None)
    pixels = images.decode(data)
    side = min(pixels.shape[:2])
    points = (TEMPLATES["centered"] * side).ravel().tolist()
    given = read_table([data, data, data])
    column = pa.array([points, None, [1.0] * 10], LANDMARKS)
    given = given.set_column(given.schema.get_field_index("landmarks"), "landmarks", column)
    crop = Crop(align=Align(template="centered"))
    faces = describe(given, crop, "gray", threads=2)
    assert faces["reason"].to_pylist() == [None, "no_landmarks", "bad_landmarks"]
    upright = images.to_gray(pixels)[:side, :side]
    found = np.frombuffer(faces["thumbnail"][0].as_py(), np.uint8).reshape(16, 16)
    assert np.abs(found.astype(int) - images.thumbnail(upright)).mean() < 3
    assert faces["width"][0].as_py() == pixels.shape[1]


def test_describe__gray_sources_compare_the_luma() -> None:
    color = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    buffers = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(color).save(buffers[0], "PNG")
    Image.fromarray(images.to_gray(color)).save(buffers[1], "PNG")
    table = read_table([b.getvalue() for b in buffers])
    alike = {
        mode: len(set(describe(table, Crop(), mode, threads=1)["pixel_sha256"].to_pylist())) == 1
        for mode in ("gray", "rgb")
    }
    assert alike == {"gray": True, "rgb": False}


def test_describe__does_not_depend_on_threads_or_company() -> None:
    table = mixed()
    whole = describe(table, Crop(), "gray", threads=3)
    alone = [describe(table.slice(i, 1), Crop(), "gray", threads=1) for i in range(len(table))]
    assert pa.concat_tables(alone).equals(whole)
    assert describe(table.slice(0, 0), Crop(), "gray", threads=1).equals(whole.slice(0, 0))


def test_surveyor__commits_the_slice_and_returns_counts(tmp_path: Path) -> None:
    at = location(tmp_path / "faces")
    piece = Slice("s0000000", 0, "web", "/pool/a", 0, 7, "f", 7)
    plan = Plan.write(location(tmp_path / "plan.parquet"), [piece])
    surveyor = Surveyor(at, {"web": (Crop(), "gray")}, 2)
    assert surveyor(piece, mixed()).to_pylist() == [{"rows": 7, "quarantined": 6}]
    ledger = Ledger(at)
    assert list(ledger.pending(plan)) == []
    assert ledger.read("s0000000").equals(describe(mixed(), Crop(), "gray", threads=1))
