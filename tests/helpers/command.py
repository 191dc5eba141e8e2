"""The command `omnifer` in this process: what it prints and its exit code."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from pipeline.cli import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def omnifer(*args: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omnifer", *map(str, args)])
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())
