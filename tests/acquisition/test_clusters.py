"""Proves TypiClust and ProbCover against dense, plain versions on the same k-means clusters."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.acquisition import clusters
from pipeline.acquisition.clusters import k_means, probcover, pure_radius, typicality, typiclust
from pipeline.acquisition.interface import Pool
from pipeline.errors import ConfigError
from pipeline.similarity import unit

from .pools import blobs


def dense_distances(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return np.linalg.norm(x[:, None] - x[None], axis=2)


def dense_typicality(x: np.ndarray, neighbors: int) -> list[float]:
    found = []
    for row, apart in enumerate(dense_distances(x)):
        near = sorted(np.delete(apart, row).tolist())[:neighbors]
        found.append(1 / (sum(near) / len(near) + 1e-5))
    return found


@pytest.mark.parametrize("neighbors", [1, 5, 20, 100])
def test_typicality__is_the_dense_one(neighbors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ASSIGNED", 25)
    monkeypatch.setattr(clusters, "_GATHERED", 7)
    x = unit(blobs().embeddings)
    np.testing.assert_allclose(typicality(x, neighbors), dense_typicality(x, neighbors), rtol=1e-4)


def test_typicality__copies_are_no_distance_apart() -> None:
    x = unit(np.repeat(blobs(12).embeddings, 5, axis=0))
    np.testing.assert_allclose(typicality(x, 4), 1e5, rtol=1e-6)
    np.testing.assert_allclose(typicality(x, 6), dense_typicality(x, 6), rtol=1e-4)
    assert typicality(x[:1], 20).tolist() == [1e5]


def plain_typiclust(pool: Pool, budget: int, seed: int, neighbors: int, most: int) -> list[int]:
    assert pool.embeddings is not None
    count = min(int(pool.labeled.sum()) + budget, most)
    cluster = k_means(pool.embeddings, count, np.random.default_rng(seed))
    typical = np.zeros(len(cluster))
    for c in range(count):
        own = np.flatnonzero(cluster == c)
        if len(own) > 1:
            typical[own] = dense_typicality(unit(pool.embeddings[own]), neighbors)
    chosen: list[int] = []
    while len(chosen) < budget:
        done = pool.labeled.copy()
        done[chosen] = True
        keyed = []
        for c in range(count):
            own = np.flatnonzero(cluster == c)
            if not done[own].all():
                keyed.append((len(own) <= 5, int(done[own].sum()), -len(own), c))
        c = min(keyed)[-1]
        rest = [row for row in np.flatnonzero(cluster == c).tolist() if not done[row]]
        chosen.append(max(rest, key=lambda row: (typical[row], -row)))
    return chosen


@pytest.mark.parametrize(("labeled", "budget", "most"), [(0, 6, 500), (8, 10, 7), (20, 40, 500)])
def test_typiclust__is_the_plain_version(labeled: int, budget: int, most: int) -> None:
    pool = blobs(labeled=labeled)
    for neighbors in (3, 20):
        chosen = typiclust(
            pool, budget, np.random.default_rng(5), neighbors=neighbors, most_clusters=most
        )
        assert chosen.tolist() == plain_typiclust(pool, budget, 5, neighbors, most)


def test_typiclust__one_face_of_every_group_before_a_second_of_any() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(6), [40, 30, 20, 10, 10, 10]))
    x = np.eye(6)[group] + 0.02 * rng.normal(size=(120, 6))
    chosen = typiclust(Pool(np.zeros(120, bool), embeddings=x), 6, rng)
    assert sorted(group[chosen].tolist()) == [0, 1, 2, 3, 4, 5]
    assert group[chosen[:3]].tolist() == [0, 1, 2]


def test_k_means__finds_groups_and_looks_at_directions_only() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 20)
    x = np.eye(4)[group] + 0.02 * rng.normal(size=(60, 4))
    found = k_means(x * rng.uniform(0.5, 9, (60, 1)), 3, np.random.default_rng(1))
    assert len(set(zip(found.tolist(), group.tolist(), strict=True))) == 3
    again = k_means(x, 3, np.random.default_rng(1))
    assert (again == found).all()


def dense_purity(x: np.ndarray, cluster: np.ndarray, radius: float) -> float:
    near = dense_distances(x) < radius
    return float(np.mean([len(set(cluster[row])) == 1 for row in near]))


@pytest.mark.parametrize("purity", [0.5, 0.9, 0.95, 1.0])
def test_pure_radius__is_the_largest_of_its_purity(
    purity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_TILE", 17)
    x = unit(blobs().embeddings)
    cluster = k_means(x, 4, np.random.default_rng(0))
    radius = pure_radius(x, cluster, purity)
    assert dense_purity(x, cluster, radius * (1 - 1e-4)) >= purity
    assert dense_purity(x, cluster, radius * (1 + 1e-4)) < purity


def test_pure_radius__one_cluster_is_pure_everywhere() -> None:
    x = unit(blobs().embeddings)
    assert pure_radius(x, np.zeros(60, np.int64), 0.95) == 2


def plain_probcover(pool: Pool, budget: int, delta: float) -> list[int]:
    """The chosen faces until nothing is left to cover."""
    assert pool.embeddings is not None
    edge = dense_distances(unit(pool.embeddings)) < delta
    covered = edge[pool.labeled].any(axis=0)
    chosen: list[int] = []
    while len(chosen) < budget and not covered.all():
        degree = (edge & ~covered).sum(axis=1)
        degree[pool.labeled] = degree[chosen] = -1
        if degree.max() <= 0:
            break
        chosen.append(int(degree.argmax()))
        covered |= edge[chosen[-1]]
    return chosen


@pytest.mark.parametrize("labeled", [0, 8])
@pytest.mark.parametrize("delta", [0.1, 0.3, 0.6, 1.2, 2.0])
def test_probcover__is_the_dense_version(
    labeled: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_TILE", 17)
    pool = blobs(labeled=labeled)
    chosen = probcover(pool, 40, np.random.default_rng(0), delta=delta)
    expected = plain_probcover(pool, 40, delta)
    assert bool(expected) == (labeled == 0 or delta < 2)
    assert chosen[: len(expected)].tolist() == expected


def test_probcover__what_is_not_needed_to_cover_is_random() -> None:
    pool = blobs(labeled=0)
    covering = len(plain_probcover(pool, 40, 1.2))
    assert covering < 20
    rest = {
        tuple(probcover(pool, 40, np.random.default_rng(seed), delta=1.2)[covering:].tolist())
        for seed in range(5)
    }
    assert len(rest) == 5


def test_probcover__finds_its_radius_by_the_purity_of_clusters() -> None:
    pool, x = blobs(labeled=0), unit(blobs().embeddings)
    radius = pure_radius(x, k_means(x, 4, np.random.default_rng(9)), 0.95)
    expected = plain_probcover(pool, 10, float(np.sqrt(radius**2 - 1e-5)))
    by_probs = probcover(pool, 10, np.random.default_rng(9))
    assert by_probs[: len(expected)].tolist() == expected
    without = replace(pool, probs=None)
    by_classes = probcover(without, 10, np.random.default_rng(9), classes=4)
    assert (by_classes == by_probs).all()
    with pytest.raises(ConfigError, match="probcover needs probs"):
        probcover(without, 10, np.random.default_rng(9))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 2.1}, "delta is"),
        ({"purity": 0.0}, "purity is"),
    ],
)
def test_probcover__settings_have_bounds(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        probcover(blobs(), 3, np.random.default_rng(0), **settings)
