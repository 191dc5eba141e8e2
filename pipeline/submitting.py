"""`omnifer submit`: send a recipe to a Ray cluster as a job, follow it, end with its exit code.

What travels is small: the files of this package that git tracks, the recipe, and the variables that
the recipe names. Credentials do not travel; nodes have their own.

A job's id says what it works on: recipe, run folder, and the number of the attempt. Whoever submits
a job that is under way is connected to it; one that ended, well or not, is submitted again and
resumes, as the same command does on one machine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__, access
from pipeline.calling import public
from pipeline.claim import WHOLE, Part
from pipeline.config import digest
from pipeline.errors import ConfigError, RunError
from pipeline.progress import console
from pipeline.recipe import Recipe
from pipeline.storage import Location, location

SENT = ("pipeline", "jobs", "pyproject.toml")
LOST_TIMES = 30
"""Times in a row that a job server may fail to answer before we stop following, a PAUSE apart."""
PAUSE = 2.0
AGENT_SECONDS = 120.0
"""A head answers before the agent that runs its jobs is there."""


@dataclass(frozen=True)
class Asked:
    """What a job is to do: `omnifer VERB RECIPE OPTIONS` on the cluster."""

    recipe: Recipe
    file: Path
    run: Location
    verb: str = "run"
    part: Part = WHOLE
    options: tuple[str, ...] = ()
    """As on the command line, less --run and --part."""

    @property
    def stem(self) -> str:
        """The job's id without its attempt: the same for the same work on the same run."""
        work = digest([self.run.uri, self.verb, self.part.name])[:8]
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', self.recipe.name)}-{self.verb}-{work}"

    @property
    def entrypoint(self) -> str:
        """The command, quoted for a shell."""
        part = () if self.part == WHOLE else ("--part", str(self.part))
        argv = ["python", "-m", "pipeline.cli", self.verb, self.file.name, "--run", self.run.uri]
        return shlex.join([*argv, *part, *self.options])


def ask(
    recipe: Recipe, file: Path, run_dir: str | None, verb: str, part: Part, options: Sequence[str]
) -> Asked:
    """Check that what is asked makes sense on another machine.

    Raises:
        ConfigError: the run folder is relative, so every node would look elsewhere.
    """
    given = recipe.folder(run_dir)
    if "://" not in given and not Path(given).is_absolute():
        raise ConfigError(
            f"--run: {given!r} is relative; expected s3://... or a path that all nodes share"
        )
    return Asked(recipe, file, location(given), verb, part, tuple(options))


def next_id(stem: str, jobs: Iterable[tuple[str, bool]]) -> tuple[str, bool]:
    """(id, whether it is under way already) for work called `stem`.

    Args:
        stem: see :attr:`Asked.stem`.
        jobs: (submission id, ended) of all jobs that the cluster knows.
    """
    found = re.compile(rf"{re.escape(stem)}-(\d+)")
    attempts = {int(m[1]): ended for job, ended in jobs if (m := found.fullmatch(job))}
    for attempt, ended in attempts.items():
        if not ended:
            return f"{stem}-{attempt}", True
    return f"{stem}-{max(attempts, default=0) + 1}", False


def package(root: Path, recipe: Path, into: Path) -> tuple[int, int]:
    """Copy what a job needs into an empty folder: (files, bytes).

    In a checkout that is what git tracks of :data:`SENT`, as it is in the working tree; of an
    installed package all its files. Nothing that is merely there is taken along.
    """
    count = size = 0
    for name in [*(_tracked(root) or _installed(root))]:
        source = root / name
        if source.is_file():  # tracked, and deleted in the working tree
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            count, size = count + 1, size + source.stat().st_size
    shutil.copyfile(recipe, into / recipe.name)
    return count + 1, size + recipe.stat().st_size


def untracked(root: Path) -> list[str]:
    """Modules that git does not track, and so no job will have."""
    others = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *SENT)
    return [name for name in others if name.endswith(".py")]


def _tracked(root: Path) -> list[str]:
    return _git(root, "ls-files", "-z", "--", *SENT)


