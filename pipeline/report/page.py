"""Writes report.html: one file that opens without a server or a network.

The template escapes everything; a content policy in the page forbids loading and every script but
the threshold explorer's, which it names by its sha256, so that a hostile file name stays text.
Without scripts a table stands where the explorer would. Cost: well under a second; about 0.2 KB per
blurred face, 2 KB shown.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from pipeline.evaluation import MIN_SEEDS
from pipeline.metrics import label_order
from pipeline.report import figures, galleries
from pipeline.report.facts import Explorer, Gain, Gallery, ModelRow, ReportFacts, Subgroup
from pipeline.report.subgroups import LEAST
from pipeline.schema import PERCEIVED
from pipeline.storage import Location

MODEL_NAMES: Mapping[str, str] = {
    "teacher": "Teacher",
    "control_a": "Control A, same steps",
    "control_b": "Control B, same passes",
    "student_share": "Student, part of mined",
    "student": "Student",
    "tuned": "Teacher, tuned",
}

REASON_TEXT: Mapping[str, str] = {
    "selected": "kept",
    "quarantined": "could not be decoded",
    "twin_of_test": "twin of a test face",
    "twin_of_validation": "twin of a validation face",
    "labeled": "labeled by a person",
    "duplicate": "duplicate of another pool face",
    "below_confidence": "the teachers are not sure enough",
    "prototype_disagrees": "nearest class prototype says otherwise",
    "neighbors_disagree": "labeled neighbors say otherwise",
    "below_class_threshold": "below the threshold of its class",
    "impure_cluster": "its cluster is of several minds",
    "cluster_disagrees": "most of its cluster is called otherwise",
    "group_cap": "its group already gave enough faces",
    "class_cap": "its class already has enough faces",
}

DASH = Markup("&ndash;")


def write_report(at: Location, facts: ReportFacts) -> None:
    """Write the page; sections without facts are left out.

    Args:
        at: the file to write, e.g. `<run>/report.html`.
        facts: what to show; see :mod:`pipeline.report.facts`.
    """
    at.write_text(render(facts))


def render(facts: ReportFacts) -> str:
    """The page as text."""
    here = Path(__file__).parent
    script = (here / "explorer.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "duration": duration,
        "points": points,
        "reason": lambda key: REASON_TEXT.get(key, key.replace("_", " ")),
        "model": lambda key: MODEL_NAMES.get(key, key),
        "value": plain,
    }
    return environment.get_template("template.html").render(
        facts=facts,
        count=count,
        duration=duration,
        css=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        start=facts.explorer and _nearest(facts.explorer),
        by_trait=_by_trait(facts.subgroups),
        perceived=PERCEIVED,
        least=LEAST,
        script_hash=sha256_source(script),
        explorer=facts.explorer and explorer_data(facts.explorer, facts.show_faces),
        verdict=verdict(facts),
        draw=figures,
        model_names=MODEL_NAMES,
        best_control=best_control(facts.models),
        student=next((m for m in facts.models if m.key == "student"), None),
        bought=(saw := bought(facts)),
        shares={model.key: f"{100 * share:.4g} % of mined" for model, share, _ in saw},
        twins=_twin_rows(facts),
        audit={key: audit(matrix, facts.label_names) for key, matrix in facts.confusion.items()},
        rejected=_by_reason(facts.galleries),
        kept=[g for g in facts.galleries if g.reason == "selected" and g.faces],
        neighbors=any(face.note for gallery in facts.galleries for face in gallery.faces),
        face=lambda pixels: galleries.face_uri(pixels, facts.show_faces),
        grid=lambda pixels: galleries.grid_uri(pixels, facts.distilled_size, facts.show_faces),
        trial_columns=_trial_columns(facts.trials),
        trials_shown=_drawable(facts.trials),
    )


def sha256_source(script: str) -> str:
    """How a content policy names an inline script: `'sha256-...'` of its UTF-8 text."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def explorer_data(explorer: Explorer, show_faces: bool) -> dict[str, Any]:
    """What explorer.js reads; JSON-able. Faces are as blurred as those of a gallery."""
    return {
        "face": "Face" if show_faces else "Blurred face",
        "levels": [
            {
                "threshold": level.threshold,
                "kept": level.kept,
                "share": _rounded(level.share),
                "purity": _rounded(level.purity),
                "known": level.known,
                "estimated": _rounded(level.estimated),
                "labeled": level.labeled,
                "classes": [[n, _rounded(p)] for n, p in level.by_class],
            }
            for level in explorer.levels
        ],
        "faces": [
            {
                "id": face.id,
                "confidence": _rounded(face.confidence, 6),
                "label": face.note,
                "image": galleries.face_uri(face.pixels, show_faces),
            }
            for face in explorer.faces
        ],
    }


