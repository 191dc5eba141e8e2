"""PostgreSQL, and MLflow on it, as processes of their own on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.helpers.nodes import Node, free_port

USER = "mlflow"
SECONDS = 300.0


def missing() -> str | None:
    """Why there can be no MLflow on PostgreSQL here; None where there can."""
    if _tool("initdb") is None or _tool("postgres") is None:
        return "no PostgreSQL: initdb and postgres are not on the path"
    if find_spec("psycopg2") is None:
        return "no driver of PostgreSQL: pip install -e .[dev]"
    return None


@contextmanager
def postgres() -> Iterator[str]:
    """An empty database of an empty server; its address as SQLAlchemy wants it, without secrets."""
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    owner = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    if owner is not None:
        shutil.chown(home, owner)
    port = free_port()
    data, log = home / "data", home / "log"
    initdb, server = str(_tool("initdb")), str(_tool("postgres"))
    try:
        subprocess.run(
            [initdb, "-D", str(data), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8"],
            user=owner, check=True, capture_output=True, cwd=home,
        )  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                [server, "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(home)],
                user=owner, stdout=out, stderr=out, start_new_session=True, cwd=home,
            )  # fmt: skip
        node = Node(process, "", {})
        try:
            _wait(lambda: "ready to accept connections" in log.read_text(), process, "PostgreSQL")
            yield f"postgresql+psycopg2://{USER}@127.0.0.1:{port}/postgres"
        finally:
            node.end()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def mlflow(store: str, folder: Path) -> Iterator[str]:
    """An MLflow server on a database; its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    options = ["--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    env = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store}
    with (folder / "mlflow.log").open("wb") as out:
        process = subprocess.Popen(
            [*command, *options], env=env, stdout=out, stderr=out, start_new_session=True
        )
    node = Node(process, "", {})
    try:
        _wait(lambda: _healthy(address), process, "MLflow")
        yield address
    finally:
        node.end()


def statuses(store: str) -> dict[str, int]:
    """Runs by status, asked of the database itself."""
    import psycopg2

    with psycopg2.connect(store.replace("+psycopg2", "")) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT status, count(*) FROM runs GROUP BY status")
        return {str(status): int(count) for status, count in cursor.fetchall()}


def _tool(name: str) -> Path | None:
    """A program of PostgreSQL; Debian keeps them off the path, by version."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), default=None)


def _wait(met: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not met():
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with {process.poll()}")
        if time.monotonic() > until:
            raise TimeoutError(f"{what} does not answer after {SECONDS:.0f} s")
        time.sleep(0.2)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
