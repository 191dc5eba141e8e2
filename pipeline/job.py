"""A job: one recipe in one run folder. Opens stages by identity; knows nothing of what they do."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.calling import public
from pipeline.claim import WHOLE, Part
from pipeline.config import digest
from pipeline.images import Color, Crop
from pipeline.recipe import Recipe
from pipeline.run import FORGOTTEN_LIST, Run, Stage
from pipeline.sources.reader import PoolSource
from pipeline.sources.removals import Removals
from pipeline.storage import Location, location
from pipeline.tracking import Tracker

SCHEMA_VERSION = 1
"""Part of every identity; raise it when a stage's output changes meaning."""

COMMAND_FILE = "command.json"
"""In the run folder: the words of the command line that made it, without secrets."""

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "labeled": ("labeled", "seed"),
    "test": ("labeled",),
    "survey": ("pool", "slice_faces"),
    "guard": ("guard",),
    "twins": ("guard",),
    "annotated": ("guard",),
    "pretrain": ("pretrain", "seed"),
    "teach": ("teach", "seed"),
    "embed": ("pool",),
    "score": ("score",),
    "search": ("search", "seed"),
    "clusters": ("seed",),
    "select": ("select",),
    "mine": (),
    "experts": ("seed",),
    "distill": ("distill", "seed"),
    "tuned": ("tune", "seed"),
    "student": ("student", "seed"),
    "student_share": ("student", "mined_share", "seed"),
    "control_a": ("control", "seed"),
    "control_b": ("control", "seed"),
    "evaluate": ("evaluate",),
    "rounds": ("active",),
    "active": ("active",),
}
"""The settings that are part of each stage's identity; the rest comes in as digests of inputs."""


@dataclass(frozen=True)
class Job:
    """One recipe in one run folder."""

    recipe: Recipe
    run: Run
    tracker: Tracker
    show_faces: bool = False
    part: Part = WHOLE
    """Of every streaming pass, where several drivers share a run."""

    @cached_property
    def sources(self) -> dict[str, PoolSource]:
        """Pool sources by name."""
        return self.recipe.sources()

    @cached_property
    def views(self) -> dict[str, tuple[Crop, Color]]:
        """How each pool source is cropped and colored."""
        return {name: (source.crop, source.color) for name, source in self.sources.items()}

    @cached_property
    def removals(self) -> Removals:
        """Faces that no reader may yield: of the recipe's list, and those that the run forgot."""
        path = self.recipe.removals
        listed = Removals.load(location(path) if path else None)
        return listed.also(forgotten(self.run.root))

    @property
    def command(self) -> str:
        """The command line that makes this run again, as a shell reads it."""
        return command_of(self.run.root)

    def note_command(self) -> None:
        """Keep this process's command line as the one that made the run."""
        (self.run.root / COMMAND_FILE).write_json([public(word) for word in sys.argv[1:]])

    def open(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        *,
        hide: Collection[str] = (),
        retarget: Collection[str] = (),
        plan: str | None = None,
        firm: Collection[str] = (),
    ) -> Stage:
        """Open a stage under its identity: settings, inputs' digests, schema version.

        Changed settings need --fresh; changed inputs do not, since whatever changed them had to
        pass here before; those of `firm`, which come from outside the run, need it as well. `hide`
        names dotted settings that do not change what the stage writes, `retarget` settings that
        may change without --fresh.
        """
        identity = self.identity(stage, inputs, hide=hide)
        kept = [f"inputs.{name}" for name in firm]
        return self.run.open(stage, identity, ("inputs", *retarget), plan, firm=kept)

    def identity(
        self, stage: str, inputs: Mapping[str, Any], *, hide: Collection[str] = ()
    ) -> dict[str, Any]:
        """What decides whether a stage's earlier output still holds."""
        values = settings(self.recipe, stage)
        for dotted in hide:
            *path, last = dotted.split(".")
            here: Any = values
            for part in path:
                here = here.get(part) or {}
            here.pop(last, None)
        return {**values, "inputs": dict(inputs), "schema": SCHEMA_VERSION}


def settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of a recipe that belongs to a stage's identity, JSON-able."""
    values = recipe.model_dump(mode="json")
    return {name: values[name] for name in SETTINGS[stage]}


def command_of(root: Location) -> str:
    """The command line that makes a run again: `omnifer run` as it was called last.

    A run that was made verb by verb has none; the verb at work, as a run of all stages, stands in.
    """
    at = root / COMMAND_FILE
    if at.exists():
        return shlex.join(["omnifer", *at.read_json()])
    words = [public(word) for word in sys.argv[2:]]
    return shlex.join(["omnifer", "run", *words])


def forgotten(root: Location) -> frozenset[bytes]:
    """What a run has forgotten, blinded; see :func:`pipeline.sources.removals.blind`."""
    data = (root / FORGOTTEN_LIST).find_bytes()
    return frozenset() if data is None else frozenset(map(bytes.fromhex, json.loads(data)))


def file_stamp(path: str) -> str:
    """Digest of a file's place and state; changes when its content does."""
    at: Location = location(path)
    return digest([at.uri, at.stamp()])[:16]
