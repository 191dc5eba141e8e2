"""Proves cluster labels and verdicts against plain loops, and that no order of parts matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.clusters import ClusterConfig, Clusters, Sample, count_labels, verdicts
from pipeline.config import parse
from pipeline.errors import ConfigError


def blobs(seed: int, each: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around four directions at right angles, and whose they are."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(4), each)
    x = np.eye(8)[own] + 0.1 * rng.normal(size=(len(own), 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), own


@pytest.mark.parametrize("order", [0, 1])
def test_sample__smallest_hashes_whatever_the_order_and_the_parts(order: int) -> None:
    rng = np.random.default_rng(order)
    hashes = np.random.default_rng(7).permutation(1000).astype(np.uint64)
    rows = np.stack([hashes, hashes * 2], 1).astype(np.float16)
    sample = Sample(60)
    for part in np.array_split(rng.permutation(1000), 17 + order):
        sample.add(hashes[part], rows[part])
        assert sample._held < 120 + 60  # two samples and a part: the pool is not kept
    assert sample.rows()[:, 0].tolist() == list(range(60))
    few = Sample(60)
    few.add(hashes[:5], rows[:5])
    assert few.rows()[:, 0].tolist() == sorted(hashes[:5].tolist())
    assert len(Sample(3).rows()) == 0


def test_clusters__rows_of_one_direction_share_a_cluster() -> None:
    x, own = blobs(0)
    made = Clusters(x, 4, seed=0)
    found = made.of(x)
    assert made.count == 4
    assert len({(a, b) for a, b in zip(own.tolist(), found.tolist(), strict=True)}) == 4
    assert (Clusters(x, 4, seed=0).of(x) == found).all()
    assert (np.concatenate([made.of(x[:3]), made.of(x[3:])]) == found).all()
    assert Clusters(x[:3], 250, seed=0).count == 3  # fewer faces than clusters


def slow(counts: list[list[int]], config: ClusterConfig) -> list[int]:
    """Each cluster's label or -1, in plain Python."""
    label, purity = [], []
    for row in counts:
        label.append(row.index(max(row)) if sum(row) else -1)
        purity.append(max(row) / sum(row) if sum(row) else 0.0)
    kept = {number for number, code in enumerate(label) if code >= 0}
    if config.share is not None:
        for code in range(len(counts[0])):
            own = [n for n, c in enumerate(label) if c == code]
            own.sort(key=lambda n: (-purity[n], -sum(counts[n]), n))
            wanted, taken = config.share * sum(sum(counts[n]) for n in own), 0
            for n in own:
                if taken >= wanted:
                    kept.discard(n)
                taken += sum(counts[n])
    if config.purity is not None:
        kept -= {n for n, value in enumerate(purity) if value < config.purity}
    return [code if n in kept else -1 for n, code in enumerate(label)]


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=12),
    purity=st.sampled_from([None, 0.5, 0.75, 1.0]),
    share=st.sampled_from([None, 0.1, 0.3, 0.5, 1.0]),
)
def test_verdicts__equal_a_slow_version(
    counts: list[list[int]], purity: float | None, share: float | None
) -> None:
    config = ClusterConfig(purity=purity, share=share)
    assert verdicts(np.array(counts), config).tolist() == slow(counts, config)


def test_verdicts__by_hand() -> None:
    counts = np.array([[9, 1], [6, 4], [5, 5], [0, 0], [1, 3]])
    assert verdicts(counts, ClusterConfig(share=None)).tolist() == [0, 0, 0, -1, 1]
    assert verdicts(counts, ClusterConfig(share=None, purity=0.6)).tolist() == [0, 0, -1, -1, 1]
    # A third of 30 faces of class 0 is in the purest cluster; a bit more needs the second one, too.
    assert verdicts(counts, ClusterConfig(share=1 / 3)).tolist() == [0, -1, -1, -1, 1]
    assert verdicts(counts, ClusterConfig(share=0.34)).tolist() == [0, 0, -1, -1, 1]


def test_count_labels__of_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    cluster, label = rng.integers(0, 5, 200), rng.integers(0, 3, 200)
    whole = count_labels(cluster, label, 6, 3)
    assert whole.shape == (6, 3)
    for number in range(6):
        for code in range(3):
            assert whole[number, code] == ((cluster == number) & (label == code)).sum()
    parts = [count_labels(cluster[i::3], label[i::3], 6, 3) for i in (2, 0, 1)]
    assert (sum(parts) == whole).all()


def test_config__says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="outvoted: Input should be 'relabel' or 'leave'"):
        parse(ClusterConfig, {"outvoted": "keep"})
    with pytest.raises(ValidationError, match="share"):
        ClusterConfig(share=0.0)
