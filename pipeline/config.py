"""Base class of every stage's settings and the text of configuration errors.

Unknown keys and all other faults of a recipe are reported together, each with where it stands and,
for a misspelt key, the nearest one. `None` means off; there is no -1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pipeline.errors import ConfigError


class Config(BaseModel):
    """Frozen settings of one module; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


def _rising(actors: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= actors[0] <= actors[1]:
        raise ValueError("expected the fewest and the most actors, from 1 up")
    return actors


Actors = Annotated[tuple[int, int], AfterValidator(_rising)]
"""Fewest and most actors of a pool."""


def parse(model: type[C], values: Mapping[str, Any], where: str = "recipe") -> C:
    """Validate `values`; raise one ConfigError that lists every fault, one line each."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as err:
        faults = err.errors(include_url=False)
        lines = [_line(model, fault, where) for fault in faults if not _follows(fault, faults)]
        raise ConfigError("\n".join(lines)) from err


def digest(value: Any) -> str:
    """Hex sha256 of a JSON-able value; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def unread(config: Config, names: Iterable[str]) -> str | None:
    """The first of some settings that is not its default, where none of them is ever read.

    Stored settings name everything, so a default says nothing of what a person asked for.
    """
    for name in names:
        field = type(config).model_fields[name]
        if getattr(config, name) != field.get_default(call_default_factory=True):
            return name
    return None


def filled(values: Any, **own: Any) -> Any:
    """A section's settings with what its place in a recipe has for those that are not named.

    Without it a section of which one setting is named would have its class's defaults in all else.
    What is no mapping, such as a finished section, comes back as it is.
    """
    return {**own, **values} if isinstance(values, Mapping) else values


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def _follows(fault: Any, faults: Sequence[Any]) -> bool:
    """Whether a tuple is too short only because pydantic does not count its faulty items."""
    place = fault["loc"]
    inside = (other["loc"] for other in faults if len(other["loc"]) > len(place))
    return fault["type"] == "too_short" and any(loc[: len(place)] == place for loc in inside)


def _line(model: type[BaseModel], fault: Any, where: str) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *path, key = fault["loc"]
        return f"{where}: unknown key {place!r}{nearest(str(key), _keys(model, path))}"
    if fault["type"] == "missing":
        return f"{where}: {place!r} is required"
    given = repr(fault.get("input"))
    given = given if len(given) <= 80 else given[:77] + "..."
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {place or 'value'}: {message} (given {given})"


def _keys(model: Any, path: list[Any]) -> list[str]:
    """Field names of the sub-model that `path` leads to; empty where it cannot be followed."""
    for part in path:
        if isinstance(part, int):
            continue
        models = _models(model)
        step = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        tagged = [m for m in models if _tag(m) == part]
        if tagged:
            model = tagged[0]
        elif step:
            model = step[0]
        else:
            return []
    return sorted({name for m in _models(model) for name in m.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models(inner)]


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    values = get_args(kind.annotation) if kind is not None else ()
    return str(values[0]) if values else None
