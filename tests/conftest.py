"""What several test folders share: one tiny run of the whole flow."""

import os
from pathlib import Path

import pytest

# torch reads it when it is imported: test processes share cores, and figures hang on the threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers import flow

from pipeline import conduct

PLAIN, SHARED, OWN = range(3)


def _kind(item: pytest.Item) -> int:
    """Whether a test needs no Ray, the one that tests share, or one of its own."""
    if item.get_closest_marker("ray") is not None:
        return OWN
    return SHARED if {"tiny_run", "local_ray"} & set(getattr(item, "fixturenames", ())) else PLAIN


@pytest.fixture
def local_ray() -> None:
    """A local Ray, the same one for all tests that name it."""
    flow.SharedRay.start()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that do not share a Ray find none."""
    if _kind(item) != SHARED:
        flow.SharedRay.end()


def pytest_sessionfinish() -> None:
    """What was shared ends with the last test."""
    flow.SharedRay.end()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of `flow.tiny()`; about a minute, so nobody may change it."""
    root = tmp_path_factory.mktemp("tiny") / "run"
    threads = torch.get_num_threads()
    flow.SharedRay.start()
    conduct.run_all(flow.start(flow.tiny(), root), None)
    torch.set_num_threads(threads)
    return root


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist a file stays with one process, and all that start Ray or share a run with one.

    Tests that share a Ray run before those that start their own, and in one process after those
    that need none.
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    items.sort(key=lambda item: _kind(item) if alone else _kind(item) == OWN)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path) if _kind(item) == PLAIN else "ray"))
