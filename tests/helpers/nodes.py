"""Ray nodes on this machine, each a session of processes that can die at once, like a machine.

A node is `ray start --block` in a session of its own: whatever it starts stays in that session, so
that it is found and ended by number, also what outlives its parents. Nothing else is touched: no
`ray stop`, and addresses are written below the head's own folder.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
SOURCES = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
"""PYTHONPATH of whatever runs this package and imports what tests import."""
STORE = 100_000_000
"""Bytes of a node's object store."""
WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "8000",  # a busy machine is slow to answer and not dead
    "RAY_health_check_failure_threshold": "4",
}
"""A dead node is missed after seconds."""
STARTS = 4
"""Attempts to start a node."""
FAKE_HEAD = "f" * 51 + "00000"
"""What Ray's provider of nodes that are processes calls the head."""


@dataclass
class Node:
    """A running node."""

    process: subprocess.Popen[bytes]
    address: str
    """Host and port of the head, for RAY_ADDRESS."""
    env: dict[str, str]
    """Of who may talk to it."""

    def processes(self) -> dict[int, str]:
        """Command line by number, of all that this node started and that still runs."""
        return session(self.process.pid)

    def runs(self, *words: str) -> bool:
        """Whether one of its processes has all these words in its command line."""
        return any(all(word in title for word in words) for title in self.processes().values())

    def raylets(self) -> int:
        """Nodes that run in this session: the head's autoscaler starts its workers there."""
        titles = self.processes().values()
        return sum(Path(title.split(" ")[0]).name == "raylet" for title in titles)

    def kill(self) -> None:
        """SIGKILL for every process, as when the power goes."""
        until = time.monotonic() + 30
        while found := self.processes():
            for pid in found:
                _signal(pid, signal.SIGKILL)
            if time.monotonic() > until:
                raise TimeoutError(f"still there after SIGKILL: {sorted(found.values())}")
            time.sleep(0.05)
        self.process.wait()

    def end(self) -> None:
        """Let it end by itself for a while, then kill what is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()


@contextmanager
def head(
    folder: Path,
    *,
    cpus: int,
    extra: Mapping[str, str] | None = None,
    options: Mapping[str, object] | None = None,
    store: int = STORE,
    port: int | None = None,
) -> Iterator[Node]:
    """A head with token authentication and without dashboard.

    Args:
        folder: where it writes; short, since paths of sockets may hold 107 characters.
        cpus: logical CPUs that it gives to work.
        extra: environment of its processes.
        options: further options of `ray start`.
        store: bytes of its object store.
        port: that it listens on; None: a free one.
    """
    port = port or free_port()
    address = f"127.0.0.1:{port}"
    env = {
        **os.environ,
        **WATCHFUL,
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": SOURCES,
        "RAY_TMPDIR": str(folder),
        **(extra or {}),
    }
    env["RAY_ADDRESS"] = address  # some of Ray's own actors look for it, and find other heads
    asked = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "num-cpus": cpus,
        "object-store-memory": store,
        "temp-dir": folder,
        "include-dashboard": "false",
        # Its default is one fixed port: beside another Ray no agent would come up.
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        **(options or {}),
    }
    with _started(["--head", *_options(asked)], env, address, folder / "head.log") as node:
        yield node


@contextmanager
def worker(of: Node, *, cpus: int = 1) -> Iterator[Node]:
    """A node that has joined a head."""
    asked = {
        "address": of.address,
        "node-ip-address": "127.0.0.1",
        "num-cpus": cpus,
        "object-store-memory": STORE,
        "dashboard-agent-listen-port": free_port(),
    }
    log = Path(of.env["RAY_TMPDIR"]) / f"worker-{secrets.token_hex(4)}.log"
    with _started(_options(asked), of.env, of.address, log) as node:
        yield node


@contextmanager
def autoscaling(folder: Path, *, most: int, idle_minutes: float) -> Iterator[Node]:
    """A head without CPUs whose autoscaler starts and ends nodes of one CPU, in its session.

    Ray's AutoscalingCluster would end all Ray processes of this user, and wants a file that Ray's
    wheels lack; its provider of nodes that are processes works as an external one.
    """
    port = free_port()
    at = folder / "autoscaling.json"
    at.write_text(json.dumps(_autoscaled(f"127.0.0.1:{port}", most, idle_minutes)))
    extra = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
    }
    options = {"autoscaling-config": at}
    with head(folder, cpus=0, extra=extra, options=options, port=port) as node:
        yield node


def _autoscaled(address: str, most: int, idle_minutes: float) -> dict[str, object]:
    """What the autoscaler of a head reads; keys that only say nothing are those it insists on."""
    worker = {"resources": {"CPU": 1, "object_store_memory": STORE}, "node_config": {}}
    kinds = ("setup", "head_setup", "worker_setup", "initialization")
    commands = [*kinds, "head_start_ray", "worker_start_ray"]
    return {
        **{f"{kind}_commands": [] for kind in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "cluster_name": "local",
        "max_workers": most,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD,
            "launch_multiple": True,
        },
        "auth": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {**worker, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
    }


def session(number: int) -> dict[int, str]:
    """Command line by process number, of all living processes of a session."""
    found = {}
    for at in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, held = (at / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (at / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # gone meanwhile
        if int(held) == number and state != "Z":
            found[int(at.name)] = title
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def _started(options: list[str], env: dict[str, str], address: str, log: Path) -> Iterator[Node]:
    """A node that stands.

    Ray gives its own processes half a minute, which a busy machine may not have: then again.
    """
    for attempt in range(1, STARTS + 1):
        log.unlink(missing_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(RAY), "start", "--block", *options],
                env=env,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        node = Node(process, address, env)
        try:
            if _stands(node, log):
                yield node
                return
        finally:
            node.end()
        if attempt == STARTS:
            end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-2:])
            raise RuntimeError(f"no Ray node after {STARTS} attempts: {end}")


def _stands(node: Node, log: Path, seconds: float = 300) -> bool:
    """Wait until the node says so; False if it has ended."""
    until = time.monotonic() + seconds
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if node.process.poll() is not None:
            return False
        if time.monotonic() > until:
            raise TimeoutError(f"a node of {node.address} does not stand after {seconds:.0f} s")
        time.sleep(0.1)
    return True


def _options(asked: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in asked.items()]


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
