"""Bytes of gzip files, which can be read from their start alone: forward, on from slice to slice.

A reader that has read one slice stands where the next begins. It is kept, so a process that reads
the slices of a file one after the other inflates it once; whoever wants bytes before those that a
kept reader has passed begins at the start again.

Cost: what lies before a slice is inflated and thrown away, 100 to 400 MB/s of one core; a kept
reader holds a piece of 128 KiB, deflate's window, and on S3 a block of 5 MB.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.storage import Location

PACKED = (".tar.gz", ".tgz")
PIECE = 128 << 10  # bytes that are inflated at a time
MOST_KEPT = 4  # readers of a process that wait for their next slice
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)

_kept: list[Unpacked] = []  # the one used last at the end
_keeping = threading.Lock()


def is_packed(uri: str) -> bool:
    """Whether a file can be read from its start alone."""
    return uri.lower().endswith(PACKED)


class Unpacked:
    """An open gzip file, inflated from its start in always the same pieces.

    Where a file is damaged, what came before within the piece is lost with it: with the same pieces
    every reader loses the same bytes, however far it had read before.

    Attributes:
        start: of the piece at hand; nothing before it can be had.
    """

    def __init__(self, at: Location, mark: str = "") -> None:
        """Open `at`; `mark` tells the file from what may replace it."""
        self.made_of = (at.uri, mark)
        self.start = 0
        self._file = at.open()
        self._unpacked = gzip.GzipFile(fileobj=self._file)
        self._piece = b""
        self._ended = False

    def read(self, size: int = PIECE) -> bytes:
        """The next piece, empty at the end; raises one of BROKEN where the file breaks off."""
        del size  # tarfile asks for PIECE at a time
        return self._unpacked.read1(PIECE)

    def range(self, start: int, stop: int) -> bytes:
        """Unpacked bytes [start, stop), fewer where the file ends or breaks off before.

        Args:
            start: not before `self.start`.
            stop: the end, not included.
        """
        assert start >= self.start, "these bytes have passed"
        found = [self._part(start, stop)]
        while self._end < stop and self._advance():
            found.append(self._part(start, stop))
        return b"".join(found)

    @property
    def _end(self) -> int:
        return self.start + len(self._piece)

    def _part(self, start: int, stop: int) -> bytes:
        """What the piece at hand has of a range."""
        return self._piece[max(start - self.start, 0) : max(stop - self.start, 0)]

    def _advance(self) -> bool:
        """Take the next piece in hand, if there is one."""
        if not self._ended:
            try:
                following = self.read()
            except BROKEN:
                following = b""
            self._ended = not following
            if following:
                self.start, self._piece = self._end, following
        return not self._ended

    def close(self) -> None:
        """Close the file."""
        self._unpacked.close()
        self._file.close()


@contextmanager
def unpacked(at: Location, mark: str, start: int) -> Iterator[Unpacked]:
    """A reader of a file for bytes from `start` on: the kept one that is nearest before it, or new.

    Args:
        at: a gzip file.
        mark: its fingerprint.
        start: first byte that will be asked for.
    """
    with _keeping:
        fit = [one for one in _kept if one.made_of == (at.uri, mark) and one.start <= start]
        nearest = max(fit, key=lambda one: one.start, default=None)
        if nearest is not None:
            _kept.remove(nearest)
    reader = nearest or Unpacked(at, mark)
    try:
        yield reader
    except BaseException:
        reader.close()
        raise
    with _keeping:
        _kept.append(reader)
        surplus = _kept.pop(0) if len(_kept) > MOST_KEPT else None
    if surplus is not None:
        surplus.close()
