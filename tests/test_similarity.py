"""Prototypes have closed forms; neighbors equal brute force for any order, tie or batch."""

import numpy as np
import pytest

from pipeline.similarity import Neighbors, nearest_prototypes, prototypes, unit, vote


def brute_force(bank, ids, x, k):
    """Every pair in float64, sorted by the documented key in plain Python."""
    rows, cosines = [], []
    for query in x.astype(np.float64):
        keyed = sorted(
            (-round(float(query @ face), 6), ids[i], i)
            for i, face in enumerate(bank.astype(np.float64))
        )[:k]
        rows.append([i for _, _, i in keyed])
        cosines.append([-c for c, _, _ in keyed])
    return np.array(rows), np.array(cosines)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_unit__has_length_one_and_keeps_zero_rows():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


def test_prototypes__mean_of_correct_samples_only():
    z = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = np.array([0, 0, 0])
    vectors, owners = prototypes(z, labels, np.array([True, True, False]), classes=2)
    np.testing.assert_allclose(vectors, [[np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-7)
    assert owners.tolist() == [0]


def test_prototypes__class_without_correct_sample_uses_all_and_empty_class_has_none():
    z = np.array([[1.0, 0.0], [0.0, 2.0]])
    vectors, owners = prototypes(z, np.array([0, 2]), np.array([True, False]), classes=3)
    assert owners.tolist() == [0, 2]
    np.testing.assert_allclose(vectors, [[1, 0], [0, 1]])


def test_prototypes__sub_prototypes_find_both_looks_of_a_class(rng):
    looks = np.eye(4)[[0, 3]]
    z = np.repeat(looks, 20, axis=0) + 0.01 * rng.normal(size=(40, 4))
    vectors, owners = prototypes(z, np.zeros(40, int), np.ones(40, bool), 1, per_class=2)
    assert owners.tolist() == [0, 0]
    assert sorted(vectors.argmax(axis=1).tolist()) == [0, 3]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    again, _ = prototypes(z, np.zeros(40, int), np.ones(40, bool), 1, per_class=2)
    np.testing.assert_array_equal(vectors, again)


def test_prototypes__never_more_than_the_class_has_samples():
    vectors, owners = prototypes(np.eye(3), np.array([0, 0, 1]), np.ones(3, bool), 2, per_class=5)
    assert owners.tolist() == [0, 0, 1]
    assert len(vectors) == 3


def test_nearest_prototypes__margin_is_to_the_best_other_class_not_the_next_prototype():
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
    label, similarity, margin = nearest_prototypes(
        np.array([[1.0, 0.0]], np.float32), vectors, np.array([4, 4, 7])
    )
    assert label.tolist() == [4]
    assert similarity == pytest.approx([1.0])
    assert margin == pytest.approx([1.0])


def test_nearest_prototypes__one_class_has_margin_to_minus_one():
    _, similarity, margin = nearest_prototypes(np.eye(2), np.eye(2)[:1], np.array([0]))
    assert margin == pytest.approx(similarity + 1)


def test_neighbors__equal_brute_force(rng):
    bank, x = unit(rng.normal(size=(300, 16))), unit(rng.normal(size=(50, 16)))
    ids = [f"face{i:03d}" for i in rng.permutation(300)]
    rows, similarity = Neighbors(bank, ids).search(x, 7)
    want_rows, want = brute_force(bank, ids, x, 7)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_allclose(similarity, want, atol=1e-7)


def test_neighbors__ties_go_by_id_even_when_they_outnumber_the_candidates(rng):
    few = unit(rng.normal(size=(4, 8)))
    bank = np.repeat(few, 40, axis=0)
    ids = [f"{i:03d}" for i in rng.permutation(160)]
    x = unit(few + 0.1 * rng.normal(size=few.shape))
    rows, _ = Neighbors(bank, ids).search(x, 5)
    np.testing.assert_array_equal(rows, brute_force(bank, ids, x, 5)[0])


def test_neighbors__order_of_the_bank_and_batch_do_not_count(rng):
    bank, x = unit(rng.normal(size=(200, 12))), unit(rng.normal(size=(33, 12)))
    bank[50:60] = bank[40:50]
    ids = np.array([f"{i:03d}" for i in range(200)])
    rows, similarity = Neighbors(bank, ids).search(x, 9)
    shuffle = rng.permutation(200)
    mixed, again = Neighbors(bank[shuffle], ids[shuffle]).search(x, 9)
    np.testing.assert_array_equal(ids[rows], ids[shuffle][mixed])
    np.testing.assert_array_equal(similarity, again)
    one_by_one = [Neighbors(bank, ids).search(q[None], 9) for q in x]
    np.testing.assert_array_equal(rows, np.concatenate([r for r, _ in one_by_one]))
    np.testing.assert_array_equal(similarity, np.concatenate([s for _, s in one_by_one]))


def test_neighbors__k_is_cut_to_the_bank_and_no_query_gives_no_row():
    neighbors = Neighbors(np.eye(3, dtype=np.float32), ["b", "a", "c"])
    rows, similarity = neighbors.search(np.eye(3, dtype=np.float32)[:1], 10)
    assert rows.tolist() == [[0, 1, 2]]
    assert similarity.tolist() == [[1, 0, 0]]
    assert neighbors.search(np.zeros((0, 3), np.float32), 2)[0].shape == (0, 2)


def test_vote__share_is_the_softmax_mass_of_the_winner():
    label, share = vote(np.array([[0, 1, 1]]), np.array([[0.9, 0.7, 0.6]]), 3, tau=0.1)
    weights = np.exp([9.0, 7.0, 6.0])
    assert label.tolist() == [0]
    assert share == pytest.approx(weights[0] / weights.sum())


def test_vote__many_far_ones_outvote_one_near_at_high_tau():
    label, share = vote(np.array([[0, 1, 1]]), np.array([[0.9, 0.7, 0.6]]), 2, tau=1e6)
    assert label.tolist() == [1]
    assert share == pytest.approx(2 / 3, abs=1e-5)


def test_vote__small_tau_does_not_overflow():
    _, share = vote(np.array([[0, 1]]), np.array([[1.0, 0.5]]), 2, tau=1e-4)
    assert share.tolist() == [1.0]
