"""Who may talk to a Ray head: its job server runs whatever it is sent, so a token must guard it.

Ray's token is one secret that every node and every client of a cluster holds. It is looked for
where Ray 2.60 looks for it. Without a token a job server is only as safe as the network before it:
we talk to such a one on this machine alone.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import ConfigError

OWN = ("auto", "local")
"""Addresses by which Ray means this machine."""
DEFAULT_SERVER = "http://127.0.0.1:8265"
SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"
_OWN = re.compile(r"(?:0{16}F{4}0{4})?[0-9A-F]{6}7F|0{24}01000000", re.I)
"""127.0.0.0/8, the same as an IPv6 address, and ::1, in the byte order of those lists."""

_VERSION = "/api/version"
PATIENCE = 10.0
"""Seconds that a job server has to answer."""


def server_address(given: str | None) -> str:
    """URL of the job server: as given, else of the environment, else Ray's default here.

    Raises:
        ConfigError: not http(s)://host:port; the address of a cluster (host:6379) is another one.
    """
    environment = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    named = next((os.environ[name] for name in environment if os.environ.get(name)), None)
    address = (given or named or DEFAULT_SERVER).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            "job server: expected http(s)://host:port without a user, as in --address "
            f"{DEFAULT_SERVER}; got {parts.scheme or 'no scheme'}://"
        )
    return address


def is_loopback(address: str) -> bool:
    """Whether an address, host:port or URL, is this machine's own and reachable by nobody else."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token() -> str | None:
    """RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token; None: no token.

    Also None if RAY_AUTH_MODE turns tokens off.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if held := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return held
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def wants_token(server: str) -> bool | None:
    """Whether a job server refuses those who show no token; None: nobody answers.

    Asks without showing one, so nothing is told to a stranger.
    """
    status = _status(f"{server}{_VERSION}")
    return None if status is None else status in (401, 403)


def refusal(server: str) -> str | None:
    """Why jobs should not be sent to this server, in one line; None: they may be."""
    wants = wants_token(server)
    if wants is None:
        return f"no job server answers at {server}"
    if not wants and (not is_loopback(server) or listens_outside(urlsplit(server).port or 80)):
        return (
            f"{server} runs jobs of everybody who reaches it; start the head with "
            "RAY_AUTH_MODE=token and bind its dashboard to 127.0.0.1"
        )
    shown = token()
    if wants and shown is None:
        return (
            f"{server} wants a token; expected RAY_AUTH_TOKEN, a file named by "
            "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token (and RAY_AUTH_MODE unset or token)"
        )
    if wants and _status(f"{server}{_VERSION}", shown) != 200:
        return (
            f"{server} does not accept the token; expected the one that its head was started with"
        )
    return None


def stranger(address: str) -> str | None:
    """Why a run should not join the cluster at `address`, in one line; None: it may.

    Args:
        address: "auto", "local" or host:port, as Ray takes it.
    """
    if address in OWN or is_loopback(address) or token() is not None:
        return None
    return (
        f"{address}, and no token here: whoever reaches a head without a token runs code on it; "
        "start it with RAY_AUTH_MODE=token"
    )


def listens_outside(port: int, tables: Sequence[Path] = SOCKETS) -> bool:
    """Whether a process of this machine takes connections on a port that others can reach.

    Args:
        port: TCP port.
        tables: Linux's lists of sockets; without them the answer is no.
    """
    rows = [
        line.split() for at in tables if at.exists() for line in at.read_text().splitlines()[1:]
    ]
    hosts = [row[1].split(":") for row in rows if row[3] == _LISTENING]
    return any(int(on, 16) == port and not _OWN.fullmatch(host) for host, on in hosts)


def _status(url: str, shown: str | None = None) -> int | None:
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        asked = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            json.load(answer)  # a job server tells its version; anything else is not one
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):  # the last: it speaks no HTTP
        return None
