"""Proves that a run on S3 passes its stages and that no credential is printed or stored.

Up to search: Ray Tune hands credentials to its trials, and Ray logs what it hands on.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import flow
from helpers.s3 import s3_bucket

from pipeline.run import Run
from pipeline.storage import Location
from tests.bench.omni import leaks

pytestmark = pytest.mark.ray


def omnifer(root: Location, ray: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, with its own folder for what Ray writes."""
    sets = [part for item in flow.TINY for part in ("--set", item)]
    argv = [sys.executable, "-m", "pipeline.cli", "run", str(flow.DEMO), "--run", root.uri]
    return subprocess.run(
        [*argv, *sets, *options],
        env={**os.environ, "RAY_TMPDIR": str(ray)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=220,
    )


@pytest.mark.slow
def test_run__on_s3_tells_no_secret() -> None:
    secret = secrets.token_urlsafe(30)
    with s3_bucket(secret=secret) as runs, tempfile.TemporaryDirectory(prefix="omni-") as folder:
        ray, log = Path(folder) / "r", Path(folder) / "log"
        ray.mkdir()
        root = runs / "demo"
        done = omnifer(root, ray, "--until", "search", "--set", "teach.steps=4")
        assert done.returncode == 0, done.stdout[-2000:]
        missing = "pool=[{kind: msceleb_tsv, path: 's3://faces/gone/a.tsv'}]"
        gone = omnifer(runs / "gone", ray, "--until", "survey", "--set", missing)
        assert gone.returncode == 2, gone.stdout[-2000:]
        assert "s3://faces/gone/a.tsv: no such file" in gone.stdout
        log.write_text(done.stdout + gone.stdout)
        assert Run(root).artifact("embed").facts["rows"] == 600
        assert any(file.is_file() for file in ray.rglob("*.log"))
        assert leaks(secret, [log, *ray.rglob("*")], runs) == []
