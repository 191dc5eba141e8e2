"""evaluate: what the student is worth on the test set, against controls of equal compute.

Pure functions from probabilities to the dictionary that becomes evaluation/metrics.json. The gain
is the student's accuracy minus that of the better control, on the same faces, with a paired
bootstrap; every number carries its protocol card. Where raters voted on every test face, models are
judged against the votes as well: a majority hides what a model knows of doubtful faces. Purity of
the mined labels is measured against the hidden truth, which nothing before this stage may open.
Cost: about a second per model and 3,000 faces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from pipeline import metrics
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.schema import class_name, require_columns

STUDENT = "student"
CONTROLS = ("control_a", "control_b")
"""Labels only: for the student's steps and batch (A), for all passes the run took (B)."""

PROTOCOL = ("split", "seeds", "sampler", "crop", "passes", "pretraining_data")
"""What the caller declares; n, classes and metric are filled in here. `passes` is per model."""

METRIC = (
    "accuracy; mean-class accuracy and macro-F1 over classes that have faces; ECE; "
    "95 % percentile bootstrap over faces; last weights, no epoch picking"
)

MIN_SEEDS = 3
MIN_GAIN = 0.01

ClassName = Annotated[str, AfterValidator(class_name)]


class EvaluateConfig(Config):
    """How sure the numbers are to be."""

    draws: int = Field(default=metrics.DRAWS, ge=100)  # of the bootstrap
    seed: int = 0  # of the draws
    large: tuple[ClassName, ...] = ("neutral", "happiness", "sadness", "surprise", "fear", "anger")


def evaluate(
    probs: Mapping[str, NDArray[np.floating[Any]]],
    labels: NDArray[np.int64],
    label_names: Sequence[str],
    protocol: Mapping[str, Any],
    config: EvaluateConfig | None = None,
    votes: NDArray[np.floating[Any]] | None = None,
) -> dict[str, Any]:
    """All numbers of an evaluation, JSON-able.

    Args:
        probs: per model the probabilities (N, K), or (S, N, K) for S training seeds. `student` is
            compared with `control_a` and `control_b`; further models are reported beside them.
        labels: (N,) codes of the test faces.
        label_names: K class names.
        protocol: the keys of :data:`PROTOCOL`; `passes` names every model's image passes.
        config: draws, seed and the large classes.
        votes: shares (N, K) of the raters' votes; None: nobody counted any.

    Returns:
        `label_names`, `models` (per model), `gain` (None without student or control), `protocol`;
        with votes every model has `votes` (means and intervals of `metrics.vote_scores`), and
        `gain` the student's kl and brier minus the control's, below 0 where it is better.

    Raises:
        RunError: shapes do not fit, values are no probabilities, or the card lacks something.
    """
    config = config or EvaluateConfig()
    stacks = {name: _stack(name, p, labels, label_names) for name, p in probs.items()}
    card = _card(protocol, list(stacks), labels, label_names)
    large = [label_names.index(name) for name in config.large if name in label_names]
    models = {
        name: {"passes": card["passes"][name], **_model(stack, labels, label_names, large, config)}
        for name, stack in stacks.items()
    }
    gained = gain(stacks, labels, config)
    if votes is not None:
        shares = np.asarray(votes, dtype=np.float64)
        shares = shares / shares.sum(1, keepdims=True)
        for name, stack in stacks.items():
            found = metrics.against_votes(stack, labels, shares, config.draws, config.seed)
            models[name]["votes"] = {key: _finite(asdict(value)) for key, value in found.items()}
        if gained is not None:
            gained["votes"] = _nearer(stacks[STUDENT], stacks[gained["over"]], shares, config)
    return {
        "label_names": list(label_names),
        "models": models,
        "gain": gained,
        "protocol": card,
    }


