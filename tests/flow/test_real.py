"""Proves on real faces that a run can be judged on a test set it has never seen."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import flow

from pipeline import conduct
from pipeline.training.handed import FACES_FILE

MOVED = 500
DATA = os.environ.get("OMNIFER_DATA")

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(DATA is None, reason="OMNIFER_DATA is not set"),
]


def test_run_all__training_rows_moved_out_as_the_test(tmp_path: Path) -> None:
    """500 Training rows leave the set; the recipe never saw them until `labeled.test` names them.

    A few of them have an identical or altered twin among the rest of Training. Those twins leave
    the training side once the 500 are the test, so the teachers may start over; where none
    trained, nothing is scored again.
    """
    table = pq.read_table(Path(str(DATA)) / "fer2013" / "fer2013.parquet")
    usage = table["usage"].to_pylist()
    training = [row for row, name in enumerate(usage) if name == "Training"]
    public = [row for row, name in enumerate(usage) if name == "PublicTest"]
    moved, known = tmp_path / "moved.parquet", tmp_path / "known.parquet"
    pq.write_table(table.take(pa.array(training[:MOVED])), moved)
    pq.write_table(table.take(pa.array([*training[MOVED:4000], *public[:300]])), known)
    sets = (
        f"labeled={{kind: ferplus, path: {known}, fraction: 0.15}}",
        "pool=[{kind: rest, name: rest}]",
        "slice_faces=1024",
        "search=null",
        "distill=null",
        "tune=null",
        "select={policy: all}",
        flow.UNTRACKED,
    )
    job = conduct.start(flow.tiny(*sets), str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)
    scored = flow.digests(job, ("teach", "embed", "score"))
    before = flow.finished(tmp_path / "run")

    recipe = flow.tiny(*sets, f"labeled.test={moved}")
    job = conduct.start(recipe, str(tmp_path / "run"), fresh=False, show_faces=False)
    conduct.run_all(job, None)
    new = {at.split("/")[0] for at in set(flow.finished(tmp_path / "run")) - set(before)}
    assert {"test", "guard", "evaluate"} <= new
    assert not new & {"labeled", "survey"}
    trained_on_a_twin = "teach" in new
    assert (flow.digests(job, tuple(scored)) == scored) != trained_on_a_twin
    tested = pq.read_table((job.run.artifact("test").dir / FACES_FILE).local_path())
    assert 0 < tested.num_rows <= MOVED  # those that have a majority label
