"""Faces that kill the process that decodes them: found one at a time in a child process.

Ray repeats the slice of a killed worker for ever, so a picture that crashes a decoder, or fills the
memory, would hold up a pass without end. Whoever starts on a slice notes the attempt first
(`Ledger.attempt`); who finds `MOST_ATTEMPTS` of them noted does not decode the slice in its own
process before a child has looked at each face alone. A face that ends the child, or keeps it busy
for `SECONDS`, becomes a row with the reason `crashed`.

Cost: one small exclusive file per slice and attempt; for a screened slice one child (0.3 s to
start) per face that kills it, and every face decoded twice. No pickle: lengths and bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import IO

import pyarrow as pa

from pipeline.errors import RecordError
from pipeline.schema import READ

MOST_ATTEMPTS = 3
SECONDS = 60.0
"""Longest time for one face, the child's start included."""
DECODE = "pipeline.images:decode"
_REASON, _DETAIL = map(READ.get_field_index, ("reason", "detail"))


def screen(table: pa.Table, *, look: str = DECODE, seconds: float = SECONDS) -> pa.Table:
    """A READ table in which every face that kills its reader has the reason `crashed`.

    Args:
        table: schema READ.
        look: "module:function" that is called with the encoded bytes; a RecordError is no crash.
        seconds: longest time for one face.
    """
    reasons, details = table["reason"].to_pylist(), table["detail"].to_pylist()
    child: _Child | None = None
    try:
        for row, image in enumerate(table["image"]):
            data = image.as_py()
            if reasons[row] is not None or data is None:
                continue
            child = child or _Child(look)
            if not child.survives(data, seconds):
                reasons[row] = "crashed"
                details[row] = f"its decoder ended, or took more than {seconds:g} s"
                child.end()
                child = None
    finally:
        if child is not None:
            child.end()
    table = table.set_column(_REASON, READ.field("reason"), pa.array(reasons, pa.string()))
    return table.set_column(_DETAIL, READ.field("detail"), pa.array(details, pa.string()))


class _Child:
    """A process that looks at one face after the other and answers each with one byte."""

    def __init__(self, look: str) -> None:
        code = f"from pipeline.screening import serve; serve({look!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def survives(self, data: bytes, seconds: float) -> bool:
        """Whether the child answers after it has looked at `data`."""
        sink, source = self._process.stdin, self._process.stdout
        assert sink is not None
        assert source is not None
        try:
            sink.write(struct.pack("<Q", len(data)) + data)
            sink.flush()
        except BrokenPipeError:
            return False
        ready, _, _ = select.select([source], [], [], seconds)
        return bool(ready and source.read(1))

    def end(self) -> None:
        """Kill it; it holds nothing that could be lost."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass


def serve(look: str) -> None:
    """The child: reads length and bytes from stdin, looks, answers, until stdin ends."""
    module, _, name = look.partition(":")
    function = getattr(importlib.import_module(module), name)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not answer
    answer(function, sys.stdin.buffer, answers)


def answer(look: Callable[[bytes], object], faces: IO[bytes], answers: IO[bytes]) -> None:
    """Look at every face of a stream of lengths and bytes; one byte after each."""
    while header := faces.read(8):
        (length,) = struct.unpack("<Q", header)
        with contextlib.suppress(RecordError):
            look(faces.read(length))
        answers.write(b".")
        answers.flush()
