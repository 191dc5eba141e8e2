"""Proves that a synthetic face depends on (seed, index) alone and that its facts hold together."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline import synthetic
from pipeline.schema import EMOTIONS
from pipeline.synthetic import draw, encode, facts, majority


def test_draw__depends_on_seed_and_index_alone() -> None:
    together = draw(5, np.arange(40))
    assert np.array_equal(draw(5, [39, 7, 7, 2]), together[[39, 7, 7, 2]])
    assert np.array_equal(np.concatenate([draw(5, [i]) for i in range(5)]), together[:5])
    assert not np.array_equal(draw(6, [7])[0], together[7])


def test_draw__known_face_never_changes() -> None:
    """A recipe's numbers would silently change with the drawing; float rounding is forgiven."""
    picture = draw(0, [123456789], 24)[0]
    assert picture.dtype == np.uint8
    assert (round(float(picture.mean()), 1), round(float(picture.std()), 1)) == (115.7, 50.4)


def test_draw__no_two_alike_and_all_sizes() -> None:
    pictures = draw(1, np.arange(200), 32)
    assert len({picture.tobytes() for picture in pictures}) == 200
    assert pictures.std(axis=(1, 2)).min() > 5
    assert draw(1, [], 48).shape == (0, 48, 48)
    assert draw(1, [2**40], 17).shape == (1, 17, 17)


def test_facts__depend_on_seed_and_index_alone() -> None:
    whole, part = facts(3, np.arange(100)), facts(3, [99, 5])
    for name in ("label", "intensity", "identity", "votes"):
        assert np.array_equal(getattr(whole, name)[[99, 5]], getattr(part, name))


def test_facts__shares_and_ranges() -> None:
    known = facts(0, np.arange(20_000), raters=7)
    shares = np.bincount(known.label, minlength=8) / 20_000
    assert np.abs(shares - synthetic.PRIOR).max() < 0.01
    assert np.all(known.votes.sum(1) == 7)
    assert np.all((known.intensity == 0) == (known.label == 0))
    assert known.intensity.max() <= 1
    assert known.identity.min() >= 0
    assert known.identity.max() < synthetic.IDENTITIES


def test_facts__raters_see_strong_expressions_better() -> None:
    known = facts(0, np.arange(20_000))
    right = majority(known.votes) == known.label
    weak = right[(known.label > 0) & (known.intensity < 0.3)].mean()
    strong = right[known.intensity > 0.7].mean()
    assert weak < 0.9 < 0.97 < strong


def test_majority__first_of_equals() -> None:
    votes = np.array([[0, 5, 0, 5, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 4]])
    assert majority(votes).tolist() == [1, 7]


def test_prototypes__one_row_per_emotion_and_all_differ() -> None:
    assert synthetic.PROTOTYPES.shape == (len(EMOTIONS), len(synthetic.MOVES))
    assert not synthetic.PROTOTYPES[0].any()
    apart = np.abs(synthetic.PROTOTYPES[:, None] - synthetic.PROTOTYPES[None]).sum(2)
    assert apart[~np.eye(8, dtype=bool)].min() > 1
    assert abs(sum(synthetic.PRIOR) - 1) < 1e-9


def test_draw__expression_is_in_the_picture() -> None:
    """A linear reader of strong, averaged faces tells smiles, sad and surprised mouths apart."""
    index = np.arange(6000)
    known = facts(2, index)
    means = []
    for label in ("happiness", "sadness", "surprise"):
        strong = (known.label == EMOTIONS.index(label)) & (known.intensity > 0.6)
        pictures = draw(2, index[strong]).astype(float)
        split = len(pictures) // 2
        means.append((pictures[:split].mean(0), pictures[split:].mean(0)))
    for i, (first, _) in enumerate(means):
        distances = [np.abs(first - second).mean() for _, second in means]
        assert int(np.argmin(distances)) == i


def test_encode__is_lossless() -> None:
    picture = draw(0, [1])[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(picture)))), picture)


def test_uniform__is_uniform() -> None:
    numbers = synthetic._uniform(9, np.arange(4000, dtype=np.uint64), 0, 8)
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.var() - 1 / 12) < 0.002
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.06
    bells = synthetic._Traits(numbers).bells(8)
    assert abs(bells.mean()) < 0.02
    assert abs(bells.std() - 1) < 0.02
