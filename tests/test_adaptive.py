"""Proves every rule against a slow plain version, over workers, restarts and edge cases."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.adaptive import RULES, FlexMatch, FreeMatch, Rule, rule
from pipeline.config import parse
from pipeline.errors import ConfigError, IdentityError
from pipeline.losses import Gather
from pipeline.threshold_config import ThresholdConfig
from tests.test_losses import in_workers

K, POOL, PRIOR = 4, 30, (0.1, 0.2, 0.3, 0.4)
Step = tuple[Tensor, Tensor, Tensor]


def drawn(rows: int, seed: int, classes: int = K) -> Tensor:
    """Probabilities, many of them above 0.95; the first class is predicted most."""
    made = torch.Generator().manual_seed(seed)
    tilt = torch.linspace(2, 0, classes)
    return torch.softmax(4 * torch.randn(rows, classes, generator=made) + tilt, 1)


def steps(count: int, batch: int = 8, classes: int = K, first: int = 0) -> list[Step]:
    """Labeled and unlabeled probabilities and positions; faces come twice in a batch."""
    made = torch.Generator().manual_seed(first)
    places = [torch.randint(POOL, (batch,), generator=made) for _ in range(count)]
    return [
        (
            drawn(batch // 2 or 1, first + 2 * n, classes),
            drawn(batch, first + 2 * n + 1, classes),
            at,
        )
        for n, at in enumerate(places)
    ]


def start(
    name: str, classes: int = K, prior: Sequence[float] | None = PRIOR, **more: object
) -> Rule:
    config = parse(ThresholdConfig, {"rule": name, "momentum": 0.8, **more})
    return rule(config, classes, POOL, None if prior is None else torch.tensor(prior))


def top(row: Sequence[float]) -> tuple[float, int]:
    """Confidence and class of one face."""
    return max(row), max(range(len(row)), key=lambda c: row[c])


def above(cuts: Sequence[float], probs: Sequence[Sequence[float]]) -> list[float]:
    return [float(top(row)[0] >= cuts[top(row)[1]]) for row in probs]


def columns(probs: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each class."""
    return [sum(row[c] for row in probs) / len(probs) for c in range(len(probs[0]))]


def ema(old: float, new: float, momentum: float = 0.8) -> float:
    return momentum * old + (1 - momentum) * new


def close(found: Tensor, expected: object) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=1e-5)


# -- each rule against a slow plain version -------------------------------------------------------


def test_fixed__one_cut_and_no_statistics() -> None:
    made = start("fixed", tau=0.7)
    for step in steps(3):
        made.observe(*step)
        close(made.cuts(), [0.7] * K)
        assert made.weights(step[1]).tolist() == above([0.7] * K, step[1].tolist())
        torch.testing.assert_close(made.targets(step[1]), step[1])
    assert made.state() == {}
    assert made.weights(torch.tensor([[0.7, 0.3, 0, 0], [0.69, 0.31, 0, 0]])).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["ada_cm", "dtm"])
@pytest.mark.parametrize("floor", [0.8, 0.2, None])
def test_class_margin__equals_a_slow_version(name: str, floor: float | None) -> None:
    made = start(name, floor=floor)
    assert made.cuts().tolist() == pytest.approx([0.97 if floor is None else floor] * K)
    labels = torch.arange(40) % (K - 1)  # no face of the last class
    for number in (1, 2, 3.5):
        probs = drawn(40, seed=int(number))
        made.epoch(number, probs, labels)
        right: list[list[float]] = [[] for _ in range(K)]
        for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
            if top(row)[1] == label:
                right[label].append(top(row)[0])
        ramp = 0.97 / (1 + math.exp(-number))
        together = [value for own in right for value in own]
        cuts = []
        for own in right:
            mean = sum(own or together) / len(own or together)
            given = ramp * mean if own or floor is None else floor
            cuts.append(given if floor is None else max(floor, given))
        close(made.cuts(), cuts)
        assert made.weights(probs).tolist() == above(cuts, probs.tolist())
    assert floor == 0.8 or len(set(made.cuts().tolist())) == K  # the floor did not decide it all


def test_class_margin__the_ramp_by_hand() -> None:
    made = start("ada_cm", floor=None)
    sure = torch.eye(K)
    cuts = []
    for number in (1, 2, 5):
        made.epoch(number, sure, torch.arange(K))
        cuts.append(made.cuts()[0].item())
    assert cuts == pytest.approx([0.7091, 0.8544, 0.9635], abs=1e-4)
    made.epoch(5, sure, (torch.arange(K) + 1) % K)  # nothing right anywhere
    assert made.cuts().tolist() == pytest.approx([cuts[-1]] * K)


