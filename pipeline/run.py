"""Identities and generations: what a stage was made from, and whether it may be used again.

    root/<stage>/g001-<digest8>/identity.json   what went in, written first
                                done.json       digest of the content and facts, written last
    root/<stage>/current.json                   names the generation in use
    root/recipe-0001.json ...                   the resolved recipes of the run, newest last

The identity of a stage holds the digests of the *content* it reads (`Artifact.digest`), so an
upstream stage that was made again and came out equal re-runs nothing. A stage never overwrites
another generation: --fresh starts a new folder and the old one stays.

Cost: three small reads per stage.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import digest
from pipeline.errors import IdentityError, RunError
from pipeline.storage import Location, to_json

IDENTITY = "identity.json"
"""In every generation: what it was made from."""
FORGOTTEN = "forgotten.json"
"""In a generation that learned from faces which were forgotten since."""
FORGOTTEN_LIST = "forgotten-faces.json"
"""In the run folder: digests of what `omnifer forget` took out, for readers to obey."""
CURRENT = "current.json"
"""Names the generation of a stage, and the plan, that later stages read."""
RECIPE_FILE = "recipe-{:04d}.json"
FIRST_RECIPE = RECIPE_FILE.format(1)
_SCRATCH = re.compile(r"(omnifer-\d+-[0-9a-f]{16})(-[0-9a-f]{8})?")

# Files of stages that other modules read.
TRUTH_FILE = "truth.parquet"  # of labeled and survey
PLAN_FILE = "plan.json"  # of survey; names the plan in use
POINTS_FILE = "labeled.parquet"  # of score: labeled faces out of fold
POINT_FILE = "operating_point.json"  # of select, or of search where select keeps none
METRICS_FILE = "metrics.json"  # of evaluate: what pipeline.evaluation.evaluate returns
PREDICTIONS_FILE = "predictions.parquet"  # of evaluate


@dataclass(frozen=True)
class Artifact:
    """A finished stage. `digest` (hex) is of the content; `facts` is what reports print."""

    stage: str
    dir: Location
    digest: str
    facts: dict[str, Any]


class Stage:
    """One generation of a stage; `done` is None until it is finished.

    A streaming stage finishes once per plan: another removal list makes another plan of the same
    generation, in which what it does not touch is done already.
    """

    def __init__(
        self, name: str, folder: Location, identity: dict[str, Any], plan: str | None
    ) -> None:
        self.name = name
        self.dir = folder
        self.identity = identity
        self.plan = plan
        self.done = _done(name, folder, plan)
        self._opened = time.monotonic()

    def finish(self, digest: str, **facts: Any) -> Artifact:
        """Write done.json, last of all; who finished first is final and is returned.

        Args:
            digest: hex digest of the content, which later stages put into their identity.
            facts: JSON-able numbers and names for reports; `seconds` since the stage was opened
                and the code's version are added.
        """
        seconds = round(time.monotonic() - self._opened, 3)
        facts = {"seconds": seconds, "code": code_version(), **facts}
        at = self.dir / _done_file(self.plan)
        at.create(to_json({"digest": digest, "facts": facts}))
        self.done = _done(self.name, self.dir, self.plan)
        if self.done is None:
            raise RunError(f"{at}: written, but not there when read back")
        return self.done


class Run:
    """A run's folder. Owns nothing in memory but the permission to start new generations.

    Args:
        root: folder of the run, local or on S3; made when something is written.
        fresh: a stage whose identity changed starts a new generation instead of failing.
    """

    def __init__(self, root: Location, *, fresh: bool = False) -> None:
        self.root = root
        self.fresh = fresh

    @property
    def scratch(self) -> Path:
        """Node-local cache folder, made on first use: root/cache, or a temporary folder on S3.

        The temporary one has another name once the run has forgotten faces.
        """
        if self.root.is_local:
            return open_scratch(self.root.local_path() / "cache")
        name = f"omnifer-{os.getuid()}-{digest(self.root.uri)[:16]}"
        gone = (self.root / FORGOTTEN_LIST).find_bytes()
        if gone is not None:
            name += f"-{hashlib.sha256(gone).hexdigest()[:8]}"
        return open_scratch(Path(tempfile.gettempdir()) / name)

    def open(
        self,
        name: str,
        identity: Mapping[str, Any],
        retarget: Collection[str] = (),
        plan: str | None = None,
        firm: Collection[str] = (),
    ) -> Stage:
        """The generation of stage `name` that `identity` belongs to, finished or to be continued.

        Args:
            name: of the stage, and of the verb that makes it.
            identity: JSON-able; everything that the content of the stage depends on.
            retarget: dotted fields that may change without --fresh, such as another test set.
                Such a change leads back to an older generation if one has this very identity.
            plan: digest of the plan that a streaming stage is to cover.
            firm: dotted fields below those of `retarget` that may not change all the same.

        Raises:
            IdentityError: the stage was made from other things; each is named on its own line.
        """
        wanted = json.loads(to_json(identity))
        home = self.root / name
        current = _current(home)
        if current is None:  # never started, or killed before current.json was written
            return self._enter(name, _same(home, wanted) or _next(home, wanted), wanted, plan)
        changes = _changes((current / IDENTITY).read_json(), wanted)
        if not changes:
            return self._enter(name, current, wanted, plan)
        mark = (current / FORGOTTEN).find_bytes()
        if not self.fresh and mark is not None:
            raise IdentityError(
                f"{name}: {current} has learned from {json.loads(mark)['faces']} faces that were "
                "forgotten since, and is not trained again unasked; use --fresh (the old one stays)"
            )
        free = (_below(field, retarget) and not _below(field, firm) for field, _, _ in changes)
        if not self.fresh and not all(free):
            lines = [f"  {field}: {old} -> {new}" for field, old, new in changes]
            raise IdentityError(
                "\n".join(
                    [
                        f"{name}: {current} was made with other settings (old -> new):",
                        *lines,
                        "use --fresh to start a new generation (the old one stays), or another run",
                    ]
                )
            )
        return self._enter(name, _same(home, wanted) or _next(home, wanted), wanted, plan)

    def find(self, name: str, identity: Mapping[str, Any]) -> Location | None:
        """Folder of the newest generation with this identity; opens nothing."""
        return _same(self.root / name, json.loads(to_json(identity)))

    def artifact(self, name: str) -> Artifact:
        """The finished stage in use.

        Raises:
            RunError: there is none; the message names the verb to run first.
        """
        done = self.latest(name)
        if done is None:
            started = _current(self.root / name) is not None
            state = "was started but not finished" if started else "has not been run"
            raise RunError(f"{self.root}: stage {name} {state}; run `omnifer {name}` first")
        return done

    def latest(self, name: str) -> Artifact | None:
        """The finished stage in use, or None: for stages that not every run has."""
        current = _current(self.root / name)
        return _done(name, current, _plan(self.root / name)) if current else None

    def generations(self, name: str) -> list[Artifact]:
        """Every finished generation of a stage that has no plan, oldest first."""
        found = [_done(name, folder, None) for folder in _generations(self.root / name)]
        return [done for done in found if done is not None]

    def folders(self, name: str) -> list[Location]:
        """Every generation of a stage, oldest first, finished or not."""
        return _generations(self.root / name)

    def recipe(self, resolved: dict[str, Any]) -> None:
        """Add the resolved recipe to the run's history unless it equals the newest one."""
        data = to_json(resolved)
        past = [c for c in self.root.children() if c.name.startswith("recipe-")]
        if past and past[-1].read_bytes() == data:
            return
        number = len(past) + 1
        while not (self.root / RECIPE_FILE.format(number)).create(data):
            number += 1

    def _enter(
        self, name: str, folder: Location, identity: dict[str, Any], plan: str | None
    ) -> Stage:
        (folder / IDENTITY).create(to_json(identity))
        entry = {"generation": folder.name, "plan": plan}
        if (folder.parent / CURRENT).find_bytes() != to_json(entry):
            (folder.parent / CURRENT).write_json(entry)
        return Stage(name, folder, identity, plan)


