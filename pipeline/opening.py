"""Opens MLflow for a run: its parent run, found again or made, and what a lost server raises.

No global state: the parent is known by a tag, and children that a dead process left open are ended.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any
from urllib.parse import urlsplit

from pipeline.calling import loggers_kept, public
from pipeline.errors import OmniferError
from pipeline.storage import Location

PART = "omnifer.part"
"""Tag of a child: which part of the passes its driver held."""


def run_id_of(run_dir: Location) -> str:
    """The id that ties a run folder to its MLflow parent; made and kept at the first call."""
    note = run_dir / "tracking.json"
    if note.exists():
        return str(note.read_json()["run"])
    run_id = uuid.uuid4().hex
    note.write_json({"run": run_id})
    return run_id


def open_parent(
    target: str, experiment: str, run_dir: Location, run_id: str, part: str
) -> tuple[Any, Any]:
    """Client and parent run; the parent is found by its tag where it exists.

    Args:
        target: MLflow tracking URI.
        experiment: name of the MLflow experiment; made if it is not there.
        run_dir: the run folder.
        run_id: its id.
        part: of the passes, that this driver holds; "" for all.
    """
    with loggers_kept():
        return _find_or_make(target, experiment, run_dir, run_id, part)


def _find_or_make(
    target: str, experiment: str, run_dir: Location, run_id: str, part: str
) -> tuple[Any, Any]:
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
        if part:  # drivers of other parts may be at work
            left_open += f" and tags.`{PART}` = '{part}'"
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


def failures() -> tuple[type[Exception], ...]:
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
