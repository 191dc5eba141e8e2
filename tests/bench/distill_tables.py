"""The part of RESULTS.md that shows what a few images per class are worth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipeline.active import unpack
from pipeline.metrics import Interval, paired_difference
from tests.bench import distill
from tests.bench.harness import Record, Records
from tests.bench.markdown import attempts, section, spread, table

MODELS = ("convnet hard", "convnet soft", "resnet soft")
UNTIMED = "(a)"
WITHOUT_EXPERTS = (
    "Without the training of the experts that the set follows: it was not timed when this was "
    "measured. It serves sets of any size."
)
MINED = "labeled + mined"
NOT_MINED = "(b)"
FROM_BOTH = (
    "Drawn from labeled and mined faces together when this was measured; now from the mined."
)
TUNED = {
    "teacher": "teacher",
    "distilled": "teacher, tuned on the distilled set",
    "random hard": "teacher, tuned on as many random mined faces, hard labels",
    "random soft": "the same with the teacher's soft labels",
    MINED: "student on labeled + mined faces, of ferplus10",
    "labels": "teacher, tuned for as many steps on the labels: equal time",
}


def lines() -> list[str]:
    """All of it."""
    return section(distill.BENCH, "a few images per class, judged on PublicTest", _body)


def _body(records: Records) -> list[str]:
    parts = [
        "Networks that saw nothing but the set: the ConvNet it was distilled for (width 32), with "
        "the class or the teacher's probabilities as targets, and a ResNet. Accuracy, then "
        "macro-F1.",
        "",
    ]
    for source, title in (("mined", "mined and labeled faces"), ("labeled", "labeled faces")):
        parts += [f"### From {title}", "", *_sets(records, source), ""]
    parts += ["### Ten learned images per class against ten random faces", "", *_against(records)]
    return [*parts, "", "### The teacher, tuned", "", *_tuned(records), "", *_developed()]


def _developed() -> list[str]:
    """The same tables of every attempt on the development set."""
    parts: list[str] = []
    for attempt, records in attempts(f"{distill.NAME}-dev").items():
        found = _sets(records, "mined")
        parts += [f"### On the development set: {attempt}", "", *found, ""]
    return parts


def _sets(records: Records, source: str) -> list[str]:
    rows = []
    for ipc in (1, 10, 50):
        for method in (*distill.CHOSEN, *distill.LEARNED):
            found = _of(records, source, method, ipc)
            if not found:
                continue
            figures = [
                f"{spread([r['metrics']['models'][m]['accuracy'] for r in found])} / "
                f"{100 * np.mean([r['metrics']['models'][m]['macro_f1'] for r in found]):.1f}"
                for m in MODELS
            ]
            training = np.mean([r["metrics"]["models"][MODELS[1]]["seconds"] for r in found])
            rows.append([str(ipc), method, *figures, _seconds(found), f"{training:,.0f}"])
    if not rows:
        return ["missing"]
    head = ("ipc", "method", *MODELS, "s distilling", "s training")
    untimed = any(UNTIMED in cell for row in rows for cell in row)
    return [*table(head, rows), *(["", f"{UNTIMED} {WITHOUT_EXPERTS}"] if untimed else [])]


def _seconds(records: Sequence[Record]) -> str:
    """What distilling took; experts, which serve all sets of a run, beside it."""
    metrics = [record["metrics"] for record in records]
    said = f"{np.mean([m['seconds_distilling'] for m in metrics]):,.0f}"
    if records[0]["method"] not in distill.FOLLOWING:
        return said
    if any("experts_seconds" not in m for m in metrics):
        return f"{said} {UNTIMED}"
    return f"{said} + experts {np.mean([m['experts_seconds'] for m in metrics]):,.0f}"


def _against(records: Records) -> list[str]:
    """Every learned method, either labels, beside random faces with hard and with soft labels."""
    random = {labels: distill.over_seeds(records, "random", 10, labels) for labels in distill.OWN}
    rows = []
    for method, labels in itertools.product(distill.LEARNED, distill.OWN):
        values = distill.over_seeds(records, method, 10, labels)
        if values and all(random.values()):
            gaps = [_beyond(values, random[of]) for of in distill.OWN]
            rows.append([f"{method}, {labels}", spread(values), *gaps])
    if not rows:
        return ["missing"]
    head = ("method", "accuracy", "minus random, hard labels", "minus random, soft labels")
    return [
        "From mined and labeled faces, the ConvNet. Beyond the spread: the worst seed is above the "
        "best one of random faces; one or two seeds cannot say so.",
        "",
        *table(head, rows),
    ]


def _beyond(values: Sequence[float], random: Sequence[float]) -> str:
    gap = f"{100 * (np.mean(values) - np.mean(random)):+.2f}"
    if min(len(values), len(random)) < len(distill.SEEDS):
        return f"{gap} (n={min(len(values), len(random))})"
    return f"{gap}, {'beyond' if min(values) > max(random) else 'within'} the spread"


def _tuned(records: Records) -> list[str]:
    found = _of(records, "mined", "tune", 10)
    if not found:
        return ["missing"]
    beside, rows = _with_students(found), []
    mixed = any(r["metrics"].get("random_from") != "mined" for r in found)
    for name, title in TUNED.items():
        own = beside if name == MINED else found
        if not own:
            rows.append([title, *["missing"] * 5])
            continue
        models = [record["metrics"]["models"][name] for record in own]
        rows.append(
            [
                f"{title} {NOT_MINED}" if mixed and name.startswith("random") else title,
                spread([model["accuracy"] for model in models]),
                f"{100 * np.mean([model['macro_f1'] for model in models]):.1f}",
                _over(own, name, "teacher"),
                f"{np.mean([model['passes'] for model in models]):,.0f}",
                f"{np.mean([model['seconds'] for model in models]):,.0f}",
            ]
        )
    head = ("model", "accuracy", "macro-F1", "minus the teacher", "image passes", "seconds")
    note = ["", f"{NOT_MINED} {FROM_BOTH}"] if mixed else []
    return [*table(head, rows), *note, "", _share(beside)]


def _with_students(records: Sequence[Record]) -> list[Record]:
    """Records of seeds whose student was judged on the same faces, with that student beside."""
    found = []
    for record in records:
        student = distill.students().get(record["seed"])
        if student is None or student["n"] != record["n"]:
            continue
        said = student["metrics"]
        own = {
            **said["models"]["student"],
            "passes": said["student_steps"] * said["student_batch"],
            "seconds": said["seconds_per_stage"]["student"],
        }
        models = {**record["metrics"]["models"], MINED: own}
        found.append({**record, "metrics": {**record["metrics"], "models": models}})
    return found


def _share(records: Sequence[Record]) -> str:
    """How much of what the mined faces bring the distilled set keeps, where they bring anything."""
    if not records:
        return "Share of the gain kept: the student of labeled + mined is missing."
    gain = _gap(records, MINED, "teacher")
    seeds = f"{len(records)} of {len(distill.SEEDS)} seeds"
    if gain.low <= 0:
        return (
            f"Share of the gain kept: none is given; the interval of {MINED} minus the teacher "
            f"reaches 0 ({seeds})."
        )
    kept = _gap(records, "distilled", "teacher").value / gain.value
    return (
        f"Share of the gain kept, (tuned on the distilled set - teacher) / ({MINED} - teacher): "
        f"{kept:.0%} ({seeds})."
    )


def _over(records: Sequence[Record], model: str, other: str) -> str:
    """Paired difference of two models, averaged over seeds, points with a 95 % interval."""
    if model == other:
        return "-"
    gap = _gap(records, model, other)
    return f"{100 * gap.value:+.2f} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"


def _gap(records: Sequence[Record], model: str, other: str) -> Interval:
    right = {
        name: np.mean(
            [unpack(r["metrics"]["models"][name]["correct"], r["n"]) for r in records], axis=0
        )
        for name in (model, other)
    }
    return paired_difference(right[model], right[other], 2000, 0)


def _of(records: Records, source: str, method: str, ipc: int) -> list[Record]:
    names = [f"{source}-{method}-ipc{ipc}-s{seed}" for seed in distill.SEEDS]
    return [records[name] for name in names if name in records]
