"""Models in MLflow: an ONNX graph with its signature and an example, kept once, with an alias.

Cost: one upload of the graph. MLflow is imported late, and beside tracking only here.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DIGEST = "omnifer.digest"
"""Tag of a model: what its weights hash to."""


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


def keep(
    client: Any,
    experiment: str,
    run_id: str,
    graph: Graph,
    register_as: str | None,
    alias: str,
) -> None:
    """Keep a model with an MLflow run, and in the registry if it is named there.

    What is there whole already, told by its digest, is neither kept nor registered twice.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    tags = {DIGEST: graph.digest}
    same = f"tags.`{DIGEST}` = '{graph.digest}'"
    known = list(client.search_logged_models([experiment], filter_string=same))
    kept = next((model for model in known if model.status == "READY"), None)
    if kept is None:
        # One that a kill has left half way may lack files; it is filled again.
        left = next((model for model in known if model.status == "PENDING"), None)
        kept = left or client.create_logged_model(experiment, graph.name, run_id, tags)
        with tempfile.TemporaryDirectory(prefix="omnifer-") as work:
            _save_graph(graph, Path(work) / "model")
            client.log_model_artifacts(kept.model_id, str(Path(work) / "model"))
        client.finalize_logged_model(kept.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(kept.model_id, 0)])
    if register_as is None:
        return
    with suppress(MlflowException):  # it is there
        client.create_registered_model(register_as)
    every = client.search_model_versions(f"name = '{register_as}'")
    mine = next((v for v in every if v.tags.get(DIGEST) == graph.digest), None)
    if mine is None:
        # Not models:/ID: MLflow would ask the process's own store for it, not this client's.
        source, owner = kept.artifact_location, {"model_id": kept.model_id, "tags": tags}
        mine = client.create_model_version(register_as, source, run_id, **owner)
    client.set_registered_model_alias(register_as, alias, mine.version)