def open_scratch(at: Path) -> Path:
    """Make a :attr:`Run.scratch` on this node, and remove those the run had before it forgot more.

    No driver works on a run while it forgets, so nobody needs them.
    """
    at.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (own := _SCRATCH.fullmatch(at.name)) is not None:
        for other in at.parent.glob(f"{own[1]}*"):
            if other != at and _SCRATCH.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)
    return at


@functools.cache
def code_version() -> str:
    """Version of this package and eight digits of what its source files hold.

    Cost: reads a megabyte, once per process.
    """
    home = Path(__file__).parent
    held = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        held.update(str(file.relative_to(home)).encode() + b"\0" + file.read_bytes())
    return f"{__version__}+{held.hexdigest()[:8]}"


def _current(home: Location) -> Location | None:
    data = (home / CURRENT).find_bytes()
    return None if data is None else home / str(json.loads(data)["generation"])


def _plan(home: Location) -> str | None:
    plan = (home / CURRENT).read_json()["plan"]
    return None if plan is None else str(plan)


def _done_file(plan: str | None) -> str:
    return "done.json" if plan is None else f"done-{plan[:8]}.json"


def _done(name: str, folder: Location, plan: str | None) -> Artifact | None:
    data = (folder / _done_file(plan)).find_bytes()
    if data is None:
        return None
    record = json.loads(data)
    return Artifact(name, folder, record["digest"], record["facts"])


def _generations(home: Location) -> list[Location]:
    return [child for child in home.children() if child.name.startswith("g")]


def _same(home: Location, identity: dict[str, Any]) -> Location | None:
    """The newest generation with this identity."""
    tail = "-" + digest(identity)[:8]
    for folder in reversed(_generations(home)):
        made_from = (folder / IDENTITY).find_bytes()
        if folder.name.endswith(tail) and made_from == to_json(identity):
            return folder
    return None


def _next(home: Location, identity: dict[str, Any]) -> Location:
    numbers = [int(folder.name[1:].partition("-")[0]) for folder in _generations(home)]
    return home / f"g{max(numbers, default=0) + 1:03d}-{digest(identity)[:8]}"


def _below(field: str, names: Collection[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def _changes(old: Any, new: Any) -> list[tuple[str, str, str]]:
    """(dotted field, old value, new value) of every difference, in the order of the fields."""
    before, after = dict(_fields(old)), dict(_fields(new))
    pairs = [(name, before.get(name), after.get(name)) for name in sorted({*before, *after})]
    return [(name, _short(a), _short(b)) for name, a, b in pairs if a != b]


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf as (dotted path, JSON text); an empty object or list is a leaf."""
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(i), item) for i, item in enumerate(value)]
    if not items:
        yield path, json.dumps(value)
    for name, item in items:
        yield from _fields(item, f"{path}.{name}" if path else name)


def _short(text: str | None) -> str:
    if text is None:
        return "(absent)"
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"
