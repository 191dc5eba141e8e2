"""Where MLflow is told what a run did; it, opening.py and registering.py alone import it.

A run is one MLflow parent run with one child per stage, tied by the tag `mlflow.parentRunId`: no
global state, so several runs may live in one process. Tracking is a courtesy, never a condition:
a server that is gone costs one warning, and what it should hear waits in the run folder, see
calling.py. It is told when a later call is answered, at the end, or by the run's next process;
twice told is once recorded. Only models are not kept for later: the next call of student has them.

Cost: importing mlflow takes 3 to 8 s and a fresh SQLite file 3 to 16 s, both on the first use of a
process; later calls are one batch per `FLUSH_SECONDS`, and one a minute of what the machine does.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator

from pipeline.calling import Patience, Record, Waiting, environment, public
from pipeline.config import Config
from pipeline.gauges import Gauges, Row, watching
from pipeline.opening import PART, failures, open_parent, run_id_of
from pipeline.registering import Graph, keep
from pipeline.storage import Location

logger = logging.getLogger(__name__)

OFF = "off"
CHILD = "omnifer.child"
"""Tag of a child run: by which it is found again."""
WAITING = "tracking-waiting"
"""Folder of a run for what a server that is gone should hear."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
BATCH = 500  # MLflow takes at most 1,000 metrics and 100 parameters in one call
PARAMS_BATCH = 100
PARAM_CHARS = 500
DIGEST_CHARS = 36
FLUSH_SECONDS = 10.0
CALL_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 backs off for minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
LOST_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""For asking again who did not answer."""
REFUSED = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")
"""What MLflow says of a record that it will never take."""

_ONE = threading.RLock()
"""One call at a time in this process: gauges tell from a thread, and calls set the environment."""

T = TypeVar("T")


def _off(value: Any) -> Any:
    """YAML reads an unquoted `off` as false."""
    return OFF if value is False else value


class TrackingConfig(Config):
    """Where runs are recorded."""

    # MLflow tracking URI; None: what MLFLOW_TRACKING_URI names, else SQLite in the run folder;
    # off: nowhere
    uri: Annotated[str | None, BeforeValidator(_off)] = None
    experiment: str = "omnifer"
    register_as: str | None = None  # name of the student in the model registry; None: nowhere
    alias: str = "student"  # of the newest version there


def connect(uri: str | None, experiment: str, run_dir: Location, part: str = "") -> Tracker:
    """What tells MLflow of a run; :meth:`Tracker.open` opens its parent, or finds it again.

    Nothing is said before that, for another driver may hold the run.

    The id that ties a resumed run to its MLflow parent is kept in `run_dir`/tracking.json.

    Args:
        uri: MLflow tracking URI; None for that of the environment (MLFLOW_TRACKING_URI), else
            `run_dir`/mlflow.db; "off" records nothing.
        experiment: name of the MLflow experiment; made if it is not there.
        run_dir: the run folder.
        part: of the passes, that this driver holds; "" for all. Children of other parts that are
            open may be at work.
    """
    if uri == OFF:
        return Tracker(OFF)
    uri = uri or os.environ.get(TRACKING_URI) or None
    if uri is None and not run_dir.is_local:
        logger.warning("tracking is off: SQLite cannot live on %s; set tracking.uri", run_dir.uri)
        return Tracker(OFF)
    target = uri or f"sqlite:///{(run_dir / 'mlflow.db').local_path()}"
    run_id = run_id_of(run_dir)
    if uri is None:
        run_dir.mkdir()
    return Tracker(
        public(target),
        Waiting(run_dir / WAITING, part),
        lambda: open_parent(target, experiment, run_dir, run_id, part),
        run_dir.local_path() if run_dir.is_local else "/",
        part,
    )


class Tracker:
    """Owns the connection, the parent run, and what waits while nobody answers.

    Without `waiting` and `opener` nothing is ever said.
    """

    def __init__(
        self,
        place: str,
        waiting: Waiting | None = None,
        opener: Callable[[], tuple[Any, Any]] | None = None,
        disk: str | Path = "/",
        part: str = "",
    ) -> None:
        self.client: Any = None
        self.parent: Any = None
        self.place = place  # the URI without its secrets; fit to be printed
        self.runs: dict[str, str] = {}  # MLflow's id of each child's run
        self._waiting, self._opener = waiting, opener
        self._part = part
        self._disk = disk  # what is watched beside CPU and memory
        self._patience, self._warned = Patience(), False

    @property
    def on(self) -> bool:
        """Whether the last call reached MLflow."""
        return self.client is not None and not self._patience.lost

    def open(self) -> Self:
        """Open the parent run, and tell what a dead process could not; one driver at a time."""
        if self._waiting is not None:
            self.guarded(self.catch_up)
        return self

    @contextmanager
    def stage(
        self, name: str, params: Mapping[str, Any], *, watched: bool = False
    ) -> Iterator[Child]:
        """A child run for one stage; FAILED if the body raises, and the error goes on.

        Args:
            name: name of the stage.
            params: flat, dotted names to plain values.
            watched: note what the machine does meanwhile, see gauges.py.
        """
        child = Child(self, None if self._waiting is None else uuid.uuid4().hex)
        said = {key: str(value)[:PARAM_CHARS] for key, value in params.items()}
        child.say({"name": name, "params": said, "time": _now()})
        machine: Any = nullcontext()
        if watched and self._waiting is not None:
            machine = watching(Gauges(self._disk), child.tell)
        try:
            with machine:
                yield child
        except BaseException:
            child.close("FAILED")
            raise
        child.close("FINISHED")

    def close(self, ok: bool = True) -> None:
        """End the parent run; a resumed run opens it again."""

        def call() -> None:
            self.catch_up()
            self.client.set_terminated(self.parent.info.run_id, "FINISHED" if ok else "FAILED")

        if self._waiting is not None:
            self.guarded(call)

    def guarded(self, call: Callable[[], T]) -> T | None:
        """The result of `call`, or None if nobody answered, which costs one warning in all."""
        expected = failures()  # imports MLflow, which is not the server's time
        with _ONE:
            return self._guarded(call, expected)

    def _guarded(self, call: Callable[[], T], expected: tuple[type[Exception], ...]) -> T | None:
        started, lost = time.monotonic(), self._patience.lost
        try:
            with environment({**CALL_ENVIRONMENT, **(LOST_ENVIRONMENT if lost else {})}):
                result = call()
        except expected as err:
            self._patience.failed(time.monotonic() - started)
            if not self._warned:
                self._warned = True
                first = next(iter(public(str(err)).splitlines()), "")
                logger.warning(
                    "tracking: %s does not answer; what it should hear waits in the run's %s/: "
                    "%s: %s",
                    *(self.place, WAITING, type(err).__name__, first[:300]),
                )
            return None
        self._patience.worked()
        return result

    def say(self, record: Record) -> None:
        """Tell a record of a child, or let it wait; what waits already goes first."""
        if self._waiting is None:
            return

        def call() -> bool:
            self.catch_up()
            self._unless_refused(record)
            return True

        with _ONE:
            if not (self._patience.may_call() and self.guarded(call)):
                self._waiting.add(record)

    def catch_up(self) -> None:
        """Open the connection where there is none, and tell what waits."""
        if self._waiting is None or self._opener is None:
            return
        if self.client is None:
            self._waiting.adopt()
            self.client, self.parent = self._opener()
        for record in self._waiting.records:
            self._unless_refused(record, again=True)
        self._waiting.clear()

    def _unless_refused(self, record: Record, again: bool = False) -> None:
        """Tell a record; one that MLflow will never take is lost, and no sign of a lost server."""
        from mlflow.exceptions import MlflowException

        try:
            self._tell(record, again)
        except MlflowException as err:
            if err.error_code not in REFUSED:
                raise
            logger.warning("tracking: refused: %s", public(str(err)).splitlines()[0][:300])

    def _tell(self, record: Record, again: bool = False) -> None:
        """Tell one record; with `again` it may have been told before."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        client, key = self.client, record["child"]
        info = self.parent.info
        if key not in self.runs and again:
            same = f"tags.`{CHILD}` = '{key}'"
            for found in client.search_runs([info.experiment_id], same, max_results=1):
                self.runs[key] = str(found.info.run_id)
        if key not in self.runs and "name" in record:
            tags = {"mlflow.parentRunId": info.run_id, CHILD: key}
            tags |= {PART: self._part} if self._part else {}
            more = {"tags": tags, "run_name": record["name"]}
            made = client.create_run(info.experiment_id, record["time"], **more)
            self.runs[key] = str(made.info.run_id)
        if key not in self.runs:  # deleted on the server
            return
        run_id = self.runs[key]
        params = [Param(name, value) for name, value in record.get("params", {}).items()]
        for start in range(0, len(params), PARAMS_BATCH):
            client.log_batch(run_id, params=params[start : start + PARAMS_BATCH])
        if "metrics" in record:
            client.log_batch(run_id, metrics=[Metric(*row) for row in record["metrics"]])
        if "inputs" in record:
            sets = [
                DatasetInput(
                    Dataset(name, digest[:DIGEST_CHARS], "local", json.dumps({"uri": source})),
                    [InputTag("mlflow.data.context", context)],
                )
                for name, digest, source, context in record["inputs"]
            ]
            client.log_inputs(run_id, sets)
        if "file" in record and os.path.exists(record["file"]):
            client.log_artifact(run_id, record["file"])
        if "end" in record:
            client.set_terminated(run_id, record["end"], record["time"])