def _nearest(explorer: Explorer) -> int:
    """Position of the level at which the explorer opens."""
    gaps = [abs(level.threshold - explorer.start) for level in explorer.levels]
    return gaps.index(min(gaps))


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def verdict(facts: ReportFacts) -> str:
    """One sentence that says no more than the interval does."""
    gain = facts.gain
    if gain is None:
        return "No comparison with the controls has been made yet."
    against = MODEL_NAMES.get(gain.against, gain.against)
    span = f"95 % interval {points(gain.low)} to {points(gain.high)}"
    size = f"{abs(gain.value) * 100:.1f} points"
    if gain.low > 0:
        better = f"The student is {size} better than the better control ({against}); {span}."
        return better if gain.real else f"{better} {_caution(gain)}"
    if gain.high < 0:
        return f"The student is {size} worse than the better control ({against}); {span}."
    return (
        f"No difference to the better control ({against}) is shown: {points(gain.value)} points, "
        f"{span}."
    )


def _caution(gain: Gain) -> str:
    if gain.seeds < MIN_SEEDS:
        seeds = "one training seed" if gain.seeds == 1 else f"{gain.seeds} training seeds"
        return f"From {seeds} this is a hint, not a finding."
    return "It is under a point or not of one sign in every seed: a hint, not a finding."


def best_control(models: tuple[ModelRow, ...]) -> ModelRow | None:
    """The control that the student has to beat."""
    controls = [m for m in models if m.key.startswith("control")]
    return max(controls, key=lambda m: m.accuracy, default=None)


def bought(facts: ReportFacts) -> list[tuple[ModelRow, float, int]]:
    """Models by how much of the mined set they saw: the model, the share and the faces."""
    kept, share = facts.pool.get("kept", 0), facts.protocol.get("mined_share")
    models = {m.key: m for m in facts.models}
    control = best_control(facts.models)
    if control is None or "student" not in models or not kept:
        return []
    rows = [(control, 0.0, 0), (models["student"], 1.0, kept)]
    if share is not None and "student_share" in models:
        rows.insert(1, (models["student_share"], float(share), max(1, round(share * kept))))
    return rows


def audit(matrix: np.ndarray, label_names: tuple[str, ...]) -> dict[str, Any]:
    """Label-order audit of counts (K, K) in the words of the page."""
    order = label_order(matrix)
    moved = [
        (label_names[meaning], label_names[said])
        for said, meaning in enumerate(order.permutation)
        if said != meaning
    ]
    return {
        "accuracy": order.accuracy,
        "best": order.accuracy_permuted,
        "suspicious": order.suspicious,
        "moved": moved,
    }


def percent(value: float | None, digits: int = 1) -> str | Markup:
    """0.7123 as `71.2 %`; a dash for None."""
    return DASH if value is None else f"{value * 100:.{digits}f}\u00a0%"


def points(value: float) -> str:
    """A difference of fractions in signed points: 0.0123 as `+1.2`."""
    return f"{value * 100:+.1f}"


def count(value: float | None) -> str | Markup:
    """12345 as `12,345`; a dash for None."""
    return DASH if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 12 s` or `2 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> str | Markup:
    """Any setting or result as short text."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(plain(item)) for item in value)
    return str(value)


def _by_reason(every: tuple[Gallery, ...]) -> dict[str, list[Gallery]]:
    groups: dict[str, list[Gallery]] = {}
    for gallery in every:
        if gallery.reason != "selected" and gallery.faces:
            groups.setdefault(gallery.reason, []).append(gallery)
    return groups


def _twin_rows(facts: ReportFacts) -> list[tuple[str, str, int, int]]:
    """How a twin was found, whose it is, and how many of the pool and of the labeled faces are."""
    labeled = facts.copies.twins if facts.copies else {}
    pairs = [
        (kind, role) for found in (facts.guard, labeled) for kind in found for role in found[kind]
    ]
    return [
        (kind, role, facts.guard.get(kind, {}).get(role, 0), labeled.get(kind, {}).get(role, 0))
        for kind, role in dict.fromkeys(pairs)
    ]


def _by_trait(subgroups: tuple[Subgroup, ...]) -> dict[str, list[Subgroup]]:
    groups: dict[str, list[Subgroup]] = {}
    for one in subgroups:
        groups.setdefault(one.trait, []).append(one)
    return groups


def _trial_columns(trials: tuple[dict[str, Any], ...]) -> list[str]:
    """Columns of the trial table in order of first appearance."""
    return list(dict.fromkeys(key for trial in trials for key in trial))


def _drawable(trials: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Trials that have a place in a figure of purity and utilization."""
    numbers = ("purity", "utilization")
    return [t for t in trials if all(isinstance(t.get(name), float) for name in numbers)]
