"""Models that leave: ONNX, a timm folder, a Hugging Face layout; they open without this package.

Whatever leaves is opened again and compared with the model it came from on drawn faces; more than
`TOLERANCE` of a probability apart is refused and nothing is written. What a person needs to use it
(class names, size, crop, temperature, protocol) goes along. No format holds a pickle.

An ensemble (the teacher, or its tuned members) is one ONNX graph, or one HF folder, that gives the
mean of its members' calibrated probabilities. Departs from evaluation, which averages a face with
its mirror image: exports see a face once, so that numbers differ by what mirroring gains.

Cost: seconds; ONNX needs `pip install 'omnifer[onnx]'`, and torch's TorchScript exporter, because
the newer one needs packages that nothing else here does.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import __version__, modeling
from pipeline.artifacts import (
    CONFIG,
    is_teacher,
    load_model,
    load_teacher,
    read_meta,
    refuse_pickles,
    save_model,
)
from pipeline.cards import model_card
from pipeline.errors import ConfigError, ModelError, OmniferError
from pipeline.lineage import Lineage, lineage
from pipeline.made import find_model, home_of
from pipeline.models import NETWORKS, FaceModel
from pipeline.run import IDENTITY, METRICS_FILE
from pipeline.storage import Location
from pipeline.synthetic import draw
from pipeline.training.distilled import LABELS

TOLERANCE = 1e-3
"""Largest difference of a probability between a model and its export."""
DRAWN = 4
"""Faces that are compared."""
OPSET = 17
ONNX_FILE = "model.onnx"
SCRIPT = "modeling.py"


class Ensemble(nn.Module):
    """One or more models as people carry them off: faces in, calibrated probabilities out."""

    def __init__(self, members: Sequence[FaceModel], temperatures: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperatures = tuple(temperatures)
        self.label_names = members[0].label_names
        self.config = members[0].config
        self.own = self.config.name in NETWORKS

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) whose softmax are the calibrated probabilities (B, K), and these.

        `x` is (B, C, S, S) in [0, 1]; the mean of the members' probabilities has log(mean) as
        its logits.
        """
        pairs = zip(self.members, self.temperatures, strict=True)
        each = [member(x) / t for member, t in pairs]
        if len(each) == 1:
            return each[0], torch.softmax(each[0], -1)
        mean = torch.stack([torch.softmax(logits, -1) for logits in each]).mean(0)
        return mean.clamp_min(1e-12).log(), mean


@dataclass(frozen=True)
class Parity:
    """How far an export is from the model it came from."""

    difference: float  # largest, of a probability
    faces: int
    judge: str  # what ran the export

    def __str__(self) -> str:
        return (
            f"max abs difference {self.difference:.1e} on {self.faces} drawn faces ({self.judge})"
        )


def load_ensemble(at: Location) -> Ensemble:
    """A model folder, a teacher folder, or the folder of its tuned members, on the CPU.

    Raises:
        ModelError: none of these, or weights that are pickled or damaged.
    """
    if (at / LABELS).exists():
        raise ModelError(f"{at}: a distilled set, not a model; it is complete as it is")
    refuse_pickles(at)
    if is_teacher(at):
        teacher = load_teacher(at)
        return Ensemble(teacher.members, [teacher.temperature] * len(teacher.members)).eval()
    folders = [at]
    if (at / "0" / CONFIG).exists():
        folders = [at / str(i) for i in range(len(at.children()))]
    temperatures = [float(read_meta(folder).get("temperature", 1.0)) for folder in folders]
    return Ensemble([load_model(folder) for folder in folders], temperatures).eval()


def export(model: Location, kind: str, out: Location) -> Parity:
    """Write a model into a new folder.

    Args:
        model: what :func:`pipeline.lineage.find_model` finds: a run stands for its student.
        kind: `timm`: `timm.create_model("local-dir:OUT", pretrained=True)` opens it; `onnx`: one
            file; `hf`: the layout of the Hugging Face hub with a card and `modeling.py`.
        out: a folder that is not there, or empty.

    Raises:
        ConfigError: another format, or something lies at `out`.
        ModelError: no model, a format that cannot hold it, or one that comes out different.
    """
    if kind not in WRITERS:
        raise ConfigError(f"--format {kind!r}: expected {', '.join(WRITERS)}")
    if out.children() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out}: expected a folder that is not there or empty")
    at = find_model(model)
    ensemble, about = load_ensemble(at), facts_of(at)
    with tempfile.TemporaryDirectory(prefix="omnifer-") as work:
        parity = WRITERS[kind](ensemble, about, Path(work))
        _copy(Path(work), out)
    return parity