class Child:
    """The record of one stage; silent without a key."""

    def __init__(self, tracker: Tracker, key: str | None) -> None:
        self._tracker = tracker
        self._key = key
        self._waiting: list[Row] = []
        self._flushed = time.monotonic()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where it has none (yet)."""
        return self._tracker.runs.get(self._key or "")

    def say(self, record: Record) -> None:
        """Tell MLflow, now or later."""
        if self._key is not None:
            self._tracker.say({"child": self._key, **record})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Note numbers; they leave in batches, at the latest when the stage ends."""
        now = _now()
        self._waiting += [(key, float(value), now, step) for key, value in values.items()]
        if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def file(self, path: str | os.PathLike[str]) -> None:
        """Keep a copy of a small local file with the run."""
        self.say({"file": str(Path(path))})

    def inputs(self, sets: Sequence[Input]) -> None:
        """Note the data sets that the stage read."""
        if sets:
            self.say({"inputs": [[s.name, s.digest, public(s.source), s.context] for s in sets]})

    def model(self, graph: Graph, register_as: str | None, alias: str) -> None:
        """Keep a model as an ONNX graph, with its signature and an example; register it if named.

        What is there already, told by its digest, is neither kept nor registered twice.
        """
        if self.run_id is not None and self._tracker.on:
            client, experiment = self._tracker.client, self._tracker.parent.info.experiment_id
            run_id = self.run_id
            self._tracker.guarded(
                lambda: keep(client, experiment, run_id, graph, register_as, alias)
            )

    def close(self, status: str) -> None:
        """Send what waits and end the child with an MLflow status."""
        self._flush()
        self.say({"end": status, "time": _now()})

    def tell(self, rows: Sequence[Row]) -> None:
        """Tell numbers at once, with the time at which each was read."""
        for start in range(0, len(rows), BATCH):
            self.say({"metrics": rows[start : start + BATCH]})

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        self.tell(waiting)


@dataclass(frozen=True)
class Input:
    """A data set that a stage read."""

    name: str
    digest: str
    source: str  # where it lies; secrets are taken out
    context: str  # training | pool | test


def _now() -> int:
    return int(time.time() * 1000)
