"""Proves what rounds ask of networks: trainings from the start, and columns of a pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import toy

from pipeline.acquisition.adversarial import boundary
from pipeline.models import FaceModel
from pipeline.storage import location
from pipeline.training.learner import LookConfig, Networks
from pipeline.training.loop import FORWARD, local
from pipeline.training.supervised import SupervisedConfig, new_model

DATA = toy.labeled(40, noise=200)
TEST = toy.labeled(20, seed=1)
CONFIG = SupervisedConfig(model=toy.RESNET, steps=4, batch=8, lr=0.01, ema=None)
LABELED = np.arange(40) < 10


def networks(config: SupervisedConfig = CONFIG, **more: object) -> Networks:
    worker = local("cpu", torch.float32)
    return Networks(config, DATA, TEST.faces, toy.NAMES, worker, seed=0, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return networks().train(np.arange(10), 0)[0]


def weights(model: FaceModel) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_train__begins_anew_in_every_round_and_sees_only_its_rows(model: FaceModel) -> None:
    again, passes = networks().train(np.arange(10), 0)
    assert torch.equal(weights(again), weights(model))
    assert passes == 4 * 8
    later, _ = networks().train(np.arange(10), 1)
    assert not torch.equal(weights(later), weights(model))
    hidden = DATA.labels.copy()
    hidden[10:] = 0
    blind = networks()
    blind._data = type(DATA)(DATA.faces, hidden)
    assert torch.equal(weights(blind.train(np.arange(10), 0)[0]), weights(model))


def test_train__starts_from_the_backbone_in_every_round(tmp_path: Path) -> None:
    from pipeline.artifacts import save_model

    backbone = new_model(toy.RESNET, toy.NAMES, 7)
    save_model(backbone, location(str(tmp_path / "backbone")), {})
    net = {"weights": str(tmp_path / "backbone"), "pretraining_data": "drawn"}
    resting = CONFIG.model_copy(
        update={"model": toy.RESNET.model_copy(update=net), "lr": 1e-12, "steps": 1}
    )
    learner = networks(resting)
    for number in (0, 1):
        stem = learner.train(np.arange(10), number)[0].net.conv_stem.weight
        assert torch.allclose(stem, backbone.net.conv_stem.weight, atol=1e-6)  # type: ignore[union-attr]


def test_train__epochs_grow_with_the_labels() -> None:
    learner = networks(epochs=2.0)
    assert [learner.train(np.arange(n), 0)[1] for n in (4, 10, 20)] == [8, 3 * 8, 5 * 8]


def test_train__first_round_is_shared(tmp_path: Path, model: FaceModel) -> None:
    first = location(str(tmp_path / "first"))
    made = networks(first=first).train(np.arange(10), 0)
    taken = networks(first=first).train(np.arange(10), 0)
    assert taken[1] == made[1] == 32
    assert torch.equal(weights(taken[0]), weights(model))
    later = networks(first=first).train(np.arange(10), 1)[0]
    assert not torch.equal(weights(later), weights(model))


def test_look__columns_are_what_the_network_says(model: FaceModel) -> None:
    learner = networks()
    columns, passes = learner.look(model, ("embeddings", "probs"), LABELED, 0)
    x = torch.from_numpy(DATA.faces.take(np.arange(40))).float() / 255
    with torch.no_grad():
        embedding, logits = model.eval().features(x)
    np.testing.assert_allclose(columns["embeddings"], embedding, atol=1e-5)
    np.testing.assert_allclose(columns["probs"], logits.softmax(1), atol=1e-5)
    assert passes == pytest.approx(40 * FORWARD)
    assert learner.look(model, (), LABELED, 0) == ({}, 0)


def test_look__passes_differ_by_dropout_alone(model: FaceModel) -> None:
    learner = networks(look=LookConfig(passes=200))
    state = torch.get_rng_state()
    seen = learner.look(model, ("passes",), LABELED, 0)[0]["passes"]
    assert torch.equal(torch.get_rng_state(), state)
    assert seen.shape == (200, 40, 4)
    assert not any(module.training for module in model.modules())
    again = learner.look(model, ("passes",), LABELED, 0)[0]["passes"]
    np.testing.assert_array_equal(seen, again)
    assert (seen != learner.look(model, ("passes",), LABELED, 1)[0]["passes"]).any()
    # What dropout leaves of a face, drawn here: logits of the embedding, a fifth of it dropped.
    embedding = torch.from_numpy(learner.look(model, ("embeddings",), LABELED, 0)[0]["embeddings"])
    kept = torch.bernoulli(torch.full((4000, *embedding.shape), 0.8)) / 0.8
    with torch.no_grad():
        wanted = model.net.get_classifier()(embedding * kept).softmax(-1)  # type: ignore[operator]
    np.testing.assert_allclose(seen.mean(0), wanted.mean(0), atol=0.05)
    np.testing.assert_allclose(seen.std(0), wanted.std(0), atol=0.05)


def test_look__boundary_of_a_sample_of_the_unlabeled(model: FaceModel) -> None:
    learner = networks(look=LookConfig(boundary_faces=6, boundary_steps=5))
    columns, _ = learner.look(model, ("boundary",), LABELED, 0)
    distance = columns["boundary"]
    looked_at = np.flatnonzero(np.isfinite(distance))
    assert len(looked_at) == 6
    assert not LABELED[looked_at].any()
    x = torch.from_numpy(DATA.faces.take(looked_at)).float() / 255
    np.testing.assert_allclose(distance[looked_at], boundary(model, x, iterations=5), rtol=1e-3)
    everyone = networks(look=LookConfig(boundary_steps=1))
    assert np.isfinite(everyone.look(model, ("boundary",), LABELED, 0)[0]["boundary"]).sum() == 30


def test_say__is_the_class_of_each_test_face(model: FaceModel) -> None:
    learned = networks(CONFIG.model_copy(update={"steps": 60})).train(np.arange(40), 0)[0]
    assert (networks().say(learned) == TEST.labels).mean() > 0.8
    assert networks().say(model).shape == (20,)
