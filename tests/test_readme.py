"""The examples in the README are recipes that load, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import parse
from pipeline.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)


def test_readme__has_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: yaml.safe_load(text)["name"])
def test_readme__example_is_a_valid_recipe(example: str) -> None:
    recipe = parse(Recipe, yaml.safe_load(example))
    assert recipe.pool


def test_readme__links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", TEXT, flags=re.M))
def test_readme__make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
