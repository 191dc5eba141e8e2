"""What a person writes down about machines and money: a cluster file and a price table.

    # cluster.yaml
    efficiency: 0.8
    groups:
      - {name: head, min: 1, max: 1, instance: m7i.xlarge}
      - {name: gpu, min: 0, max: 8, instance: g5.xlarge, spot: true, dollars_per_hour: 0.45,
         gpu_images_per_second: 9000}

`instance` takes what a group does not say from the price table.
"""

from __future__ import annotations

import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator

from pipeline.config import Config, nearest, parse
from pipeline.errors import ConfigError
from pipeline.planning.forecast import Machine

GBIT = 1e9 / 8  # bytes per second


class S3Prices(Config):
    """Dollars of an object store."""

    as_of: str
    put_per_1000: float = Field(ge=0)  # PUT, COPY, POST, LIST
    get_per_1000: float = Field(ge=0)  # GET, HEAD and all others
    gb_month: float = Field(ge=0)

    _dates = field_validator("as_of", mode="before")(lambda value: _date(value))

    def requests(self, puts: float, gets: float) -> float:
        """Dollars of so many requests."""
        return (puts * self.put_per_1000 + gets * self.get_per_1000) / 1000


class Instance(Config):
    """A machine that can be rented."""

    as_of: str
    dollars_per_hour: float = Field(ge=0)
    cpus: float = Field(gt=0)
    gpus: int = Field(default=0, ge=0)
    network_gbit: float | None = Field(default=None, gt=0)

    _dates = field_validator("as_of", mode="before")(lambda value: _date(value))


class Prices(Config):
    """The price table."""

    note: str = "check before you rely on it"
    region: str
    s3: S3Prices
    instances: dict[str, Instance] = Field(default_factory=dict)


class NodeGroup(Config):
    """Nodes of one kind, between `min` and `max` of them."""

    name: str
    min: int = Field(default=0, ge=0)
    max: int = Field(ge=0)
    instance: str | None = None  # of the price table; fills what is not said here
    cpus: float | None = Field(default=None, gt=0)  # logical CPUs of a node
    cpu_factor: float = Field(default=1.0, gt=0)  # of one, over one of the probing machine's
    gpus: int | None = Field(default=None, ge=0)
    gpu_factor: float | None = Field(default=None, gt=0)  # one GPU over this machine's forward rate
    gpu_images_per_second: float | None = Field(default=None, gt=0)  # of one GPU, as you measured
    network_gbit: float | None = Field(default=None, gt=0)  # of a node
    dollars_per_hour: float | None = Field(default=None, ge=0)  # of a node
    spot: bool = False

    @model_validator(mode="after")
    def _sound(self) -> NodeGroup:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        if self.gpu_factor is not None and self.gpu_images_per_second is not None:
            raise ValueError("give gpu_factor or gpu_images_per_second, not both")
        return self

    def speed(self, forward: float) -> float:
        """Forward rate of one of its GPUs over `forward`, the probed images per second."""
        if self.gpu_images_per_second is not None:
            return self.gpu_images_per_second / forward
        return self.gpu_factor or 0.0


class Cluster(Config):
    """Groups of nodes that a cluster may have."""

    name: str = "cluster"
    groups: tuple[NodeGroup, ...] = Field(min_length=1)
    efficiency: float = Field(default=0.8, gt=0, le=1)  # of several nodes; assumed, not measured
    node_start_seconds: float = Field(default=180, ge=0)  # until a new node takes work

    def machine(self, counts: dict[str, int], forward: float, *, gpu: bool) -> Machine:
        """So many nodes of each group as one machine.

        Args:
            counts: nodes by group.
            forward: images per second of a probed embed worker.
            gpu: whether forwards run on GPUs.
        """
        held = [(group, counts[group.name]) for group in self.groups]
        logical = sum(n * (group.cpus or 0) for group, n in held)
        cores = sum(n * (group.cpus or 0) * group.cpu_factor for group, n in held)
        gpus = sum(n * (group.gpus or 0) for group, n in held)
        speed = sum(n * (group.gpus or 0) * group.speed(forward) for group, n in held)
        known = [n * g.network_gbit for g, n in held if g.network_gbit is not None]
        return Machine(
            cores=cores,
            core_speed=cores / logical if logical else 1.0,
            gpu_factor=speed / gpus if gpu and gpus else None,
            network=sum(known) * GBIT if known else None,
            dollars_per_hour=sum(n * (group.dollars_per_hour or 0.0) for group, n in held),
            efficiency=self.efficiency if sum(counts.values()) > 1 else 1.0,
        )


def load_prices(path: Path | None) -> Prices:
    """The user's price table, or the one that comes with the package.

    Raises:
        ConfigError: no such file, not YAML, or any number of faults, one line each.
    """
    if path is None:
        return parse(Prices, yaml.safe_load(_own_prices()), where="prices")
    return _load(Prices, path)


def load_cluster(path: Path, prices: Prices) -> Cluster:
    """A cluster file, its groups filled from the price table.

    Raises:
        ConfigError: as :func:`load_prices`; an instance that the table lacks; a group without CPUs,
            or with GPUs of unknown speed.
    """
    cluster = _load(Cluster, path)
    names = [group.name for group in cluster.groups]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path.name}: two groups are named {twice[0]!r}")
    groups = tuple(_filled(group, prices, path.name) for group in cluster.groups)
    if not any(group.max for group in groups):
        raise ConfigError(f"{path.name}: max is 0 in every group; a cluster needs a node")
    return cluster.model_copy(update={"groups": groups})


def _filled(group: NodeGroup, prices: Prices, where: str) -> NodeGroup:
    place = f"{where}: group {group.name!r}"
    values: dict[str, Any] = {}
    if group.instance is not None:
        if group.instance not in prices.instances:
            near = nearest(group.instance, sorted(prices.instances))
            raise ConfigError(f"{place}: no price of instance {group.instance!r}{near}")
        known = prices.instances[group.instance]
        own = ("cpus", "gpus", "network_gbit", "dollars_per_hour")
        values = {name: getattr(known, name) for name in own if getattr(group, name) is None}
    filled = group.model_copy(update=values)
    if filled.cpus is None:
        raise ConfigError(f"{place}: expected cpus, or an instance of the price table")
    if filled.gpus and not filled.speed(1.0):
        raise ConfigError(
            f"{place}: {filled.gpus} GPUs of unknown speed; expected gpu_images_per_second, as you "
            f"measured it, or gpu_factor over this machine's forward rate"
        )
    return filled


C = TypeVar("C", bound=Config)


def _load(model: type[C], path: Path) -> C:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: no such file ({err.strerror})") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(values).__name__}")
    return parse(model, values, where=path.name)


def _own_prices() -> str:
    return files("pipeline.planning").joinpath("prices.yaml").read_text(encoding="utf-8")


def _date(value: Any) -> Any:
    """YAML reads a whole date as one."""
    return value.isoformat() if isinstance(value, datetime.date) else value
