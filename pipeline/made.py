"""What a run has made: generations by the digest of their content, models by a path.

A stage names its inputs by digest, so whoever looks for what an input was searches the generation
that has that digest, also where the run has gone on since. Cost: a few small files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import CALIBRATION, WEIGHTS
from pipeline.errors import ModelError
from pipeline.flow import MODEL
from pipeline.job import SETTINGS
from pipeline.plan import Plan
from pipeline.run import CURRENT, FIRST_RECIPE, IDENTITY, Run
from pipeline.storage import Location
from pipeline.training.distilled import LABELS
from pipeline.training.pretrain import BACKBONE
from pipeline.training.runs import TEACHER


@dataclass(frozen=True)
class Made:
    """A finished generation of a stage."""

    run: Run
    stage: str
    dir: Location
    digest: str
    plan: str | None  # first digits of the plan it was finished under
    facts: dict[str, Any]
    before: tuple[str, ...] = ()  # digests that its content had until faces were forgotten

    @property
    def identity(self) -> dict[str, Any]:
        """What went in."""
        return dict((self.dir / IDENTITY).read_json())

    @property
    def inputs(self) -> dict[str, Any]:
        """Digests of the inputs, by name."""
        return dict(self.identity["inputs"])


def find_model(at: Location) -> Location:
    """The folder of a model, teacher, tuned teacher or distilled set at a path that a person named.

    A run stands for its student, the folder of a stage for what it made.

    Raises:
        ModelError: nothing of that kind there.
    """
    if (at / "student" / CURRENT).exists():
        return Run(at).artifact("student").dir / MODEL
    if (at / CURRENT).exists():
        at = Run(at.parent).artifact(at.name).dir
    for folder in (at, at / MODEL, at / TEACHER, at / BACKBONE):
        if any((folder / name).exists() for name in (WEIGHTS, CALIBRATION, f"0/{WEIGHTS}", LABELS)):
            return folder
    raise ModelError(
        f"{at}: expected a run folder, a model or teacher folder or a distilled set; it is none"
    )


def named_model(at: Location) -> Location:
    """What :func:`find_model` finds at a path; another folder as it is, for its reader to judge.

    Raises:
        ModelError: a run that has made no student so far.
    """
    try:
        return find_model(at)
    except ModelError:
        if (at / FIRST_RECIPE).exists():
            raise ModelError(
                f"{at}: a run whose student is not finished; name what is, such as {at}/teach"
            ) from None
        return at


def home_of(model: Location) -> Made | None:
    """The generation that a model's folder belongs to; None where it was carried off."""
    for folder in (model, model.parent, model.parent.parent, model.parent.parent.parent):
        if (folder / IDENTITY).exists() and (folder.parent / CURRENT).exists():
            run = Run(folder.parent.parent)
            return next(finished(run, folder.parent.name, folder), None)
    return None


def made_with(run: Run, stage: str, digest: str) -> Made | None:
    """The newest generation of a stage whose content has, or had, a digest."""
    for folder in reversed(run.folders(stage)):
        for made in finished(run, stage, folder):
            if digest in (made.digest, *made.before):
                return made
    return None


def finished(run: Run, stage: str, folder: Location) -> Iterator[Made]:
    """A generation under every plan that it was finished under."""
    for child in folder.children():
        if child.name.startswith("done") and child.name.endswith(".json"):
            known = child.read_json()
            plan = child.name.removesuffix(".json").partition("-")[2] or None
            before = tuple(known.get("before", ()))
            yield Made(run, stage, folder, known["digest"], plan, known["facts"], before)


def in_use(run: Run, stage: str) -> Made | None:
    """The finished generation that later stages read; None where there is none."""
    found = run.latest(stage)
    if found is None:
        return None
    plan = (run.root / stage / CURRENT).read_json()["plan"]
    return Made(run, stage, found.dir, found.digest, plan and plan[:8], found.facts)


def plan_of(made: Made) -> Plan | None:
    """The plan that a streaming stage was finished under."""
    for survey in reversed(made.run.folders("survey")):
        at = survey / f"plan-{made.plan}.parquet"
        if at.exists():
            return Plan(at)
    return None


def recipe_of(made: Made) -> tuple[str, dict[str, Any]]:
    """The first recipe of the run that has the stage's settings; later ones made other stages."""
    identity = made.identity
    past = [c for c in made.run.root.children() if c.name.startswith("recipe-")]
    for at in past:
        recipe = dict(at.read_json())
        if all(recipe.get(n) == identity.get(n) for n in SETTINGS[made.stage] if n in identity):
            return at.name, recipe
    if not past:
        raise ModelError(f"{made.run.root}: holds no recipe-NNNN.json; expected a run folder")
    return past[-1].name, dict(past[-1].read_json())
