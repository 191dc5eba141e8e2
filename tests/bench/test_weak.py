"""Proves that the gates of the bench weak can fail, and what its verdicts tell apart."""

import pytest

from tests.bench import weak, weak_tables

KEYS = (*weak.LOWER, *weak.HIGHER)


def _record(seed, value, **own):
    return {"seed": seed, "n": 100, "metrics": dict.fromkeys(KEYS, value) | own}


def _grid(value=0.5, **rows):
    """Every row at one value, save those named: figures by row, on both sets of faces."""
    return {
        f"{row}-{faces}-s{seed}": _record(seed, value, **rows.get(row, {}))
        for row in weak.ROWS
        for faces in weak.SETS
        for seed in weak.SEEDS
    }


def test_judge_votes__wants_candidates_on_both_metrics_in_all_seeds():
    assert weak.judge_votes(_grid(pico={"kl": 0.4, "brier": 0.4})) == []
    (fault,) = weak.judge_votes(_grid(pico={"kl": 0.4}, proden={"brier": 0.4}))
    assert fault == "no row is, on both KL and Brier in all seeds"
    once_worse = _grid(pico={"kl": 0.4, "brier": 0.4})
    for faces in weak.SETS:
        once_worse[f"pico-{faces}-s1"]["metrics"]["kl"] = 0.6
    assert weak.judge_votes(once_worse) != []


def test_judge_votes__soft_labels_are_a_baseline():
    assert weak.judge_votes(_grid(votes={"kl": 0.4, "brier": 0.4})) != []


def test_gates__wait_for_cells_unless_one_row_is_enough():
    lacking = _grid(pico={"kl": 0.4})
    del lacking["decoder-voted-s2"]
    assert weak.judge_votes(lacking) is None
    found = _grid(pico={"kl": 0.4, "brier": 0.4})
    del found["decoder-voted-s2"]
    assert weak.judge_votes(found) == []
    del found["pico-voted-s2"], found["pico-majority-s2"]
    assert weak.judge_votes(found) is None
    assert weak.judge_finite({}) is None


@pytest.mark.parametrize("key", ["accuracy", "kl"])
def test_verdict__better_worse_undecided_or_missing(key):
    more, less = (0.6, 0.4) if key in weak.HIGHER else (0.4, 0.6)

    def said(values):
        records = _grid()
        for seed, value in zip(weak.SEEDS, values, strict=True):
            records[f"proden-voted-s{seed}"] = _record(seed, value)
        return weak.verdict(records, "proden", "voted", key)

    assert said([more] * 3) == weak.BETTER
    assert said([less] * 3) == weak.WORSE
    assert said([more, less, more]) == said([more, 0.5, more]) == weak.UNDECIDED
    records = _grid()
    del records["proden-voted-s1"]
    assert weak.verdict(records, "proden", "voted", key) is None


def test_verdict__transformers_have_their_own_baseline():
    records = _grid(mae={"kl": 0.7}, mae_decoder={"kl": 0.6})
    assert weak.verdict(records, "mae_decoder", "voted", "kl") == weak.BETTER
    assert weak.verdict(records, "mae", "majority", "kl") is None  # the baseline itself
    assert weak.verdict(records, "mae", "voted", "kl") == weak.UNDECIDED


def test_rows__marks_stand_behind_the_figures():
    records = _grid(pico={"kl": 0.4}, smoothing={"kl": 0.6})
    rows = weak_tables._rows(records, "majority", verdicts=True)
    kl = {row.split("|")[1].strip(): row.split("|")[8].strip() for row in rows}
    titles = weak_tables.TITLES
    assert kl[titles["pico"]] == "0.400 +"
    assert kl[titles["smoothing"]] == "0.600 -"
    assert kl[titles["proden"]] == "0.500 ~"
    assert kl[titles["ce"]] == "0.500"
