"""Buckets through s3fs: patient clients, nothing cached, exclusive creates by conditional writes.

s3fs is imported at the first use (about half a second); the endpoint and the credentials come from
the usual AWS environment. Throttling (503), timeouts and broken connections are repeated by the
client, conflicts of conditional writes (409) here.

Patience: a store that accepts requests and answers none is an error after about 8 minutes, where
the call reads an object after 16; one that answers 503 after about one minute, "SlowDown" after two
to four.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from pipeline.errors import SourceError

WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between repeats of a conditional write that met another one."""
_CLIENT = {
    "retries": {"max_attempts": 8, "mode": "standard"},  # 503, timeouts, broken connections
    "connect_timeout": 10,
    "read_timeout": 20,  # between two packets, and from the last byte sent to the first answer
}
_REPEATS = 2
"""Of all that the client has tried, by s3fs; its five are 25 where it reads an object."""


def filesystem() -> Any:
    """The file system of this thread; nothing it lists is kept."""
    import s3fs

    # fsspec keeps one instance per thread; its listings cache would hide other writers' files
    found = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=_CLIENT)
    found.retries = _REPEATS
    return found


def create(key: str, data: bytes) -> bool:
    """Write `key` (bucket and path) unless it exists; see :meth:`storage.Location.create`.

    Raises:
        SourceError: other conditional writes to it go on.
    """
    for wait in WAITS:
        try:
            filesystem().pipe_file(key, data, mode="create")  # If-None-Match: *
            return True
        except OSError as err:
            if isinstance(err, FileExistsError) or code(err) in ("PreconditionFailed", "412"):
                return False
            if code(err) not in ("ConditionalRequestConflict", "409"):
                raise
            time.sleep(wait)  # another conditional write to this key is under way
    raise SourceError(f"s3://{key}: conditional write conflicts persist (409)")


def stamp(key: str) -> str:
    """The ETag of an object; for a prefix, a digest of the keys and ETags below it.

    Cost: of a prefix one request per thousand keys.

    Raises:
        FileNotFoundError: neither.
    """
    found = filesystem().info(key)
    if found["type"] != "directory":
        return str(found["ETag"]).strip('"')
    below = filesystem().find(key, detail=True)
    lines = [f"{name}\t{item['ETag']}\n" for name, item in sorted(below.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def below(key: str) -> dict[str, tuple[str, int]]:
    """ETag and size of every object below a prefix; one request per thousand."""
    found = filesystem().find(key, detail=True)
    return {name: (str(item["ETag"]).strip('"'), int(item["size"])) for name, item in found.items()}


def code(err: BaseException) -> str:
    """The S3 error code behind an OSError of s3fs, or ""."""
    response = getattr(err.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if response else ""
