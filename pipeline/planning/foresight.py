"""Stage by stage, what a recipe will take: measurements and a machine in, rows of a table out.

Pure. Which operators a pass has, how many workers they get and what they ask of storage follows
stages.py and flow.py; the counting of image passes is that of the stages' own facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.placement import Capacity, Layout, Operator, Transform, lay_out
from pipeline.plan import GROUP
from pipeline.planning.forecast import Machine, Part, Span, Spent, Step, stream_time, train_time
from pipeline.planning.probing import Requests, Sealed
from pipeline.recipe import Recipe
from pipeline.training.distill_cost import Cost, cost_of, looks
from pipeline.training.loop import FORWARD

RAY_START_CPU = 5.0
"""Core-seconds until a local Ray stands, over its processes (4.9 measured, n 1)."""
SLICE_CPU = 0.03
"""Core-seconds that Ray takes per slice and step (10 to 30 ms, see streaming.py)."""


@dataclass(frozen=True)
class Measured:
    """What was found out on the probed machine."""

    faces: float
    slices: int
    planning: float
    """Seconds of a run's planning."""
    spent: Mapping[str, Spent]
    """Per face of the pool."""
    variants: Sequence[Mapping[str, Spent]]
    """The same for every probe by itself: what the range is made of."""
    read_bytes: float
    """Per face."""
    stored: Mapping[str, float]
    """Bytes per face, by stage."""
    requests: Mapping[str, Requests]
    """Per slice: read, survey, embed, score."""
    sealed: Sealed
    labeled_seconds: float
    training_faces: int
    labeled_faces: int
    """All that the labeled set holds, which survey describes too."""
    rates: Mapping[str, tuple[float, float, float]]
    """Image passes per second of a training: mean, lowest, highest."""
    classes: int
    start_cpu: Mapping[str, float]
    """Core-seconds until a new worker process of a stage has its imports."""

    @property
    def forward_rate(self) -> float:
        """Faces per second of one embed worker that does nothing else."""
        return 1 / self.spent["forward"].seconds


@dataclass(frozen=True)
class Rented:
    """What stages run on: one machine while faces stream, another one while something trains."""

    passes: Machine
    resting: Machine
    capacity: Capacity
    node_start: float = 0.0


@dataclass(frozen=True)
class Row:
    """A stage: how much of what, how fast, how long, what it leaves and asks, what it costs."""

    stage: str
    amount: float
    unit: str
    seconds: float
    low: float
    high: float
    bottleneck: str
    stored: float = 0.0
    requests: Requests = field(default_factory=Requests)
    compute_dollars: float = 0.0

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.amount / self.seconds if self.seconds else 0.0


def foresee(found: Measured, recipe: Recipe, rented: Rented) -> list[Row]:
    """Rows in the order of the flow; stages without a row are not modelled.

    Raises:
        ResourceError: a pass would hang on such a machine; with the numbers.
    """
    passes = _passes(found, recipe)
    rows = [
        _survey(found, recipe, rented),
        _guard(found, rented),
        *_learned(("pretrain", "teach"), passes, found, recipe, rented),
        _embed(found, recipe, rented),
        _serial("score", found, rented, _seal(found, rented), "seal"),
        _mine(found, rented),
    ]
    rows += _distill(found, recipe, rented)
    trained = ("student", "student_share", "control_a", "control_b")
    return rows + _learned(trained, passes, found, recipe, rented)


def _learned(
    names: Sequence[str],
    passes: Mapping[str, float],
    found: Measured,
    recipe: Recipe,
    rented: Rented,
) -> list[Row]:
    return [_training(n, passes[n], found, recipe, rented) for n in names if n in passes]


def _passes(found: Measured, recipe: Recipe) -> dict[str, float]:
    """Image passes of every training; control B gets what teachers, embed and student took."""
    teach, student = recipe.teach, recipe.student
    views = teach.folds * (2 if recipe.embed.flip else 1)
    taught = float(teach.trainings * teach.steps * teach.step_images)
    taught += 2 * found.training_faces * FORWARD * teach.trainings / teach.folds
    embedded = found.faces * views * FORWARD
    own = student.steps * student.step_images
    again = len(student.rescore_at) * 2 * found.faces * FORWARD  # at most: of the mined faces
    passes = {"teach": taught, "student": own + again, "control_a": float(own)}
    passes["control_b"] = own + again + taught + embedded
    if recipe.mined_share is not None:
        passes["student_share"] = own + again * recipe.mined_share
    if recipe.pretrain is not None:
        passes["pretrain"] = float(recipe.pretrain.steps * recipe.pretrain.step_images)
        if recipe.starts_pretrained:
            passes["control_b"] += passes["pretrain"]
    if recipe.distill is not None and student.beside == "distilled":
        expected = _distilling(found, recipe)
        passes["control_b"] += expected.passes + expected.expert_passes
    return passes


