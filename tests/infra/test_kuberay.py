"""Proves that the overlays apply and that what they yield fits KubeRay's schemas and our rules.

No Kubernetes is started here.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import load
from tests.infra.kustomize import Resource, build

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
OVERLAYS = ("small", "large", "small-job", "large-job")
CLUSTERS = {name: build(KUBERAY / "overlays" / name) for name in OVERLAYS}


def spec(overlay: str) -> Any:
    """The cluster's, wherever it stands."""
    if overlay.endswith("-job"):
        return CLUSTERS[overlay]["RayJob", "omnifer"]["spec"]["rayClusterSpec"]
    return CLUSTERS[overlay]["RayCluster", "omnifer"]["spec"]


def pods(overlay: str) -> dict[str, Any]:
    """Pod specs by role."""
    found = {"head": spec(overlay)["headGroupSpec"]["template"]["spec"]}
    groups = {group["groupName"]: group for group in spec(overlay)["workerGroupSpecs"]}
    found |= {name: group["template"]["spec"] for name, group in groups.items()}
    if overlay.endswith("-job"):
        job = CLUSTERS[overlay]["RayJob", "omnifer"]["spec"]
        found["submitter"] = job["submitterPodTemplate"]["spec"]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay__yields_one_cluster_and_what_it_needs(overlay: str) -> None:
    kind = "RayJob" if overlay.endswith("-job") else "RayCluster"
    beside = {("ConfigMap", "omnifer"), ("ServiceAccount", "omnifer"), ("Namespace", "omnifer")}
    expected = {(kind, "omnifer"), ("NetworkPolicy", "omnifer-ray"), *beside}
    assert CLUSTERS[overlay].keys() == expected
    inside = [one for one in CLUSTERS[overlay].values() if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in inside} == {"omnifer"}
    assert "namespace" not in CLUSTERS[overlay]["Namespace", "omnifer"]["metadata"]