def gain(
    stacks: Mapping[str, NDArray[np.float64]], labels: NDArray[np.int64], config: EvaluateConfig
) -> dict[str, Any] | None:
    """Student minus the control with the higher mean accuracy, paired over the test faces.

    `real` asks for three seeds of each with the same sign, a mean of a point or more, and a 95 %
    interval of the seed-averaged correctness that excludes zero.
    """
    right = {name: (stack.argmax(2) == labels).astype(float) for name, stack in stacks.items()}
    controls = [name for name in CONTROLS if name in right]
    if STUDENT not in right or not controls:
        return None
    over = max(controls, key=lambda name: right[name].mean())
    student, control = right[STUDENT], right[over]
    interval = metrics.paired_difference(
        student.mean(0), control.mean(0), config.draws, config.seed
    )
    paired = len(student) == len(control)
    per_seed = (student.mean(1) - control.mean(1)).tolist() if paired else []
    same_sign = paired and len({bool(d > 0) for d in per_seed}) == 1 and 0.0 not in per_seed
    enough = len(per_seed) >= MIN_SEEDS
    return {
        "over": over,
        "accuracy": asdict(interval),
        "per_seed": per_seed,
        "same_sign": same_sign,
        "real": enough and same_sign and interval.value >= MIN_GAIN and interval.low > 0,
    }


