"""Local files that a kill cannot tear: staged writes, exclusive creates, durable folders.

Bytes are written to a hidden file in the same folder and fsynced before any name leads to them;
then the name is set by rename (replace) or by hard link (exclusive create) and the folder is
fsynced. A kill in between leaves a hidden file that nobody reads.

Beside them what else is the operating system's to say: how many cores there are for us.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from typing import IO

from pipeline.errors import RunError, SourceError

TEMP = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")
"""Names of staged files."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained(uri: str, writing: bool = False) -> Iterator[None]:
    """What a disk or a store raises, as one line that names the place."""
    try:
        yield
    except FileNotFoundError as err:
        if writing:  # its folder could not be made
            raise RunError(f"{uri}: cannot be written there") from err
        raise SourceError(f"{uri}: no such file") from err
    except IsADirectoryError as err:
        raise SourceError(f"{uri}: expected a file, found a folder") from err
    except PermissionError as err:
        raise SourceError(f"{uri}: access denied") from err
    except OSError as err:
        said = err.strerror or " ".join(str(err).split())
        if err.errno in _FULL:
            said += "; make room and start again: what is committed stays"
        raise RunError(f"{uri}: {said}") from err
    except Exception as err:
        if not type(err).__module__.startswith("botocore."):
            raise
        said = " ".join(str(err).split())
        raise SourceError(f"{uri}: {said}; check the AWS environment") from err


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` if the block ends without an error."""
    with _staged(path) as file:
        yield file
        _sync(file)
        os.replace(file.name, path)
    _sync_folder(os.path.dirname(path))


def create(path: str, data: bytes) -> bool:
    """Write `path` unless it exists; exactly one of many writers gets True.

    O_EXCL would name the file before its bytes are down, and a kill in between would leave an
    empty file that says "committed"; a link names bytes that are already durable.

    Raises:
        SourceError: the file system has no hard links.
    """
    with _staged(path) as file:
        file.write(data)
        _sync(file)
        try:
            os.link(file.name, path)
        except FileExistsError:
            # NFS repeats a link whose answer was lost: a second name on our bytes means we won
            won = os.fstat(file.fileno()).st_nlink == 2
        except OSError as err:
            raise SourceError(f"{path}: cannot make a hard link here ({err.strerror})") from err
        else:
            won = True
        _sync_folder(os.path.dirname(path))
    return won


def make_folder(path: str) -> None:
    """Make the folder and its parents, and their names durable."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_folder(parent)


def walk(folder: str) -> Iterator[str]:
    """Files at any depth in the order of their full paths; links are followed, circles cut.

    Memory: one folder listing per level.
    """
    return _walk(folder, frozenset())


def stamp(path: str) -> str:
    """Size and mtime in ns of a file; for a folder, a digest of these and the paths of all below.

    Hidden names do not count, as in :meth:`storage.Location.files`. Cost of a folder: one listing
    of every folder and one stat of every file below.

    Raises:
        FileNotFoundError: neither.
    """
    stat = os.stat(path)
    if not os.path.isdir(path):
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    found = hashlib.sha256()
    for file in walk(path):
        below = file[len(path) :]
        if "/." in below:
            continue
        with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
            stat = os.stat(file)
            found.update(os.fsencode(f"{below}\t{stat.st_size}\t{stat.st_mtime_ns}\n"))
    return found.hexdigest()[:32]


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as listing:
            # a folder sorts as "name/", which makes the recursion yield plain path order
            entries = sorted((e.name + "/" if e.is_dir() else e.name) for e in listing)
    except FileNotFoundError:
        return
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    for entry in entries:
        path = f"{folder.rstrip('/')}/{entry}"
        if entry.endswith("/"):
            yield from _walk(path[:-1], above | {here})
        else:
            yield path


def sweep(folder: str, but: str) -> None:
    """Unlink staged files of killed writers at any depth, less those in the folder `but` in it.

    Nobody may be writing elsewhere.
    """
    for at, folders, names in os.walk(folder):
        if at == folder and but in folders:
            folders.remove(but)
        for name in names:
            if TEMP.fullmatch(name):
                os.unlink(os.path.join(at, name))


@contextlib.contextmanager
def _staged(path: str) -> Iterator[IO[bytes]]:
    """A hidden file beside `path`, gone when the block ends."""
    folder, name = os.path.split(path)
    make_folder(folder)
    temp = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    with open(temp, "xb") as file:
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cores() -> int:
    """Logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
