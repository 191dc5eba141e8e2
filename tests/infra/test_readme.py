"""Proves that infra/README.md holds the table of infra/sizes.py, and what that table rests on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from helpers import sizes as helper

from pipeline.embedding import EmbedConfig
from pipeline.scoring import ScoreConfig
from pipeline.streaming import StreamConfig
from pipeline.training.runs import TrainConfig

ROOT = Path(__file__).parents[2]

sizes = helper.sizes()
TEXT = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")


def test_readme__holds_the_table() -> None:
    _, _, rest = TEXT.partition("<!-- python -m infra.sizes -->\n")
    shown, found, _ = rest.partition("<!-- end -->")
    assert found
    assert shown.strip() == sizes.table()


def test_size__is_bounded_by_what_can_be_summed_by_hand() -> None:
    """A hundred million faces, ten passes each, on eight GPUs at 80 %; and their bytes."""
    one = sizes.size(100_000_000, 8, 4)
    embed = 100_000_000 * 10 / (8 * 20_000) / 0.8 / 3600
    assert 0.95 * embed < one.hours["embed"] < 1.3 * embed
    kept = 100_000_000 * (1_400 + 1_100 + 260 + 8_000)
    assert one.stored == pytest.approx(kept)
    assert one.compute > embed * (8 * 0.50 + 4 * 0.30 + 0.20)


def test_size__more_gpus_cost_less_time() -> None:
    assert sizes.size(10_000_000, 8, 4).hours["embed"] < sizes.size(10_000_000, 2, 4).hours["embed"]


def test_readme__links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / "infra" / link).exists()] == []


def test_readme__scaling_block_is_that_of_the_recipe() -> None:
    """The lines that a recipe changes between here and a cluster are settings that exist."""
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)
    models = {
        "stream": StreamConfig,
        "train": TrainConfig,
        "embed": EmbedConfig,
        "score": ScoreConfig,
    }
    values = yaml.safe_load(block)
    assert values.keys() == models.keys()
    for name, model in models.items():
        model.model_validate(values[name])