# -- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """A streaming pass: its operators, what each does with a face, and whose ledgers it fills."""

    stage: str
    operators: Sequence[tuple[Operator, Sequence[str]]]
    written: Sequence[str]
    read_apart: bool = True
    """Whether read tasks read the faces, or the operators themselves."""


def _survey(found: Measured, recipe: Recipe, rented: Rented) -> Row:
    described = found.spent["survey"].cpu * found.labeled_faces
    before = found.labeled_seconds + described / rented.resting.core_speed
    before += RAY_START_CPU / rented.resting.cores
    operator = Operator(_nothing, (), "survey")
    asked = _Pass("survey", [(operator, ["survey", "survey write"])], ["survey"])
    return _pass(asked, found, recipe, rented, before + found.planning)


def _embed(found: Measured, recipe: Recipe, rented: Rented) -> Row:
    """Where reading and scoring happen is the recipe's choice; every choice is the same work."""
    embed, score = recipe.embed, recipe.score
    reads = embed.read_in == "actor"
    scores = score.run_in == "embed"
    work = [*(["read"] if reads else []), "decode", "forward", "embed write"]
    scoring = ["score", "score write"]
    home = Operator(
        _nothing,
        (),
        "embed",
        pool=embed.pool,
        num_cpus=embed.num_cpus,
        num_gpus=embed.num_gpus if rented.passes.gpu_factor is not None else 0.0,
        calls=embed.streams,
    )
    operators = [(home, [*work, *(scoring if scores else [])])]
    if not scores:
        own = Operator(_nothing, (), "score", pool=score.pool, num_cpus=score.num_cpus)
        operators.append((own, scoring))
    asked = _Pass("embed", operators, ["embed", "score"], read_apart=not reads)
    return _pass(asked, found, recipe, rented, 0.0)


def _pass(asked: _Pass, found: Measured, recipe: Recipe, rented: Rented, before: float) -> Row:
    """Start of the workers, the stream itself, packing at the end."""
    machine = rented.passes
    operators = [op for op, _ in asked.operators]
    layout = lay_out(operators, recipe.stream, rented.capacity)

    def span(spent: Mapping[str, Spent]) -> Span:
        reads = [Part("read", spent["read"])] if asked.read_apart else []
        steps = [Step("read", reads, layout.readers)] if reads else []
        for (op, names), workers in zip(asked.operators, layout.workers, strict=True):
            parts = [
                Part(p, spent[p], gpu=p == "forward", beside=p in ("decode", "forward"))
                for p in names
            ]
            steps.append(Step(op.name, parts, workers * op.calls, gpus=workers * op.num_gpus))
        return stream_time(
            steps,
            found.faces,
            found.slices,
            machine,
            face_bytes=found.read_bytes + sum(found.stored[name] for name in asked.written),
            slice_cpu=SLICE_CPU * (1 + len(operators)),
        )

    start = _start(found.start_cpu[asked.stage], found.slices, operators, layout, recipe, rented)
    fixed = before + start + rented.node_start + _seal(found, rented)
    streamed, others = span(found.spent), [span(one).seconds for one in found.variants]
    requests = [found.requests["read"], *(found.requests[name] for name in asked.written)]
    seconds = fixed + streamed.seconds
    return Row(
        asked.stage,
        found.faces,
        "faces",
        seconds,
        fixed + min(others, default=streamed.seconds),
        fixed + max(others, default=streamed.seconds),
        "start" if fixed > streamed.seconds else streamed.bottleneck,
        stored=found.faces * sum(found.stored[name] for name in asked.written),
        requests=_requests([*requests, found.sealed.requests], found.slices),
        compute_dollars=_dollars(seconds, machine),
    )


def _start(
    cpu: float,
    slices: int,
    operators: Sequence[Operator],
    layout: Layout,
    recipe: Recipe,
    rented: Rented,
) -> float:
    """Seconds until all worker processes of a pass have their imports; they share the cores."""
    counts = [(min(layout.readers, slices), recipe.stream.read_cpus)]
    counts += [
        (min(workers, slices), op.num_cpus)
        for op, workers in zip(operators, layout.workers, strict=True)
    ]
    fit = min(1.0, rented.capacity.cpus / sum(count * cpus for count, cpus in counts))
    processes = max(1.0, fit * sum(count for count, _ in counts))
    machine = rented.passes
    return cpu * max(processes / machine.cores, 1 / machine.core_speed)


