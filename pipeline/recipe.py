"""A recipe: the settings of every module, composed; YAML in, one frozen object out.

Every fault of a recipe is reported at once. A pool source is told by its `kind`, see
:data:`pipeline.sources.reader.PoolSource`. `--set a.b=value` replaces one value (YAML syntax, list
items by number); `$NAME` in any string is taken from the environment. The resolved recipe is stored
in the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from pipeline.active import ActiveConfig
from pipeline.config import Config, nearest, parse
from pipeline.embedding import EmbedConfig
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation import EvaluateConfig
from pipeline.guard import GuardConfig
from pipeline.labeled.reader import LabeledSource
from pipeline.models import PRETRAINED, ModelConfig
from pipeline.outline import outline, require_patches
from pipeline.policy import SelectConfig
from pipeline.report import ReportConfig
from pipeline.scoring import ScoreConfig
from pipeline.search import SearchConfig
from pipeline.sources.reader import PoolSource
from pipeline.spaces import HeadConfig
from pipeline.streaming import StreamConfig
from pipeline.survey import SurveyConfig
from pipeline.tracking import TrackingConfig
from pipeline.training.distillation import TuneConfig
from pipeline.training.distilling import DistillConfig
from pipeline.training.pretraining import PretrainConfig
from pipeline.training.runs import TrainConfig
from pipeline.training.student import ControlConfig, StudentConfig
from pipeline.training.teacher import TeachConfig

SEARCHED = ("policy", "confidence", "prototype", "neighbors", "target_precision", "adaptive")
"""Settings of select that a search decides in its place."""


class Recipe(Config):
    """Everything a run is made of."""

    name: str
    run: str | None = None  # where the run is stored; default runs/<name>; --run wins
    seed: int = 0  # of splits, weights, augmentation and search
    labeled: LabeledSource
    pool: tuple[PoolSource, ...] = Field(min_length=1)
    removals: str | None = None  # file of ids, sha256 or groups that no reader may yield
    slice_faces: int = Field(default=1024, ge=1)  # faces per slice: unit of work, retry and commit
    error_budget: float = Field(default=0.01, ge=0, le=1)  # largest share of quarantined faces
    stream: StreamConfig = StreamConfig()
    train: TrainConfig = TrainConfig()
    survey: SurveyConfig = SurveyConfig()
    guard: GuardConfig = GuardConfig()
    pretrain: PretrainConfig | None = None  # None: nothing is learned from faces without labels
    teach: TeachConfig = TeachConfig()
    embed: EmbedConfig = EmbedConfig()
    score: ScoreConfig = ScoreConfig()
    search: SearchConfig | None = None  # None: select uses its own settings
    select: SelectConfig = SelectConfig()
    distill: DistillConfig | None = None  # None: no distilled set
    tune: TuneConfig | None = None  # None: the teacher learns nothing from the distilled set
    student: StudentConfig = StudentConfig()
    mined_share: float | None = Field(default=None, gt=0, lt=1)
    """Of the mined faces, for a second student that sees no others; None: there is none."""
    control: ControlConfig = ControlConfig()
    active: ActiveConfig | None = None  # None: no acquisition functions are compared
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [source_name(source, i) for i, source in enumerate(self.pool)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"pool: two sources are named {twice[0]!r}; give each its own name")
        return self

    @model_validator(mode="after")
    def _tuned_on_something(self) -> Recipe:
        for name, asks in (("tune", self.tune is not None), ("student.beside", self._beside())):
            if asks and self.distill is None:
                raise ValueError(f"{name}: there is no distilled set; name distill as well")
        return self

    @model_validator(mode="after")
    def _share_is_of_mined_faces(self) -> Recipe:
        if self.mined_share is not None and self._beside():
            raise ValueError("mined_share: beside the distilled set no student sees mined faces")
        return self

    def _beside(self) -> bool:
        return self.student.beside == "distilled"

    @model_validator(mode="after")
    def _shares_are_of_sources(self) -> Recipe:
        known = list(self.sources())
        for name in self.student.source_share:
            if name not in known:
                raise ValueError(
                    f"student.source_share: no source of the pool is named {name!r}"
                    f"{nearest(name, known)}"
                )
        if self.student.source_share and self._beside():
            raise ValueError("student.source_share: beside the distilled set no source is drawn")
        return self

    @model_validator(mode="after")
    def _search_decides(self) -> Recipe:
        if self.search is None:
            return self
        given, default = self.select.model_fields_set, SelectConfig()
        # A stored recipe names every setting, and means none of those that are the default.
        stored = given >= set(SelectConfig.model_fields)
        for name in SEARCHED:
            chosen = name in given and not stored
            if chosen or getattr(self.select, name) != getattr(default, name):
                raise ValueError(
                    f"select.{name}: search finds the operating point and reads none of select's; "
                    "drop it, or say search=null"
                )
        if self.search.seed not in (0, self.seed):
            raise ValueError(f"search.seed: the search takes the recipe's seed, {self.seed}")
        rules = [each.rule for each in self.search.adaptive]
        twice = sorted({rule for rule in rules if rules.count(rule) > 1})
        if twice:
            raise ValueError(f"search.adaptive: two rules are {twice[0]}; only one is looked at")
        if self.search.finalists is not None and self.student.asks_out_of_fold:
            raise ValueError(
                "search.finalists: student.kd and conformal candidates take what teachers say that "
                "have seen the judges; drop one of them"
            )
        draws = self.search.objective == "head" or self.search.finalists is not None
        if not draws and self.search.head != HeadConfig():
            raise ValueError(
                f"search.head: no head judges the objective {self.search.objective}; "
                "say search.objective=head"
            )
        return self

    @model_validator(mode="after")
    def _teacher_sees_what_is_distilled(self) -> Recipe:
        if self.distill is not None:
            net, teacher = self.distill.net, self.teach.model
            if (net.size, net.color) != (teacher.size, teacher.color):
                raise ValueError(
                    f"distill.net: {net.color} faces of {net.size} px; the teacher gives the soft "
                    f"labels and sees {teacher.color} faces of {teacher.size} px"
                )
            if self._beside() and self.student.model.color != net.color:
                raise ValueError(
                    f"student.beside: the distilled set is {net.color}, student.model sees "
                    f"{self.student.model.color} faces; give both one color"
                )
        return self

    @model_validator(mode="after")
    def _pretrained_by_this_run(self) -> Recipe:
        if self.pretrain is not None and self.pretrain.model.weights == PRETRAINED:
            raise ValueError("pretrain.model.weights: pretrained is what this stage makes")
        starts = [
            (name, model, f"{name}.model.weights")
            for name, model in (("teach", self.teach.model), ("student", self.student.model))
            if model.weights == PRETRAINED
        ]
        if self.active is not None and PRETRAINED in self.active.starts:
            starts.append(("active.train", self.active.train.model, "active.starts"))
        for name, model, asked in starts:
            if self.pretrain is None:
                raise ValueError(f"{asked}: pretrained, and the recipe has no pretrain")
            if not model.same_network(self.pretrain.model):
                own = self.pretrain.model
                raise ValueError(
                    f"{name}.model: {model.name} at {model.size} px {model.color} cannot start "
                    f"from pretrain.model, {own.name} at {own.size} px {own.color}, unless name, "
                    "args, size and color are the same"
                )
        return self

    @model_validator(mode="after")
    def _networks_are_there(self) -> Recipe:
        looked_at: list[ModelConfig] = []
        for name, model in self.networks().items():
            if any(model.same_network(other) for other in looked_at):
                continue
            looked_at.append(model)
            try:
                outline(model)
            except ModelError as err:
                raise ValueError(f"{name}: {err}") from err
        if self.pretrain is not None and self.pretrain.method == "mae":
            try:
                require_patches(self.pretrain.model, self.pretrain.mask_ratio)
            except ConfigError as err:
                raise ValueError(str(err)) from err
        return self

    @model_validator(mode="after")
    def _batches_are_shared_evenly(self) -> Recipe:
        batches = [("teach", "teach.batch", self.teach.batch)]
        for stage in ("student", "student_share")[: 1 + (self.mined_share is not None)]:
            batches.append((stage, "student.labeled_batch", self.student.labeled_batch))
            batches.append((stage, "student.mined_batch", self.student.mined_batch))
        if self.pretrain is not None:
            batches.append(("pretrain", "pretrain.batch", self.pretrain.batch))
        for stage, name, faces in batches:
            workers = max(1, self.train.stage_workers.get(stage, self.train.workers))
            if faces % workers:
                raise ValueError(f"{name}: {faces} cannot be shared evenly by {workers} workers")
        return self

    @property
    def starts_pretrained(self) -> bool:
        """Whether a teacher or the student starts from the run's own backbone."""
        return PRETRAINED in (self.teach.model.weights, self.student.model.weights)

    def folder(self, run_dir: str | None) -> str:
        """Its run's folder: as asked for, as the recipe says, or runs/ and its name."""
        return run_dir or self.run or f"runs/{self.name}"

    def networks(self) -> dict[str, ModelConfig]:
        """Every network that the recipe trains, by where it is named."""
        found = {"teach.model": self.teach.model, "student.model": self.student.model}
        if self.pretrain is not None:
            found["pretrain.model"] = self.pretrain.model
        if self.distill is not None:
            found["distill.net"] = self.distill.net
        if self.active is not None:
            found["active.train.model"] = self.active.train.model
        return found

    def sources(self) -> dict[str, PoolSource]:
        """Pool sources by name."""
        return {source_name(source, i): source for i, source in enumerate(self.pool)}


