"""guard: twins of test and validation faces, and duplicates inside the pool.

Pure functions on FACES tables. A twin has the same pixels, or a near perceptual hash and then a
thumbnail that correlates; hashes and thumbnails are compared mirrored and moved by a few pixels
too. Embeddings of expressions only propose candidates, since all happy faces lie close together.

Cost: a reference face is 18 hashes (9 moves, mirrored or not), scanned at 3e8 pairs per second and
core, then about two thumbnail comparisons (17,000 per second) per face: 3,600 test faces against a
million pool faces would take four minutes of one core (extrapolated). Nothing of size
pool x reference is ever held.
Duplicates keep 60 bytes per pool face in memory and 256 in a file, and two per number of an
embedding where embeddings propose them.

The cuts were set on altered copies of FER2013 PublicTest faces (JPEG 30-95, 0.5-2x, mirrored, moved
by 2 pixels), 5 draws of 200: all are found. Of 13,233 LFW faces none is taken for a twin (the
nearest correlates 0.979), and of 66 duplicates looked at one by one none was wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.config import Config
from pipeline.copies import components, near_pairs
from pipeline.images import THUMBNAIL
from pipeline.likeness import (
    FAR,
    MOVES,
    NEAR,
    QUERIES,
    close_pairs,
    hamming_pairs,
    likeness,
    likeness_at,
    probes,
)
from pipeline.ranking import stable_hash
from pipeline.schema import GUARD, OK

Thumbnails = Callable[[np.ndarray], np.ndarray]
"""Thumbnails (P, 256) uint8 of P rows."""

ROLES = ("test", "validation")  # who is twin of both is a twin of test
SLACK = 0.06  # what the move next to the right one may lack of the cut


class GuardConfig(Config):
    """Cuts of the guard. There is no way to switch it off."""

    radius: int = Field(default=12, ge=8, le=20)  # differing bits of 64
    likeness: float = Field(default=0.98, ge=0.9, le=0.995)  # correlation of thumbnails
    neighbors: int = Field(default=3, ge=1, le=50)  # reference embeddings that are looked at
    copies: float | None = Field(default=None, ge=0.5, le=1)
    """Cosine from which the teacher's embeddings propose two pool faces as duplicates, which
    thumbnails have to confirm as ever: copies that moved too far for a hash. None: hashes only."""


@dataclass(frozen=True)
class Reference:
    """Faces that nothing may learn from; rows are sorted by role, then id."""

    ids: tuple[str, ...]
    role: np.ndarray  # (R,) int, index into ROLES
    pixels: Mapping[bytes, int]  # pixel_sha256 -> first row that has it
    thumbnails: np.ndarray  # (R, 256) uint8
    probes: np.ndarray  # (18 R,) uint64: hashes of every move, then of every mirrored move


@dataclass(frozen=True)
class _Hits:
    """Candidate pairs that were verified; kind is an index into KINDS."""

    face: np.ndarray
    row: np.ndarray
    kind: np.ndarray
    likeness: np.ndarray


KINDS = ("pixels", "phash", "flip", "embedding")


def reference(tables: Mapping[str, pa.Table]) -> Reference:
    """Reference of FACES tables by role (test, validation); faces that did not decode are left out.

    Raises:
        KeyError: no table of role test.
    """
    parts = []
    for code, role in enumerate(ROLES):
        if role == "test" or role in tables:
            good = _good(tables[role]).sort_by("id")
            parts.append(good.append_column("role", pa.array([code] * len(good), pa.int8())))
    table = pa.concat_tables(parts)
    pixels: dict[bytes, int] = {}
    for row, digest in enumerate(table["pixel_sha256"].to_pylist()):
        pixels.setdefault(digest, row)
    thumbnails = _thumbnails(table)
    return Reference(
        ids=tuple(table["id"].to_pylist()),
        role=table["role"].to_numpy().astype(np.int64),
        pixels=pixels,
        thumbnails=thumbnails,
        probes=probes(thumbnails),
    )


def find_twins(known: Reference, faces: pa.Table, config: GuardConfig) -> pa.Table:
    """GUARD rows of a FACES table by pixels and perceptual hash; duplicate_group is null.

    A face with several twins names the nearest; a test face goes before a validation face.
    """
    good = _good_rows(faces)
    digests = faces["pixel_sha256"].to_pylist()
    same = [(face, known.pixels[digests[face]]) for face in good if digests[face] in known.pixels]
    exact = np.array(same, np.int64).reshape(-1, 2)
    by_pixels = _Hits(
        exact[:, 0], exact[:, 1], np.zeros(len(exact), np.int64), np.full(len(exact), 2.0)
    )
    return _guarded(known, faces, [by_pixels, _by_hash(known, faces, good, config)])


def find_twins_by_embedding(
    known: Reference, faces: pa.Table, neighbors: np.ndarray, config: GuardConfig
) -> pa.Table:
    """GUARD rows of a FACES table from proposed pairs, verified on thumbnails moved up to 4 pixels.

    Args:
        known: the reference, R rows.
        faces: FACES, N rows.
        neighbors: (N, k) int, rows of `known` whose embeddings are nearest; -1 for none.
        config: the cuts.
    """
    good = _good_rows(faces)
    near = neighbors[good]
    face, row = np.repeat(good, near.shape[1]), near.reshape(-1)
    face, row = face[row >= 0], row[row >= 0]
    own = _thumbnails(faces)[face]
    plain, mirrored = (
        likeness(own, known.thumbnails[row], np.full(len(row), flip), FAR) for flip in (False, True)
    )
    best = np.maximum(plain, mirrored)
    hit = best >= config.likeness
    kind = np.full(int(hit.sum()), KINDS.index("embedding"))
    return _guarded(known, faces, [_Hits(face[hit], row[hit], kind, best[hit])])


def merge(first: pa.Table, second: pa.Table) -> pa.Table:
    """Two GUARD tables of the same faces: a test twin goes first, then what `first` says."""
    rows = []
    for a, b in zip(first.to_pylist(), second.to_pylist(), strict=True):
        better = b["twin_of"] is not None and (
            a["twin_of"] is None or ROLES.index(b["twin_role"]) < ROLES.index(a["twin_role"])
        )
        rows.append({**(b if better else a), "duplicate_group": a["duplicate_group"]})
    return pa.Table.from_pylist(rows, schema=GUARD)


def with_duplicates(guard: pa.Table, groups: Mapping[str, str]) -> pa.Table:
    """The GUARD table with the duplicate groups of :meth:`Duplicates.groups`."""
    column = pa.array([groups.get(face) for face in guard["id"].to_pylist()], pa.string())
    return guard.set_column(
        guard.schema.get_field_index("duplicate_group"), GUARD.field("duplicate_group"), column
    )


class Duplicates:
    """Groups faces of the pool that show the same picture; fed slice by slice, in any order.

    Faces of equal hash are compared with the first and the previous of them, other hashes through
    their first face: a picture that occurs a million times costs a million comparisons.

    In memory are the id, 64 bits for pixels and crop, and the two perceptual hashes of every face;
    thumbnails, and embeddings where they are given, lie in files without a name in `scratch`, which
    go with this object.
    """

    def __init__(self, config: GuardConfig, scratch: Path | None = None) -> None:
        self._config = config
        self._ids: list[pa.ChunkedArray] = []
        self._hashes: list[np.ndarray] = []  # (N, 3) uint64: pixels, phash, phash_flip
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  closed with this object
        self._vectors = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        self._width = 0

    def add(self, faces: pa.Table, embeddings: np.ndarray | None = None) -> None:
        """Remember the good faces of a FACES table.

        Args:
            faces: FACES, N rows.
            embeddings: (N, D) unit rows, zero where a face has none; of every table or of none.
        """
        good = _good(faces)
        if embeddings is not None:
            self._width = embeddings.shape[1]
            self._vectors.write(embeddings[_good_rows(faces)].astype(np.float16).tobytes())
        if len(good):
            own = _thumbnails(good)
            # Two people of one photo share its pixels, and each has a thumbnail.
            pairs = zip(good["pixel_sha256"].to_pylist(), own, strict=True)
            digests = b"".join(
                blake2b(pixels + face.tobytes(), digest_size=8).digest() for pixels, face in pairs
            )
            columns = [np.frombuffer(digests, "<u8"), good["phash"], good["phash_flip"]]
            self._hashes.append(np.stack([np.asarray(column) for column in columns], axis=1))
            self._ids.append(pa.chunked_array(good["id"].combine_chunks().cast(pa.large_string())))
            self._file.write(own.tobytes())

    def groups(self) -> dict[str, str]:
        """Id of every face that has a duplicate -> smallest id of its group."""
        if not self._ids:
            return {}
        self._file.flush()
        thumbnails = np.memmap(self._file, np.uint8, "r").reshape(-1, THUMBNAIL * THUMBNAIL)
        ids = pa.chunked_array([chunk for part in self._ids for chunk in part.chunks])
        by_id = pc.sort_indices(ids).to_numpy()
        digest, phash, flipped = np.concatenate(self._hashes)[by_id].T
        leads, same = np.unique(digest, return_index=True, return_inverse=True)[1:]
        first = np.sort(leads)  # of every picture the smallest id
        own = np.stack([leads[same], np.arange(len(by_id))], 1)
        near = self._near(first, phash[first], flipped[first], lambda at: thumbnails[by_id[at]])
        pairs = [own, *near]
        if self._width:
            pairs += self._alike(ids, by_id, lambda at: thumbnails[by_id[at]])
        group = components(len(by_id), np.concatenate(pairs))
        size = np.bincount(group, minlength=len(by_id))
        members = np.flatnonzero(size[group] > 1)
        names, leaders = (
            ids.take(pa.array(by_id[rows])).to_pylist() for rows in (members, group[members])
        )
        return dict(zip(names, leaders, strict=True))

    def _near(
        self, first: np.ndarray, hashes: np.ndarray, flipped: np.ndarray, thumbnails: Thumbnails
    ) -> Iterator[np.ndarray]:
        order = np.lexsort((first, hashes))
        equal = hashes[order][1:] == hashes[order][:-1]
        leads = np.concatenate([[0], np.flatnonzero(~equal) + 1]) if len(order) else order
        lead = order[leads]  # first face of every hash
        leader = np.repeat(lead, np.diff(np.append(leads, len(order))))
        yield self._verified(first[leader], first[order], False, thumbnails)
        yield self._verified(first[order][:-1][equal], first[order][1:][equal], False, thumbnails)

        for mirrored, queries in ((False, hashes[lead]), (True, flipped[lead])):
            for query, found in close_pairs(hashes[lead], queries):
                apart = query < found
                a, b = first[lead[query[apart]]], first[lead[found[apart]]]
                yield self._verified(a, b, mirrored, thumbnails)

    def _alike(
        self, ids: pa.ChunkedArray, by_id: np.ndarray, thumbnails: Thumbnails
    ) -> Iterator[np.ndarray]:
        """Pairs whose embeddings are near and whose thumbnails, moved further, correlate."""
        self._vectors.flush()
        x = np.memmap(self._vectors, np.float16, "r").reshape(-1, self._width)
        place = np.empty_like(by_id)
        place[by_id] = np.arange(len(by_id))
        a, b = place[near_pairs(x, stable_hash(ids), self._config.copies or 1.0)].T
        for mirrored in (False, True):
            yield self._verified(a, b, mirrored, thumbnails, FAR)

    def _verified(
        self,
        a: np.ndarray,
        b: np.ndarray,
        mirrored: bool,
        thumbnails: Thumbnails,
        moves: Sequence[float] = NEAR,
    ) -> np.ndarray:
        apart = a != b
        pairs = np.stack([a[apart], b[apart]], 1)
        alike = np.zeros(len(pairs), bool)
        for at in range(0, len(pairs), QUERIES):  # so many thumbnails at once
            left, right = pairs[at : at + QUERIES].T
            flip = np.full(len(left), mirrored)
            found = likeness(thumbnails(left), thumbnails(right), flip, moves)
            alike[at : at + QUERIES] = found >= self._config.likeness
        return pairs[alike]


def _by_hash(known: Reference, faces: pa.Table, good: np.ndarray, config: GuardConfig) -> _Hits:
    hashes = faces["phash"].take(pa.array(good)).to_numpy()
    mirrored_from = MOVES * len(known.ids)
    own = _thumbnails(faces)
    none = np.zeros(0, np.int64)
    found: list[tuple[np.ndarray, ...]] = [(none, none, none, none.astype(np.float32))]
    for query, probe in hamming_pairs(known.probes, hashes, config.radius):
        flip = probe >= mirrored_from
        row = (probe - mirrored_from * flip) // MOVES
        face = good[query]
        first = likeness_at(
            own[face], known.thumbnails[row], (probe - mirrored_from * flip) % MOVES, flip
        )
        near = first >= config.likeness - SLACK
        pair = np.unique(np.stack([face, row, flip], 1)[near], axis=0)
        alike = likeness(own[pair[:, 0]], known.thumbnails[pair[:, 1]], pair[:, 2] == 1)
        hit = alike >= config.likeness
        kind = np.where(pair[:, 2] == 1, KINDS.index("flip"), KINDS.index("phash"))
        found.append((pair[hit, 0], pair[hit, 1], kind[hit], alike[hit]))
    return _Hits(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _guarded(known: Reference, faces: pa.Table, hits: Sequence[_Hits]) -> pa.Table:
    face = np.concatenate([h.face for h in hits])
    row = np.concatenate([h.row for h in hits])
    kind = np.concatenate([h.kind for h in hits])
    alike = np.concatenate([h.likeness for h in hits])
    order = np.lexsort((row, -alike.round(6), known.role[row], face))
    face, row, kind = face[order], row[order], kind[order]
    best = np.unique(face, return_index=True)[1]
    columns: dict[str, list[str | None]] = {
        name: [None] * len(faces) for name in GUARD.names if name != "id"
    }
    for i in best.tolist():
        columns["twin_of"][face[i]] = known.ids[row[i]]
        columns["twin_kind"][face[i]] = KINDS[kind[i]]
        columns["twin_role"][face[i]] = ROLES[known.role[row[i]]]
    return pa.table({"id": faces["id"], **columns}, schema=GUARD)


def _good_rows(faces: pa.Table) -> np.ndarray:
    good = pc.equal(faces["status"], OK).to_numpy()
    return np.flatnonzero(good).astype(np.int64)


def _good(faces: pa.Table) -> pa.Table:
    return faces.take(pa.array(_good_rows(faces)))


def _thumbnails(faces: pa.Table) -> np.ndarray:
    """(N, 256) uint8; zeros where a face is bad."""
    size = THUMBNAIL * THUMBNAIL
    column = pc.fill_null(faces["thumbnail"].combine_chunks(), bytes(size))
    data = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    return data[size * column.offset :][: size * len(column)].reshape(-1, size)