def test_flexmatch__equals_a_slow_version() -> None:
    made, last, twice = start("flexmatch", tau=0.9), {}, 0
    assert isinstance(made, FlexMatch)
    for step in steps(12):
        made.observe(*step)
        for row, at in zip(step[1].tolist(), step[2].tolist(), strict=True):
            confidence, label = top(row)
            if confidence >= 0.9:
                twice += last.get(at, label) != label
                last[at] = label
        unused = POOL - len(last)
        counts = [sum(label == c for label in last.values()) for c in range(K)]
        b = [count / max(*counts, unused) for count in counts]
        close(made.cuts(), [0.9 * share / (2 - share) for share in b])
        assert made.weights(step[1]).tolist() == above(made.cuts().tolist(), step[1].tolist())
        assert made.unused().item() == pytest.approx(unused / POOL)
        assert made.state()["counts"].tolist() == [*counts, unused]
    assert twice > 3  # faces changed class
    assert made.cuts().max().item() == pytest.approx(0.9)  # the largest class outnumbers the unused


def test_flexmatch__a_face_drawn_twice_in_a_batch_counts_once_as_its_last() -> None:
    made = start("flexmatch", tau=0.9)
    sure = torch.eye(K)[[0, 1, 2, 1]]
    made.observe(sure, sure, torch.tensor([7, 7, 7, 3]))
    assert made.state()["counts"].tolist() == [0, 1, 1, 0, POOL - 2]
    doubtful = torch.full((1, K), 1 / K)
    both = torch.cat([sure[:1], doubtful])
    made.observe(both, both, torch.tensor([7, 7]))  # the doubtful view is not remembered
    assert made.state()["counts"].tolist() == [1, 1, 0, 0, POOL - 2]
    assert made.state()["memory"][-1] == K


def test_freematch__equals_a_slow_version() -> None:
    made = start("freematch")
    level, shares, histogram = 1 / K, [1 / K] * K, [1 / K] * K
    for step in steps(10):
        made.observe(*step)
        rows = step[1].tolist()
        level = ema(level, sum(top(row)[0] for row in rows) / len(rows))
        shares = [ema(old, new) for old, new in zip(shares, columns(rows), strict=True)]
        given = [sum(top(row)[1] == c for row in rows) / len(rows) for c in range(K)]
        histogram = [ema(old, new) for old, new in zip(histogram, given, strict=True)]
        cuts = [level * share / max(shares) for share in shares]
        close(made.cuts(), cuts)
        close(made.stats["shares"], shares)
        close(made.stats["histogram"], histogram)
        assert made.weights(step[1]).tolist() == above(cuts, rows)


def plainly_aligned(
    rows: list[list[float]], to: Sequence[float], mean: Sequence[float], power: float
) -> list[list[float]]:
    raised = [[p * (t / m) ** power for p, t, m in zip(row, to, mean, strict=True)] for row in rows]
    return [[p / sum(row) for p in row] for row in raised]


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("align", ["prior", "labeled", "uniform", None])
@pytest.mark.parametrize("name", ["softmatch", "adamatch"])
def test_aligned_rules__equal_a_slow_version(name: str, align: str | None, power: float) -> None:
    made = start(name, align=align, align_power=power, tau=0.9)
    known = [0.0] * K
    mean, middle, var = [0.0] * K, 1 / K, 1.0
    for number, step in enumerate(steps(12), 1):
        made.observe(*step)
        labeled, rows = step[0].tolist(), step[1].tolist()
        momentum = min(0.8, 1 - 1 / number)  # the mean of all steps, then a running one
        mean = [ema(a, b, momentum) for a, b in zip(mean, columns(rows), strict=True)]
        known = [ema(a, b, momentum) for a, b in zip(known, columns(labeled), strict=True)]
        to = {"prior": PRIOR, "labeled": known, "uniform": [1 / K] * K, None: mean}[align]
        aligned = plainly_aligned(rows, to, mean, power)
        close(made.targets(step[1]), aligned)
        confidence = [top(row)[0] for row in aligned]
        if name == "softmatch":
            here = sum(confidence) / len(confidence)
            spread = sum((p - here) ** 2 for p in confidence) / (len(confidence) - 1)
            middle, var = ema(middle, here), ema(var, spread)
            sd = math.sqrt(var) / 2
            expected = [math.exp(-(min(p - middle, 0) ** 2) / (2 * sd**2)) for p in confidence]
            close(made.cuts(), [middle] * K)
            close(made.weights(step[1]), expected)
        else:
            cut = 0.9 * sum(top(row)[0] for row in labeled) / len(labeled)
            close(made.cuts(), [cut] * K)
            assert made.weights(step[1]).tolist() == above([cut] * K, aligned)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("align", ["prior", "labeled", "uniform", None])
