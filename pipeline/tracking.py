"""Where MLflow is told what a run did; the only module that imports it.

A run is one MLflow parent run with one child per stage, tied by the tag `mlflow.parentRunId`: no
global state, so several runs may live in one process. Tracking is a courtesy, never a condition:
the first call that fails costs one warning and switches tracking off until the process ends.

Cost: importing mlflow takes 3 to 8 s and a fresh SQLite file 3 to 16 s, both on the first use of a
process; later calls are one batch per `FLUSH_SECONDS`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import BeforeValidator

from pipeline.config import Config
from pipeline.errors import OmniferError
from pipeline.storage import Location

logger = logging.getLogger(__name__)

OFF = "off"
DIGEST = "omnifer.digest"
"""Tag of a model: what its weights hash to."""
BATCH = 500  # MLflow takes at most 1,000 metrics and 100 parameters in one call
PARAMS_BATCH = 100
PARAM_CHARS = 500
FLUSH_SECONDS = 10.0
CALL_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 backs off for minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

T = TypeVar("T")


def _off(value: Any) -> Any:
    """YAML reads an unquoted `off` as false."""
    return OFF if value is False else value


class TrackingConfig(Config):
    """Where runs are recorded."""

    # MLflow tracking URI; None: SQLite in the run folder; off: nowhere
    uri: Annotated[str | None, BeforeValidator(_off)] = None
    experiment: str = "omnifer"
    register_as: str | None = None  # name of the student in the model registry; None: nowhere
    alias: str = "student"  # of the newest version there


def connect(uri: str | None, experiment: str, run_dir: Location) -> Tracker:
    """Open or find again the parent run of `run_dir`; never raises for a server that is gone.

    The id that ties a resumed run to its MLflow parent is kept in `run_dir`/tracking.json.

    Args:
        uri: MLflow tracking URI; None for `run_dir`/mlflow.db; "off" records nothing.
        experiment: name of the MLflow experiment; made if it is not there.
        run_dir: the run folder.
    """
    if uri == OFF:
        return Tracker(None, None, OFF)
    if uri is None and not run_dir.is_local:
        logger.warning("tracking is off: SQLite cannot live on %s; set tracking.uri", run_dir.uri)
        return Tracker(None, None, OFF)
    target = uri or f"sqlite:///{(run_dir / 'mlflow.db').local_path()}"
    run_id = _run_id(run_dir)
    if uri is None:
        run_dir.mkdir()
    tracker = Tracker(None, None, public(target))
    opened = tracker.guarded(lambda: _open(target, experiment, run_dir, run_id))
    if opened is not None:
        tracker.client, tracker.parent = opened
    return tracker


class Tracker:
    """Owns the connection and the parent run; off once a call has failed."""

    def __init__(self, client: Any, parent: Any, place: str) -> None:
        self.client = client
        self.parent = parent
        self.place = place  # the URI without its secrets; fit to be printed

    @property
    def on(self) -> bool:
        """Whether calls still reach MLflow."""
        return self.client is not None

    @contextmanager
    def stage(self, name: str, params: Mapping[str, Any]) -> Iterator[Child]:
        """A child run for one stage; FAILED if the body raises, and the error goes on.

        Args:
            name: name of the stage.
            params: flat, dotted names to plain values.
        """
        child = Child(self, self.guarded(lambda: self._child(name, params)) if self.on else None)
        try:
            yield child
        except BaseException:
            child.close("FAILED")
            raise
        child.close("FINISHED")

    def close(self, ok: bool = True) -> None:
        """End the parent run; a resumed run opens it again."""
        if self.on:
            status = "FINISHED" if ok else "FAILED"
            self.guarded(lambda: self.client.set_terminated(self.parent.info.run_id, status))

    def guarded(self, call: Callable[[], T]) -> T | None:
        """The result of `call`, or None after switching tracking off with one warning."""
        try:
            with _environment(CALL_ENVIRONMENT):
                return call()
        except _failures() as err:
            self.client = None
            first = next(iter(public(str(err)).splitlines()), "")
            logger.warning(
                "tracking is off for the rest of this run: %s: %s: %s",
                self.place,
                type(err).__name__,
                first[:300],
            )
            return None

    def _child(self, name: str, params: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        info = self.parent.info
        tags = {"mlflow.parentRunId": info.run_id}
        child = self.client.create_run(info.experiment_id, tags=tags, run_name=name)
        rows = [Param(key, str(value)[:PARAM_CHARS]) for key, value in params.items()]
        for start in range(0, len(rows), PARAMS_BATCH):
            self.client.log_batch(child.info.run_id, params=rows[start : start + PARAMS_BATCH])
        return str(child.info.run_id)


class Child:
    """The record of one stage; silent where tracking is off."""

    def __init__(self, tracker: Tracker, run_id: str | None) -> None:
        self._tracker = tracker
        self._waiting: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Note numbers; they leave in batches, at the latest when the stage ends."""
        if not self._live():
            return
        now = int(time.time() * 1000)
        self._waiting += [(key, float(value), now, step) for key, value in values.items()]
        if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def file(self, path: str | os.PathLike[str]) -> None:
        """Keep a copy of a small local file with the run."""
        if self._live():
            client = self._tracker.client
            self._tracker.guarded(lambda: client.log_artifact(self.run_id, str(Path(path))))

    def model(self, graph: Graph, register_as: str | None, alias: str) -> None:
        """Keep a model as an ONNX graph, with its signature and an example; register it if named.

        What is there already, told by its digest, is neither kept nor registered twice.
        """
        if self._live():
            self._tracker.guarded(lambda: self._keep(graph, register_as, alias))

    def _keep(self, graph: Graph, register_as: str | None, alias: str) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        client, experiment = self._tracker.client, self._tracker.parent.info.experiment_id
        tags = {DIGEST: graph.digest}
        same = f"tags.`{DIGEST}` = '{graph.digest}'"
        kept = next(iter(client.search_logged_models([experiment], filter_string=same)), None)
        if kept is None:
            kept = client.create_logged_model(experiment, graph.name, self.run_id, tags)
            with tempfile.TemporaryDirectory(prefix="omnifer-") as work:
                _save_graph(graph, Path(work) / "model")
                client.log_model_artifacts(kept.model_id, str(Path(work) / "model"))
            client.finalize_logged_model(kept.model_id, "READY")
        client.log_outputs(self.run_id, [LoggedModelOutput(kept.model_id, 0)])
        if register_as is None:
            return
        with suppress(MlflowException):  # it is there
            client.create_registered_model(register_as)
        every = client.search_model_versions(f"name = '{register_as}'")
        mine = next((v for v in every if v.tags.get(DIGEST) == graph.digest), None)
        if mine is None:
            # Not models:/ID: MLflow would ask the process's own store for it, not this client's.
            source, owner = kept.artifact_location, {"model_id": kept.model_id, "tags": tags}
            mine = client.create_model_version(register_as, source, self.run_id, **owner)
        client.set_registered_model_alias(register_as, alias, mine.version)

    def close(self, status: str) -> None:
        """Send what waits and end the child with an MLflow status."""
        self._flush()
        if self._live():
            client = self._tracker.client
            self._tracker.guarded(lambda: client.set_terminated(self.run_id, status))

    def _live(self) -> bool:
        return self.run_id is not None and self._tracker.on

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), BATCH):
            if self._live():
                self._send(waiting[start : start + BATCH])

    def _send(self, rows: list[tuple[str, float, int, int]]) -> None:
        def call() -> None:
            from mlflow.entities import Metric

            metrics = [Metric(*row) for row in rows]
            self._tracker.client.log_batch(self.run_id, metrics=metrics)

        self._tracker.guarded(call)


