"""What several test folders share: one tiny run of the whole flow."""

import os
from pathlib import Path

import pytest

# torch reads it when it is imported: test processes share cores, and figures hang on the threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers import flow

from pipeline import conduct


@pytest.fixture
def local_ray() -> None:
    """A local Ray, the same one for all tests that name it."""
    flow.SharedRay.start()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that start a Ray of their own find none."""
    if item.get_closest_marker("ray") is not None:
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

    Tests that share a Ray run before those that start their own.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
    for item in items:
        shared = {"tiny_run", "local_ray"} & set(getattr(item, "fixturenames", ()))
        marked = item.get_closest_marker("ray") is not None
        name = "ray" if shared or marked else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
