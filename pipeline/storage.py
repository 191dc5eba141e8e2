"""Where bytes live: one path type for local folders and S3, atomic writes, exclusive creates.

A write is seen whole or not at all: local files are written beside their target, fsynced and
renamed, and the folder is fsynced; S3 objects appear when their upload completes. `create` lets
exactly one of many writers win, which every commit in this package rests on.

Cost: an atomic local write is two fsyncs (file and folder). Endpoint and credentials of S3 come
from the usual AWS environment, never from a uri.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline import posix, s3
from pipeline.errors import SourceError

_S3 = "s3://"


@dataclass(frozen=True)
class Location:
    """A file or folder: an absolute local path, or s3://bucket/key. Cheap, hashable, picklable."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Location:
        """What `name` (may hold slashes) means below this folder; it cannot lead out of it."""
        if not name or any(part in ("", ".", "..") for part in name.split("/")):
            raise SourceError(f"{self.uri}: {name!r} is not a name below this folder")
        return Location(f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder this lies in; a bucket and the root are their own parents."""
        if self.is_local:
            return Location(os.path.dirname(self.uri))
        return Location(self.uri.rpartition("/")[0]) if "/" in self._key else self

    @property
    def is_local(self) -> bool:
        """False on S3."""
        return not self.uri.startswith(_S3)

    @property
    def _key(self) -> str:
        return self.uri.removeprefix(_S3)

    def local_path(self) -> Path:
        """The path, for code that needs a real file; SourceError on S3."""
        if not self.is_local:
            raise SourceError(f"{self.uri}: expected a local path here, not S3")
        return Path(self.uri)

    # -- looking ------------------------------------------------------------------------------

    def exists(self) -> bool:
        """True for a file, a folder or a prefix that holds keys."""
        with posix.explained(self.uri):
            if self.is_local:
                return os.path.exists(self.uri)
            return bool(s3.filesystem().exists(self._key))

    def is_dir(self) -> bool:
        """True for a folder or a prefix that holds keys."""
        with posix.explained(self.uri):
            is_local = self.is_local
            return os.path.isdir(self.uri) if is_local else bool(s3.filesystem().isdir(self._key))

    def size(self) -> int:
        """Bytes; SourceError if there is no such file."""
        with posix.explained(self.uri):
            return (
                os.stat(self.uri).st_size if self.is_local else int(s3.filesystem().size(self._key))
            )

    def stamp(self) -> str:
        """Changes when the content does: size and mtime in ns, or the ETag, without reading.

        A folder's: of all files below, one by one; see :func:`posix.stamp` and :func:`s3.stamp`.
        """
        with posix.explained(self.uri):
            return posix.stamp(self.uri) if self.is_local else s3.stamp(self._key)

    def children(self) -> list[Location]:
        """Files and folders right below, sorted by name; [] if missing. Unfinished writes hide."""
        paths: list[str] = []
        with posix.explained(self.uri), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                paths = os.listdir(self.uri)
            else:
                paths = s3.filesystem().ls(self._key, detail=False)
        names = sorted(path.rstrip("/").rpartition("/")[2] for path in paths if path != self._key)
        return [self / name for name in names if not posix.TEMP.fullmatch(name)]

    def files(self, suffixes: Sequence[str]) -> Iterator[Location]:
        """Files at any depth whose name ends in one of `suffixes` (case does not count).

        Sorted by relative path, the same on disk and on S3; names with a leading dot are skipped,
        links are followed. Memory: one folder listing per level on disk, every key on S3.
        """
        with posix.explained(self.uri):
            found = posix.walk(self.uri) if self.is_local else sorted(self._below())
            yield from self._ending(found, suffixes)

    def listed(self, suffixes: Sequence[str]) -> Iterator[tuple[Location, str, int]]:
        """As :meth:`files`, with stamp and size; on S3 from the listing, no request per file."""
        if self.is_local:
            yield from ((at, at.stamp(), at.size()) for at in self.files(suffixes))
            return
        below = self._below()
        yield from ((at, *below[at._key]) for at in self._ending(sorted(below), suffixes))

    def _below(self) -> dict[str, tuple[str, int]]:
        with posix.explained(self.uri):
            return s3.below(self._key)

    def _ending(self, paths: Iterable[str], suffixes: Sequence[str]) -> Iterator[Location]:
        ends = tuple(suffix.lower() for suffix in suffixes)
        for path in paths:
            uri = path if self.is_local else _S3 + path
            if uri.lower().endswith(ends) and "/." not in uri[len(self.uri) :]:
                yield Location(uri)

    # -- reading ------------------------------------------------------------------------------

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A binary file object. "wb" is not atomic on disk: see :meth:`replacing`."""
        with posix.explained(self.uri):
            if not self.is_local:
                return s3.filesystem().open(self._key, mode)
            if "r" not in mode:
                posix.make_folder(os.path.dirname(self.uri))
            return open(self.uri, mode)

    def read_bytes(self) -> bytes:
        """The whole file; SourceError if there is none."""
        with posix.explained(self.uri):
            if not self.is_local:
                # one GET; more would ask for the size first, and most files read whole are small
                return bytes(s3.filesystem().cat_file(self._key, max_concurrency=1))
            with open(self.uri, "rb") as file:
                return file.read()

    def find_bytes(self) -> bytes | None:
        """The whole file, or None if there is none: one request where exists + read are two."""
        try:
            return self.read_bytes()
        except SourceError as err:
            if missing(err):
                return None
            raise

    def read_text(self) -> str:
        """The file as UTF-8."""
        return self.read_bytes().decode()

    def read_json(self) -> Any:
        """The file as JSON; SourceError naming the place if it is not."""
        try:
            return json.loads(self.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as err:
            raise SourceError(f"{self.uri}: expected JSON: {err}") from err

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop); shorter, or empty, where the file ends before."""
        if stop <= start:
            return b""
        with posix.explained(self.uri):
            if self.is_local:
                with open(self.uri, "rb") as file:
                    file.seek(start)
                    return file.read(stop - start)
            try:
                return bytes(s3.filesystem().cat_file(self._key, start=start, end=stop))
            except OSError as err:
                if s3.code(err) in ("InvalidRange", "416"):
                    return b""
                raise

    # -- writing ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def replacing(self) -> Iterator[IO[bytes]]:
        """A file object whose content replaces this file when the block ends without an error.

        On an error, or if the process dies, whatever was here before stays.
        """
        with posix.explained(self.uri, writing=True), self._replacing() as file:
            yield file

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[IO[bytes]]:
        if self.is_local:
            with posix.replacing(self.uri) as file:
                yield file
            return
        upload = s3.filesystem().open(self._key, "wb")
        finished = False
        try:
            yield upload
            finished = True
        finally:
            if finished:
                upload.close()
            else:
                upload.discard()
                upload.closed = True  # or the destructor would upload what was written so far

    def write_bytes(self, data: bytes) -> None:
        """Replace the file atomically and durably; folders are made."""
        with self.replacing() as file:
            file.write(data)

    def write_text(self, text: str) -> None:
        """Same as :meth:`write_bytes`, as UTF-8."""
        self.write_bytes(text.encode())

    def write_json(self, value: Any) -> None:
        """Same as :meth:`write_bytes`, as indented JSON with sorted keys."""
        self.write_bytes(to_json(value))

    def create(self, data: bytes) -> bool:
        """Write the file unless there is one; among any number of writers exactly one gets True.

        False may also mean "you won, but the answer of your first request was lost and its repeat
        met your own file" (S3 behind a retrying client). Who must know puts an id of its own in
        `data` and reads back.

        Raises:
            SourceError: the file system has no hard links.
        """
        with posix.explained(self.uri, writing=True):
            return posix.create(self.uri, data) if self.is_local else s3.create(self._key, data)

    def mkdir(self) -> None:
        """Make the folder and its parents; nothing to do on S3."""
        with posix.explained(self.uri, writing=True):
            if self.is_local:
                posix.make_folder(self.uri)

    def remove(self) -> None:
        """Remove a file; nothing there is fine. One request on S3."""
        with posix.explained(self.uri), contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.uri)
            else:
                s3.filesystem().rm_file(self._key)

    def remove_tree(self) -> None:
        """Remove a file or a folder with all it holds; nothing there is fine."""
        with posix.explained(self.uri), contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                s3.filesystem().rm(self._key, recursive=True)
            elif os.path.isdir(self.uri) and not os.path.islink(self.uri):
                shutil.rmtree(self.uri)
            else:
                os.unlink(self.uri)


def location(uri: str | os.PathLike[str]) -> Location:
    """The location that a person wrote: `~` and `$NAME` expanded, relative paths made absolute.

    Raises:
        SourceError: an unset variable, an unknown scheme, or a uri that carries credentials or
            query parameters (they would end up in logs; the message does not repeat them).
    """
    text = os.path.expanduser(os.path.expandvars(os.fspath(uri)))
    scheme, mark, rest = text.partition("://")
    if mark and not re.fullmatch(r"file|s3", scheme):
        known = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) else "unreadable"
        raise SourceError(f"location: scheme {known!r}; expected a local path or s3://bucket/key")
    if mark and "@" in rest.partition("/")[0]:
        raise SourceError(f"location: {scheme}:// uri with user or secret; use the AWS environment")
    if mark and "?" in rest:
        raise SourceError(f"location: {scheme}:// uri with query parameters; use the environment")
    if unset := re.search(r"\$(\{\w+\}|[A-Za-z_]\w*)", text):
        raise SourceError(f"location: environment variable {unset.group()} is not set")
    path = rest if mark else text
    if not path.strip("/") and (mark or not path):
        raise SourceError(f"location: {text!r} names nothing; expected a path or s3://bucket/key")
    if mark and scheme == "s3":
        return Location(_S3 + "/".join(part for part in rest.split("/") if part))
    return Location(os.path.abspath(path))


def to_json(value: Any) -> bytes:
    """Indented JSON with sorted keys; a set becomes a sorted list, what else JSON lacks a str."""
    text = json.dumps(
        value,
        indent=1,
        sort_keys=True,
        default=lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v),
    )
    return text.encode() + b"\n"


def missing(error: BaseException) -> bool:
    """Whether an error of this module says that there is no such file."""
    return isinstance(error.__cause__, FileNotFoundError)


def probe(root: Location) -> None:
    """Refuse a store on which two writers can both create a file: commits would not be exclusive.

    Costs two writes and a removal.

    Raises:
        SourceError: the second of two creations of one file won as well.
    """
    at = root / f"probe-{secrets.token_hex(8)}"
    try:
        first, second = at.create(b"1"), at.create(b"2")
    finally:
        at.remove_tree()
    if first and second:
        raise SourceError(
            f"{root}: two writers both created one file; the store ignores If-None-Match, which "
            f"commits rest on"
        )
