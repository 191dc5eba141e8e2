"""Cards say what must be said, in front matter that a machine reads and text that people do."""

from types import SimpleNamespace

import yaml

from pipeline.cards import CELEB, LIMITS, data_statement, model_card
from pipeline.models import ModelConfig

KNOWN = {"crop": None, "protocol": None, "result": None, "lineage": None}


def card(**about) -> tuple[dict, str]:
    model = SimpleNamespace(
        label_names=("neutral", "fear"), temperatures=(1.5,), config=ModelConfig(), own=True
    )
    text = model_card(model, {**KNOWN, **about})
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_model_card__without_a_run_says_what_is_not_known() -> None:
    head, body = card()
    assert head["library_name"] == "pytorch"
    assert "model-index" not in head
    assert "exported before it was judged" in body
    assert "Classes, in this order: neutral, fear." in body
    assert LIMITS in body


def test_model_card__results_stand_beside_their_protocol() -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ("accuracy", "mean_class_accuracy", "macro_f1", "ece")
    row = {"class": "fear", "n": 4, "recall": None, "precision": 0.25}
    result = {**dict.fromkeys(names, value), "per_class": [row]}
    lineage = {"recipe": "demo (recipe-0001.json)", "run": "/secret/run", "code": "1+a"}
    head, body = card(result=result, protocol={"split": "folder", "n": 4}, lineage=lineage)
    found = head["model-index"][0]["results"][0]
    assert [m["value"] for m in found["metrics"]] == [0.5, 0.5]
    assert "| accuracy | 0.500 | 0.400 to 0.600 |" in body
    assert "| fear | 4 | - | 0.250 |" in body
    assert "- split: folder" in body
    assert "- code: 1+a" in body
    assert "/secret" not in body


def test_data_statement__labels_are_machine_generated_and_removal_has_a_place() -> None:
    facts, columns = {"faces": 1234, "purity": 0.5}, ["`image` the bytes"]
    text = data_statement("demo", facts, ("neutral", "fear"), columns, {"size_categories": "n<1K"})
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["annotations_creators"] == ["machine-generated"]
    assert yaml.safe_load(head)["size_categories"] == "n<1K"
    assert "`image` the bytes" in body
    assert "- faces: 1,234" in body
    assert "- purity: 0.5" in body
    assert "Removal contact: [name an address" in body
    assert CELEB in body
    assert LIMITS in body
