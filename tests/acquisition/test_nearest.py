"""Proves factored distances against outer products written out, and lazy ones against all."""

import numpy as np
import pytest

from pipeline.acquisition import nearest
from pipeline.acquisition.nearest import Nearest, Outer, nearest_squared, outer


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def written_out(h: np.ndarray, a: np.ndarray | None) -> np.ndarray:
    """All squared distances, float64, of rows a h^T of K D numbers."""
    g = h if a is None else (a[:, :, None] * h[:, None, :]).reshape(len(h), -1)
    g = g.astype(np.float64)
    return ((g[:, None] - g[None]) ** 2).sum(axis=2)


def some(rows: Outer, part: slice) -> Outer:
    return Outer(*(None if factor is None else factor[part] for factor in rows))


def each(x: Outer, y: Outer) -> np.ndarray:
    """Squared distances (R, S)."""
    alone = [some(y, slice(row, row + 1)) for row in range(len(y.h))]
    return np.stack([nearest_squared(x, one) for one in alone], axis=1)


@pytest.mark.parametrize("classes", [None, 1, 4])
def test_nearest_squared__are_those_of_the_outer_products(
    classes: int | None, rng: np.random.Generator
) -> None:
    h = rng.normal(size=(60, 8))
    a = None if classes is None else rng.normal(size=(60, classes))
    rows, dense = outer(h, a), written_out(h, a)
    np.testing.assert_allclose(each(rows, rows), dense, rtol=1e-4, atol=1e-4)
    lengths = (h**2).sum(axis=1) * (1 if a is None else (a**2).sum(axis=1))
    np.testing.assert_allclose(rows.norm, lengths, rtol=1e-5)
    found = nearest_squared(rows, some(rows, slice(9)))
    np.testing.assert_allclose(found, dense[:, :9].min(axis=1), rtol=1e-4, atol=1e-4)


def test_nearest_squared__copies_are_exactly_zero_apart(rng: np.random.Generator) -> None:
    h = 30 + rng.normal(size=(50, 200))
    rows = outer(h, None)
    again = outer(h[::-1].copy(), None)
    assert (np.diag(each(rows, again)[:, ::-1]) == 0).all()
    assert (nearest_squared(rows, again) == 0).all()
    other = each(rows, again)[:, ::-1]
    assert (other[~np.eye(50, dtype=bool)] > 0).all()


@pytest.mark.parametrize("classes", [None, 3])
def test_refresh__lazy_distances_are_those_of_all_centers(
    classes: int | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "_FACES", 7)
    monkeypatch.setattr(nearest, "_CENTERS", 3)
    h = rng.normal(size=(40, 6)).astype(np.float16)
    a = None if classes is None else rng.normal(size=(40, classes))
    dense = written_out(h, a)
    near = Nearest(h, a, 12)
    centers: list[int] = []
    for new in ([0, 5, 9, 11, 12], [20], [21, 3], [30, 31, 32, 33]):
        near.add(np.array(new))
        centers.extend(new)
        asked = np.sort(rng.choice(40, 15, replace=False))
        near.refresh(asked)
        exact = dense[:, centers].min(axis=1)
        np.testing.assert_allclose(near.bound[asked], exact[asked], rtol=1e-4, atol=1e-4)
        assert (near.bound >= exact - 1e-3).all()
    near.refresh()
    np.testing.assert_allclose(near.bound, exact, rtol=1e-4, atol=1e-4)


def test_refresh__until_looks_at_the_first_centers_only(rng: np.random.Generator) -> None:
    h = rng.normal(size=(20, 6))
    near = Nearest(h, None, 5)
    near.add(np.arange(5))
    near.refresh(until=2)
    dense = written_out(h, None)
    np.testing.assert_allclose(near.bound, dense[:, :2].min(axis=1), rtol=1e-4, atol=1e-4)
    near.refresh(np.array([7]))
    assert near.bound[7] == pytest.approx(dense[7, :5].min(), rel=1e-4)