def _nearer(
    student: NDArray[np.float64],
    control: NDArray[np.float64],
    votes: NDArray[np.float64],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Student's distance from the votes minus the control's, paired over faces, mean over seeds."""
    found = {}
    for name, score in (("kl", metrics.kl_to_votes), ("brier", metrics.brier_to_votes)):
        ours, theirs = (np.mean([score(p, votes) for p in s], 0) for s in (student, control))
        gap = metrics.paired_difference(ours, theirs, config.draws, config.seed)
        found[name] = asdict(gap)
    return found


def predictions(
    probs: Mapping[str, NDArray[np.floating[Any]]], faces: pa.Table, label_names: Sequence[str]
) -> pa.Table:
    """What each model said of each test face, for comparisons over several runs.

    Args:
        probs: per model the probabilities (N, K).
        faces: `id` and `label` of the test faces (N rows).
        label_names: K class names.

    Returns:
        id, label, and a column per model with the class it gave the most probability.
    """
    names = np.array(label_names, dtype=object)
    said = {name: pa.array(names[p.argmax(1)], pa.string()) for name, p in probs.items()}
    return pa.table({"id": faces["id"], "label": faces["label"], **said})


def votes_of(faces: pa.Table) -> NDArray[np.float64] | None:
    """Shares (N, K) of the votes on test faces (column `soft`); None where a face has none."""
    soft = faces["soft"].combine_chunks()
    if soft.null_count:
        return None
    return soft.flatten().to_numpy().reshape(len(soft), -1).astype(np.float64)


def purity(selection: Iterable[pa.Table], truth: pa.Table) -> dict[str, Any]:
    """Share of kept labels that are right, and share of the pool kept, against the hidden truth.

    Args:
        selection: chunks of SELECTION.
        truth: TRUTH; faces without a label there (or not there at all) count as unknown.

    Returns:
        purity (None where nothing kept is known), utilization, pool, selected, known, and per_class
        (n known, purity) by pseudo-label.
    """
    require_columns(truth.column_names, ("id", "label"), "hidden truth")
    truth = truth.filter(pc.is_valid(truth["label"]))
    pool = selected = 0
    known: dict[str, int] = {}
    right: dict[str, int] = {}
    for table in selection:
        kept = table.filter(table["selected"])
        pool += len(table)
        selected += len(kept)
        place = pc.index_in(kept["id"], value_set=truth["id"])
        has = pc.is_valid(place)
        guess = kept["label"].filter(has)
        hit = pc.equal(guess, truth["label"].take(place.filter(has)))
        for counts, which in ((known, guess), (right, guess.filter(hit))):
            for pair in which.value_counts().to_pylist():
                counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
    total = sum(known.values())
    return {
        "purity": sum(right.values()) / total if total else None,
        "utilization": selected / pool if pool else 0.0,
        "pool": pool,
        "selected": selected,
        "known": total,
        "per_class": {
            n: {"n": known[n], "purity": right.get(n, 0) / known[n]} for n in sorted(known)
        },
    }


def right_so_far(said: pa.Table, truth: pa.Table) -> tuple[float | None, int]:
    """How right a student's labels were at one step of its training.

    Args:
        said: id, label and weight of watched faces, see :mod:`pipeline.training.watching`.
        truth: TRUTH.

    Returns:
        share of the labels that are right, each as much as it counted, None where none with a known
        truth counted; and the faces with a known truth.
    """
    answer = truth["label"].take(pc.index_in(said["id"], truth["id"].combine_chunks()))
    known = pc.is_valid(answer).to_numpy()
    right = np.asarray(pc.equal(said["label"], answer).fill_null(False))
    weight = said["weight"].to_numpy().astype(np.float64) * known
    total = weight.sum()
    return (float(weight @ right / total) if total else None), int(known.sum())


def _stack(
    name: str,
    probs: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    label_names: Sequence[str],
) -> NDArray[np.float64]:
    """Probabilities (S, N, K), checked."""
    stack = np.asarray(probs, dtype=np.float64)
    stack = stack[None] if stack.ndim == 2 else stack
    want = (len(labels), len(label_names))
    if stack.ndim != 3 or stack.shape[1:] != want or not len(labels):
        raise RunError(f"evaluate {name}: probabilities {stack.shape}, expected (seeds, *{want})")
    if not np.allclose(stack.sum(2), 1, atol=1e-2) or stack.min() < 0:
        raise RunError(f"evaluate {name}: rows are no probabilities (softmax them first)")
    return stack


def _card(
    protocol: Mapping[str, Any],
    models: Sequence[str],
    labels: NDArray[np.int64],
    label_names: Sequence[str],
) -> dict[str, Any]:
    missing = [key for key in PROTOCOL if key not in protocol]
    missing += [f"passes.{name}" for name in models if name not in protocol.get("passes", {})]
    if missing:
        raise RunError(f"evaluate: the protocol card lacks {', '.join(missing)}")
    classes = metrics.class_counts(labels, label_names)
    return {**protocol, "n": len(labels), "classes": classes, "metric": METRIC}


def _model(
    stack: NDArray[np.float64],
    labels: NDArray[np.int64],
    label_names: Sequence[str],
    large: Sequence[int],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Numbers of one model; the confusion matrix and what follows from it sum over its seeds."""
    each = [metrics.confusion_matrix(p.argmax(1), labels, len(label_names)) for p in stack]
    confusion = np.sum(each, axis=0)
    intervals = metrics.headline(stack, labels, large, config.draws, config.seed)
    columns = zip(
        label_names,
        (confusion.sum(1) // len(stack)).tolist(),
        metrics.recalls(confusion),
        metrics.precisions(confusion),
        metrics.f1s(confusion),
        strict=True,
    )
    per_class = [
        {"class": name, "n": n, "recall": _json(r), "precision": _json(p), "f1": _json(f)}
        for name, n, r, p, f in columns
    ]
    order = metrics.label_order(confusion)
    return {
        "seeds": len(stack),
        **{name: _finite(asdict(interval)) for name, interval in intervals.items()},
        "accuracy_per_seed": [float(metrics.accuracy(c)) for c in each],
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "reliability": metrics.reliability(
            stack.reshape(-1, stack.shape[2]), np.tile(labels, len(stack))
        ),
        "label_order": {
            "permutation": [label_names[i] for i in order.permutation],
            "accuracy_permuted": order.accuracy_permuted,
            "suspicious": order.suspicious,
        },
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _json(value) for name, value in values.items()}


def _json(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)
