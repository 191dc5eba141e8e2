"""Proves that every verb can be submitted as a job, by one real submission to a local head."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stages import STAGES

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
RAY = Path(sys.executable).with_name("ray")


def verb(job: Path) -> str:
    (found,) = re.findall(r'sys\.argv = \["omnifer", "(\w+)"', job.read_text(encoding="utf-8"))
    return str(found)


def test_jobs__one_per_stage_and_one_for_all() -> None:
    assert sorted(map(verb, JOBS)) == sorted(["run", "active", "annotate", *STAGES])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_jobs__name_hides_no_module(job: Path) -> None:
    """Python puts the folder of a script first on its path."""
    assert job.stem not in sys.stdlib_module_names
    assert job.stem == verb(job) or verb(job) in job.stem


def test_jobs__runs_without_an_installed_package(tmp_path: Path) -> None:
    """As in the copied working folder of a job: another folder, nothing on the path."""
    job = [sys.executable, str(ROOT / "jobs" / "run.py"), str(tmp_path / "gone.yaml")]
    done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "gone.yaml: no such recipe" in done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a head with token authentication, and the environment that may talk to it."""
    pytest.importorskip("aiohttp_cors", reason="the job server needs ray[default]")
    port, dashboard = _free_port(), _free_port()
    env = {
        **os.environ,
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "port": port,
        "dashboard-port": dashboard,
        # Its default is one fixed port: beside another Ray no agent would come up to run jobs.
        "dashboard-agent-listen-port": _free_port(),
        "num-cpus": 2,
        "object-store-memory": 300_000_000,
        # Sockets lie in here, and their paths may hold 107 characters.
        "temp-dir": tmp_path_factory.mktemp("h"),
    }
    command = [RAY, "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    address = f"http://127.0.0.1:{dashboard}"
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(address, process)
        yield address, env
    finally:
        process.send_signal(signal.SIGTERM)  # ends everything that the head started
        process.wait(60)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_jobs__a_real_submission(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = head
    sets = ["pool.0.count=600", "labeled.count=80", "labeled.test_count=40"]
    job = ["python", "jobs/run.py", "jobs/recipes/demo.yaml", "--until", "survey"]
    options = [f"--run={tmp_path / 'run'}", *(f"--set={item}" for item in sets)]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    until = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [*submit, *job, *options],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=500,
        )
        # The job server answers some seconds before the agent that runs jobs is there.
        if "No available agent" not in done.stderr or time.monotonic() > until:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survey: 600/600 faces" in done.stdout
    assert list((tmp_path / "run" / "survey").glob("g001-*/done-*.json"))

    failed = subprocess.run(
        [*submit, *job[:2], "gone.yaml"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert failed.returncode == 1  # whatever the code of the job
    assert "omnifer: gone.yaml: no such recipe" in failed.stdout


def submit(env: dict[str, str], *options: str, log: Path) -> subprocess.CompletedProcess[str]:
    """`omnifer submit` of the first stage of a small demo."""
    sets = ["pool.0.count=600", "labeled.count=80", "labeled.test_count=40"]
    command = [sys.executable, "-m", "pipeline.cli", "submit", "jobs/recipes/demo.yaml"]
    return subprocess.run(
        [*command, "--until", "survey", *(f"--set={item}" for item in sets), *options],
        cwd=ROOT,
        env={**env, "HOME": str(log)},  # no token of this machine's user
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_submit__runs_joins_and_resumes(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """The environment's RAY_AUTH_MODE is not needed: a token is shown where one is at hand."""
    address, env = head
    run = f"--run={tmp_path / 'run'}"
    mine = {name: value for name, value in env.items() if name != "RAY_AUTH_MODE"}
    first = submit(mine, run, f"--address={address}", "--no-wait", log=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (job,) = re.findall(r"^(demo-run-[0-9a-f]{8}-1): \d+ files, [0-4]\.\d MB", first.stdout, re.M)

    joined = submit({**mine, "RAY_ADDRESS": address}, run, log=tmp_path)
    assert joined.returncode == 0, joined.stdout + joined.stderr
    assert f"{job}: under way already" in joined.stdout
    assert joined.stdout.count("survey: 600/600 faces") == 1

    again = submit(mine, run, f"--address={address}", log=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{job[:-1]}2: " in again.stdout
    assert "survey: 600" not in again.stdout  # it was done; the second job says so and ends
    assert re.search(r"^survey +[0-9a-f]{12} .*rows 600", again.stdout, re.M)

    failed = submit(mine, run, f"--address={address}", "--set=pool.0.count=601", log=tmp_path)
    assert failed.returncode == 2  # the job's own code: another plan needs --fresh
    assert "exit code 2" in failed.stdout


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("held", "said"),
    [({}, "wants a token"), ({"RAY_AUTH_TOKEN": "0" * 64}, "does not accept the token")],
)
def test_submit__without_the_token_is_refused(
    head: tuple[str, dict[str, str]], tmp_path: Path, held: dict[str, str], said: str
) -> None:
    address, env = head
    bare = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
    done = submit(
        {**bare, **held}, f"--run={tmp_path / 'run'}", f"--address={address}", log=tmp_path
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert env["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the job server answers; it refuses us, since we show no token."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        status = _status(f"{address}/api/version")
        if status is not None:
            assert status == 401
            return
        time.sleep(0.5)
    raise TimeoutError(f"no answer from {address}; head ended with {process.poll()}")


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
