"""What a ledger writes of a slice: the commit record, its digest, and the names of files.

Values, and seals that were read; the protocol that makes one of them the winner is in
:mod:`pipeline.ledger`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline import config
from pipeline.errors import LedgerError
from pipeline.packs import content_digest
from pipeline.plan import GROUP, Slice, number_of
from pipeline.storage import Location


@dataclass(frozen=True)
class Commit:
    """The winning attempt of a slice; `file` is its part, `sha256` that of `content_digest`.

    `reads` names what the attempt read (such as the sha256 of the embeddings it scored);
    `seconds` is what the work took, `time` is UTC.
    """

    key: str
    attempt: str
    file: str
    sha256: str
    rows: int
    quarantined: int
    fingerprint: str
    reads: dict[str, str]
    seconds: float
    host: str
    time: str


def describe(
    slice: Slice, table: pa.Table, quarantined: int, reads: dict[str, str], seconds: float
) -> Commit:
    """What an attempt of this process says of its table."""
    attempt = secrets.token_hex(16)
    return Commit(
        key=slice.key,
        attempt=attempt,
        file=f"{slice.key}-{attempt}.parquet",
        sha256=content_digest(table),
        rows=table.num_rows,
        quarantined=quarantined,
        fingerprint=slice.fingerprint,
        reads=reads,
        seconds=round(seconds, 3),
        host=socket.gethostname(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def noted(
    slices: Sequence[Slice], tables: Iterator[pa.Table], commits: list[Commit], at: Location
) -> Iterator[pa.Table]:
    """The next table of each slice; its commit is added to `commits`."""
    for slice in slices:
        table = next(tables, None)
        if table is None:
            raise LedgerError(f"{at}: no table for slice {slice.key} and those after it")
        commits.append(describe(slice, table, 0, {}, 0.0))
        yield table


def folder_of(group: int) -> str:
    """Folder of a group: reversed hex, so that the load spreads over key prefixes."""
    return f"{group:06x}"[::-1]


def record_at(ledger: Location, key: str) -> Location:
    """Where a ledger keeps the commit of a slice."""
    return ledger / "commits" / folder_of(number_of(key) // GROUP) / f"{key}.json"


def seal_name(slices: Sequence[Slice]) -> str:
    """Name of the seal and the pack that hold exactly these slices of one group."""
    held = config.digest([[s.key, s.fingerprint] for s in slices])
    return f"{folder_of(slices[0].group)}-{held[:16]}"


def group_digest(commits: Sequence[Commit]) -> str:
    """Digest of what came out of a group, and of nothing about how."""
    fields = ("key", "fingerprint", "rows", "quarantined", "sha256")
    return config.digest([[getattr(c, field) for field in fields] for c in commits])


def tally(groups: Iterable[Sequence[Commit]]) -> dict[str, Any]:
    """What came out of groups, and nothing about how; a group may be empty.

    `slices`, `rows`, `quarantined`, and `groups`: for each its number and :func:`group_digest`.
    """
    rows = bad = count = 0
    digests: dict[str, str] = {}
    for commits in groups:
        count += len(commits)
        rows += sum(c.rows for c in commits)
        bad += sum(c.quarantined for c in commits)
        if commits:
            digests[str(number_of(commits[0].key) // GROUP)] = group_digest(commits)
    return {"slices": count, "rows": rows, "quarantined": bad, "groups": digests}


def seal_record(commits: Sequence[Commit]) -> dict[str, Any]:
    """What the seal of a group says: its digest, and its commits with their rows in the pack."""
    firsts = itertools.accumulate((c.rows for c in commits), initial=0)
    pairs = zip(commits, firsts, strict=False)
    slices = [{"commit": asdict(commit), "first": first} for commit, first in pairs]
    return {"digest": group_digest(commits), "slices": slices}


def parse_seal(seal: Location) -> list[tuple[Commit, int]]:
    """Commits of a seal and the first row of each in the pack."""
    return [(Commit(**e["commit"]), e["first"]) for e in seal.read_json()["slices"]]


def parse_commit(record: Location, data: bytes) -> Commit:
    """The commit of a record; LedgerError where it is none."""
    try:
        return Commit(**json.loads(data))
    except (ValueError, TypeError) as err:
        raise LedgerError(f"{record}: expected a commit record: {err}") from err


@functools.lru_cache(maxsize=8)
def sealed_commits(seal: Location, stamp: str) -> list[tuple[Commit, int]]:
    """:func:`parse_seal`, read once per process and `stamp`.

    The stamp of the file tells a seal that `omnifer forget` wrote again.
    """
    del stamp
    return parse_seal(seal)


def check_fingerprint(slice: Slice, commit: Commit) -> None:
    """LedgerError where the commit was made from another version of the slice's shard."""
    if commit.fingerprint != slice.fingerprint:
        raise LedgerError(
            f"slice {slice.key} of {slice.shard}: committed from a shard with fingerprint "
            f"{commit.fingerprint}, the plan has {slice.fingerprint}"
        )


def fault(step: str) -> None:
    """Die like a killed process if OMNIFER_FAULT names this step.

    For tests: what holds when a process dies between two lines only one that really does can prove.
    """
    if os.environ.get("OMNIFER_FAULT") == step:
        os._exit(137)