def _git(root: Path, *arguments: str) -> list[str]:
    """Names, relative to `root`; none where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


def _installed(root: Path) -> list[str]:
    files = (root / "pipeline").rglob("*")
    named = (at.relative_to(root) for at in files if at.is_file())
    return [str(name) for name in named if "__pycache__" not in name.parts]


def submit(
    asked: Asked,
    address: str | None,
    variables: Mapping[str, str],
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    wait: bool = True,
) -> int:
    """Submit, or join what is under way; print the job's log and return its exit code.

    Args:
        asked: the work.
        address: of the job server; None: see :func:`pipeline.access.server_address`.
        variables: environment of the job, and visible to all who may use the job server.
        cpus: that the driver reserves; 0 starts it on the head and reserves nothing there.
        gpus: the same; a driver that trains on a GPU itself (`train.workers: 0`) needs one.
        wait: follow the job to its end; else return 0 once it is submitted.

    Raises:
        ConfigError: nobody answers, no token, a server that asks nobody for one, or the work is
            under way with other options.
        RunError: the server refuses the job, or answers no more.
    """
    server = access.server_address(address)
    if why := access.refusal(server):
        raise ConfigError(why)
    client = _client(server)
    with _answering(server):
        jobs = _jobs(client)
    job, joined = next_id(asked.stem, [(name, ended) for name, ended, _ in jobs])
    if joined:
        _same_work(job, asked, next(how for name, _, how in jobs if name == job))
        _say(f"{job}: under way already; its log follows")
    else:
        with tempfile.TemporaryDirectory(prefix="omnifer-job-") as folder, _answering(server):
            job = _send(client, asked, job, Path(folder), variables, cpus, gpus)
    if not wait:
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        _say(f"\n{job} goes on; submit again to follow it, `ray job stop {job}` ends it")
        return 130


def _send(
    client: Any,
    asked: Asked,
    job: str,
    folder: Path,
    variables: Mapping[str, str],
    cpus: float,
    gpus: float,
) -> str:
    root = Path(__file__).resolve().parents[1]
    count, size = package(root, asked.file, folder)
    if missing := untracked(root):
        _say(f"not sent, since git does not track it: {', '.join(missing)}")
    _say(f"{job}: {count} files, {size / 1e6:.1f} MB; {asked.entrypoint}")
    until = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            sent: str = client.submit_job(
                entrypoint=asked.entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(folder), "env_vars": dict(variables)},
                metadata={"omnifer": __version__, "run": public(asked.run.uri)},
                entrypoint_num_cpus=cpus,
                entrypoint_num_gpus=gpus,
            )
            return sent
        except RuntimeError as error:
            if "already exists" in str(error):  # somebody was faster by a moment
                return job
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise RunError(f"{job} was refused: {' '.join(str(error).split())}") from error
            time.sleep(2)


def follow(client: Any, job: str, pause: float = PAUSE) -> int:
    """Print a job's log until it ends; its exit code. Connects again where the line breaks.

    Raises:
        RunError: nobody answered `LOST_TIMES` times in a row.
    """
    log, lost = _Log(sys.stdout.write), 0
    while True:
        try:
            asyncio.run(log.tail(client, job))
        except _broken() as error:
            if not lost:
                _say(f"{job}: lost the log ({_line(error)[:120]}); trying again")
        try:
            info, lost = client.get_job_info(job), 0
        except _broken() as error:
            lost += 1
            if lost >= LOST_TIMES:
                raise RunError(
                    f"{job}: the job server does not answer ({_line(error)[:120]}); the job may go "
                    "on: submit again to follow it"
                ) from error
        else:
            if info.status.is_terminal():
                break
        time.sleep(pause)
    if str(info.status) == "SUCCEEDED":
        return 0
    code = info.driver_exit_code or 1
    why = (info.message or "").strip().splitlines()
    _say(f"{job}: {str(info.status).lower()}, exit code {code}; {why[0] if why else 'no reason'}")
    return int(code)


class _Log:
    """What was printed of a log; a new connection sends it from the beginning."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._printed = 0

    async def tail(self, client: Any, job: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(job):
            self._write(text[max(0, self._printed - seen) :])
            sys.stdout.flush()
            seen += len(text)
            self._printed = max(self._printed, seen)


def _client(server: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = server  # Ray lets it overrule the argument
    shown = access.token()
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        return JobSubmissionClient(server, headers=headers)
    except _broken() as error:
        raise ConfigError(f"{server}: {_line(error)}") from error


def _jobs(client: Any) -> list[tuple[str, bool, str]]:
    """Submission id, whether it ended, and entry point of all jobs that the cluster knows."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    return [(job.submission_id, job.status.is_terminal(), job.entrypoint) for job in jobs]


def _same_work(job: str, asked: Asked, entrypoint: str) -> None:
    if entrypoint != asked.entrypoint:
        raise ConfigError(
            f"{job} is under way with other options: {entrypoint!r}, asked for "
            f"{asked.entrypoint!r}; submit those to follow it, or end it: ray job stop {job}"
        )


def _broken() -> tuple[type[Exception], ...]:
    """What a line to a job server breaks with; not all of it is an OSError."""
    import aiohttp
    import requests

    return RuntimeError, OSError, requests.RequestException, aiohttp.ClientError


@contextmanager
def _answering(server: str) -> Iterator[None]:
    """RunError where the line breaks before a job is followed."""
    try:
        yield
    except _broken() as error:
        raise RunError(f"{server}: {_line(error)}; submit again") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
