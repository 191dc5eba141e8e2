"""Proves that a face which kills or blocks its reader becomes a row; its neighbors stay good."""

from __future__ import annotations

import io
import os
import signal
import struct
import time
from pathlib import Path

import pyarrow as pa

from pipeline import synthetic
from pipeline.errors import RecordError
from pipeline.images import Crop
from pipeline.plan import Slice
from pipeline.schema import READ
from pipeline.screening import MOST_ATTEMPTS, answer, screen
from pipeline.storage import location
from pipeline.survey import Surveyor

FACE = synthetic.encode(synthetic.draw(0, [1])[0])
LOOK = f"{__name__}:deadly"
SLICE = Slice("s0000000", 0, "web", "/pool/a", 0, 6, "f", 6)


def deadly(data: bytes) -> None:
    """A reader that some bytes kill, block, or make print and complain."""
    if data == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"block":
        time.sleep(60)
    if data == b"bad":
        os.write(1, b"....")
        raise RecordError("unreadable")


def table(images: list[bytes | None], reasons: dict[int, str] | None = None) -> pa.Table:
    rows = range(len(images))
    columns = {
        "id": [f"web/a#{i}" for i in rows],
        "position": list(rows),
        "group": [None for _ in rows],
        "image": images,
        "box": [None for _ in rows],
        "landmarks": [None for _ in rows],
        "reason": [(reasons or {}).get(i) for i in rows],
        "detail": [None for _ in rows],
    }
    return pa.table(columns, schema=READ)


def test_screen__marks_who_kills_or_blocks_and_nobody_else(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[__name__.count(".")])
    given = table([FACE, b"kill", b"bad", b"block", None, b"kill", FACE], {5: "truncated"})
    found = screen(given, look=LOOK, seconds=5)
    wanted = [None, "crashed", None, "crashed", None, "truncated", None]
    assert found["reason"].to_pylist() == wanted
    ours = ["reason", "detail"]
    assert found.drop_columns(ours) == given.drop_columns(ours)
    said = "its decoder ended, or took more than 5 s"
    assert found["detail"].to_pylist() == [None, said, None, said, None, None, None]
    assert found.schema == READ


def test_screen__real_decoder_has_no_complaints() -> None:
    given = table([FACE, b"", FACE[:50], b"no image"])
    assert screen(given) == given


def test_answer__one_byte_per_face() -> None:
    seen: list[bytes] = []
    faces = io.BytesIO(b"".join(struct.pack("<Q", len(d)) + d for d in (b"", b"one", b"x" * 9)))
    answers = io.BytesIO()
    answer(seen.append, faces, answers)
    assert (seen, answers.getvalue()) == ([b"", b"one", b"x" * 9], b"...")


def test_surveyor__screens_only_what_was_tried_before(tmp_path: Path, monkeypatch) -> None:
    screened: list[pa.Table] = []
    monkeypatch.setattr("pipeline.survey.screen", lambda t: screened.append(t) or t)
    given = table([FACE] * 6)
    for attempt in range(1, MOST_ATTEMPTS + 2):
        surveyor = Surveyor(location(tmp_path), {"web": (Crop(), "gray")}, 1)
        surveyor(SLICE, given)
        assert len(screened) == (attempt > MOST_ATTEMPTS)
