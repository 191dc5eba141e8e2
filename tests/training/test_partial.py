"""Proves the partial-label losses and updates by hand, their edges, workers and resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, RESNET, labeled
from helpers.workers import in_threads
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.models import ModelConfig, create
from pipeline.partial import nearest_candidate, trusted, uniformity
from pipeline.training.data import Batches, LabeledFaces
from pipeline.training.loop import Fitted, Step, fit, local
from pipeline.training.partial import Partial, PartialConfig, train_partial, votes_of
from pipeline.training.supervised import (
    SupervisedConfig,
    new_model,
    predict_logits,
    train_supervised,
)

WORKER = local(dtype=torch.float32)
METHODS = ("proden", "pico", "decoder")
VIT = ModelConfig(
    name="vit_tiny_patch16_224",
    args={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    size=16,
    dropout=0.0,
)


def voted(count: int = 64, doubtful: float = 0.5, seed: int = 0) -> LabeledFaces:
    """Faces of which some share their votes between the right class and the next."""
    data = labeled(count, seed=seed)
    soft = np.eye(4, dtype=np.float32)[data.labels]
    rng = np.random.default_rng(seed)
    for row, label in zip(soft, data.labels, strict=True):
        if rng.random() < doubtful:
            row[label], row[(label + 1) % 4] = 0.6, 0.4
    return replace(data, soft=soft)


def config(**changes: object) -> SupervisedConfig:
    base = {
        "model": CONVNET, "steps": 10, "batch": 8, "lr": 1e-2, "augment": "plain", "smoothing": 0.1,
    }  # fmt: skip
    return SupervisedConfig.model_validate({**base, **changes})


def partial(method: str, **changes: object) -> PartialConfig:
    own = {"decoder": {"width": 8, "depth": 1, "heads": 2}} if method == "decoder" else {}
    return PartialConfig.model_validate({"method": method, **own, **changes})


@pytest.mark.parametrize(
    ("method", "other", "said"),
    [
        ("proden", {"contrastive": 0.5}, "contrastive: proden has no use for it"),
        ("pico", {"uniformity": 0.2}, "uniformity: pico has no use for it"),
        ("proden", {"decoder": {"width": 8}}, "decoder: proden has no use for it"),
        ("decoder", {"ratio": 0.9}, "ratio: of derived candidates; these are votes"),
    ],
)
def test_config__settings_of_another_method_are_refused(
    method: str, other: dict[str, object], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        partial(method, **other)
    stored = partial(method).model_dump()
    assert PartialConfig.model_validate(stored) == partial(method)
    assert partial("proden", candidates="derived", ratio=0.9).ratio == 0.9


def one_step(
    own: PartialConfig,
    data: LabeledFaces,
    settings: SupervisedConfig | None = None,
    before: Callable[[Partial], None] = lambda objective: None,
):
    settings = settings or config()
    model = new_model(settings.model, NAMES, 0)
    objective = Partial(model, settings, own, data, WORKER.device, 0)
    before(objective)
    at = Step(4, settings.steps, 0, WORKER, objective.modules())
    with Batches(0, 0, 1, WORKER.device) as batches:
        batch = batches.at(objective.streams(), 4, last=True)["labeled"]
    loss = objective.loss({"labeled": batch}, at)
    return objective, loss, batch, at


def smoothed(logits: Tensor, target: Tensor) -> Tensor:
    target = 0.9 * target + 0.1 / 4
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()


def test_proden__loss_and_update_by_hand() -> None:
    data = voted()
    own = partial("proden", momentum=0.8, momentum_end=0.4, vote_power=0.5)
    objective, loss, batch, at = one_step(own, data)
    logits = objective.modules()["model"](batch.views["x"])
    votes = torch.from_numpy(data.soft[batch.index])
    assert loss.sum.item() == pytest.approx(smoothed(logits, votes).item(), rel=1e-5)
    assert (loss.trained, loss.forward) == (8, 0)
    objective.update(loss, at)
    moved = objective.state()["targets"]
    momentum = 0.8 - 0.4 * 4 / 10
    want = momentum * votes + (1 - momentum) * trusted(logits.detach().softmax(1), votes, 0.5)
    torch.testing.assert_close(moved[batch.index], want)
    others = np.setdiff1d(np.arange(64), batch.index)
    torch.testing.assert_close(moved[others], torch.from_numpy(data.soft[others]))


def test_pico__loss_and_update_by_hand() -> None:
    data = voted()
    own = partial("pico", momentum=0.8, contrastive=0.5, prototype_momentum=0.9)
    prototypes = F.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), dim=1)

    def known(objective: Partial) -> None:
        objective.load({"targets": objective.state()["targets"], "prototypes": prototypes.clone()})

    objective, loss, batch, at = one_step(own, data, before=known)
    embedding, logits = objective.modules()["model"].features(batch.views["x"])
    features, votes = F.normalize(embedding, dim=1), torch.from_numpy(data.soft[batch.index])
    classes = trusted(logits.softmax(1), votes, 0.0).argmax(1)
    contrast = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        logs = (features[i] @ features[others].T / 0.07).log_softmax(0)
        same = [logs[n] for n, j in enumerate(others) if classes[j] == classes[i]]
        contrast.append(-sum(same) / max(1, len(same)))
    want = smoothed(logits, votes) + 0.5 * sum(contrast) / 8
    assert loss.sum.item() == pytest.approx(want.item(), rel=1e-4)
    objective.update(loss, at)
    nearest = nearest_candidate(features.detach(), prototypes, votes > 0)
    moved = objective.state()
    torch.testing.assert_close(moved["targets"][batch.index], 0.8 * votes + 0.2 * nearest)
    for k in range(4):
        there = features[classes == k].detach()
        keep = 0.9 ** len(there)
        mean = there.mean(0) if len(there) else 0
        want = F.normalize(keep * prototypes[k] + (1 - keep) * mean, dim=0)
        torch.testing.assert_close(moved["prototypes"][k], want)


def test_pico__a_face_waits_for_the_prototypes_of_all_its_candidates() -> None:
    data = voted()
    objective, loss, batch, at = one_step(partial("pico", momentum=0.0), data)
    objective.update(loss, at)
    votes = torch.from_numpy(data.soft[batch.index])
    torch.testing.assert_close(objective.state()["targets"][batch.index], votes)
    assert objective.state()["prototypes"].any()


@pytest.mark.parametrize("net", [CONVNET, RESNET.model_copy(update={"dropout": 0.0}), VIT])
def test_decoder__loss_and_update_by_hand(net: ModelConfig) -> None:
    data, own = voted(), partial("decoder", momentum=0.5, uniformity=0.3)
    objective, loss, batch, at = one_step(own, data, config(model=net))
    modules = objective.modules()
    tokens, _, logits = modules["model"].tokens(batch.views["x"])
    said = modules["decoder"](tokens)
    votes = torch.from_numpy(data.soft[batch.index])
    apart = uniformity(modules["decoder"].embeddings)
    want = smoothed(logits, votes) + smoothed(said, votes) + 0.3 * apart
    assert loss.sum.item() == pytest.approx(want.item(), rel=1e-4)
    objective.update(loss, at)
    settled = 0.5 * votes + 0.5 * trusted(said.detach().softmax(1), votes, 0.0)
    torch.testing.assert_close(objective.state()["targets"][batch.index], settled)


def test_tokens__are_what_the_embedding_is_made_of() -> None:
    x = torch.rand(2, 1, 16, 16)
    resnet = create(RESNET, NAMES).eval()
    tokens, embedding, logits = resnet.tokens(x)
    assert tokens.shape == (2, 16, 16)  # 4 x 4 places of 16 channels
    torch.testing.assert_close(tokens.mean(1), embedding)
    torch.testing.assert_close(logits, resnet(x))
    vit = create(VIT, NAMES).eval()
    tokens, embedding, _ = vit.tokens(x)
    assert tokens.shape == (2, 17, 16)  # 4 x 4 patches and the class token
    torch.testing.assert_close(tokens[:, 0], embedding)


@pytest.mark.parametrize("method", ["proden", "pico"])
def test_train_partial__one_candidate_each_is_cross_entropy(method: str) -> None:
    data = voted(doubtful=0.0)
    settings = config(steps=6)
    ours = train_partial(settings, partial(method), data, NAMES, WORKER, seed=0)
    plain = train_supervised(settings, labeled(64), NAMES, WORKER, seed=0)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_train_partial__a_momentum_of_one_is_cross_entropy_with_the_votes() -> None:
    data, settings = voted(), config(steps=6)
    ours = train_partial(settings, partial("proden", momentum=1.0), data, NAMES, WORKER, seed=0)
    plain = train_supervised(settings, data, NAMES, WORKER, seed=0)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value)


def test_start__all_candidates_alike_say_nothing() -> None:
    data = replace(voted(), soft=np.full((64, 4), 0.25, np.float32))
    settings = config(smoothing=0.0)

    def unsure(objective: Partial) -> None:
        for parameter in objective.modules()["model"].net.fc.parameters():
            torch.nn.init.zeros_(parameter)

    objective, loss, _, _ = one_step(partial("proden", start="uniform"), data, settings, unsure)
    loss.sum.backward()
    for parameter in objective.modules()["model"].parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-7


def test_start__uniform_forgets_the_shares_and_keeps_the_candidates() -> None:
    data = voted()
    objective, *_ = one_step(partial("proden", start="uniform"), data)
    there = data.soft > 0
    want = there / there.sum(1, keepdims=True)
    np.testing.assert_allclose(objective.state()["targets"].numpy(), want, rtol=1e-6)


def test_warm__targets_stay_until_then() -> None:
    data = voted()
    for warm, moves in ((0.5, False), (0.4, True)):
        objective, loss, _, at = one_step(partial("proden", warm=warm), data)  # step 4 of 10
        objective.update(loss, at)
        same = torch.equal(objective.state()["targets"], torch.from_numpy(data.soft))
        assert same is not moves


@pytest.mark.parametrize("method", METHODS)
def test_train_partial__finds_the_class_that_a_set_hides(method: str) -> None:
    data = labeled(96)
    soft = np.eye(4, dtype=np.float32)[data.labels]
    rng = np.random.default_rng(1)
    hidden = np.flatnonzero(rng.random(96) < 0.5)
    soft[hidden, (data.labels[hidden] + rng.integers(1, 4, len(hidden))) % 4] = 1
    soft /= soft.sum(1, keepdims=True)
    assert soft.max(1).mean() < 0.8
    data = replace(data, soft=soft)
    own = partial(method, momentum=0.5, warm=0.2, start="uniform")
    settings = config(steps=80, batch=24, model=RESNET, smoothing=0.0)
    trained = train_partial(settings, own, data, NAMES, WORKER, seed=0)
    unseen = labeled(64, seed=1)
    logits = predict_logits(trained.model, unseen.faces, WORKER, flip=False)
    assert (logits.argmax(1) == unseen.labels).mean() > 0.85
    row = trained.fitted.history[-1]
    assert row["certainty"] > 0.85


def test_fit__interrupted_and_continued_gives_the_same_model(tmp_path: Path) -> None:
    settings = config(steps=8, ema=0.9, imbalance="sampler")

    def stop(objective: object, at: Step) -> None:
        if at.number == 5:
            raise KeyboardInterrupt

    for method in METHODS:
        own = partial(method, momentum=0.3, **({"contrastive": 0.5} if method == "pico" else {}))
        whole = train_partial(settings, own, voted(), NAMES, WORKER, seed=0)
        worker = replace(WORKER, checkpoint=str(tmp_path / method), checkpoint_every=4)
        given = (settings, own, voted(), NAMES, worker)
        with pytest.raises(KeyboardInterrupt):
            train_partial(*given, seed=0, hooks=[stop])
        continued = train_partial(*given, seed=0)
        for name, value in whole.fitted.averaged.state_dict().items():
            assert torch.equal(value, continued.fitted.averaged.state_dict()[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_fit__two_workers_equal_one(method: str) -> None:
    settings = config(steps=6, ema=0.9, imbalance="sampler")
    own = partial(method, momentum=0.3, **({"contrastive": 0.5} if method == "pico" else {}))

    def objective() -> Partial:
        model = new_model(settings.model, NAMES, 0)
        return Partial(model, settings, own, voted(), WORKER.device, 0)

    one, objectives = objective(), [objective(), objective()]
    fit(one, settings, WORKER, seed=3)
    done: dict[int, Fitted] = {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        worker = replace(WORKER, rank=rank, world=2, sum_over_workers=reduce)
        done[rank] = fit(objectives[rank], settings, worker, seed=3)

    in_threads(2, run)
    for rank in range(2):
        for name, value in one.state().items():
            assert torch.allclose(objectives[rank].state()[name], value, atol=1e-3), name
    for name, value in objectives[0].state().items():
        assert torch.equal(value, objectives[1].state()[name]), name


def test_partial__refuses_faces_without_candidates_and_mixed_ones() -> None:
    with pytest.raises(ConfigError, match="neither votes nor derived candidates"):
        one_step(partial("proden"), labeled(16))
    soft = np.eye(4, dtype=np.float32)[labeled(16).labels]
    soft[3] = 0
    data = replace(labeled(16), soft=soft)
    with pytest.raises(ConfigError, match="1 faces have no candidate"):
        one_step(partial("proden"), data)
    assert votes_of(data, np.arange(3)).shape == (16, 4)  # face 3 does not train
    with pytest.raises(ConfigError, match="mixed by mixup"):
        one_step(partial("proden"), voted(16), config(mix="mixup"))
