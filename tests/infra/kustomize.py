"""The part of kustomize that infra/kuberay uses, in plain YAML: resources, JSON patches, copies.

`kubectl kustomize` is the judge where it is installed; without it the overlays are still tested.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "replacements"}
LOCAL = "config.kubernetes.io/local-config"


def build(folder: Path) -> dict[tuple[str, str], Resource]:
    """What a folder's kustomization yields, by (kind, name)."""
    found = _accumulate(folder, [])
    kept = [one for one in found if LOCAL not in (one["metadata"].get("annotations") or {})]
    return {(one["kind"], one["metadata"]["name"]): one for one in kept}


def _accumulate(folder: Path, found: list[Resource]) -> list[Resource]:
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert asked.keys() <= KNOWN, f"{folder}: {asked.keys() - KNOWN} is not done here"
    for name in asked.get("resources", ()):
        at = folder / name
        if at.is_dir():
            _accumulate(at, found)
        else:
            found += [copy.deepcopy(one) for one in yaml.safe_load_all(at.read_text("utf-8"))]
    for name in asked.get("components", ()):
        _accumulate(folder / name, found)
    for patch in asked.get("patches", ()):
        (target,) = _select(found, patch["target"])
        for step in yaml.safe_load(patch["patch"]):
            _apply(target, step)
    if "namespace" in asked:
        for one in (one for one in found if one["kind"] != "Namespace"):
            one["metadata"]["namespace"] = asked["namespace"]
    for wanted in asked.get("replacements", ()):
        (source,) = _select(found, wanted["source"])
        value = _at(source, wanted["source"]["fieldPath"].split("."))
        for aim in wanted["targets"]:
            (target,) = _select(found, aim["select"])
            for path in aim["fieldPaths"]:
                *parents, last = path.split(".")
                _at(target, parents)[last] = copy.deepcopy(value)
    return found


def _select(found: list[Resource], asked: dict[str, str]) -> list[Resource]:
    wanted = (asked["kind"], asked["name"])
    return [one for one in found if (one["kind"], one["metadata"]["name"]) == wanted]


def _apply(target: Resource, step: dict[str, Any]) -> None:
    """One step of a JSON patch (RFC 6902); replacing what is not there is an error."""
    *parents, last = step["path"].strip("/").split("/")
    holder = _at(target, parents)
    key = int(last) if isinstance(holder, list) else last
    assert step["op"] in ("add", "replace")
    if step["op"] == "replace":
        assert (0 <= key < len(holder)) if isinstance(holder, list) else key in holder, step["path"]
    holder[key] = step["value"]


def _at(value: Any, path: list[str]) -> Any:
    for part in path:
        value = value[int(part) if isinstance(value, list) else part]
    return value
