"""Slices and commits: which slice of the pool is done, by whom, and what came out.

One ledger is one generation of one stage:

    commits/<group>/<key>.json               the one winning attempt of a slice; never changed
    parts/<group>/<key>-<attempt>.parquet    the table of one attempt; only the winner's is read
    packs/<group>-<digest>.parquet           the tables of a complete group, in slice order
    seals/<group>-<digest>.json              the commits of that group, with their rows in the pack
    attempts/<group>/<key>-<n>               somebody started on the slice for the n-th time

<group> is written in reversed hex, so that the load of an object store spreads over key prefixes.
The digest of a pack and its seal is of the slices they hold: where a removal list or a grown pool
changes a group, a new pack is made and the old one is not mistaken for it.

Protocol: the data is durable first, then the commit record is created exclusively. Whoever finds a
record reads it back: the own attempt id means that we won and the answer was lost; any other means
that this attempt lost, removes its own part and returns the winner. Listings save work and never
decide. Kill a writer anywhere and the same slices, rows and counts come out, each exactly once.

A stage that one process computes whole packs its groups straight away (:meth:`Ledger.pack`); there
the exclusive seal is the commit of 1,024 slices, and no part or record is written.

Cost per slice on a local disk: two files, four fsyncs; on S3: two PUTs (and one GET for who loses).
To resume: one listing of the seals and one of each group not sealed yet.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipeline import config
from pipeline.commits import (
    Commit,
    check_fingerprint,
    describe,
    fault,
    folder_of,
    noted,
    parse_commit,
    record_at,
    seal_name,
    seal_record,
    sealed_commits,
    tally,
)
from pipeline.errors import LedgerError, SourceError
from pipeline.ordered import in_order
from pipeline.packs import Pack, content_digest, row_ranges, write_pack
from pipeline.plan import GROUP, Plan, Slice, number_of
from pipeline.storage import Location, missing, to_json
from pipeline.tables import open_stored, read_table, write_table

__all__ = ["GROUP", "Commit", "Ledger", "Plan", "Slice"]

_REQUESTS = 16  # records read at a time: on S3 each waits 20-100 ms
_TABLES = 4  # tables read and checked at a time; see in_order for how many wait in memory


class Ledger:
    """Commits of one stage generation below the folder `at`; any number of writers at a time."""

    def __init__(self, at: Location) -> None:
        self.at = at
        # Records and seals never change, so reading one once will do; a few are kept.
        self._commits: dict[str, Commit] = {}
        self._seals: dict[str, list[tuple[Commit, int]]] = {}  # commits and their first row

    # -- writing ------------------------------------------------------------------------------

    def attempt(self, slice: Slice) -> int:
        """Note that work on a slice starts; which attempt this is, from 1, over all processes.

        A slice that kills its workers is told by it: what they note stays when they die.
        """
        at = self.at / "attempts" / folder_of(slice.group)
        number = 1
        while not (at / f"{slice.key}-{number}").create(b""):
            number += 1
        return number

    def commit(
        self,
        slice: Slice,
        table: pa.Table,
        *,
        quarantined: int = 0,
        reads: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> Commit:
        """Store the slice's table, unless another attempt was first; returns the winning commit.

        Who gets a commit with another sha256 than its own must go on with the stored table. A
        table without rows is a commit like any other.

        Raises:
            LedgerError: the winner was made from another version of the shard.
        """
        mine = describe(slice, table, quarantined, dict(reads or {}), seconds)
        part = self._part(mine)
        write_table(part, table)
        fault("part-written")
        record = record_at(self.at, slice.key)
        fault("before-commit")
        created = record.create(to_json(asdict(mine)))
        fault("after-commit")
        winner = mine if created else parse_commit(record, record.read_bytes())
        if winner.attempt != mine.attempt:
            part.remove_tree()
        check_fingerprint(slice, winner)
        return winner

    def complete(self, plan: Plan) -> Iterator[list[Slice]]:
        """The groups of the plan all of whose slices are committed and that have no seal."""
        sealed = self._sealed()
        for slices in plan.groups():
            if seal_name(slices) not in sealed and not self._missing(slices):
                yield slices

    def close(self, slices: Sequence[Slice]) -> None:
        """Pack and seal a complete group; safe to repeat and to race.

        Each table is checked against the digest that was committed.

        Raises:
            LedgerError: a part differs from its commit, or another seal disagrees.
        """
        commits = self._load(slices)
        tables = in_order(self._checked, commits, _TABLES)
        self._close_group(seal_name(slices), commits, tables)

    def pack(self, plan: Plan, tables: Iterable[pa.Table]) -> None:
        """Pack and seal every group of the plan straight from its tables, one per slice in order.

        For a stage computed in one process (select): the exclusive seal is the commit of all
        slices of its group, so two durable files take the place of two per slice. What is
        sealed stays; a process that dies leaves whole groups. Reading, manifest and digest are
        those of the same tables committed one by one. Memory: one row group. Only one process at a
        time may do so (the run's claim sees to it).

        Raises:
            LedgerError: tables and slices are not equally many, or another seal disagrees.
        """
        sealed = self._sealed()
        rest = iter(tables)
        for slices in plan.groups():
            name = seal_name(slices)
            commits: list[Commit] = []
            own = noted(slices, rest, commits, self.at)
            if name in sealed:
                collections.deque(own, maxlen=0)
            else:
                self._close_group(name, commits, own)
        if next(rest, None) is not None:
            raise LedgerError(f"{self.at}: more tables than the plan's {len(plan)} slices")

    def _close_group(
        self, name: str, commits: Sequence[Commit], tables: Iterable[pa.Table]
    ) -> None:
        """Write the pack of a group, then its seal; `commits` is complete once `tables` ends."""
        with self._pack(name).replacing() as sink:
            write_pack(sink, tables)
        fault("pack-written")
        record, seal = seal_record(commits), self.at / "seals" / f"{name}.json"
        fault("before-seal")
        digest = record["digest"]
        if not seal.create(to_json(record)) and (other := seal.read_json()["digest"]) != digest:
            raise LedgerError(f"{seal}: digest {other}, expected {digest}")

    def closed(self, plan: Plan) -> Iterator[list[Slice]]:
        """The groups of the plan.

        Raises:
            LedgerError: one of them is not sealed; before the first is given.
        """
        sealed = self._sealed()
        for slices in plan.groups():
            if seal_name(slices) not in sealed:
                raise LedgerError(f"{self.at}: group {slices[0].group} is not sealed, no sweep")
        yield from plan.groups()

    def clear(self, slices: Sequence[Slice]) -> None:
        """Remove parts and noted attempts of a sealed group.

        The commit records stay, so an attempt that comes late still loses and cannot commit a
        part that this removed.
        """
        keys = {s.key for s in slices}
        homes = [self.at / kind / folder_of(slices[0].group) for kind in ("parts", "attempts")]
        files = [file for home in homes for file in home.children()]
        garbage = [file for file in files if file.name.rpartition("-")[0] in keys]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(Location.remove, garbage))

    # -- asking -------------------------------------------------------------------------------

    def find(self, key: str) -> Commit | None:
        """The commit of a slice, or None."""
        known = self._commits.get(key)
        if known is None:
            record = record_at(self.at, key)
            if (data := record.find_bytes()) is None:
                return None
            if len(self._commits) >= GROUP:
                self._commits.clear()  # another thread may do so at any time
            self._commits[key] = known = parse_commit(record, data)
        return known

    def committed(self, plan: Plan) -> Iterator[Commit]:
        """Commits of the plan's slices, in plan order; lists seals and open groups only.

        Raises:
            LedgerError: a commit was made from another version of its shard than the plan's.
        """
        for commits in self._groups(plan):
            yield from commits

    def pending(self, plan: Plan) -> Iterator[Slice]:
        """Slices of the plan without a commit, in plan order; reads names, no records."""
        sealed = self._sealed()
        for slices in plan.groups():
            if seal_name(slices) not in sealed:
                yield from self._missing(slices)

    def read(self, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The committed table of one slice, from its part or, once that is swept, its pack.

        From a pack this decodes a row group, and once for the slices read after it in a process.

        Raises:
            LedgerError: the slice is not committed.
        """
        commit = self.find(key)
        part = None if commit is None else self._part(commit)
        if part is not None:
            try:
                return read_table(part, columns)
            except FileNotFoundError:  # swept while it was opened
                pass
            except SourceError as error:  # swept before
                if not missing(error):
                    raise
        name, sealed, first = self._in_seals(key)
        if sealed is not None:
            rows = [(first, first + sealed.rows)]
            return next(row_ranges(Pack(self._pack(name)), rows, columns))
        if part is None:
            raise LedgerError(f"{self.at}: slice {key} is not committed")
        raise LedgerError(f"{part}: committed, but neither this part nor a pack of it is there")

    def winner(self, key: str) -> Commit | None:
        """The commit of a slice, also of one that only a seal names; None if there is neither.

        Where most slices have no commit yet, :meth:`find` saves a listing.
        """
        return self.find(key) or self._in_seals(key)[1]

    def blocks(
        self, plan: Plan, columns: Sequence[str], coded: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """The rows of all slices in plan order, as many at a time as are cheap to read at once.

        A row group of a pack, or a slice where a group is not sealed yet.

        Args:
            plan: the slices.
            columns: which to read.
            coded: text columns of few values, given as dictionaries where they come from a pack:
                ten times as fast as text.

        Raises:
            LedgerError: a slice is not committed (raised when it is reached).
        """
        sealed = self._sealed()
        for slices in plan.groups():
            if (name := seal_name(slices)) in sealed:
                with open_stored(self._pack(name), coded) as file:
                    for group in range(len(file.bounds) - 1):
                        yield file.read(columns, row_group=group)
            else:
                for slice in slices:
                    yield self.read(slice.key, columns)

    def tables(
        self, plan: Plan, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[Slice, pa.Table]]:
        """Every slice and its table in plan order, a row group of a pack in memory at a time.

        Raises:
            LedgerError: a slice is not committed (raised when it is reached).
        """
        sealed = self._sealed()
        for slices in plan.groups():
            if (name := seal_name(slices)) in sealed:
                ranges = [(first, first + commit.rows) for commit, first in self._seal(name)]
                with open_stored(self._pack(name)) as file:
                    yield from zip(slices, row_ranges(file, ranges, columns), strict=True)
            else:
                for slice in slices:
                    yield slice, self.read(slice.key, columns)

    def manifest(self, plan: Plan) -> dict[str, Any]:
        """What came out, and nothing about how: equal for any schedule, host or interruption.

        Returns:
            As :func:`pipeline.commits.tally`.

        Raises:
            LedgerError: a slice is not committed.
        """
        found = tally(self._groups(plan))
        if (lacking := len(plan) - found["slices"]) > 0:
            absent = next(self.pending(plan))
            raise LedgerError(
                f"{self.at}: {lacking} of {len(plan)} slices are not committed, "
                f"the first is {absent.key} of {absent.shard}"
            )
        return found

    def digest(self, plan: Plan) -> str:
        """Hex sha256 of the manifest: the content digest of the stage."""
        return config.digest(self.manifest(plan))

    # -- files --------------------------------------------------------------------------------

    def _part(self, commit: Commit) -> Location:
        return self.at / "parts" / folder_of(number_of(commit.key) // GROUP) / commit.file

    def _pack(self, name: str) -> Location:
        return self.at / "packs" / f"{name}.parquet"

    def _groups(self, plan: Plan) -> Iterator[list[Commit]]:
        """The commits of each group of the plan in turn; a group may lack some."""
        sealed = self._sealed()
        for slices in plan.groups():
            if (name := seal_name(slices)) in sealed:
                yield [commit for commit, _ in self._seal(name)]
            else:
                missing = set(self._missing(slices))
                yield self._load([s for s in slices if s not in missing])

    def _in_seals(self, key: str) -> tuple[str, Commit | None, int]:
        """Name of the seal that holds a slice, its commit and first row in the pack."""
        home = folder_of(number_of(key) // GROUP) + "-"
        for name in sorted(self._sealed()):
            if name.startswith(home):
                for commit, first in self._seal(name):
                    if commit.key == key:
                        return name, commit, first
        return "", None, 0

    def _sealed(self) -> set[str]:
        return {child.name.removesuffix(".json") for child in (self.at / "seals").children()}

    def _seal(self, name: str) -> list[tuple[Commit, int]]:
        known = self._seals.get(name)
        if known is None:
            seal = self.at / "seals" / f"{name}.json"
            self._seals = {name: (known := sealed_commits(seal, seal.stamp()))}
        return known

    def _missing(self, slices: Sequence[Slice]) -> list[Slice]:
        """Slices of one group without a commit record: one listing."""
        listed = (self.at / "commits" / folder_of(slices[0].group)).children()
        have = {child.name for child in listed}
        return [s for s in slices if f"{s.key}.json" not in have]

    def _load(self, slices: Sequence[Slice]) -> list[Commit]:
        """Commits of slices known to have one."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            found = list(pool.map(self.find, [s.key for s in slices]))
        commits = []
        for slice, commit in zip(slices, found, strict=True):
            if commit is None:
                raise LedgerError(
                    f"{record_at(self.at, slice.key)}: listed, but not there when read"
                )
            check_fingerprint(slice, commit)
            commits.append(commit)
        return commits

    def _checked(self, commit: Commit) -> pa.Table:
        table = self.read(commit.key)
        if (have := content_digest(table)) != commit.sha256:
            part = self._part(commit)
            raise LedgerError(f"{part}: content sha256 {have}, committed {commit.sha256}")
        return table