def facts_of(at: Location) -> dict[str, Any]:
    """What goes along with a model: crop, color, results and their protocol, what it learned from.

    Only a model that lies in its run knows these; others say so.
    """
    if home_of(at) is None:
        return {"crop": None, "color": None, "protocol": None, "result": None, "lineage": None}
    found = lineage(at)
    metrics = _metrics(found)
    name = "teacher" if found.made.stage == "teach" else found.made.stage
    labeled = _labeled_settings(found)
    return {
        "crop": labeled.get("crop"),
        "color": labeled.get("color"),
        "protocol": metrics.get("protocol"),
        "result": metrics.get("models", {}).get(name),
        "lineage": found.facts,
    }


def _metrics(found: Lineage) -> dict[str, Any]:
    """Of the evaluation that judged this very model."""
    made = found.made
    for folder in reversed(made.run.folders("evaluate")):
        if (folder / METRICS_FILE).exists():
            judged = (folder / IDENTITY).read_json()["inputs"].get(made.stage)
            if judged in (made.digest, *made.before):
                return dict((folder / METRICS_FILE).read_json())
    return {}


def _labeled_settings(found: Lineage) -> dict[str, Any]:
    made = found.made.run.artifact("labeled")
    return dict((made.dir / IDENTITY).read_json()["labeled"])


# -- formats --------------------------------------------------------------------------------------


def _write_timm(ensemble: Ensemble, about: Mapping[str, Any], work: Path) -> Parity:
    config = ensemble.config
    if len(ensemble.members) > 1:
        raise ModelError(
            f"--format timm: a timm folder holds one network, this is {len(ensemble.members)}; "
            "name one of its members' folders, or take --format onnx or hf, which hold all"
        )
    if ensemble.own:
        raise ModelError(
            f"--format timm: {config.name} is this package's own network and timm cannot build it; "
            f"--format hf brings a script that opens it with torch alone, --format onnx a graph"
        )
    _write_member(ensemble, 0, work, about)
    import timm

    net = timm.create_model(f"local-dir:{work}", pretrained=True).eval()
    member = ensemble.members[0]
    assert isinstance(member, FaceModel)
    t = ensemble.temperatures[0]
    return check(
        ensemble, lambda x: torch.softmax(net((x - member.mean) / member.std) / t, -1), "timm"
    )


def _write_hf(ensemble: Ensemble, about: Mapping[str, Any], work: Path) -> Parity:
    count = len(ensemble.members)
    if count == 1:
        _write_member(ensemble, 0, work, about)
    else:
        for number in range(count):
            _write_member(ensemble, number, work / "members" / str(number), about)
        shared = {"members": count, "num_classes": len(ensemble.label_names)}
        _write_json(work / CONFIG, {**shared, **_settings(ensemble, about)})
    _write_json(work / "preprocessor_config.json", _preprocessor(ensemble, about))
    (work / SCRIPT).write_bytes(Path(modeling.__file__).read_bytes())
    (work / "README.md").write_text(model_card(ensemble, about), encoding="utf-8")
    return check(ensemble, modeling.load(str(work)), SCRIPT)


def _write_onnx(ensemble: Ensemble, about: Mapping[str, Any], work: Path) -> Parity:
    data, parity = to_onnx(ensemble, about)
    (work / ONNX_FILE).write_bytes(data)
    return parity


WRITERS: Mapping[str, Callable[[Ensemble, Mapping[str, Any], Path], Parity]] = {
    "timm": _write_timm,
    "onnx": _write_onnx,
    "hf": _write_hf,
}


def _write_member(ensemble: Ensemble, number: int, folder: Path, about: Mapping[str, Any]) -> None:
    """config.json and model.safetensors of one network, with what our own loader does not need."""
    member = ensemble.members[number]
    assert isinstance(member, FaceModel)
    at = Location(str(folder))
    save_model(member, at, {"temperature": ensemble.temperatures[number]})
    config = dict((at / CONFIG).read_json())
    alone = {**_settings(ensemble, about), "temperature": [ensemble.temperatures[number]]}
    _write_json(folder / CONFIG, {**config, **alone})


def _settings(ensemble: Ensemble, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label_names": list(ensemble.label_names),
        "temperature": list(ensemble.temperatures),
        "crop": about["crop"],
        "protocol": about["protocol"],
        "pretraining_data": ensemble.config.pretraining_data,
        "made_with": f"omnifer {__version__}",
    }


