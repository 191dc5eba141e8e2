"""Weights that others trained, copied into one of our networks.

Reads safetensors, timm-style folders and plain torch files; never unpickles objects. What did not
match is reported, and too little is an error: a network that silently kept its random start looks
like a bad recipe. Cost: one read of the file.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models import FaceModel, classifier_of
from pipeline.storage import Location

MIN_MATCHED = 0.9  # share of the network's values that must be filled


@dataclass(frozen=True)
class WeightsReport:
    """What became of foreign weights. The classifier is not counted: it keeps its random start."""

    matched: int  # values copied
    total: int  # values the network has without its classifier
    missing: tuple[str, ...]  # of the network, not in the file or of another shape
    unexpected: tuple[str, ...]  # of the file, not in the network
    adapted: tuple[str, ...]  # first layers turned from color to gray or back
    sha256: str  # of the file

    def __str__(self) -> str:
        named = [("missing", self.missing), ("unexpected", self.unexpected)]
        lists = [f"{what} {', '.join(names)}" for what, names in named if names]
        share = f"{self.matched:,} of {self.total:,} values match"
        return "; ".join([share, *lists, f"sha256 {self.sha256[:12]}"])


def load_weights(model: FaceModel, path: Location) -> WeightsReport:
    """Copy weights from a .safetensors file, a timm-style folder, or a torch file, in place.

    A torch file is read with weights_only=True and may nest its state under `state_dict` or
    `model`. Names may start with `module.` or `net.`. A first convolution for another number of
    channels is summed over color (to gray) or spread over it (to rgb).

    Raises:
        ModelError: nothing readable there, or less than 90 % of the network's values match; the
            model is then unchanged.
    """
    data, state = _state(path)
    given = {k.removeprefix("module.").removeprefix("net."): v for k, v in state.items()}
    head = {id(p) for p in classifier_of(model.net).parameters()}
    every = model.net.state_dict(keep_vars=True)
    body = {k: v for k, v in every.items() if id(v) not in head and v.is_floating_point()}
    fitting: dict[str, Tensor] = {}
    adapted = []
    for name, own in body.items():
        value = given.get(name)
        if value is None:
            continue
        if value.shape != own.shape:
            value = _other_channels(value, own)
            adapted.append(name)
        if value is not None:
            fitting[name] = value
    missing = tuple(name for name in body if name not in fitting)
    unexpected = tuple(name for name in given if name not in every)
    matched = sum(body[name].numel() for name in fitting)
    total = sum(own.numel() for own in body.values())
    if matched < MIN_MATCHED * total:
        raise ModelError(
            f"{path.uri}: {matched:,} of {total:,} values of {model.config.name} match "
            f"({matched / total:.1%}), expected at least {MIN_MATCHED:.0%}; "
            f"missing {', '.join(missing[:3])}; unexpected {', '.join(unexpected[:3]) or 'none'}"
        )
    with torch.no_grad():
        for name, value in fitting.items():
            body[name].copy_(value)
    return WeightsReport(
        matched=matched,
        total=total,
        missing=missing,
        unexpected=unexpected,
        adapted=tuple(name for name in adapted if name in fitting),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _other_channels(value: Tensor, own: Tensor) -> Tensor | None:
    """A convolution's weight (O, C, h, w) for another C; None where more than C differs."""
    if value.ndim != 4 or own.ndim != 4 or value[:, 0].shape != own[:, 0].shape:
        return None
    if {value.shape[1], own.shape[1]} != {1, 3}:
        return None
    gray = value.sum(dim=1, keepdim=True)
    return gray if own.shape[1] == 1 else gray.expand_as(own) / 3


def file_of(path: Location) -> Location:
    """The file with the weights: itself, or the one in a timm-style folder.

    Raises:
        ModelError: not there.
    """
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        inside = [path / name for name in names if (path / name).exists()]
        if not inside:
            raise ModelError(f"{path.uri}: expected {' or '.join(names)} in the folder; not there")
        return inside[0]
    if not path.exists():
        raise ModelError(f"{path.uri}: expected a weights file or folder; not there")
    return path


@lru_cache(maxsize=16)
def weights_sha256(file: Location, stamp: str) -> str:
    """Hex sha256 of a weights file, read once per `stamp` of it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _state(path: Location) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes of a weights file and its tensors."""
    path = file_of(path)
    data = path.read_bytes()
    try:
        if path.name.endswith(".safetensors"):
            return data, load_tensors(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as err:
        first = " ".join(str(err).split())[:120]
        raise ModelError(f"{path.uri}: not a file of plain weights: {first}") from err
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path.uri}: holds {type(state).__name__}, expected named tensors")
    return data, state
