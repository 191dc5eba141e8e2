"""The removal list: faces that no reader may yield.

A file of ids, of sha256 (hex, of the encoded bytes) or of groups: CSV or Parquet with any of the
columns id, sha256, group, or plain text with one of these per line. Bytes are hashed only where
the list holds a sha256: 1,024 faces of 10 KB take about 10 ms.

What a run has forgotten it must keep out and may not name: its own list holds digests of ids,
hashes and groups (:func:`blind`), which tell a face that comes back and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.types as pt

from pipeline import config
from pipeline.errors import SourceError
from pipeline.storage import Location
from pipeline.tables import read_table

COLUMNS = ("id", "sha256", "group")
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Removals:
    """Faces to leave out; a face is hit by its id, its bytes or its group."""

    ids: frozenset[str] = frozenset()
    sha256: frozenset[bytes] = frozenset()
    groups: frozenset[str] = frozenset()
    blinded: frozenset[bytes] = frozenset()  # of any of the three, see blind

    def __bool__(self) -> bool:
        return bool(self.ids or self.sha256 or self.groups or self.blinded)

    @staticmethod
    def load(at: Location | None) -> Removals:
        """Read a removal list; an empty one for None.

        Raises:
            SourceError: no such file, none of the columns, or a sha256 that is none.
        """
        if at is None:
            return Removals()
        suffix = at.name.lower().rpartition(".")[2]
        if suffix not in ("csv", "parquet"):
            return _from_text(at.read_text())
        table = _read_csv(at) if suffix == "csv" else read_table(at)
        there = [name for name in COLUMNS if name in table.column_names]
        if not there:
            found = ", ".join(table.column_names) or "none"
            raise SourceError(f"{at}: expected a column {', '.join(COLUMNS)}; found: {found}")
        values = {name: _values(table[name]) for name in there}
        for row, value in enumerate(values.get("sha256", [])):
            if value and not _HASH.fullmatch(value):
                raise SourceError(f"{at} row {row}: sha256 {value[:20]!r}; expected 64 hex digits")
        return Removals(
            ids=frozenset(filter(None, values.get("id", []))),
            sha256=frozenset(bytes.fromhex(value) for value in values.get("sha256", []) if value),
            groups=frozenset(filter(None, values.get("group", []))),
        )

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of the list; the order of lines does not count."""
        hashes = sorted(value.hex() for value in self.sha256)
        said = [sorted(self.ids), hashes, sorted(self.groups)]
        blinded = [sorted(value.hex() for value in self.blinded)] if self.blinded else []
        return config.digest([*said, *blinded])

    @functools.cached_property
    def all_blinded(self) -> frozenset[bytes]:
        """Every entry as :func:`blind` has it."""
        plain = [("id", value.encode()) for value in self.ids]
        plain += [("group", value.encode()) for value in self.groups]
        plain += [("sha256", value) for value in self.sha256]
        return self.blinded | {blind(kind, value) for kind, value in plain}

    def covers(self, earlier: Removals) -> bool:
        """Whether every entry of an earlier list is in this one."""
        return self.all_blinded >= earlier.all_blinded

    def also(self, blinded: Iterable[bytes]) -> Removals:
        """This list and what a run has forgotten."""
        return replace(self, blinded=self.blinded | frozenset(blinded))

    def hits(self, table: pa.Table) -> np.ndarray:
        """Mask (N,) bool of the faces to leave out.

        Args:
            table: columns id and group, and sha256 (32 bytes each) or image (encoded bytes).
        """
        mask = np.zeros(len(table), dtype=bool)
        for name, known in (("id", self.ids), ("group", self.groups)):
            if known:
                mask |= _among(table[name].to_pylist(), known)
        hashes = _hashes(table) if self.sha256 or self.blinded else []
        if self.sha256:
            mask |= _among(hashes, self.sha256)
        if self.blinded:
            for name in ("id", "group"):
                mask |= _among(_blind(name, table[name].to_pylist()), self.blinded)
            mask |= _among(_blind("sha256", hashes), self.blinded)
        return mask


def blind(kind: str, value: bytes) -> bytes:
    """What a run keeps of a forgotten id, sha256 or group; it tells only who has that already."""
    return hashlib.sha256(b"omnifer forgotten " + kind.encode() + b" " + value).digest()


def _blind(kind: str, values: Iterable[str | bytes | None]) -> list[bytes | None]:
    raw = (value.encode() if isinstance(value, str) else value for value in values)
    return [None if value is None else blind(kind, value) for value in raw]


def _from_text(text: str) -> Removals:
    """64 hex digits are a sha256; any other line is an id or a group, whichever it equals."""
    lines = {line.strip() for line in text.splitlines()} - {""}
    hashes = {line for line in lines if _HASH.fullmatch(line)}
    names = frozenset(lines - hashes)
    return Removals(names, frozenset(bytes.fromhex(line) for line in hashes), names)


def _read_csv(at: Location) -> pa.Table:
    text = pcsv.ConvertOptions(column_types={name: pa.string() for name in COLUMNS})
    try:
        with at.open() as file:
            return pcsv.read_csv(file, convert_options=text)
    except pa.ArrowInvalid as err:
        raise SourceError(f"{at}: expected CSV: {str(err).splitlines()[0]}") from err


def _values(column: pa.ChunkedArray) -> list[str | None]:
    if pt.is_fixed_size_binary(column.type) or pt.is_binary(column.type):
        return [None if value is None else value.hex() for value in column.to_pylist()]
    return [None if value is None else str(value) for value in column.to_pylist()]


def _among(values: Iterable[str | bytes | None], known: Container[str | bytes]) -> np.ndarray:
    return np.array([value in known for value in values], dtype=bool)


def _hashes(table: pa.Table) -> list[bytes | None]:
    if "sha256" in table.column_names:
        return list(table["sha256"].to_pylist())
    images = (image.as_buffer() for image in table["image"])
    return [None if image is None else hashlib.sha256(image).digest() for image in images]
