"""Proves which work each stage is predicted from, on measurements that can be summed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.flow import tiny

from pipeline.errors import ResourceError
from pipeline.placement import Capacity
from pipeline.planning.forecast import Machine, Spent
from pipeline.planning.foresight import Measured, Rented, Row, foresee
from pipeline.planning.probing import Requests, Sealed

STEPS = ("read", "survey", "guard", "decode", "score", "survey write", "embed write", "score write")


def measured(**changes: object) -> Measured:
    """A million faces in a thousand slices; forwards take ten times what everything else does."""
    spent = {name: Spent(0.001, 0.001) for name in STEPS} | {"forward": Spent(0.01, 0.01)}
    found = Measured(
        faces=1_000_000,
        slices=1000,
        planning=5.0,
        spent=spent,
        variants=[spent, {**spent, "forward": Spent(0.02, 0.02)}],
        read_bytes=10_000,
        stored={"survey": 400, "embed": 1000, "score": 300},
        requests={
            "read": Requests(0, 2),
            "survey": Requests(3, 0),
            "embed": Requests(3, 4),
            "score": Requests(2, 1),
        },
        sealed=Sealed(0.01, Requests(1, 5)),
        labeled_seconds=2.0,
        training_faces=300,
        labeled_faces=400,
        rates=dict.fromkeys(("teach", "student", "control", "distill"), (100.0, 50.0, 200.0)),
        classes=8,
        start_cpu={"survey": 1.0, "embed": 4.0},
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def rented(machine: Machine, cpus: float = 64, gpus: float = 0, start: float = 0) -> Rented:
    return Rented(machine, machine, Capacity(cpus, gpus, cpus, gpus, 1 << 50), start)


APART = ("embed.read_in=task", "embed.streams=1", "score.run_in=actor")


def rows(found: Measured, on: Rented, *sets: str) -> dict[str, Row]:
    return {row.stage: row for row in foresee(found, tiny(*APART, *sets), on)}


def test_foresee__image_passes_are_those_of_the_stages() -> None:
    recipe = tiny()
    found = rows(measured(), rented(Machine(64)))
    teach = recipe.teach.folds * recipe.teach.steps * recipe.teach.batch + 2 * 300 / 3
    student = recipe.student.steps * (recipe.student.labeled_batch + recipe.student.mined_batch)
    embed = 1_000_000 * recipe.teach.folds * 2 / 3  # with the mirror image
    assert found["teach"].amount == pytest.approx(teach)
    assert found["student"].amount == found["control_a"].amount == student
    assert found["control_b"].amount == pytest.approx(student + teach + embed)
    judged = 1_000_300 + 2 * 8  # the teacher at every face that may be mined, twice at the images
    passes = 5 * 8 * (1 + 4 / 3)
    assert found["distill"].amount == pytest.approx(passes + judged * recipe.teach.folds / 3)
    # a forward of both teachers with the mirror image takes 0.01 s
    assert found["distill"].seconds == pytest.approx(passes / 100 + judged * 0.005)
    assert found["control_b"].seconds == pytest.approx(found["control_b"].amount / 100)
    low, high = found["teach"].low, found["teach"].high
    assert (low, high) == (pytest.approx(teach / 200), pytest.approx(teach / 50))


def test_foresee__a_student_of_a_share_takes_as_long_as_the_other() -> None:
    found = rows(measured(), rented(Machine(64)), "mined_share=0.1", "student.rescore_at=[0.5]")
    student, share = found["student"], found["student_share"]
    again = 2 * 1_000_000 / 3  # scored again half way
    assert student.amount - share.amount == pytest.approx(0.9 * again)
    assert share.seconds == pytest.approx(share.amount / 100)
    assert "student_share" not in rows(measured(), rented(Machine(64)))


def test_foresee__experts_train_on_labeled_and_mined_faces() -> None:
    experts = "{count: 2, epochs: 3, batch: 100, ahead: 1, latest: [0, 1]}"
    sets = ("distill.method=trajectory", f"distill.experts={experts}")
    few, many = (
        rows(measured(faces=faces), rented(Machine(64)), *sets)["distill"] for faces in (700, 9700)
    )
    judged = 9000 * tiny().teach.folds / 3
    assert many.amount - few.amount == pytest.approx(2 * 3 * 9000 + judged)


def test_foresee__control_b_gets_what_a_student_beside_the_distilled_set_took() -> None:
    experts = "{count: 2, epochs: 3, batch: 100, ahead: 1, latest: [0, 1]}"
    sets = ("distill.method=trajectory", f"distill.experts={experts}")
    mined, beside = (
        rows(measured(), rented(Machine(64)), *sets, *more)
        for more in ((), ("student.beside=distilled",))
    )
    looks = 1_000_300 * tiny().teach.folds / 3  # of the teacher; they are not training
    spent = beside["control_b"].amount - mined["control_b"].amount
    assert spent == pytest.approx(beside["distill"].amount - looks, rel=1e-3)
    assert spent > 2 * 3 * 1_000_000


def test_foresee__chosen_images_cost_the_looks_of_the_teacher() -> None:
    row = rows(measured(), rented(Machine(64)), "distill.method=herding")["distill"]
    judged = 2 * (1_000_300 + 8)  # to choose and for provenance
    assert row.amount == pytest.approx(judged * tiny().teach.folds / 3)
    assert row.bottleneck == "the teacher"


def test_foresee__more_cores_are_no_help_to_one_embedding_actor() -> None:
    few = rows(measured(), rented(Machine(8)), "embed.pool=[1,1]")["embed"]
    many = rows(measured(), rented(Machine(512), cpus=512), "embed.pool=[1,1]")["embed"]
    assert few.bottleneck == many.bottleneck == "forward"
    assert many.seconds == pytest.approx(few.seconds, rel=0.01)
    # 0.01 s a face and its commit, at least
    assert 11_000 <= many.seconds < 11_000 * 1.3


def test_foresee__a_range_from_the_probes() -> None:
    embed = rows(measured(), rented(Machine(64)))["embed"]
    assert embed.low == pytest.approx(embed.seconds)
    assert embed.high > 1.5 * embed.seconds


def test_foresee__gpus_take_the_forward_off_the_cores() -> None:
    sets = ("embed.pool=[1,4]", "embed.num_gpus=1", "embed.decode_threads=4")
    slow = rows(measured(), rented(Machine(64, gpu_factor=1), gpus=4), *sets)["embed"]
    # four actors: forwards of 0.01 s and commits of 0.001 s, 250,000 faces each
    assert slow.bottleneck == "forward"
    assert slow.seconds == pytest.approx(250_000 * 0.011, rel=0.02)
    fast = rows(measured(), rented(Machine(64, gpu_factor=100), gpus=4), *sets)["embed"]
    # the only scoring actor has become the slowest: 0.001 s to score, 0.001 s to commit
    assert fast.bottleneck == "score"
    assert fast.seconds == pytest.approx(1_000_000 * 0.002, rel=0.02)


def test_foresee__one_actor_that_reads_and_scores_does_all_of_it() -> None:
    sets = ("embed.read_in=actor", "embed.streams=2", "score.run_in=embed", "embed.pool=[1,1]")
    found = foresee(measured(), tiny(*sets), rented(Machine(64)))
    embed = next(row for row in found if row.stage == "embed")
    # two slices at a time: 0.01 s beside decoding, and 0.004 s of reading, scoring and commits
    assert embed.seconds == pytest.approx(500_000 * 0.014, rel=0.02)


def test_foresee__requests_and_bytes_add_up() -> None:
    found = rows(measured(), rented(Machine(64)))
    # read, the commits of the pass's ledgers, and one seal
    assert found["survey"].requests == Requests(1000 * (3 + 1), 1000 * (2 + 5))
    assert found["embed"].requests == Requests(1000 * (3 + 2 + 1), 1000 * (2 + 4 + 1 + 5))
    assert found["survey"].stored == 1_000_000 * 400
    assert found["embed"].stored == 1_000_000 * 1300
    assert found["mine"].stored == 1_000_000 * 10_000


def test_foresee__dollars_are_hours_of_what_is_held() -> None:
    passes = Machine(64, dollars_per_hour=36)
    resting = Machine(4, dollars_per_hour=3.6)
    on = Rented(passes, resting, Capacity(64, 0, 64, 0, 1 << 50), node_start=180)
    found = rows(measured(), on)
    assert found["embed"].compute_dollars == pytest.approx(found["embed"].seconds / 100)
    assert found["teach"].compute_dollars == pytest.approx(found["teach"].seconds / 1000)
    without = rows(measured(), replace(on, node_start=0.0))
    assert found["embed"].seconds - without["embed"].seconds == pytest.approx(180)


def test_foresee__a_tiny_pool_waits_for_its_workers_to_start() -> None:
    tiny_pool = measured(faces=100, slices=1)
    row = rows(tiny_pool, rented(Machine(2), cpus=2), "embed.num_cpus=0.5")["embed"]
    assert row.bottleneck == "start"
    assert row.seconds >= 4.0


def test_foresee__a_pass_that_would_hang_is_refused_with_its_numbers() -> None:
    with pytest.raises(ResourceError, match="asks for 8 CPUs at a time, the largest node has 4"):
        rows(measured(), rented(Machine(4), cpus=4), "embed.num_cpus=8")