def test_remixmatch__equals_a_slow_version(align: str | None, temperature: float) -> None:
    made = start("remixmatch", align=align, temperature=temperature)
    known, mean = [0.0] * K, [0.0] * K
    for number, step in enumerate(steps(8), 1):
        made.observe(*step)
        rows, momentum = step[1].tolist(), min(0.8, 1 - 1 / number)
        mean = [ema(a, b, momentum) for a, b in zip(mean, columns(rows), strict=True)]
        seen = columns(step[0].tolist())
        known = [ema(a, b, momentum) for a, b in zip(known, seen, strict=True)]
        to = {"prior": PRIOR, "labeled": known, "uniform": [1 / K] * K, None: mean}[align]
        sharp = [
            [p ** (1 / temperature) for p in row] for row in plainly_aligned(rows, to, mean, 1.0)
        ]
        close(made.targets(step[1]), [[p / sum(row) for p in row] for row in sharp])
        assert made.weights(step[1]).tolist() == [1] * len(rows)
        assert made.cuts().tolist() == [0] * K


def test_aligned_rules__reach_the_shares_they_align_to() -> None:
    made, probs = start("adamatch"), drawn(2000, 0).pow(0.2)  # soft: sure faces hardly move
    probs = probs / probs.sum(1, keepdim=True)
    before = (probs.mean(0) - torch.tensor(PRIOR)).abs().sum()
    made.observe(probs, probs, torch.zeros(2000, dtype=torch.int64))
    after = (made.targets(probs).mean(0) - torch.tensor(PRIOR)).abs().sum()
    assert after < before / 4


@pytest.mark.parametrize("name", ["softmatch", "adamatch"])
def test_aligned_rules__align_nothing_before_the_first_step(name: str) -> None:
    probs = drawn(5, 0)
    for align in ("prior", "labeled", "uniform", None):
        torch.testing.assert_close(start(name, align=align).targets(probs), probs)


# -- all rules ------------------------------------------------------------------------------------


def run(made: Rule, given: Sequence[Step]) -> None:
    for number, (labeled, probs, index) in enumerate(given, 1):
        made.observe(labeled, probs, index)
        made.epoch(number, probs, index % labeled.shape[1])


@pytest.mark.parametrize("name", RULES)
def test_rules__two_workers_equal_one_on_the_joined_batch(name: str) -> None:
    one, given = start(name), steps(6)
    for step in given:
        one.observe(*step)

    def work(gather: Gather) -> Rule:
        mine = start(name)
        for step in given:
            labeled, probs, index = (rows.chunk(2)[gather.rank] for rows in step)
            mine.observe(labeled, probs, index, gather)
        return mine

    for worker in in_workers(2, work):
        for key, value in one.state().items():
            assert torch.equal(worker.state()[key], value), key
        assert torch.equal(worker.weights(given[0][1]), one.weights(given[0][1]))


@pytest.mark.parametrize("name", RULES)
def test_rules__loaded_go_on_as_if_nothing_had_happened(name: str) -> None:
    made = start(name)
    run(made, steps(5))
    saved = made.state()
    frozen = {key: value.clone() for key, value in saved.items()}
    again = start(name)
    again.load(saved)
    run(again, steps(5, first=100))
    run(made, steps(5, first=100))
    probs = drawn(9, 7)
    assert torch.equal(again.cuts(), made.cuts())
    assert torch.equal(again.weights(probs), made.weights(probs))
    assert torch.equal(again.targets(probs), made.targets(probs))
    for key, value in made.state().items():
        assert torch.equal(again.state()[key], value)
        assert torch.equal(saved[key], frozen[key])  # neither rule writes into what was saved
    if name != "fixed":
        assert any(not torch.equal(saved[key], value) for key, value in made.state().items())


