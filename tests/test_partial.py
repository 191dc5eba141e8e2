"""Proves every partial-label formula against a slow version by hand, and what its edges mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.workers import in_threads
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.losses import Gather, cross_entropy
from pipeline.partial import (
    LabelDecoder,
    class_contrast,
    move_prototypes,
    move_targets,
    nearest_candidate,
    trusted,
    uniformity,
    within,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_within__by_hand() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    inside = within(probs, torch.tensor([[True, True, False], [False, True, False]]))
    torch.testing.assert_close(inside, torch.tensor([[5 / 8, 3 / 8, 0], [0, 1, 0]]))


def test_within__candidates_that_the_network_rules_out_share_alike() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]])
    inside = within(probs, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(inside, torch.tensor([[0.0, 0.5, 0.5]]))


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_trusted__is_the_weighted_product_of_network_and_votes(power: float) -> None:
    probs = drawn(20, 5).softmax(1)
    votes = F.relu(drawn(20, 5, seed=1) + 0.5)
    votes[:, 0] += 0.1
    votes = votes / votes.sum(1, keepdim=True)
    for p, v, got in zip(probs, votes, trusted(probs, votes, power), strict=True):
        product = [
            float(a) ** (1 - power) * float(b) ** power if b > 0 else 0.0
            for a, b in zip(p, v, strict=True)
        ]
        torch.testing.assert_close(got, torch.tensor([x / sum(product) for x in product]))


def test_trusted__without_power_the_votes_only_say_which() -> None:
    probs, votes = drawn(6, 4).softmax(1), torch.tensor([[0.7, 0.3, 0, 0]]).expand(6, -1)
    torch.testing.assert_close(trusted(probs, votes, 0.0), within(probs, votes > 0))
    torch.testing.assert_close(trusted(probs, votes, 1.0), votes.contiguous())


def test_targets__one_candidate_is_cross_entropy_for_ever() -> None:
    logits, labels = drawn(8, 4), torch.arange(8) % 4
    votes = F.one_hot(labels, 4).float()
    targets = votes.clone()
    for seed in range(5):
        probs = drawn(8, 4, seed=seed).softmax(1)
        move_targets(targets, torch.arange(8), trusted(probs, votes, 0.0), 0.5)
    torch.testing.assert_close(
        cross_entropy(logits, targets), F.cross_entropy(logits, labels, reduction="none")
    )


def test_targets__all_candidates_say_nothing_at_the_start() -> None:
    uniform = torch.full((8, 4), 0.25)
    logits = torch.zeros(8, 4, requires_grad=True)
    cross_entropy(logits, uniform).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7
    # Nor later on: moved toward the network itself, they ask for what it says.
    probs = drawn(8, 4).softmax(1)
    torch.testing.assert_close(trusted(probs, uniform, 0.0), probs)


def slow_targets(targets: Tensor, index: list[int], toward: Tensor, m: float) -> Tensor:
    moved = targets.clone()
    for face in set(index):
        rows = [i for i, own in enumerate(index) if own == face]
        mean = sum(toward[i] for i in rows) / len(rows)
        moved[face] = m * targets[face] + (1 - m) * mean
    return moved


def test_move_targets__by_hand_with_a_face_twice() -> None:
    targets, toward = drawn(6, 3).softmax(1), drawn(4, 3, seed=1).softmax(1)
    index = [4, 1, 4, 0]
    want = slow_targets(targets, index, toward, 0.7)
    move_targets(targets, torch.tensor(index), toward, 0.7)
    torch.testing.assert_close(targets, want)


def slow_prototypes(prototypes: Tensor, features: Tensor, classes: list[int], m: float) -> Tensor:
    moved = prototypes.clone()
    for k in range(len(prototypes)):
        rows = [i for i, own in enumerate(classes) if own == k]
        if rows:
            keep = m ** len(rows)
            mean = sum(features[i] for i in rows) / len(rows)
            moved[k] = keep * prototypes[k] + (1 - keep) * mean
            moved[k] /= moved[k].norm()
    return moved


def test_move_prototypes__by_hand() -> None:
    prototypes = F.normalize(drawn(4, 5), dim=1)
    features = F.normalize(drawn(7, 5, seed=1), dim=1)
    classes = [0, 2, 2, 0, 2, 3, 0]
    want = slow_prototypes(prototypes, features, classes, 0.9)
    before = prototypes[1].clone()
    move_prototypes(prototypes, features, torch.tensor(classes), 0.9)
    torch.testing.assert_close(prototypes, want)
    torch.testing.assert_close(prototypes[1], before)  # nobody stood for class 1


def test_move_prototypes__one_face_moves_as_in_the_paper() -> None:
    prototypes, feature = F.normalize(drawn(3, 4), dim=1), F.normalize(drawn(1, 4, seed=1), dim=1)
    want = F.normalize(0.99 * prototypes[2] + 0.01 * feature[0], dim=0)
    move_prototypes(prototypes, feature, torch.tensor([2]), 0.99)
    torch.testing.assert_close(prototypes[2], want)


def test_nearest_candidate__looks_at_candidates_only() -> None:
    prototypes = torch.eye(3)
    features = torch.tensor([[0.9, 0.4, 0.1], [0.9, 0.4, 0.1]])
    got = nearest_candidate(features, prototypes, torch.tensor([[True] * 3, [False, True, True]]))
    assert got.tolist() == [[1, 0, 0], [0, 1, 0]]


def slow_contrast(features: Tensor, classes: list[int], temperature: float) -> list[float]:
    losses = []
    for i, x in enumerate(features):
        others = [j for j in range(len(features)) if j != i]
        total = sum(math.exp(float(x @ features[j]) / temperature) for j in others)
        positives = [j for j in others if classes[j] == classes[i]]
        terms = [math.log(total) - float(x @ features[j]) / temperature for j in positives]
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


def test_class_contrast__by_hand() -> None:
    features, classes = F.normalize(drawn(6, 4), dim=1), [0, 1, 0, 2, 0, 1]
    got = class_contrast(features, torch.tensor(classes), 0.2)
    assert got.tolist() == pytest.approx(slow_contrast(features, classes, 0.2), rel=1e-4)
    assert got[3] == 0  # alone in its class


def test_uniformity__by_hand_and_smallest_where_classes_are_apart() -> None:
    embeddings = drawn(5, 3)
    unit = F.normalize(embeddings, dim=1)
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    mean = sum(math.exp(-2 * float((unit[a] - unit[b]).square().sum())) for a, b in pairs) / 20
    assert uniformity(embeddings).item() == pytest.approx(math.log(mean), rel=1e-4)
    assert uniformity(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.tensor([[1.0], [-1.0]])).item() == pytest.approx(-8)


def test_uniformity__has_a_gradient_where_embeddings_agree() -> None:
    embeddings = torch.ones(3, 4, requires_grad=True)
    uniformity(embeddings).backward()
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()


def test_decoder__by_hand() -> None:
    torch.manual_seed(0)
    decoder = LabelDecoder(6, 3, width=8, depth=1, heads=1)
    tokens = drawn(2, 5, 6)
    layer = decoder.layers[0]
    seen = decoder.tokens[1](decoder.tokens[0](tokens))
    wq, wk, wv = layer.attention.in_proj_weight.chunk(3)
    for face in range(2):
        for k in range(3):
            query = layer.before(decoder.embeddings[k]) @ wq.T
            scores = torch.stack([query @ (token @ wk.T) / 8**0.5 for token in seen[face]])
            mixed = (scores.softmax(0)[:, None] * (seen[face] @ wv.T)).sum(0)
            x = decoder.embeddings[k] + layer.attention.out_proj(mixed)
            x = x + layer.mlp(layer.between(x))
            want = (decoder.norm(x) * decoder.weight[k]).sum() + decoder.bias[k]
            assert decoder(tokens)[face, k].item() == pytest.approx(want.item(), abs=1e-5)


def test_decoder__does_not_care_where_a_token_stands() -> None:
    decoder = LabelDecoder(6, 3, width=8, depth=2, heads=2)
    tokens = drawn(2, 5, 6)
    torch.testing.assert_close(decoder(tokens), decoder(tokens.flip(1)))


def test_decoder__learns_a_class_that_one_token_of_many_shows() -> None:
    torch.manual_seed(0)
    decoder = LabelDecoder(8, 4, width=16, depth=1, heads=2)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(64) % 4
        tokens = 0.3 * drawn(64, 6, 8, seed=seed)
        tokens[torch.arange(64), torch.arange(64) % 6, labels] += 3
        return tokens, labels

    for step in range(60):
        tokens, labels = batch(step)
        loss: Tensor = nn.functional.cross_entropy(decoder(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, labels = batch(1000)
    assert (decoder(tokens).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize(("classes", "heads"), [(3, 3), (1, 2)])
def test_decoder__refuses_what_cannot_be_divided(classes: int, heads: int) -> None:
    with pytest.raises(ConfigError, match=r"partial\.decoder"):
        LabelDecoder(6, classes, width=8, depth=1, heads=heads)


def test_gather__two_workers_move_what_one_does() -> None:
    targets, toward = drawn(6, 3).softmax(1), drawn(4, 3, seed=1).softmax(1)
    index, classes = torch.tensor([4, 1, 4, 0]), torch.tensor([0, 2, 0, 0])
    features = F.normalize(drawn(4, 5, seed=2), dim=1)
    want, prototypes = targets.clone(), F.normalize(drawn(3, 5, seed=3), dim=1)
    want_prototypes = prototypes.clone()
    move_targets(want, index, toward, 0.5)
    move_prototypes(want_prototypes, features, classes, 0.9)
    contrast = class_contrast(features, classes, 0.2)
    done: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def run(rank: int, reduce: Callable[[Tensor], Tensor]) -> None:
        here, gather = slice(2 * rank, 2 * rank + 2), Gather(reduce, rank, 2)
        own, mine = targets.clone(), prototypes.clone()
        move_targets(own, index[here], toward[here], 0.5, gather)
        move_prototypes(mine, features[here], classes[here], 0.9, gather)
        done[rank] = own, mine, class_contrast(features[here], classes[here], 0.2, gather)

    in_threads(2, run)
    for rank in range(2):
        torch.testing.assert_close(done[rank][0], want)
        torch.testing.assert_close(done[rank][1], want_prototypes)
        torch.testing.assert_close(done[rank][2], contrast[2 * rank : 2 * rank + 2])
