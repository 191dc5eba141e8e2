"""Proves which errors end a command with which exit code."""

from __future__ import annotations

import inspect
import re

import pytest

from pipeline import errors
from pipeline.errors import (
    LedgerError,
    OmniferError,
    PartDone,
    RecordError,
    RunError,
    SourceError,
    UserError,
    told,
)

TREE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, OmniferError)
]


def test_tree__is_the_one_in_the_docstring() -> None:
    drawn = re.findall(r"^( *)(\w+Error|PartDone)\b", errors.__doc__ or "", flags=re.M)
    path: list[str] = []
    parents = {}
    for indent, name in drawn:
        depth = len(indent) // 4
        path[depth:] = [name]
        parents[name] = path[depth - 1] if depth else "Exception"
    assert parents == {kind.__name__: kind.__base__.__name__ for kind in TREE}


@pytest.mark.parametrize("kind", TREE)
def test_exit_code__two_for_what_a_person_can_mend(kind: type[OmniferError]) -> None:
    well = issubclass(kind, PartDone)
    assert kind.exit_code == (0 if well else 2 if issubclass(kind, UserError) else 1)


def test_user_and_run_errors__have_no_heir_in_common() -> None:
    assert not [kind for kind in TREE if issubclass(kind, UserError) and issubclass(kind, RunError)]


def test_record_error__keeps_reason_and_detail() -> None:
    error = RecordError("truncated", "17 of 90 bytes")
    assert (error.reason, error.detail) == ("truncated", "17 of 90 bytes")
    assert str(error) == "truncated: 17 of 90 bytes"
    assert str(RecordError("blank")) == "blank"


@pytest.mark.parametrize("kind", [SourceError, LedgerError])
def test_told__ours_keeps_its_class_and_first_line(kind: type[OmniferError]) -> None:
    found = told(kind("a.tar: no such file\nconsider raising the limit"), "embed")
    assert type(found) is kind
    assert str(found) == "a.tar: no such file"


def test_told__others_become_a_run_error_in_one_line() -> None:
    found = told(ValueError("a\n  b"), "embed")
    assert type(found) is RunError
    assert str(found) == "embed: ValueError: a b"