@dataclass(frozen=True)
class Graph:
    """A model as an ONNX graph: `input` (batch, C, S, S) to `logits` and `probs` (batch, K)."""

    name: str
    data: bytes
    example: np.ndarray  # faces (B, C, S, S) float32, nobody's
    classes: int  # K
    digest: str  # of its weights


def _save_graph(graph: Graph, at: Path) -> None:
    """Write a model folder as MLflow has it; its own writer would need onnxruntime."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    number = np.dtype(np.float32)
    outputs = [TensorSpec(number, (-1, graph.classes), name) for name in ("logits", "probs")]
    inputs = [TensorSpec(number, (-1, *graph.example.shape[1:]), "input")]
    model = Model(signature=ModelSignature(Schema(inputs), Schema(outputs)))
    model.saved_input_example_info = {"artifact_path": "input_example.json", "type": "ndarray"}
    pyfunc.add_to_model(model, loader_module="mlflow.onnx", data="model.onnx")
    model.add_flavor("onnx", data="model.onnx", providers=["CPUExecutionProvider"])
    at.mkdir()
    (at / "model.onnx").write_bytes(graph.data)
    (at / "requirements.txt").write_text("mlflow\nonnx\nonnxruntime\n")
    example = json.dumps({"input": graph.example.tolist()})
    (at / "input_example.json").write_text(example)
    model.save(str(at / "MLmodel"))


def public(text: str) -> str:
    """The text with user, password and query removed from every URI in it."""
    without_user = re.sub(r"://\S*@", "://", text)
    return re.sub(r"(://[^\s?]*)\?[^\s)\"']*", r"\1", without_user)


def _run_id(run_dir: Location) -> str:
    note = run_dir / "tracking.json"
    if note.exists():
        return str(note.read_json()["run"])
    run_id = uuid.uuid4().hex
    note.write_json({"run": run_id})
    return run_id


def _open(target: str, experiment: str, run_dir: Location, run_id: str) -> tuple[Any, Any]:
    """Client and parent run; the parent is found by its tag where it exists."""
    with _loggers_kept():
        return _find_or_make(target, experiment, run_dir, run_id)


@contextmanager
def _loggers_kept() -> Iterator[None]:
    """Undo what making a database does to loggers: its migrations disable all that exist."""
    known = {
        name: found.disabled
        for name, found in logging.Logger.manager.loggerDict.items()
        if isinstance(found, logging.Logger)
    }
    try:
        yield
    finally:
        for name, disabled in known.items():
            logging.getLogger(name).disabled = disabled


def _find_or_make(target: str, experiment: str, run_dir: Location, run_id: str) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # greets a fresh database
    client = MlflowClient(tracking_uri=target)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        place = _artifacts(target, run_dir)
        experiment_id = client.create_experiment(experiment, artifact_location=place)
    else:
        experiment_id = found.experiment_id
    runs = client.search_runs(
        [experiment_id], filter_string=f"tags.`omnifer.run` = '{run_id}'", max_results=1
    )
    if runs:
        parent_id = runs[0].info.run_id
        client.update_run(parent_id, status="RUNNING")
        left_open = f"tags.`mlflow.parentRunId` = '{parent_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([experiment_id], filter_string=left_open):
            client.set_terminated(child.info.run_id, "KILLED")  # its process died
        return client, runs[0]
    tags = {"omnifer.run": run_id, "omnifer.folder": public(run_dir.uri)}
    return client, client.create_run(experiment_id, tags=tags, run_name=run_dir.name)


def _artifacts(target: str, run_dir: Location) -> str | None:
    """Where files of a new experiment go; a server decides that for itself.

    Left to itself, MLflow would put them below the working directory of whoever came first.
    """
    if urlsplit(target).scheme in ("http", "https", "databricks"):
        return None
    place = run_dir / "mlflow-artifacts"
    return place.local_path().as_uri() if place.is_local else place.uri


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow and the stores below it raise when a server, driver or disk is not there."""
    try:
        from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            ClientError,
        )
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return (ImportError, OSError)
    return (
        MlflowException,
        SQLAlchemyError,
        BotoCoreError,
        ClientError,
        Boto3Error,
        OmniferError,
        ImportError,
        OSError,
    )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for one call; what the person has set stays as it is."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
