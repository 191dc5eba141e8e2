"""Proves that no face is judged by a head or a member that has seen it, against slow versions."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from helpers.tiny import NAMES
from training.test_references import FOLDED, IDS, cross_fitted

from pipeline.artifacts import Teacher
from pipeline.heads import fit_head, named
from pipeline.policy import OperatingPoint, passes
from pipeline.scoring import ScoreConfig
from pipeline.spaces import Drawn, HeadConfig, Space, heads, said, spaces_of, study
from pipeline.training.references import build_teacher, members_alone

K = len(NAMES)
POOL = 40
CONFIG = HeadConfig(l2=1e-3)
SCORE = ScoreConfig(neighbors=4)
EVERYTHING = OperatingPoint(label_names=NAMES)


def drawn(teacher: Teacher, seed: int = 0) -> Drawn:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(POOL, teacher.width)).astype(np.float32)
    logits = rng.normal(size=(POOL, FOLDED, K)).astype(np.float32)
    ids = np.array([f"pool/{i}" for i in range(POOL)], dtype=object)
    return Drawn(ids, x, logits, np.full(POOL, 2.0))


@pytest.fixture(scope="module")
def cross() -> tuple[Teacher, pa.Table, np.ndarray, np.ndarray]:
    fit, data = cross_fitted()
    teacher, folds = build_teacher(fit, data, IDS, NAMES, sub_prototypes=1, seed=0)
    return teacher, folds, fit.fold, data.labels


@pytest.fixture(scope="module")
def spaces(cross: tuple) -> list[Space]:
    teacher, folds, _, _ = cross
    return spaces_of(teacher, folds, drawn(teacher), SCORE, sub_prototypes=1, seed=0)


def test_spaces_of__each_labeled_face_is_unseen_in_one_space(
    cross: tuple, spaces: list[Space]
) -> None:
    _, _, fold, _ = cross
    assert (np.stack([space.unseen for space in spaces]).argmax(0) == fold).all()
    assert (sum(space.unseen.astype(int) for space in spaces) == 1).all()


def test_spaces_of__pool_is_what_one_member_says_of_it(cross: tuple, spaces: list[Space]) -> None:
    teacher, _, _, _ = cross
    faces = drawn(teacher)
    width = teacher.width // FOLDED
    for number, space in enumerate(spaces):
        own = faces.embedding[:, number * width : (number + 1) * width]
        np.testing.assert_allclose(
            space.pool, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-6
        )
        assert (space.rows.predicted == faces.logits[:, number].argmax(1)).all()
        scaled = np.exp(faces.logits[:, number] / teacher.temperature)
        sure = (scaled / scaled.sum(1, keepdims=True)).max(1)
        np.testing.assert_allclose(space.rows.confidence, sure, atol=1e-5)
        np.testing.assert_allclose(space.soft, scaled / scaled.sum(1, keepdims=True), atol=1e-5)


def test_spaces_of__labels_of_unseen_faces_reach_no_score_of_their_space(cross: tuple) -> None:
    teacher, folds, fold, labels = cross
    hidden = np.where(fold == 0, (labels + 1) % K, labels)
    changed = folds.set_column(1, folds.schema.field("label"), pa.array([NAMES[c] for c in hidden]))
    a, b = (next(members_alone(teacher, t, sub_prototypes=1, seed=0)) for t in (folds, changed))
    faces = drawn(teacher)
    rows = [
        one.scores(faces.ids, one.part(faces.embedding), faces.logits[:, 0], SCORE)
        for one in (a, b)
    ]
    assert rows[0].equals(rows[1])


def invented(n: int = 120, seed: int = 1) -> tuple[list[Space], np.ndarray, np.ndarray]:
    """Two spaces of one kind, in which classes are far apart and pseudo-labels are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)

    def features(codes: np.ndarray) -> np.ndarray:
        x = rng.normal(size=(len(codes), 8)) + 2.5 * np.eye(K, 8)[codes]
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    fold, found = rng.permutation(np.arange(n) % 2), []
    for number in range(2):
        codes = rng.integers(0, K, 60)
        sure = rng.uniform(0.4, 1, 60).astype(np.float32)
        from pipeline.policy import Rows

        rows = Rows(codes, sure, codes, codes, sure)
        soft = np.eye(K, dtype=np.float32)[codes]
        x, unseen = features(labels), fold == number
        found.append(Space(x, unseen, features(codes), rows, np.ones(60), soft))
    return found, labels, fold


def test_heads__are_taught_by_the_seen_half_and_what_the_point_keeps() -> None:
    found, labels, fold = invented()
    taught = np.arange(len(labels)) % 3 > 0
    made = study(found, labels, taught, K, CONFIG)
    point = EVERYTHING.model_copy(update={"confidence": 0.7})
    got = heads(point, made)
    for number, space in enumerate(found):
        known = taught & (fold != number)
        kept = passes(space.rows, point)
        weight = min(1.0, CONFIG.mined_weight * known.sum() / kept.sum())
        slow = fit_head(
            np.concatenate([space.labeled[known], space.pool[kept]]),
            np.concatenate([labels[known], space.rows.predicted[kept]]),
            np.concatenate([np.ones(known.sum()), np.full(kept.sum(), weight)]),
            K,
            CONFIG.l2,
            made.starts[number],
        )
        np.testing.assert_allclose(got[number], slow)
        named_so = named(slow, space.labeled)
        assert (said(got, made)[space.unseen] == named_so[space.unseen]).all()


def test_heads__labels_of_the_other_half_teach_nothing() -> None:
    found, labels, _ = invented()
    taught = np.arange(len(labels)) % 3 > 0
    poisoned = np.where(taught, labels, (labels + 1) % K)
    two = [
        said(
            heads(EVERYTHING, study(found, t, taught, K, CONFIG)),
            study(found, t, taught, K, CONFIG),
        )
        for t in (labels, poisoned)
    ]
    assert (two[0] == two[1]).all()
    assert (two[0] == labels).mean() > 0.7


def test_heads__a_point_that_keeps_nothing_leaves_the_labels_alone() -> None:
    found, labels, _ = invented()
    made = study(found, labels, np.ones(len(labels), bool), K, CONFIG)
    none = heads(EVERYTHING.model_copy(update={"confidence": 1.5}), made)
    assert all((a == b).all() for a, b in zip(none, made.starts, strict=True))
    assert not (heads(EVERYTHING, made)[0] == made.starts[0]).all()


def test_heads__the_pool_weighs_at_most_its_share() -> None:
    found, labels, _ = invented()
    taught = np.ones(len(labels), bool)
    more = [replace(space, stands_for=space.stands_for * 1000) for space in found]
    most = [replace(space, stands_for=space.stands_for * 1e6) for space in found]
    a, b = (heads(EVERYTHING, study(s, labels, taught, K, CONFIG)) for s in (more, most))
    np.testing.assert_allclose(a, b, atol=1e-9)
