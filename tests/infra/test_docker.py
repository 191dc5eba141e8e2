"""Proves what can be read off the Dockerfiles and compose.yaml; no image is built here."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import load

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "infra" / "docker"
DOCKERFILES = sorted(at for at in DOCKER.glob("Dockerfile.*") if at.suffix != ".dockerignore")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
IMAGE = re.compile(r"(python|postgres):\d+\.\d+(\.\d+)?-[a-z-]+")
"""Official images, a release in full, the distribution's name."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, arguments), in order, with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (w.upper(), rest) for w, _, rest in (x.partition(" ") for x in joined.splitlines()) if w
    ]


def of(file: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(file.read_text(encoding="utf-8")) if name == word]


def faults(text: str) -> list[str]:
    """Everything that is wrong with a Dockerfile."""
    found, steps = [], instructions(text)
    images = [rest.split()[0] for word, rest in steps if word == "FROM"]
    found += [f"not pinned: {image}" for image in images if not IMAGE.fullmatch(image)]
    if len(images) < 2:
        found.append("one stage")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not users[-1].isdigit() or int(users[-1]) < 1000:
        found.append("ends as root")
    found += [f"ADD {rest}" for word, rest in steps if word == "ADD"]
    runs = [rest for word, rest in steps if word == "RUN"]
    found += [f"fetches: {run}" for run in runs if re.search(r"curl|wget|https?://", run)]
    for run in runs:
        if "pip install" in run and "-c /src/constraints.txt" not in run:
            found.append(f"not constrained: {run}")
    settings = [rest for word, rest in steps if word in ("ENV", "ARG")]
    secret = re.compile(r"\w*(PASSWORD|SECRET|AUTH_TOKEN|API_KEY)\w*", re.I)
    found += [f"secret: {rest}" for rest in settings if secret.search(rest)]
    if steps[-1][0] != "CMD" or not steps[-1][1].startswith("["):
        found.append("no CMD in exec form")
    return found


def test_dockerfiles__are_all_there() -> None:
    assert [at.suffix for at in DOCKERFILES] == [".cpu", ".gpu", ".mlflow"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda at: at.suffix[1:])
def test_dockerfile__has_no_fault(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (("slim-bookworm AS", "slim AS"), None),
        (("python:3.11.13-slim-bookworm AS", "python:latest AS"), "not pinned: python:latest"),
        (("USER 10001", ""), "ends as root"),
        (("USER 10001", "USER 10001\nUSER root"), "ends as root"),
        (("COPY jobs", "ADD https://example.org/x"), "ADD https://example.org/x /opt/omnifer/jobs"),
        (("-c /src/constraints.txt", ""), "not constrained"),
        (("WORKDIR", "ENV DB_PASSWORD=x\nWORKDIR"), "secret: DB_PASSWORD=x"),
    ],
)
def test_faults__are_seen(harm: tuple[str, str], seen: str | None) -> None:
    text = (DOCKER / "Dockerfile.gpu").read_text(encoding="utf-8")
    assert harm[0] in text
    found = faults(text.replace(*harm))
    assert found == [] if seen is None else any(seen in fault for fault in found)


def test_dockerfiles__share_one_python() -> None:
    """Ray refuses a node whose Python differs from the head's."""
    images = {rest.split()[0] for file in DOCKERFILES for rest in of(file, "FROM")}
    assert len(images) == 1
    (image,) = images
    assert image.startswith("python:3.11.")  # the oldest that pyproject.toml allows: it is tested


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda at: at.suffix[1:])
def test_dockerfile__copies_what_exists_and_is_sent(file: Path) -> None:
    copied = [shlex.split(rest) for rest in of(file, "COPY")]
    sources = [name for words in copied if not words[0].startswith("--") for name in words[:-1]]
    sent = file.with_name(file.name + ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert [name for name in sources if f"!{name}" not in sent] == []
    assert sent[1] == "*"  # all else stays here


def test_compose__builds_and_images_are_pinned() -> None:
    for service in SERVICES.values():
        if "image" in service:
            assert IMAGE.fullmatch(service["image"])
        else:
            name = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["build"]["dockerfile"])
            assert (ROOT / name).is_file()
            assert (DOCKER / service["build"]["context"]).resolve() == ROOT


def test_compose__has_no_default_password() -> None:
    values = {k: v for s in SERVICES.values() for k, v in s.get("environment", {}).items()}
    passwords = {key: value for key, value in values.items() if "PASS" in key}
    assert passwords.keys() == {"PGPASSWORD", "POSTGRES_PASSWORD"}
    assert all(value.startswith("${MLFLOW_DB_PASSWORD:?") for value in passwords.values())
    assert not any(re.search(r"://[^@/]*:[^@/]*@", str(value)) for value in values.values())


def test_compose__is_reached_from_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose__waits_for_what_is_healthy() -> None:
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "test" in SERVICES[other]["healthcheck"]
    assert SERVICES["omnifer"]["depends_on"].keys() == {"mlflow"}
    assert SERVICES["mlflow"]["depends_on"].keys() == {"postgres"}


def test_compose__gives_no_container_more_than_it_needs() -> None:
    for service in SERVICES.values():
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service
        assert "docker.sock" not in str(service)


def test_compose__volumes_are_declared() -> None:
    named = {
        mount.split(":")[0]
        for service in SERVICES.values()
        for mount in service.get("volumes", ())
        if isinstance(mount, str)
    }
    assert named == COMPOSE["volumes"].keys()


def test_compose__runs_a_recipe_that_loads() -> None:
    words = shlex.split(SERVICES["omnifer"]["command"])
    assert words[:3] == ["omnifer", "run", "jobs/recipes/demo.yaml"]
    recipe = load(ROOT / words[2], [words[words.index("--set") + 1]])
    host = str(recipe.tracking.uri).removeprefix("http://")
    assert host in SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_compose__mlflow_knows_its_settings() -> None:
    """Read, not imported: MLflow takes seconds."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    text = "".join(
        (package / at).read_text(encoding="utf-8")
        for at in ("utils/cli_args.py", "cli/__init__.py")
    )
    asked = [name for name in SERVICES["mlflow"]["environment"] if name.startswith("MLFLOW_")]
    assert asked
    assert [name for name in asked if f'envvar="{name}"' not in text] == []


def test_compose__names_the_driver_that_the_image_has() -> None:
    """SQLAlchemy 2.1 takes another one if none is named."""
    uri = SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    driver = re.match(r"postgresql\+(\w+)://", uri)
    assert driver is not None
    (install,) = [run for run in of(DOCKER / "Dockerfile.mlflow", "RUN") if "pip install" in run]
    assert f"{driver[1]}-binary==" in install