def _preprocessor(ensemble: Ensemble, about: Mapping[str, Any]) -> dict[str, Any]:
    """How a face crop becomes the network's input, in the words of Hugging Face."""
    member = ensemble.members[0]
    assert isinstance(member, FaceModel)
    size = ensemble.config.size
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 4,  # PIL.Image.Resampling.BOX: area average
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": member.mean.flatten().tolist(),
        "image_std": member.std.flatten().tolist(),
        "do_convert_rgb": ensemble.config.color == "rgb",
        "do_convert_grayscale": ensemble.config.color == "gray",
        "face_crop": about["crop"],
    }


def to_onnx(ensemble: Ensemble, about: Mapping[str, Any]) -> tuple[bytes, Parity]:
    """The graph with its metadata, and how far it is from the model.

    Input `input` (batch, C, S, S) float32 in [0, 1], the mean and deviation inside; outputs
    `logits` and `probs` (batch, K), calibrated.

    Raises:
        ConfigError: the package onnx is not installed.
        ModelError: the graph gives other probabilities, or the network has no graph.
    """
    try:
        import onnx
    except ImportError as err:
        raise ConfigError("--format onnx: pip install 'omnifer[onnx]' first") from err
    config = ensemble.config
    example = torch.rand(2, config.channels, config.size, config.size)
    names = ["input", "logits", "probs"]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, and of the check of shapes
        try:
            torch.onnx.export(
                ensemble,
                (example,),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: "batch"} for name in names},
            )
        except torch.onnx.errors.OnnxExporterError as err:
            first = str(err).splitlines()[0]
            raise ModelError(f"--format onnx: {config.name} has no graph: {first}") from err
    graph = onnx.load_from_string(buffer.getvalue())
    for key, value in _metadata(ensemble, about).items():
        graph.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(graph)
    data: bytes = graph.SerializeToString()
    run, judge = runner(data)
    parity = check(ensemble, lambda x: torch.from_numpy(run(x.numpy())), judge)
    return data, parity


def _metadata(ensemble: Ensemble, about: Mapping[str, Any]) -> dict[str, str]:
    member = ensemble.members[0]
    assert isinstance(member, FaceModel)
    facts = {
        **_settings(ensemble, about),
        "size": ensemble.config.size,
        "color": ensemble.config.color,
        "mean": member.mean.flatten().tolist(),
        "std": member.std.flatten().tolist(),
        "normalization": "inside the graph: feed pixels / 255",
        "resize": "the face crop, stretched to a square by area average",
        "meaning": "perceived expressions, not what a person feels",
    }
    if about["lineage"] is not None:
        facts["weights"] = about["lineage"]["weights"]
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def runner(data: bytes) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Probabilities (B, K) of an ONNX graph: by onnxruntime, else by onnx's own slow evaluator."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        slow = ReferenceEvaluator(data)
        return lambda x: np.asarray(slow.run(["probs"], {"input": x})[0]), "onnx.reference"
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(["probs"], {"input": x})[0]), "onnxruntime"


def drawn(ensemble: Ensemble) -> np.ndarray:
    """Faces of nobody (DRAWN, C, S, S) float32 in [0, 1], of a model's size."""
    config = ensemble.config
    pixels = draw(0, range(DRAWN), config.size)[:, None].repeat(config.channels, axis=1)
    return pixels.astype(np.float32) / 255


@torch.inference_mode()
def check(ensemble: Ensemble, other: Callable[[Tensor], Tensor], judge: str) -> Parity:
    """Compare an export with its model on drawn faces, one and several at a time.

    Raises:
        ModelError: a probability differs by more than `TOLERANCE`, or is none.
    """
    x = torch.from_numpy(drawn(ensemble))
    worst = 0.0
    for faces in (x[:1], x):
        apart = (ensemble(faces)[1] - other(faces)).abs().max()
        worst = max(worst, float(apart) if torch.isfinite(apart) else float("inf"))
    parity = Parity(worst, DRAWN, judge)
    if worst > TOLERANCE:
        raise ModelError(f"export: {parity}, expected at most {TOLERANCE}; nothing was written")
    return parity


def _write_json(at: Path, value: Mapping[str, Any]) -> None:
    Location(str(at)).write_json(dict(value))


def _copy(work: Path, out: Location) -> None:
    """Into place, the file that completes the folder last."""
    files = sorted((f for f in work.rglob("*") if f.is_file()), key=lambda f: f.name == CONFIG)
    for file in files:
        (out / str(file.relative_to(work))).write_bytes(file.read_bytes())
    if not files:
        raise OmniferError(f"{out}: nothing was written")
