"""Proves on real Ray nodes what a cluster is promised: whoever dies, the same comes out.

python -m pytest -m cluster tests/cluster/test_cluster.py -k NAME      node_loss, head_restart,
                                                                       autoscaling, train_node
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import scenes
from tests.helpers import nodes, servers

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    at = Path(tempfile.mkdtemp(prefix="ray-"))
    yield at
    shutil.rmtree(at, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one node."""
    return scenes.single_node(tmp_path_factory.mktemp("whole"))


@pytest.mark.skipif(servers.missing() is not None, reason=str(servers.missing()))
def test_submission__finishes_on_s3_and_mlflow_on_postgresql(work: Path) -> None:
    found = scenes.submission(work)
    assert found["without_token"] == 401
    assert found["exit_code"] == 0, found["said"]
    assert found["table"]
    assert {"survey", "score", "select", "mine", "student", "evaluate"} <= set(found["stages"])
    assert found["report"]
    assert set(found["tracked"]) == {"FINISHED"}
    assert found["tracked"]["FINISHED"] > 10


def test_node_loss__two_of_three_die_and_the_manifest_is_that_of_one_node(
    work: Path, whole: Path
) -> None:
    found = scenes.node_loss(work, whole)
    assert found["exit_code"] == 0, found["said"]
    first, second = found["scored_at_death"]
    assert 2 <= first < second < found["slices"], "killed too late to show anything"
    assert found["manifest_equal"]


def test_head_restart__run_again_continues_what_was_committed(work: Path, whole: Path) -> None:
    found = scenes.head_restart(work, whole)
    assert found["exit_code"] != 0  # it cannot go on without its head; None: it waits for ever
    assert 3 <= found["scored_at_death"] < found["slices"], "killed too late to show anything"
    assert found["committed_again"] == 0
    assert found["manifest_equal"]


def test_autoscaling__nodes_come_for_the_pass_and_go_after_it(work: Path, whole: Path) -> None:
    found = scenes.autoscaling(work, whole)
    assert found["exit_code"] == 0, found["said"]
    counts = (found["nodes_before"], found["nodes_most"], found["nodes_after"])
    assert counts == (0, scenes.NODES, 0)
    assert found["manifest_equal"]


def test_train_node__dies_and_the_training_ends_as_if_it_had_not(work: Path) -> None:
    found = scenes.train_node_loss(work)
    assert found["exit_code"] == 0, found["said"]
    assert 8 <= found["steps_at_death"] < found["steps"], "killed too late to show anything"
    assert found["starts"] == 2
    assert found["largest_difference"] <= 1e-6
    assert found["loss"][1] == pytest.approx(found["loss"][0], abs=1e-6)


def test_session__is_empty_after_a_node_was_killed(work: Path) -> None:
    """The other scenes rest on it: a node is all of its processes, and none is left."""
    with nodes.head(work, cpus=1) as head:
        number = head.process.pid
        titles = " ".join(nodes.session(number).values())
        assert "gcs_server" in titles
        assert head.raylets() <= 1
        head.kill()
        assert nodes.session(number) == {}