def test_load__names_what_does_not_fit() -> None:
    other = rule(ThresholdConfig(rule="flexmatch"), K, POOL + 1, None)
    with pytest.raises(IdentityError, match=r"flexmatch keeps .*31.*the checkpoint has .*32"):
        start("flexmatch").load(other.state())
    with pytest.raises(IdentityError, match="freematch keeps"):
        start("freematch").load({})


@pytest.mark.parametrize("name", RULES)
def test_rules__edge_cases_give_numbers_in_range(name: str) -> None:
    flat = torch.full((6, K), 1 / K)
    sure = torch.eye(K)[[0, 0, 1]]  # classes 2 and 3 are never predicted
    places = torch.arange(6)
    for labeled, probs, index in (
        (flat, flat, places),  # no confident face
        (sure, sure, places[:3]),
        (sure[:1], sure[:1], places[:1]),  # a batch of one
        (sure[:1], drawn(1, 3), places[:1]),
        (drawn(6, 1), drawn(6, 2).bfloat16(), places),
    ):
        made = start(name)
        for _ in range(3):
            made.observe(labeled, probs, index)
            made.epoch(1, labeled, index[: len(labeled)] % K)
            weights, targets = made.weights(probs), made.targets(probs)
            assert weights.shape == (len(probs),)
            assert weights.dtype == targets.dtype == torch.float32
            assert ((weights >= 0) & (weights <= 1)).all()
            assert ((made.cuts() >= 0) & (made.cuts() <= 1)).all()
            assert made.cuts().shape == (K,)
            torch.testing.assert_close(targets.sum(1), torch.ones(len(probs)), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", RULES)
def test_rules__one_class_only(name: str) -> None:
    made = start(name, classes=1, prior=[1.0])
    one = torch.ones(3, 1)
    made.observe(one, one, torch.arange(3))
    made.epoch(1, one, torch.zeros(3, dtype=torch.int64))
    assert made.weights(one).tolist() == [1, 1, 1]
    assert made.targets(one).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("name", RULES)
def test_rules__hand_no_gradient_to_the_model(name: str) -> None:
    made, (labeled, probs, index) = start(name), steps(1)[0]
    labeled, probs = labeled.requires_grad_(), probs.requires_grad_()
    made.observe(labeled, probs, index)
    made.epoch(1, probs, index % K)
    found = [made.weights(probs), made.targets(probs), made.cuts(), *made.state().values()]
    assert not any(value.requires_grad for value in found)


@pytest.mark.parametrize("name", RULES)
def test_rules__ask_the_device_for_no_value(name: str) -> None:
    # meta tensors have no values: whatever would make a CPU wait for a GPU raises.
    config = parse(ThresholdConfig, {"rule": name})
    made = rule(config, K, POOL, torch.tensor(PRIOR), "meta")
    labeled, probs, index = (rows.to("meta") for rows in steps(1)[0])
    made.observe(labeled, probs, index)
    made.epoch(1, probs, index)
    assert made.weights(probs).device == made.targets(probs).device == torch.device("meta")
    assert made.cuts().shape == (K,)


def test_flexmatch__a_class_never_predicted_keeps_cut_zero() -> None:
    made = start("flexmatch")
    sure = torch.eye(K)[[0, 0, 1]]
    made.observe(sure, sure, torch.arange(3))
    assert made.cuts()[2:].tolist() == [0, 0]
    assert made.cuts()[0] > made.cuts()[1] > 0


def test_softmatch__a_share_of_zero_never_divides_zero_by_zero() -> None:
    made = start("softmatch", prior=[0.0, 0.5, 0.5, 0.0])
    sure = torch.eye(K)
    made.observe(sure, sure, torch.arange(K))
    torch.testing.assert_close(made.targets(sure), sure)


@pytest.mark.parametrize("name", ["softmatch", "adamatch"])
def test_rule__without_a_prior_needs_another_alignment(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: align is prior"):
        start(name, prior=None)
    for align in ("labeled", "uniform", None):
        start(name, prior=None, align=align)


@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]])
def test_rule__refuses_what_is_no_prior(prior: list[float]) -> None:
    with pytest.raises(ConfigError, match="prior: expected 4 shares"):
        start("softmatch", prior=prior)


def test_rules__are_the_names_of_the_config() -> None:
    assert {name: type(start(name)) for name in RULES} == RULES
    with pytest.raises(ConfigError, match="rule"):
        start("flexmach")
    assert isinstance(start("freematch"), FreeMatch)
