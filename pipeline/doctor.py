"""`omnifer doctor`: what this machine has, and what would stop a run before it starts.

Starts nothing, writes nothing.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import shutil
import socket
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pipeline import access
from pipeline.calling import public
from pipeline.posix import cores
from pipeline.tracking import OFF, TRACKING_URI

DASHBOARD_PORT = 8265
MIN_SHM_BYTES = 512 * 1024**2
MIN_DISK_BYTES = 5 * 1024**3
TRACKING_PATIENCE = 3.0
"""Seconds that a tracking server may take to answer."""
DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
PACKAGES = ("ray", "torch", "torchvision", "faiss-gpu", "pyarrow", "s3fs", "mlflow", "timm")


@dataclass(frozen=True)
class Finding:
    """One check: `ok` is False only for what would stop a run, or leave it unrecorded."""

    name: str
    ok: bool
    detail: str


def checks(tracking: str | None = None) -> list[Finding]:
    """Every check, in the order a run would meet the fault.

    Args:
        tracking: the MLflow tracking URI of a recipe; None: what the environment names.
    """
    return [
        _python(),
        *(_package(name) for name in PACKAGES),
        _cores(),
        _cuda(),
        _faiss(),
        _space("object store", Path("/dev/shm"), MIN_SHM_BYTES),
        _space("disk", Path.cwd(), MIN_DISK_BYTES),
        _address(),
        _dashboard(),
        _tracking(tracking),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed")


def _cores() -> Finding:
    return Finding("cpu cores", True, str(cores()))


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("cuda", True, "no GPU; everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("cuda", True, ", ".join(names))


def _faiss() -> Finding:
    try:
        import faiss
    except ImportError as err:
        return Finding("faiss", False, str(err))
    return Finding("faiss index", True, f"{faiss.get_num_gpus()} GPU(s) visible to FAISS")


def _space(name: str, at: Path, need: int) -> Finding:
    if not at.exists():
        return Finding(name, True, f"{at} does not exist here; not checked")
    free = shutil.disk_usage(at).free
    detail = f"{free / 1024**3:.1f} GiB free at {at}; {need / 1024**3:.1f} GiB wanted"
    return Finding(name, free >= need, detail)


def _address() -> Finding:
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not named:
        return Finding("ray address", True, "local (RAY_ADDRESS is not set)")
    if named.startswith(("http://", "https://")):
        why = access.refusal(access.server_address(named))
        return Finding("ray address", why is None, why or f"{named} takes our jobs")
    why = access.stranger(named)
    return Finding("ray address", why is None, why or named)


def _dashboard() -> Finding:
    """Whether a head of this machine lets others run jobs on it."""
    name = "ray dashboard"
    if not access.listens_outside(DASHBOARD_PORT):
        return Finding(name, True, f"port {DASHBOARD_PORT} is closed to other machines")
    if access.wants_token(access.DEFAULT_SERVER) is not False:
        return Finding(name, True, f"port {DASHBOARD_PORT} is open to others, who need the token")
    what = "runs jobs of everybody; --dashboard-host=127.0.0.1 and RAY_AUTH_MODE=token"
    return Finding(name, False, f"port {DASHBOARD_PORT} is open to others without a token: {what}")


def _tracking(uri: str | None) -> Finding:
    """Where runs are recorded, and whether that answers; a run goes on where it does not."""
    named = uri or os.environ.get(TRACKING_URI)
    if named == OFF:
        return Finding("tracking", True, "off")
    if not named:
        return Finding("tracking", True, f"SQLite in the run folder ({TRACKING_URI} is not set)")
    place, parts = public(named), urlsplit(named)
    if parts.hostname is None:
        return Finding("tracking", True, place)
    why = _silent(place, parts)
    if why is None:
        return Finding("tracking", True, f"{place} answers")
    return Finding("tracking", False, f"{place}: {why}; runs go on and tell it when it is back")


def _silent(uri: str, parts: SplitResult) -> str | None:
    """Why a tracking server or database is not there, in a few words; None: it is.

    Asked without user and password: who refuses that is there.
    """
    try:
        if parts.scheme in ("http", "https"):
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TRACKING_PATIENCE):
                return None
        port = parts.port or DATABASE_PORTS.get(parts.scheme.partition("+")[0])
        if port is not None:
            socket.create_connection((parts.hostname, port), TRACKING_PATIENCE).close()
    except urllib.error.HTTPError as err:
        return None if err.code in (401, 403) else f"answers {err.code} to /health"
    except (OSError, ValueError, http.client.HTTPException) as err:
        return f"does not answer within {TRACKING_PATIENCE:g} s ({type(err).__name__})"
    return None
