"""Tracking nests stages below their run, finds a run again, and never ends one."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage import location
from pipeline.tracking import CALL_ENVIRONMENT, Graph, Tracker, connect, public


@pytest.fixture(scope="module")
def mlflow_imported() -> None:
    import mlflow  # noqa: F401  (seconds, which are not the server's)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, mlflow_imported: None) -> Path:
    """A run folder with one finished and one failed stage in a real SQLite store."""
    folder = tmp_path_factory.mktemp("run") / "first"
    tracker = connect(None, "faces", location(folder))
    note = folder / "note.txt"
    note.write_text("seen")
    with tracker.stage("teach", {"teach.steps": 600, "teach.lr": 0.002}) as child:
        for step in range(3):
            child.metrics({"loss": 1.0 / (step + 1)}, step=step)
        child.file(note)
    with pytest.raises(ZeroDivisionError), tracker.stage("embed", {}):
        _ = 1 / 0
    tracker.close()
    return folder


def _client(folder: Path):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def _runs(folder: Path) -> tuple[list, list]:
    """Parents and children of the experiment."""
    client = _client(folder)
    experiment = client.get_experiment_by_name("faces")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    return parents, [r for r in runs if "mlflow.parentRunId" in r.data.tags]


def test_stage__one_child_per_stage_below_one_parent(tracked: Path) -> None:
    parents, children = _runs(tracked)
    assert len(parents) == 1
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parents[0].info.run_id}
    assert {c.info.run_name: c.info.status for c in children} == {
        "teach": "FINISHED",
        "embed": "FAILED",
    }


def test_stage__params_metrics_and_files_arrive(tracked: Path) -> None:
    teach = next(c for c in _runs(tracked)[1] if c.info.run_name == "teach")
    assert teach.data.params == {"teach.steps": "600", "teach.lr": "0.002"}
    client = _client(tracked)
    history = client.get_metric_history(teach.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(0, 1.0), (1, 0.5), (2, 1.0 / 3)]
    assert [f.path for f in client.list_artifacts(teach.info.run_id)] == ["note.txt"]
    assert (tracked / "mlflow-artifacts").is_dir()


def test_connect__resumed_run_finds_its_parent_and_ends_orphans(tracked: Path) -> None:
    client = _client(tracked)
    parent = _runs(tracked)[0][0]
    tags = {"mlflow.parentRunId": parent.info.run_id}
    orphan = client.create_run(parent.info.experiment_id, tags=tags, run_name="killed")
    again = connect(None, "faces", location(tracked))
    assert again.parent.info.run_id == parent.info.run_id
    assert client.get_run(parent.info.run_id).info.status == "RUNNING"
    assert client.get_run(orphan.info.run_id).info.status == "KILLED"
    again.close(ok=False)
    assert client.get_run(parent.info.run_id).info.status == "FAILED"
    assert len(_runs(tracked)[0]) == 1


def _goes_on(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> str:
    """Run a stage through a tracker that must be off; the one warning it gave."""
    with tracker.stage("teach", {"steps": 1}) as child:
        child.metrics({"loss": 0.5})
        child.file("nowhere.txt")
    tracker.close()
    assert not tracker.on
    warnings = [r for r in caplog.records if r.name == "pipeline.tracking"]
    assert len(warnings) == 1
    return warnings[0].getMessage()


@pytest.mark.usefixtures("mlflow_imported")
def test_connect__closed_port_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    tracker = connect(f"http://someone:hush@127.0.0.1:{port}", "faces", location(tmp_path))
    said = _goes_on(tracker, caplog)
    assert time.monotonic() - start < 15
    assert "tracking is off for the rest of this run" in said
    assert "hush" not in caplog.text
    assert f"127.0.0.1:{port}" in said


@pytest.mark.usefixtures("mlflow_imported")
def test_connect__silent_server_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # instead of 5, asked twice
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        start = time.monotonic()
        tracker = connect(f"http://127.0.0.1:{deaf.getsockname()[1]}", "faces", location(tmp_path))
        _goes_on(tracker, caplog)
    assert time.monotonic() - start < 7


def test_guarded__store_lost_half_way_does_not_end_the_stage(
    tmp_path: Path, tracked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "others", location(tmp_path))
    assert tracker.on

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    done = False
    with tracker.stage("teach", {}) as child:
        tracker.client.log_batch = gone
        child.metrics({"loss": 1.0})
        done = True
    assert done
    assert "gone" in _goes_on(tracker, caplog)


def test_guarded__our_own_faults_are_not_swallowed() -> None:
    tracker = Tracker(None, None, "off")
    with pytest.raises(KeyError):
        tracker.guarded(lambda: {}["missing"])


@pytest.mark.usefixtures("mlflow_imported")
def test_guarded__environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    inside = Tracker(None, None, "off").guarded(
        lambda: [os.environ.get(key) for key in CALL_ENVIRONMENT][:2]
    )
    assert inside == ["77", "1"]
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_connect__off_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tracker = connect("off", "faces", location(tmp_path))
    with tracker.stage("teach", {}) as child:
        child.metrics({"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


def test_connect__run_on_s3_without_a_server_is_off_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not connect(None, "faces", location("s3://bucket/run")).on
    assert "set tracking.uri" in caplog.text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("http://me:hush@host:5000/x", "http://host:5000/x"),
        ("postgresql://me:p@ss@host/db", "postgresql://host/db"),
        ("https://host/api?token=hush", "https://host/api"),
        ("to https://a:hush@host/x?k=hush failed", "to https://host/x failed"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_public__no_secret_is_left(text: str, seen: str) -> None:
    assert public(text) == seen


@pytest.fixture(scope="module")
def graph() -> Graph:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def value(name: str, *shape: object) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Flatten", ["input"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=-1),
    ]
    outputs = [value("logits", "batch", 4), value("probs", "batch", 4)]
    made = helper.make_graph(nodes, "tiny", [value("input", "batch", 1, 2, 2)], outputs)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    example = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2)
    return Graph("student", model.SerializeToString(), example, 4, "d" * 64)


@pytest.fixture(scope="module")
def registered(tracked: Path, graph: Graph) -> tuple[Path, list[str]]:
    """The same model kept three times, registered in the second and third."""
    ids = []
    for name in (None, "faces", "faces"):
        tracker = connect(None, "faces", location(tracked))
        with tracker.stage("student", {}) as child:
            child.model(graph, name, "student")
            ids.append(child.run_id)
        tracker.close()
        assert tracker.on
    return tracked, ids


def test_model__is_kept_once_without_a_pickle(registered: tuple[Path, list[str]]) -> None:
    folder, ids = registered
    client = _client(folder)
    experiment = client.get_experiment_by_name("faces").experiment_id
    models = client.search_logged_models([experiment])
    assert [(m.name, m.status) for m in models] == [("student", "READY")]
    for run in ids:
        outputs = client.get_run(run).outputs.model_outputs
        assert [output.model_id for output in outputs] == [models[0].model_id]
    place = Path(models[0].artifact_location.removeprefix("file://"))
    names = {at.name for at in place.rglob("*") if at.is_file()}
    assert {"MLmodel", "model.onnx", "requirements.txt"} <= names
    assert not {at.suffix for at in place.rglob("*")} & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def test_model__signature_and_example_fit_the_graph(
    registered: tuple[Path, list[str]], graph: Graph
) -> None:
    from mlflow.models import Model
    from onnx.reference import ReferenceEvaluator

    folder, _ = registered
    client = _client(folder)
    experiment = client.get_experiment_by_name("faces").experiment_id
    place = client.search_logged_models([experiment])[0].artifact_location
    about = Model.load(place.removeprefix("file://"))
    assert about.signature.inputs.input_names() == ["input"]
    assert about.signature.outputs.input_names() == ["logits", "probs"]
    assert about.signature.inputs.inputs[0].shape == (-1, 1, 2, 2)
    example = about.load_input_example(place.removeprefix("file://"))["input"]
    np.testing.assert_allclose(example, graph.example)
    session = ReferenceEvaluator(str(Path(place.removeprefix("file://")) / "model.onnx"))
    probs = session.run(["probs"], {"input": np.asarray(example, np.float32)})[0]
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)


def test_model__one_version_with_an_alias(registered: tuple[Path, list[str]]) -> None:
    folder, ids = registered
    client = _client(folder)
    versions = client.search_model_versions("name = 'faces'")
    assert len(versions) == 1
    assert versions[0].run_id == ids[1]
    assert versions[0].tags["omnifer.digest"] == "d" * 64
    assert client.get_model_version_by_alias("faces", "student").version == versions[0].version


def test_model__a_lost_store_costs_one_warning(
    tmp_path: Path, tracked: Path, graph: Graph, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "others", location(tmp_path))

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    with tracker.stage("student", {}) as child:
        tracker.client.search_logged_models = gone
        child.model(graph, "faces", "student")
    assert "gone" in _goes_on(tracker, caplog)
