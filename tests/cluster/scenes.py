"""What happens to clusters, on this machine: nodes die, come and go, the head dies.

Each scene starts its own Ray nodes (tests/helpers/nodes.py), ends all of them, and returns what was
seen; tests/cluster/test_cluster.py and the bench `cluster` say what must hold. Faces are drawn and
networks tiny: the scenes are about the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.run import Run
from pipeline.stages import STAGES
from tests.bench.resume import PASS, digests, scored
from tests.helpers import flow, nodes, servers
from tests.helpers.s3 import s3_bucket

RECIPE = "jobs/recipes/demo.yaml"
SETS = (*flow.TINY, "pool.0.count=1216", "teach.steps=20", flow.UNTRACKED)
"""Nineteen slices of 64 faces."""
DRIVER = nodes.ROOT / "tests" / "chaos" / "driver.py"
TRAINER = nodes.ROOT / "tests" / "cluster" / "trainer.py"
NODES = 3
SPREAD = (f"stream.cpus={NODES}", f"embed.pool=[{NODES},{NODES}]", "embed.num_cpus=0.75")
"""One embedding actor on each node of one CPU, beside a read task."""
PATIENCE = 600.0


class Waited(Exception):
    """Something did not come about in time."""


@dataclass
class Running:
    """A command of ours that runs."""

    process: subprocess.Popen[bytes]
    log: Path

    def until(self, met: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Wait for something while the command runs.

        Raises:
            Waited: the command ended, or the time.
        """
        end = time.monotonic() + seconds
        while not met():
            if self.process.poll() is not None:
                raise Waited(f"{what}: the command ended with {self.process.poll()}; {self.end()}")
            if time.monotonic() > end:
                raise Waited(f"{what}: not in {seconds:.0f} s; {self.end()}")
            time.sleep(0.05)

    def code(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code; None if it does not end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def end(self) -> str:
        """The end of its output."""
        return " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])


@contextlib.contextmanager
def running(argv: Sequence[str], log: Path, cluster: nodes.Node | None = None) -> Iterator[Running]:
    """Run a command of ours, on a cluster or on a local Ray; it is killed when the block ends."""
    given = {**(os.environ if cluster is None else cluster.env), "PYTHONPATH": nodes.SOURCES}
    given |= {"OMP_NUM_THREADS": "1"}
    given.pop("RAY_ADDRESS", None)
    if cluster is not None:
        given["RAY_ADDRESS"] = cluster.address
    with log.open("ab") as out:
        process = subprocess.Popen(
            list(argv), cwd=nodes.ROOT, env=given, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield Running(process, log)
    finally:
        nodes.Node(process, "", {}).kill()


def omnifer(root: Path, work: Path, cluster: nodes.Node | None = None, *sets: str) -> None:
    """`omnifer run` up to the scores."""
    given = [part for item in (*SETS, *sets) for part in ("--set", item)]
    argv = [sys.executable, "-m", "pipeline.cli", "run", RECIPE, "--run", str(root)]
    with running([*argv, "--until", "score", *given], work / "run.log", cluster) as run:
        if code := run.code():
            raise Waited(f"omnifer run ended with {code}: {run.end()}")


@contextlib.contextmanager
def slow_driver(root: Path, work: Path, cluster: nodes.Node, *sets: str) -> Iterator[Running]:
    """A driver that embeds and scores with slow reads (tests/chaos/driver.py)."""
    argv = [sys.executable, str(DRIVER), str(root), *SETS, *sets]
    with running(argv, work / "driver.log", cluster) as driver:
        yield driver


def single_node(work: Path) -> Path:
    """A finished run of one node, which the others are compared with; made once."""
    root = work / "whole"
    if not any(root.glob("score/g*/done*.json")):
        omnifer(root, work)
    return root


def open_run(whole: Path, root: Path) -> Path:
    """A copy of the run in which nothing is embedded yet."""
    return flow.copy(whole, root, without=PASS)


def node_loss(work: Path, whole: Path, targets: Sequence[int] = (2, 7)) -> dict[str, Any]:
    """Two of three nodes die by SIGKILL while faces are scored; the third one finishes.

    Args:
        work: an empty folder with a short path.
        whole: the run of one node.
        targets: slices that are scored when a node with an embedding actor dies.
    """
    root = open_run(whole, work / "run")
    killed = []
    with ExitStack() as stack:
        head = stack.enter_context(nodes.head(work, cpus=0))
        alive = [stack.enter_context(nodes.worker(head)) for _ in range(NODES)]
        driver = stack.enter_context(slow_driver(root, work, head, *SPREAD))
        for target in targets:
            driver.until(lambda t=target: scored(root) >= t, f"{target} slices scored")
            driver.until(lambda: any(map(embeds, alive)), "an actor on a node")
            victim = next(filter(embeds, alive))
            alive.remove(victim)
            victim.kill()
            killed.append(scored(root))
        code = driver.code()
        end = driver.end()
    return {
        "slices": scored(whole),
        "scored_at_death": killed,
        "exit_code": code,
        "said": end if code != 0 else "",
        "manifest_equal": code == 0 and digests(root) == digests(whole),
    }


def embeds(node: nodes.Node) -> bool:
    """Whether an actor of the pass runs on a node."""
    return node.runs("ray::", "Map")


def head_restart(work: Path, whole: Path, target: int = 3) -> dict[str, Any]:
    """The head is killed while faces are scored; `omnifer run` goes on at another head."""
    root = open_run(whole, work / "run")
    soon = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}  # that a driver waits for a dead head
    with (
        nodes.head(_folder(work / "a"), cpus=2, extra=soon) as head,
        slow_driver(root, work, head) as driver,
    ):
        driver.until(lambda: scored(root) >= target, f"{target} slices scored")
        head.kill()
        code = driver.code(120)
    before = commits(root)
    with nodes.head(_folder(work / "b"), cpus=2) as head:
        omnifer(root, work, head, "stream.cpus=2")
    after = commits(root)
    return {
        "slices": scored(whole),
        "scored_at_death": len(before),
        "exit_code": code,
        "committed_again": sum(after.get(name) != at for name, at in before.items()),
        "manifest_equal": digests(root) == digests(whole),
    }


def commits(root: Path) -> dict[str, int]:
    """When each score was committed, in ns."""
    found = root.glob("score/g*/commits/*/*.json")
    return {at.name: at.stat().st_mtime_ns for at in found}


def submission(work: Path) -> dict[str, Any]:
    """`ray job submit` of the demo, shrunk: a head with a token, runs on S3, MLflow on PostgreSQL.

    Where it is done, S3 is a server in this process, and the others are processes of their own.
    """
    with ExitStack() as stack:
        bucket = stack.enter_context(s3_bucket())
        store = stack.enter_context(servers.postgres())
        tracking = stack.enter_context(servers.mlflow(store, work))
        port = nodes.free_port()
        options = {"include-dashboard": "true", "dashboard-host": "127.0.0.1"}
        options["dashboard-port"] = str(port)
        head = stack.enter_context(nodes.head(work, cpus=2, options=options, store=300_000_000))
        address, root = f"http://127.0.0.1:{port}", bucket / "demo"
        seen = _refused(address)
        given = [*flow.TINY, f"tracking.uri={tracking}"]
        job = ["python", "jobs/run.py", RECIPE, "--run", root.uri]
        job += [part for item in given for part in ("--set", item)]
        submit = [str(nodes.RAY), "job", "submit", "--address", address, "--working-dir", "."]
        log = work / "submit.log"
        end = time.monotonic() + PATIENCE
        while True:  # the server answers some seconds before the agent that runs jobs is there
            with running([*submit, "--", *job], log, head) as submitted:
                code = submitted.code(2 * PATIENCE)
            if "No available agent" not in log.read_text() or time.monotonic() > end:
                break
            log.unlink()
            time.sleep(2)
        said = log.read_text(errors="replace")
        stages = [name for name in STAGES if Run(root).latest(name) is not None]
        return {
            "without_token": seen,
            "exit_code": code,
            "said": " | ".join(said.strip().splitlines()[-3:]) if code != 0 else "",
            "table": "student" in said and "control_b" in said,
            "stages": stages,
            "report": (root / "report.html").exists(),
            "tracked": servers.statuses(store),
        }


def _refused(address: str) -> int | None:
    """What the job server answers who shows no token."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.5)
    return None


def autoscaling(work: Path, whole: Path, *, idle_minutes: float = 0.2) -> dict[str, Any]:
    """Nodes come for a pass and go after it: none, three, none."""
    root = open_run(whole, work / "run")
    with nodes.autoscaling(work, most=NODES, idle_minutes=idle_minutes) as head:
        before = most = head.raylets() - 1
        with slow_driver(root, work, head, *SPREAD) as driver:
            end = time.monotonic() + PATIENCE
            while driver.process.poll() is None and time.monotonic() < end:
                most = max(most, head.raylets() - 1)
                time.sleep(0.2)
            code, said = driver.code(1), driver.end()
        began = time.monotonic()
        while (left := head.raylets() - 1) > 0 and time.monotonic() - began < PATIENCE / 2:
            time.sleep(0.2)
        gone = time.monotonic() - began
    return {
        "nodes_before": before,
        "nodes_most": most,
        "nodes_after": left,
        "gone_seconds": round(gone, 1),
        "exit_code": code,
        "said": said if code != 0 else "",
        "manifest_equal": code == 0 and digests(root) == digests(whole),
    }


def train_node_loss(work: Path, steps: int = 24, target: int = 8) -> dict[str, Any]:
    """Two workers of Ray Train on two nodes, one of which dies; a third node stands by.

    The undisturbed run is one of the same function on the same nodes.
    """
    with ExitStack() as stack:
        head = stack.enter_context(nodes.head(work, cpus=0))
        alive = [stack.enter_context(nodes.worker(head)) for _ in range(NODES)]
        whole = _train(work / "whole", work, head, steps)
        at = work / "lost"
        with trainer(at, work, head, steps) as training:
            training.until(lambda: done(at) >= target, f"{target} steps trained")
            victim = next(node for node in alive if node.runs("ray::", "TrainWorker"))
            victim.kill()
            died_at, code = done(at), training.code()
            end = training.end()
        lost = json.loads((at / "found.json").read_text()) if code == 0 else {}
    return {
        "steps": steps,
        "steps_at_death": died_at,
        "exit_code": code,
        "said": end if code != 0 else "",
        "starts": lost.get("starts"),
        "loss": [whole["loss"], lost.get("loss")],
        "largest_difference": _apart(whole["weights"], lost.get("weights")),
    }


@contextlib.contextmanager
def trainer(at: Path, work: Path, cluster: nodes.Node, steps: int) -> Iterator[Running]:
    """A driver of two training workers (tests/cluster/trainer.py)."""
    at.mkdir()
    argv = [sys.executable, str(TRAINER), str(at), str(steps)]
    with running(argv, work / "train.log", cluster) as run:
        yield run


def _train(at: Path, work: Path, cluster: nodes.Node, steps: int) -> dict[str, Any]:
    with trainer(at, work, cluster, steps) as training:
        if code := training.code():
            raise Waited(f"the undisturbed training ended with {code}: {training.end()}")
    return dict(json.loads((at / "found.json").read_text()))


def done(at: Path) -> int:
    """Steps of the newest checkpoint."""
    names = [file.stem for file in at.glob("checkpoints/step-*.safetensors")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def _apart(one: Sequence[float], other: Sequence[float] | None) -> float | None:
    if other is None or len(one) != len(other):
        return None
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _folder(at: Path) -> Path:
    at.mkdir()
    return at