def test_readme__names_the_namespace_in_every_command() -> None:
    text = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"kubectl (?:get|port-forward|delete) [^`\n]*", text)
    assert len(commands) == 3
    assert all("-n omnifer" in command for command in commands)
    assert "kubectl create" not in text  # a second time it meets AlreadyExists


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay__kustomize_yields_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip(
            "kubectl is not installed; the overlays are applied by tests/infra/kustomize.py"
        )
    command = [kubectl, "kustomize", str(KUBERAY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert {(one["kind"], one["metadata"]["name"]): one for one in made} == _plain(overlay)


def _plain(overlay: str) -> dict[tuple[str, str], Resource]:
    """Kustomize leaves out empty annotations."""
    found = copy.deepcopy(CLUSTERS[overlay])
    for one in found.values():
        if not one["metadata"].get("annotations", True):
            del one["metadata"]["annotations"]
    return found


@pytest.mark.parametrize("size", ["small", "large"])
def test_job__brings_the_cluster_of_its_size(size: str) -> None:
    assert spec(f"{size}-job") == spec(size)


def test_sizes__are_what_their_patches_say() -> None:
    def largest(overlay: str) -> dict[str, tuple[int, str, str | None]]:
        found = {}
        for group in spec(overlay)["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            shape = limits["cpu"], limits.get("nvidia.com/gpu")
            found[group["groupName"]] = group["maxReplicas"], *shape
        return found

    assert largest("small") == {"gpu": (1, "4", "1"), "cpu": (2, "4", None)}
    assert largest("large") == {"gpu": (8, "8", "1"), "cpu": (4, "16", None)}
    recipe = yaml.safe_load((ROOT / "jobs/recipes/omni-msceleb.yaml").read_text("utf-8"))
    assert recipe["stream"]["cpus"] == 8 * 8 + 4 * 16
    assert recipe["stream"]["gpus"] == 8
    assert recipe["stream"]["node_cpus"] == max(
        int(cpus) for _, cpus, _ in largest("large").values()
    )
    assert recipe["stream"]["object_store_mb"] <= 12 * 0.3 * 30 * 2**30 / 1e6  # 12 pods of 30Gi
    assert recipe["stream"]["no_progress_seconds"] >= 3600


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_cluster__is_guarded_and_starts_from_none(overlay: str) -> None:
    asked = spec(overlay)
    assert asked["authOptions"]["mode"] == "token"
    assert asked["enableInTreeAutoscaling"] is True
    assert asked["autoscalerOptions"]["version"] == "v2"
    assert asked["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert asked["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = asked["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"], g["replicas"]) for g in groups] == [
        ("gpu", 0, 0), ("cpu", 0, 0),
    ]  # fmt: skip
    for group in groups:
        keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert {"cloud.google.com/gke-spot", "nvidia.com/gpu"} <= keys
    assert "tolerations" not in pods(overlay)["head"]


def test_cluster__runs_the_pinned_ray() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split())
    assert spec("small")["rayVersion"] == pins["ray"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods__are_bounded_and_unprivileged(overlay: str) -> None:
    for role, pod in pods(overlay).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            asked = container["resources"]
            assert asked["requests"] == asked["limits"]
            assert {"cpu", "memory"} <= asked["limits"].keys()
            assert ("nvidia.com/gpu" in asked["limits"]) == (role == "gpu")
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            image, _, tag = container["image"].partition(":")
            assert (image, tag) == (f"omnifer-{'gpu' if role == 'gpu' else 'cpu'}", "0.1.0")


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_pods__hold_ray_and_are_probed(overlay: str) -> None:
    for pod in pods(overlay).values():
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["medium"] == "Memory"
        shared = int(mounts["/dev/shm"]["sizeLimit"].removesuffix("Gi"))
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert 0.25 * memory <= shared < 0.5 * memory  # Ray takes 30 % of the memory
        for probe in ("readinessProbe", "livenessProbe"):
            command = container[probe]["exec"]["command"]
            assert command[:2] == ["python", "-c"]
            compile(command[2], probe, "exec")
            assert "127.0.0.1:52365/api/local_raylet_healthz" in command[2]


def test_job__ends_and_runs_a_recipe_that_loads() -> None:
    job = CLUSTERS["small-job"]["RayJob", "omnifer"]["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["activeDeadlineSeconds"] > job["ttlSecondsAfterFinished"]
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["omnifer", "run"]
    sets = [after for word, after in itertools.pairwise(words) if word == "--set"]
    recipe = load(ROOT / Path(words[2]).relative_to("/opt/omnifer"), sets)
    assert recipe.name == "demo"
    groups = spec("small")["workerGroupSpecs"]
    limits = [(g["maxReplicas"], int(_cpus(g))) for g in groups]
    assert recipe.stream.cpus == sum(count * each for count, each in limits)
    assert recipe.stream.node_cpus == max(each for _, each in limits)
    assert recipe.stream.no_progress_seconds >= 3600  # nodes have to come first
    assert recipe.train.workers >= 1  # the head, where the driver is, trains nothing
    settings = CLUSTERS["small-job"]["ConfigMap", "omnifer"]["data"]
    assert words[words.index("--run") + 1].removeprefix("$") in settings


def _cpus(group: Any) -> str:
    limits: dict[str, str] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits["cpu"]


def test_settings__hold_no_secret() -> None:
    for made in CLUSTERS.values():
        assert not any(kind == "Secret" for kind, _ in made)
        assert set(made["ConfigMap", "omnifer"]["data"]) == {"OMNIFER_RUN", "AWS_DEFAULT_REGION"}


# -- against the schemas of KubeRay ---------------------------------------------------------------


def closed(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as JSON schema: unknown keys are errors."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False) is True:
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "pattern" in found:  # of the string
            found["anyOf"][1]["pattern"] = found.pop("pattern")
    preserves = found.pop("x-kubernetes-preserve-unknown-fields", False) is True
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found:
        found["additionalProperties"] = preserves
    return found


@functools.cache
def schema_of(kind: str) -> Any:
    if "OMNIFER_DATA" not in os.environ:
        pytest.skip("OMNIFER_DATA is not set: KubeRay's schemas are not at hand")
    file = Path(os.environ["OMNIFER_DATA"]) / "kuberay-crd" / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"{file} is not at hand")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte of YAML
    definition = yaml.load(file.read_text(encoding="utf-8"), loader)
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def misfits(resource: Resource, schema: Any) -> list[str]:
    from jsonschema import Draft202012Validator

    return [error.message for error in Draft202012Validator(schema).iter_errors(resource)]


@pytest.mark.real
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay__fits_the_schema(overlay: str) -> None:
    kind = "RayJob" if overlay.endswith("-job") else "RayCluster"
    assert misfits(CLUSTERS[overlay][kind, "omnifer"], schema_of(kind)) == []


@pytest.mark.real
def test_schema__sees_a_misspelt_key_and_a_wrong_value() -> None:
    schema = schema_of("RayCluster")
    harmed = copy.deepcopy(CLUSTERS["small"]["RayCluster", "omnifer"])
    harmed["spec"]["workerGroupSpec"] = harmed["spec"].pop("workerGroupSpecs")
    harmed["spec"]["authOptions"]["mode"] = "tokens"
    harmed["spec"]["headGroupSpec"]["template"]["spec"]["restartPolicies"] = "Never"
    seen = " ".join(misfits(harmed, schema))
    assert all(word in seen for word in ("workerGroupSpec", "tokens", "restartPolicies"))
