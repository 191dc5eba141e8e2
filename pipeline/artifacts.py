"""Models on storage: timm-style model folders and teacher folders.

A model folder is `config.json` + `model.safetensors` with timm's own keys, so where the network is
timm's, `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it; our settings are in the
block `omnifer`. A teacher folder holds member folders, calibration, prototypes and the bank of
labeled embeddings. Nothing here unpickles. Cost: one read of the files; a remote folder is copied
once per node.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import digest, parse
from pipeline.errors import ModelError
from pipeline.models import FaceModel, ModelConfig, create
from pipeline.storage import Location, location

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CALIBRATION = "calibration.json"
CROP = "crop"
"""Of a model's facts: which part of a picture was the face where it learned."""
_PICKLES = (
    *(".pkl", ".pickle", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".pth.tar"),
    *(".joblib", ".dill", ".cloudpickle", ".pkl.gz", ".npy"),
)

# -- one model ------------------------------------------------------------------------------------


def save_model(model: FaceModel, at: Location, meta: Mapping[str, Any]) -> str:
    """Write a model folder; `config.json` comes last and completes it.

    Args:
        model: any device; saved as it is.
        at: the folder; made if missing, replaced file by file.
        meta: JSON-able facts kept with the model. `temperature` and `crop` are read again by
            predict.

    Returns:
        hex sha256 of `model.safetensors`.
    """
    state = {key: v.detach().cpu().contiguous() for key, v in model.net.state_dict().items()}
    data = save_tensors(state, metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    config, classes = model.config, len(model.label_names)
    facts: Mapping[str, Any] = getattr(model.net, "pretrained_cfg", {})
    (at / WEIGHTS).write_bytes(data)
    (at / CONFIG).write_json(
        {
            "architecture": config.name,
            "num_classes": classes,
            "num_features": model.embed_dim,
            "label_names": list(model.label_names),
            "model_args": dict(config.args),
            "pretrained_cfg": {
                "input_size": [config.channels, config.size, config.size],
                "fixed_input_size": bool(facts.get("fixed_input_size", False)),
                # pixels in [0, 1] of the face crop, stretched to a square by area average
                "mean": model.mean.flatten().tolist(),
                "std": model.std.flatten().tolist(),
                "interpolation": "box",
                "crop_pct": 1.0,
                "crop_mode": "squash",
                "num_classes": classes,
                "first_conv": facts.get("first_conv"),
                "classifier": facts.get("classifier", "fc"),
            },
            "omnifer": {
                "model": config.model_dump(mode="json"),
                "label_names": list(model.label_names),
                "pretraining_data": config.pretraining_data,
                "sha256": sha256,
                **({} if model.started is None else {"started_from": model.started}),
                "meta": dict(meta),
            },
        }
    )
    return sha256


def load_model(at: Location) -> FaceModel:
    """The model of a folder, on the CPU, in evaluation mode.

    Raises:
        ModelError: not a model folder, one that holds a pickle, or weights that are damaged or of
            another network.
    """
    about = _about(at)
    names = about["label_names"]
    model = create(parse(ModelConfig, about["model"], where=f"{at.uri}/config.json"), names)
    data = _read(at / WEIGHTS, about["sha256"])
    try:
        model.net.load_state_dict(load_tensors(data), strict=True)
    except (RuntimeError, SafetensorError) as err:
        first = " ".join(str(err).split())[:200]
        raise ModelError(f"{at.uri}: weights do not fit {model.config.name}: {first}") from err
    # The folder decides, not the installed timm, whose defaults may move.
    norm = (at / CONFIG).read_json()["pretrained_cfg"]
    model.mean.copy_(torch.tensor(norm["mean"]).view_as(model.mean))
    model.std.copy_(torch.tensor(norm["std"]).view_as(model.std))
    return model.eval()


def is_complete(at: Location) -> bool:
    """Whether a model folder was written to its end."""
    return (at / CONFIG).exists()


def saved_digest(at: Location) -> str:
    """Sha256 of a model folder's weights, as :func:`save_model` returned it."""
    return hashlib.sha256((at / WEIGHTS).read_bytes()).hexdigest()


def read_meta(at: Location) -> dict[str, Any]:
    """The facts saved with a model or teacher folder."""
    if is_teacher(at):
        return dict((at / CALIBRATION).read_json()["meta"])
    return dict(_about(at)["meta"])


def _about(at: Location) -> dict[str, Any]:
    """The `omnifer` block of a model folder."""
    refuse_pickles(at)
    if not (at / WEIGHTS).exists():
        raise ModelError(f"{at.uri}: expected {WEIGHTS}; not there")
    if not is_complete(at):
        raise ModelError(f"{at.uri}: expected config.json beside {WEIGHTS}; not there")
    about = (at / CONFIG).read_json().get("omnifer")
    if about is None:
        raise ModelError(f"{at.uri}/config.json: no block 'omnifer'; expected one of our models")
    return dict(about)


def refuse_pickles(at: Location) -> None:
    """ModelError where a folder holds a pickle at any depth, whatever else it holds.

    Another tool might open the pickle, and think that it is the same model.
    """
    for found in at.files(_PICKLES):
        name = found.uri.removeprefix(at.uri).lstrip("/")
        raise ModelError(f"{at.uri}: holds {name}, a pickle, which is never opened; remove it")


def _read(at: Location, sha256: str) -> bytes:
    data = at.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ModelError(f"{at.uri}: sha256 {found[:12]}, expected {sha256[:12]}; damaged or mixed")
    return data


# -- the teacher ----------------------------------------------------------------------------------


@dataclass
class Teacher:
    """An ensemble with its calibration and what it knows of the labeled faces.

    The embedding of a face is the concatenation of its members' unit features over sqrt(members),
    so the cosine of two faces is the mean of their members' cosines.
    """

    members: list[FaceModel]
    label_names: tuple[str, ...]
    temperature: float
    prototypes: Tensor  # (P, D) unit
    prototype_labels: Tensor  # (P,) int64
    bank: Tensor  # (N, D) unit, labeled faces
    bank_labels: Tensor  # (N,) int64
    bank_ids: tuple[str, ...]
    sha256: str = ""  # of everything that scores depend on; set where it was saved or loaded
    weights_sha256: str = ""  # of the members alone: what embeddings depend on

    @property
    def width(self) -> int:
        """D: members x their embedding width."""
        return sum(member.embed_dim for member in self.members)

    def to(self, device: torch.device) -> Self:
        """Move the members, channels last; prototypes and bank stay on the CPU."""
        for member in self.members:
            member.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def compile(self) -> None:
        """Let torch.compile fuse what `represent` runs, for one shape of input."""
        for member in self.members:
            member.features = torch.compile(member.features, dynamic=False)  # type: ignore[method-assign]

    @torch.inference_mode()
    def represent(self, x: Tensor, flip: bool = True) -> tuple[Tensor, Tensor]:
        """Embedding and raw logits of faces.

        Args:
            x: (B, C, S, S), uint8 or float in [0, 1], on the members' device.
            flip: average with the mirror image: unit features renormalized, logits meaned.

        Returns:
            embedding (B, D) float32 of unit length, logits (B, M, K) float32, not calibrated.
        """
        x = x / 255 if x.dtype == torch.uint8 else x
        views = torch.cat([x, x.flip(-1)]) if flip else x
        views = views.contiguous(memory_format=torch.channels_last)
        parts, logits = [], []
        for member in self.members:
            features, scores = member.features(views)
            z = F.normalize(features.float(), dim=-1).view(-1, len(x), member.embed_dim)
            parts.append(F.normalize(z.mean(0), dim=-1))
            logits.append(scores.float().view(-1, len(x), scores.shape[-1]).mean(0))
        return torch.cat(parts, dim=-1) / len(parts) ** 0.5, torch.stack(logits, dim=1)

    def member_probs(self, logits: Tensor) -> Tensor:
        """(..., M, K) raw logits -> calibrated probabilities of each member, same shape."""
        return torch.softmax(logits.float() / self.temperature, dim=-1)

    def probs(self, logits: Tensor) -> Tensor:
        """(..., M, K) raw logits -> (..., K): mean of the members' calibrated probabilities."""
        return self.member_probs(logits).mean(dim=-2)


def is_teacher(at: Location) -> bool:
    """Whether a folder holds a teacher rather than one model."""
    return (at / CALIBRATION).exists()


def save_teacher(teacher: Teacher, at: Location, meta: Mapping[str, Any] | None = None) -> str:
    """Write a teacher folder, calibration last; sets and returns `teacher.sha256`.

    `meta` holds JSON-able facts; they do not count in the digest.
    """
    names = list(teacher.label_names)
    members = []
    for i, member in enumerate(teacher.members):
        sha256 = save_model(member, at / "members" / str(i), {})
        members.append({"sha256": sha256, "model": member.config.model_dump(mode="json")})
    files = {
        "prototypes.safetensors": _tensors(teacher.prototypes, teacher.prototype_labels),
        "bank.safetensors": _tensors(teacher.bank, teacher.bank_labels),
    }
    for name, data in files.items():
        (at / name).write_bytes(data)
    (at / "bank_ids.json").write_json(list(teacher.bank_ids))
    scored = {
        "members": members,
        "label_names": names,
        "temperature": teacher.temperature,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "bank_ids": digest(list(teacher.bank_ids)),
    }
    (at / CALIBRATION).write_json({**scored, "meta": dict(meta or {})})
    teacher.sha256 = digest(scored)
    teacher.weights_sha256 = digest(members)
    return teacher.sha256


def load_teacher(at: Location) -> Teacher:
    """The teacher of a folder, on the CPU.

    Raises:
        ModelError: a file is missing or was changed, or the folder holds a pickle.
    """
    refuse_pickles(at)
    if not is_teacher(at):
        raise ModelError(f"{at.uri}: expected a teacher folder with {CALIBRATION}; not there")
    stored = (at / CALIBRATION).read_json()
    stored.pop("meta")
    ids = (at / "bank_ids.json").read_json()
    if digest(ids) != stored["bank_ids"]:
        raise ModelError(f"{at.uri}/bank_ids.json: not the ids this teacher was saved with")
    members = [load_model(at / "members" / str(i)) for i in range(len(stored["members"]))]
    names = ("prototypes.safetensors", "bank.safetensors")
    prototypes, bank = (load_tensors(_read(at / name, stored["files"][name])) for name in names)
    return Teacher(
        members=members,
        label_names=tuple(stored["label_names"]),
        temperature=float(stored["temperature"]),
        prototypes=prototypes["vectors"],
        prototype_labels=prototypes["labels"],
        bank=bank["vectors"],
        bank_labels=bank["labels"],
        bank_ids=tuple(ids),
        sha256=digest(stored),
        weights_sha256=digest(stored["members"]),
    )


def load_any(at: Location) -> Teacher:
    """A teacher folder, or a model folder as a teacher of one member that knows no labeled face."""
    if is_teacher(at):
        return load_teacher(at)
    model = load_model(at)
    about = _about(at)
    return Teacher(
        members=[model],
        label_names=model.label_names,
        temperature=float(about["meta"].get("temperature", 1.0)),
        prototypes=torch.zeros(0, model.embed_dim),
        prototype_labels=torch.zeros(0, dtype=torch.int64),
        bank=torch.zeros(0, model.embed_dim),
        bank_labels=torch.zeros(0, dtype=torch.int64),
        bank_ids=(),
        sha256=about["sha256"],
        weights_sha256=about["sha256"],
    )


def _tensors(vectors: Tensor, labels: Tensor) -> bytes:
    return save_tensors(
        {"vectors": vectors.cpu().float().contiguous(), "labels": labels.cpu().long().contiguous()}
    )


def on_node(at: Location) -> Location:
    """A model or teacher folder on this node's disk: itself, or a copy made once per node.

    The copy is named by the folder and its files' stamps, so a changed folder is fetched again, and
    the copy of what it was before is removed: it may know faces that were forgotten since. Actors
    that start together wait for the first one.

    Raises:
        ModelError: no such folder, or one that holds a pickle, which no copy would show.
    """
    refuse_pickles(at)
    if at.is_local:
        return at
    files = list(at.files((".json", ".safetensors")))
    if not files:
        raise ModelError(f"{at.uri}: expected a model or teacher folder; holds no such file")
    name = digest(at.uri)[:16]
    key = f"{name}-{digest([[f.uri, f.stamp()] for f in files])[:32]}"
    cache = Path(tempfile.gettempdir()) / f"omnifer-{os.getuid()}" / "models"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / key).exists():
            for old in cache.glob(f"{name}-*"):  # unfinished ones of the killed as well
                shutil.rmtree(old, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
            for file in files:
                target = partial / file.uri.removeprefix(at.uri).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open() as source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy)
            partial.rename(cache / key)
    return location(cache / key)