def source_name(source: PoolSource, position: int) -> str:
    """The recipe's name of a pool source, or its kind and position."""
    return source.name or f"{source.kind}{position}"


def load(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `--set` values, fill environment variables, validate.

    Raises:
        ConfigError: no such file, not YAML, or any number of faults, one line each.
    """
    faults: list[str] = []
    values = _expand(_read(path, sets, faults), faults)
    try:
        recipe = parse(Recipe, values, where=Path(path).name)
    except ConfigError as err:
        raise ConfigError("\n".join([*faults, str(err)])) from err
    _refuse(faults)
    return recipe


def variables(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> dict[str, str]:
    """Environment variables that a recipe names, with their values here.

    Raises:
        ConfigError: no such file, not YAML, or a variable that the environment does not define.
    """
    faults: list[str] = []
    named: set[str] = set()
    _expand(_read(path, sets, faults), faults, named)
    _refuse(faults)
    return {name: os.environ[name] for name in sorted(named)}


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


class _Loader(yaml.SafeLoader):
    """Plain YAML that notes keys which a mapping holds twice: the last one would win unheard."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written; merged keys come later and may be there twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                self.twice.append(f"key {name!r} is in line {lines[name]} and in line {line}")
            lines[name] = line
        return node


def _yaml(text: str, where: str, faults: list[str]) -> Any:
    """What a text says; keys that it has twice are added to `faults`."""
    loader = _Loader(text)
    try:
        values = loader.get_single_data()
    finally:
        loader.dispose()
    faults += [f"{where}: {line}; keep one" for line in loader.twice]
    return values


def _read(path: str | os.PathLike[str], sets: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """A recipe's values with `--set` applied, as they stand there; what is wrong joins `faults`."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{file}: no such recipe ({err.strerror})") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{file}: not text, so no recipe: {err.reason}") from err
    try:
        values = _yaml(text, file.name, faults)
    except yaml.YAMLError as err:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a recipe is a mapping of settings, got {type(values).__name__}")
    for item in sets:
        try:
            _assign(values, item, faults)
        except ConfigError as err:
            faults.append(str(err))
    return values


def _assign(values: dict[str, Any], item: str, faults: list[str]) -> None:
    """Apply one `a.b.0.c=value` in place."""
    path, sign, text = item.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"--set {item!r}: expected KEY.PATH=VALUE")
    try:
        value = _yaml(text, f"--set {item!r}", faults)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {item!r}: the value is not YAML") from err
    *parents, last = path.strip().split(".")
    here: Any = values
    for part in parents:
        if isinstance(here, dict):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            here = here[_index(here, part, item)]
    if isinstance(here, dict):
        here[last] = value
    else:
        here[_index(here, last, item)] = value


def _index(here: Any, part: str, item: str) -> int:
    if not isinstance(here, list) or not part.isdigit() or int(part) >= len(here):
        size = f"a list of {len(here)}" if isinstance(here, list) else "a plain value"
        raise ConfigError(f"--set {item!r}: {part!r} does not lead into {size}")
    return int(part)


_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def _expand(value: Any, faults: list[str], named: set[str] | None = None) -> Any:
    """Fill `$NAME` and `${NAME}` in every string; a variable that is missing joins `faults`.

    The names are added to `named`.
    """
    if isinstance(value, dict):
        return {key: _expand(item, faults, named) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, faults, named) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            line = f"recipe names ${name}, which the environment does not define"
            if line not in faults:
                faults.append(line)
            return match.group()
        if named is not None:
            named.add(name)
        return os.environ[name]

    return _VARIABLE.sub(fill, value)
