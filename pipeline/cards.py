"""What stands beside models and data that leave: the card of a model, the statement of a data set.

Text from facts; nothing is read here. Front matter as the Hugging Face hub reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import yaml

LIMITS = """\
Labels are *perceived expressions*: what observers, or a model taught by them, see in a picture, not
what a person feels. Errors differ between groups of people; measure them on yours before any use.

Inferring emotions of people at work and in education is prohibited in the European Union, with
narrow medical and safety exceptions (EU Artificial Intelligence Act, article 5(1)(f)); people who
are exposed to emotion recognition must be told (article 50(3)). Do not use this to identify, rank
or decide about people. These are facts to check, not legal advice.
"""

CELEB = """\
MS-Celeb-1M was withdrawn by Microsoft in 2019; its photographs were collected without consent. If
any of the sources above holds it or a copy of it, do not pass on pixels: ids, hashes and
probabilities suffice to build the set again. The same care is due to weights trained on it.
"""

CONTACT = "[name an address where people in the pictures can ask for removal]"


class Carried(Protocol):
    """What a card says of a model."""

    label_names: Any
    temperatures: Any
    config: Any
    own: bool  # the network is this package's, not timm's


def model_card(model: Carried, about: Mapping[str, Any]) -> str:
    """README.md of a model: what it is, how to open it, how good it is and on what, what not to do.

    Args:
        model: an :class:`pipeline.exporting.Ensemble`.
        about: crop, protocol, result, lineage; None where unknown.
    """
    config, result, lineage = model.config, about["result"], about["lineage"]
    title = str((lineage or {}).get("recipe", config.name)).partition(" ")[0]
    kind = "an ensemble of " if len(model.temperatures) > 1 else ""
    needs = "torch and safetensors" + ("" if model.own else ", timm")
    text = [
        _front(_model_facts(title, about, "pytorch" if model.own else "timm")),
        f"# {title}: perceived facial expressions",
        "",
        f"{kind}{config.name}, {config.color} faces of {config.size} px; made with OmniFER.",
        "",
        f"Classes, in this order: {', '.join(model.label_names)}.",
        "",
        "## Use",
        "",
        "```python",
        f"from modeling import load            # the script in this folder: {needs}",
        'model = load(".")',
        f"probs = model(faces)                 # (B, {config.channels}, {config.size}, "
        f"{config.size}) in [0, 1] -> (B, {len(model.label_names)}), calibrated",
        "```",
        "",
        f"Faces are cropped as `{json.dumps(about['crop'])}` says (null: unknown), stretched to a "
        "square by area average, and divided by 255. The script subtracts mean and deviation and "
        f"divides logits by the temperature ({', '.join(f'{t:.3g}' for t in model.temperatures)}).",
        "",
        "## Results",
        "",
        *_results(result, about["protocol"]),
        "",
        "## What it learned from",
        "",
        *_lines(_public(lineage)),
        f"- pre-training data: {config.pretraining_data or 'none'}",
        "",
        "## Limits and prohibited use",
        "",
        LIMITS,
        "## License",
        "",
        "That of the faces and weights it was made from; fill in `license` above before you",
        "publish it.",
        "",
    ]
    return "\n".join(text)


def data_statement(
    title: str,
    facts: Mapping[str, Any],
    classes: Sequence[str],
    columns: Sequence[str],
    head: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a mined set: machine-generated labels, yield, sources, removal, limits.

    Args:
        title: name of the recipe.
        facts: what was counted, by the words that are printed.
        classes: label names in order.
        columns: what a face consists of, as lines.
        head: more front matter.
    """
    front = {
        "license": "other",
        "license_name": "terms-of-the-sources",
        "annotations_creators": ["machine-generated"],
        "task_categories": ["image-classification"],
        "tags": ["facial-expression", "pseudo-labels", "omnifer"],
        "extra_gated_prompt": "Faces are personal data. Say what you will use them for.",
        **(head or {}),
    }
    return "\n".join(
        [
            _front(front),
            f"# {title}: mined faces",
            "",
            "**The labels are machine-generated.** A teacher ensemble trained on a small labeled",
            "set scored unlabeled faces; thresholds chosen on held-out labeled faces decided which",
            "ones stay.",
            "",
            f"Classes, in this order: {', '.join(classes)}.",
            "",
            *_lines(facts),
            "",
            "## Columns",
            "",
            *columns,
            "",
            "## Personal data and removal",
            "",
            f"The pictures show people. Removal contact: {CONTACT}",
            "`omnifer forget RUN --ids FILE` takes faces out of the run; export again afterwards.",
            "",
            CELEB,
            "## Limits and prohibited use",
            "",
            LIMITS,
            "The licenses of the sources apply to their pictures, also here.",
            "",
        ]
    )


def _front(values: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"


def _model_facts(title: str, about: Mapping[str, Any], library: str) -> dict[str, Any]:
    head: dict[str, Any] = {
        "license": "other",
        "license_name": "terms-of-the-data",
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["facial-expression", "omnifer"],
        "metrics": ["accuracy"],
    }
    result, protocol = about["result"], about["protocol"]
    if result is None or protocol is None:
        return head
    metrics = [
        {"type": "accuracy", "value": round(result["accuracy"]["value"], 4), "name": "accuracy"},
        {
            "type": "recall",
            "value": round(result["mean_class_accuracy"]["value"], 4),
            "name": "mean class accuracy",
        },
    ]
    data = {"name": protocol["split"], "type": "private"}
    task = {"type": "image-classification", "name": "perceived expression"}
    entry = {"task": task, "dataset": data, "metrics": metrics}
    return {**head, "model-index": [{"name": title, "results": [entry]}]}


def _public(lineage: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Lineage without places: a card travels, paths of the machine that wrote it should not."""
    if lineage is None:
        return {"": "not known: exported from outside its run"}
    return {k: v for k, v in lineage.items() if k not in ("model", "run", "pretraining data")}


def _results(result: Mapping[str, Any] | None, protocol: Mapping[str, Any] | None) -> list[str]:
    if result is None or protocol is None:
        return ["Not known: this model was exported before it was judged, or outside its run."]
    rows = ["| | value | 95 % |", "|---|---|---|"]
    for name in ("accuracy", "mean_class_accuracy", "macro_f1", "ece", "nll"):
        if name in result:
            one = result[name]
            ends = f"{one['low']:.3f} to {one['high']:.3f}" if one.get("low") is not None else "-"
            rows.append(f"| {name.replace('_', ' ')} | {one['value']:.3f} | {ends} |")
    rows += ["", "| class | n | recall | precision |", "|---|---|---|---|"]
    for row in result["per_class"]:
        recall, precision = (
            "-" if row[k] is None else f"{row[k]:.3f}" for k in ("recall", "precision")
        )
        rows.append(f"| {row['class']} | {row['n']} | {recall} | {precision} |")
    said = {k: v for k, v in protocol.items() if k not in ("passes", "classes", "labeled")}
    averaged = "Each test face was averaged with its mirror image; the export sees it once."
    return [*rows, "", averaged, "", "Protocol:", "", *_lines(said)]


def _lines(facts: Mapping[str, Any]) -> list[str]:
    """A list item per fact; what is a mapping is put on one line."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {_said(v)}" for k, v in value.items())
        lines.append(f"- {name.replace('_', ' ')}: {_said(value)}" if name else f"- {value}")
    return lines


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