def _mine(found: Measured, rented: Rented) -> Row:
    """At most: as if every face were selected."""
    machine = rented.passes
    write = Part("write", found.spent["score write"])
    steps = [Step("read", [Part("read", found.spent["read"])], float("inf"))]
    steps.append(Step("mine", [write], float("inf")))
    streamed = stream_time(
        steps,
        found.faces,
        found.slices,
        machine,
        face_bytes=2 * found.read_bytes,
        slice_cpu=2 * SLICE_CPU,
    )
    seconds = streamed.seconds + _seal(found, rented)
    asked = [found.requests["read"], found.requests["score"], found.sealed.requests]
    return Row(
        "mine",
        found.faces,
        "faces",
        seconds,
        0.0,
        seconds,
        streamed.bottleneck,
        stored=found.faces * found.read_bytes,
        requests=_requests(asked, found.slices),
        compute_dollars=_dollars(seconds, machine),
    )


# -- the driver and trainings ---------------------------------------------------------------------


def _guard(found: Measured, rented: Rented) -> Row:
    """One process looks at every face twice; the second time it commits."""
    each = found.spent["guard"].cpu + found.spent["score write"].cpu
    seconds = found.faces * each / rented.resting.core_speed + _seal(found, rented)
    return _serial("guard", found, rented, seconds, "one core")


def _serial(stage: str, found: Measured, rented: Rented, seconds: float, waits: str) -> Row:
    asked = [found.sealed.requests]
    if stage == "guard":
        asked.append(found.requests["score"])
    return Row(
        stage,
        found.faces,
        "faces",
        seconds,
        seconds,
        seconds,
        waits,
        requests=_requests(asked, found.slices),
        compute_dollars=_dollars(seconds, rented.resting),
    )


def _distilling(found: Measured, recipe: Recipe) -> Cost:
    """Cost of the recipe's distillation, at most: as if every face were selected."""
    assert recipe.distill is not None
    workers = recipe.train.stage_workers.get("distill", recipe.train.workers)
    names, faces = [str(code) for code in range(found.classes)], found.training_faces + found.faces
    return cost_of(recipe.distill, names, int(faces), max(1, workers))


def _distill(found: Measured, recipe: Recipe, rented: Rented) -> list[Row]:
    """At most: as if every face were selected, which experts and the teacher then see."""
    config, machine = recipe.distill, rented.resting
    if config is None:
        return []
    expected = _distilling(found, recipe)
    teachers, views = recipe.teach.folds, 2 if recipe.embed.flip else 1
    each = found.forward_rate * views * (machine.gpu_factor or machine.core_speed)
    # Workers look at the same time, each at what one alone would.
    looking = looks(config, found.classes, int(found.training_faces + found.faces)) / each
    judged = Row(
        "distill",
        expected.judged * teachers * FORWARD,
        "passes",
        looking,
        looking,
        looking,
        "the teacher",
        compute_dollars=_dollars(looking, machine),
    )
    if not config.learned:
        return [judged]
    passes = expected.passes + expected.expert_passes
    learned = _training("distill", passes, found, recipe, rented)
    return [
        replace(
            learned,
            amount=learned.amount + judged.amount,
            seconds=learned.seconds + looking,
            low=learned.low + looking,
            high=learned.high + looking,
            bottleneck=max(learned, judged, key=lambda row: row.seconds).bottleneck,
            compute_dollars=learned.compute_dollars + judged.compute_dollars,
        )
    ]


def _training(stage: str, passes: float, found: Measured, recipe: Recipe, rented: Rented) -> Row:
    rates = found.rates[stage.partition("_")[0]]  # control_b, student_share
    workers = recipe.train.stage_workers.get(stage, recipe.train.workers)
    threads = recipe.train.threads or 1
    machine = rented.resting
    mean, slow, fast = (
        train_time(passes, rate, machine, workers=workers, threads=threads).seconds
        for rate in rates
    )
    waits = "training steps"
    return Row(
        stage, passes, "passes", mean, fast, slow, waits, compute_dollars=_dollars(mean, machine)
    )


# -- sums -----------------------------------------------------------------------------------------


def _seal(found: Measured, rented: Rented) -> float:
    """Seconds until a stage is packed and sealed: every node does so with groups of its own."""
    nodes = rented.capacity.cpus / rented.capacity.node_cpus
    groups = math.ceil(found.slices / GROUP)
    return found.slices * found.sealed.seconds / max(1.0, min(nodes, groups))


def _requests(each: Sequence[Requests], slices: int) -> Requests:
    return Requests(slices * sum(r.puts for r in each), slices * sum(r.gets for r in each))


def _dollars(seconds: float, machine: Machine) -> float:
    return seconds / 3600 * machine.dollars_per_hour


def _nothing() -> Transform:
    raise AssertionError("an operator that only stands for its numbers")
