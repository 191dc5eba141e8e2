"""Proves that out of fold a face is compared with the other folds only, against a slow version."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.tiny import NAMES, faces, tiny_model

from pipeline.artifacts import Teacher
from pipeline.scoring import ScoreConfig
from pipeline.training.data import LabeledFaces
from pipeline.training.faces import ArrayFaces
from pipeline.training.references import FOLDS, build_teacher, out_of_fold_scores
from pipeline.training.teacher import TeacherFit

COUNT, FOLDED, K, TAU = 30, 3, 4, 0.07
IDS = [f"train/{i}" for i in range(COUNT)]


def cross_fitted() -> tuple[TeacherFit, LabeledFaces]:
    rng = np.random.default_rng(3)
    labels = np.arange(COUNT) % len(NAMES)
    logits = rng.normal(size=(COUNT, len(NAMES))).astype(np.float32)
    logits[np.arange(COUNT), labels] += 1.5
    fit = TeacherFit(
        members=[tiny_model(seed) for seed in range(FOLDED)],
        fold=rng.permutation(np.arange(COUNT) % FOLDED),
        logits=logits,
        temperature=1.3,
        passes=0.0,
        history=[],
        metrics={},
        seconds=0.0,
    )
    return fit, LabeledFaces(ArrayFaces(faces(COUNT).numpy()), labels)


@pytest.fixture(scope="module")
def made() -> tuple[Teacher, pa.Table, TeacherFit, LabeledFaces]:
    fit, data = cross_fitted()
    return *build_teacher(fit, data, IDS, NAMES, sub_prototypes=1, seed=0), fit, data


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def member_embedding(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Mean of the unit features of a face and its mirror image, of length one."""
    with torch.no_grad():
        x = torch.from_numpy(pixels).float() / 255
        both = [unit(model.features(view)[0].numpy()) for view in (x, x.flip(-1))]
    return unit(both[0] + both[1])


def test_build_teacher__bank_and_prototypes_by_hand(made: tuple) -> None:
    teacher, folds, fit, data = made
    parts = [member_embedding(m, data.faces.take(np.arange(COUNT))) for m in fit.members]
    bank = np.concatenate(parts, axis=1) / np.sqrt(FOLDED)
    np.testing.assert_allclose(teacher.bank.numpy(), bank, atol=1e-5)
    correct = fit.logits.argmax(1) == data.labels
    for code in range(len(NAMES)):
        mean = unit(bank[correct & (data.labels == code)].mean(0))
        np.testing.assert_allclose(teacher.prototypes[code].numpy(), mean, atol=1e-5)
    assert teacher.prototype_labels.tolist() == [0, 1, 2]
    assert folds.schema == FOLDS
    assert folds["id"].to_pylist() == IDS == list(teacher.bank_ids)
    assert folds["fold"].to_pylist() == fit.fold.tolist()
    assert folds["label"].to_pylist() == [NAMES[code] for code in data.labels]


def test_out_of_fold_scores__as_the_slow_version(made: tuple) -> None:
    teacher, folds, fit, data = made
    config = ScoreConfig(neighbors=K, neighbor_tau=TAU)
    rows = out_of_fold_scores(teacher, folds, config, sub_prototypes=1, seed=0).to_pylist()
    correct = fit.logits.argmax(1) == data.labels
    for face, row in enumerate(rows):
        member = fit.members[fit.fold[face]]
        own = member_embedding(member, data.faces.take(np.arange(COUNT)))
        others = np.flatnonzero(fit.fold != fit.fold[face])

        cosine = own[others] @ own[face]
        # Stored embeddings are halves: near ties may swap, so nearness is compared, not order.
        nearest = np.array([others.tolist().index(IDS.index(i)) for i in row["neighbor_ids"]])
        np.testing.assert_allclose(cosine[nearest], np.sort(cosine)[::-1][:K], atol=2e-3)
        weight = np.exp(cosine[nearest] / TAU)
        votes = np.bincount(data.labels[others[nearest]], weight, minlength=len(NAMES))
        assert row["neighbor_label"] == NAMES[votes.argmax()]
        assert row["neighbor_agreement"] == pytest.approx(votes.max() / votes.sum(), abs=2e-2)

        means = [
            unit(own[others][(correct & (data.labels == code))[others]].mean(0))
            for code in range(len(NAMES))
        ]
        likeness = np.stack(means) @ own[face]
        assert row["prototype_label"] == NAMES[likeness.argmax()]
        assert row["prototype_similarity"] == pytest.approx(likeness.max(), abs=2e-3)

        scaled = np.exp(fit.logits[face] / fit.temperature)
        assert row["id"] == IDS[face]
        assert row["label"] == NAMES[data.labels[face]]
        assert row["confidence"] == pytest.approx(scaled.max() / scaled.sum(), abs=2e-3)
