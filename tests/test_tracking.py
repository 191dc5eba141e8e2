"""Tracking nests stages below their run, finds a run again, and never ends one."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.calling import public
from pipeline.registering import Graph, keep
from pipeline.storage import location
from pipeline.tracking import CALL_ENVIRONMENT, TRACKING_URI, WAITING, Input, Tracker, connect


@pytest.fixture(scope="module")
def mlflow_imported() -> None:
    import mlflow  # noqa: F401  (seconds, which are not the server's)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, mlflow_imported: None) -> Path:
    """A run folder with one finished and one failed stage in a real SQLite store."""
    folder = tmp_path_factory.mktemp("run") / "first"
    tracker = connect(None, "faces", location(folder)).open()
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


MACHINE = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage")


def test_stage__notes_what_the_machine_did(tracked: Path, tmp_path: Path) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "watched", location(tmp_path)).open()
    with tracker.stage("teach", {}, watched=True) as child:
        child.metrics({"loss": 1.0})
        until = time.process_time() + 0.1  # busy for some ticks
        while time.process_time() < until:
            pass
    with pytest.raises(ZeroDivisionError), tracker.stage("embed", {}, watched=True) as broken:
        _ = 1 / 0
    tracker.close()
    client = _client(tracked)
    found = client.get_run(child.run_id).data.metrics
    assert found["loss"] == 1.0
    assert {f"system/{name}" for name in MACHINE} <= set(found)
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    # Of one sample, at the end, with the names that MLflow's own metrics have.
    assert len(client.get_metric_history(child.run_id, "system/disk_usage_percentage")) == 1
    failed = client.get_run(broken.run_id)
    assert failed.info.status == "FAILED"
    assert "system/disk_usage_percentage" in failed.data.metrics


def test_connect__resumed_run_finds_its_parent_and_ends_orphans(tracked: Path) -> None:
    client = _client(tracked)
    parent = _runs(tracked)[0][0]
    tags = {"mlflow.parentRunId": parent.info.run_id}
    orphan = client.create_run(parent.info.experiment_id, tags=tags, run_name="killed")
    again = connect(None, "faces", location(tracked)).open()
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
    tracker = connect(f"http://someone:hush@127.0.0.1:{port}", "faces", location(tmp_path)).open()
    said = _goes_on(tracker, caplog)
    assert time.monotonic() - start < 15
    assert "does not answer; what it should hear waits in the run's tracking-waiting/" in said
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
        tracker = connect(
            f"http://127.0.0.1:{deaf.getsockname()[1]}", "faces", location(tmp_path)
        ).open()
        _goes_on(tracker, caplog)
    assert time.monotonic() - start < 7


def test_open__children_of_parts_that_others_drive_stay_open(tracked: Path, tmp_path: Path) -> None:
    store, run = f"sqlite:///{tracked}/mlflow.db", location(tmp_path)
    status = {}
    with connect(store, "parts", run, "1of2").open().stage("embed", {}) as child:
        for part in ("2of2", "1of2"):
            client = connect(store, "parts", run, part).open().client
            status[part] = client.get_run(child.run_id).info.status
    assert status == {"2of2": "RUNNING", "1of2": "KILLED"}


def test_guarded__store_lost_half_way_does_not_end_the_stage(
    tmp_path: Path, tracked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "others", location(tmp_path)).open()
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


def test_say__what_a_lost_server_missed_is_told_when_it_is_back(
    tmp_path: Path, tracked: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.calling.PAUSE", 0.0)
    store = f"sqlite:///{tracked}/mlflow.db"
    tracker = connect(store, "lost", location(tmp_path)).open()
    client = tracker.client

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    kept = {name: getattr(client, name) for name in ("log_batch", "create_run", "log_inputs")}
    for name in kept:
        setattr(client, name, gone)
    data = [Input("faces training", "ab" * 32, "https://me:hush@host/faces", "training")]
    with tracker.stage("teach", {"lr": 0.1}) as child:
        child.metrics({"loss": 1.0}, step=1)
        child.inputs(data)
    with tracker.stage("guard", {}, watched=True) as machine:
        pass
    (waiting,) = (tmp_path / WAITING).iterdir()
    assert len(waiting.read_text().splitlines()) == 4 + 3
    assert "hush" not in waiting.read_text()
    for name, call in kept.items():
        setattr(client, name, call)
    with tracker.stage("embed", {}) as other:
        other.metrics({"rows": 5})
    assert tracker.on
    assert not (tmp_path / WAITING).exists()
    assert len([r for r in caplog.records if r.name == "pipeline.tracking"]) == 1
    teach = client.get_run(child.run_id)
    assert (teach.info.run_name, teach.info.status) == ("teach", "FINISHED")
    assert (teach.data.params, teach.data.metrics) == ({"lr": "0.1"}, {"loss": 1.0})
    (found,) = teach.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("faces training", "ab" * 18)
    assert found.dataset.source == '{"uri": "https://host/faces"}'
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]
    assert client.get_run(other.run_id).data.metrics == {"rows": 5.0}
    guard = client.get_run(machine.run_id)
    assert guard.info.status == "FINISHED"
    assert "system/disk_usage_percentage" in guard.data.metrics


def test_connect__tells_once_what_a_killed_process_could_not(
    tmp_path: Path, tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tracked}/mlflow.db"
    dead = connect(store, "killed", location(tmp_path)).open()
    run_id = dead.parent.info.run_id
    for name in ("log_batch", "set_terminated"):
        monkeypatch.setattr(dead.client, name, lambda *_, **__: _raise(ConnectionError("gone")))
    with dead.stage("teach", {"lr": 0.1}) as child:
        child.metrics({"loss": 1.0}, step=1)
    monkeypatch.undo()
    (waiting,) = (tmp_path / WAITING).iterdir()
    lines = waiting.read_text()
    waiting.write_text(lines + '{"child": "torn')
    for _ in range(2):
        again = connect(store, "killed", location(tmp_path)).open()
        assert not (tmp_path / WAITING).exists()
        experiment, parent = again.parent.info.experiment_id, again.parent.info.run_id
        again.close()
        below = f"tags.`mlflow.parentRunId` = '{parent}'"
        (teach,) = again.client.search_runs([experiment], below)
        assert (teach.info.status, teach.data.metrics) == ("FINISHED", {"loss": 1.0})
        assert len(again.client.get_metric_history(teach.info.run_id, "loss")) == 1
        (tmp_path / WAITING).mkdir()
        waiting.write_text(lines)  # as if the answer to all of it had been lost
    assert parent == run_id


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.slow
def test_connect__over_http_as_over_sql(tmp_path: Path, tracked: Path) -> None:
    """A real server on the store, which takes half a minute to start."""
    from helpers.servers import mlflow

    with mlflow(f"sqlite:///{tracked}/mlflow.db", tmp_path) as address:
        tracker = connect(address, "served", location(tmp_path / "run")).open()
        with tracker.stage("teach", {"lr": 0.1}) as child:
            child.metrics({"loss": 1.0})
            child.inputs([Input("faces", "ab" * 32, "folder", "training")])
        tracker.close()
        assert tracker.on
    found = _client(tracked).get_run(child.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == ["faces"]


def test_guarded__our_own_faults_are_not_swallowed() -> None:
    tracker = Tracker("off")
    with pytest.raises(KeyError):
        tracker.guarded(lambda: {}["missing"])


@pytest.mark.usefixtures("mlflow_imported")
def test_guarded__environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    inside = Tracker("off").guarded(lambda: [os.environ.get(key) for key in CALL_ENVIRONMENT][:2])
    assert inside == ["77", "1"]
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_tracker__travels_with_what_is_pickled(tmp_path: Path, tracked: Path) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "others", location(tmp_path)).open()
    from ray import cloudpickle  # Tune writes down whoever hears of its trials

    told = cloudpickle.dumps(lambda: tracker.stage("search 0", {}))
    assert cloudpickle.loads(told) is not None


def test_connect__off_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tracker = connect("off", "faces", location(tmp_path)).open()
    before = threading.active_count()
    with tracker.stage("teach", {}, watched=True) as child:
        child.metrics({"loss": 1.0})
        assert threading.active_count() == before
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


def test_connect__the_environment_names_the_server_where_the_recipe_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACKING_URI, f"sqlite:///{tmp_path}/ours.db")
    for uri, place in ((None, "ours.db"), (f"sqlite:///{tmp_path}/own.db", "own.db")):
        tracker = connect(uri, "faces", location(tmp_path / "run")).open()
        tracker.close()
        assert tracker.place == f"sqlite:///{tmp_path}/{place}"
        assert (tmp_path / place).exists()
    assert not (tmp_path / "run" / "mlflow.db").exists()


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
        tracker = connect(None, "faces", location(tracked)).open()
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
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "others", location(tmp_path)).open()

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    with tracker.stage("student", {}) as child:
        tracker.client.search_logged_models = gone
        child.model(graph, "faces", "student")
        assert not tracker.on
    tracker.close()  # which is answered again
    assert tracker.on
    assert [r.name for r in caplog.records] == ["pipeline.tracking"]
    assert "gone" in caplog.text


def test_keep__a_model_that_a_kill_left_half_way_is_not_taken_for_whole(
    tmp_path: Path, tracked: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = connect(f"sqlite:///{tracked}/mlflow.db", "half", location(tmp_path)).open()
    client, experiment = tracker.client, tracker.parent.info.experiment_id
    with tracker.stage("student", {}) as child:
        given = (client, experiment, child.run_id, graph, "half", "student")
        monkeypatch.setattr(client, "log_model_artifacts", lambda *_: _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            keep(*given)
        monkeypatch.undo()
        assert [m.status for m in client.search_logged_models([experiment])] == ["PENDING"]
        keep(*given)
    (made,) = client.search_logged_models([experiment])
    assert made.status == "READY"
    (version,) = client.search_model_versions("name = 'half'")
    place = Path(version.source.removeprefix("file://"))
    assert (place / "model.onnx").read_bytes() == graph.data
