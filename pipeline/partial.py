"""Partial labels: a face has several candidate classes, and training finds out which one it is.

What for: votes that disagree and probabilities that are not sure are worth more as sets than as one
label. Targets q start at the votes, or alike within the set, and follow the network's own
probabilities (PRODEN), the nearest class prototype (PiCO), or a decoder of labels. A face with one
candidate is learned by cross entropy; where every class is a candidate and nobody voted, the first
target says nothing. Pure torch. Cost: nothing beside a forward, but for the decoder: K queries over
N tokens per layer.
Source: PRODEN: Lv et al., arXiv 2002.08053, eq. 7. PiCO: Wang et al., arXiv 2201.08984, eq. 5 to 7
(prototypes, targets) and 4 (contrast). Decoder of labels: Rethinking the Learning Paradigm for FER,
arXiv 2209.15402; its text was not at hand, so that the decoder has the form of Query2Label, arXiv
2107.10834, section 3.2, and the regularizer that of arXiv 2005.10242, eq. 5, over label embeddings.
Departs: targets move by a share, since a face with votes is not to forget them in one step; all
faces that a batch gives to a class move its prototype at once, by their mean, which any number of
workers computes alike; the contrast has no key network and no queue, its positives are the faces of
the batch with the same most probable candidate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.losses import ALONE, Gather


def within(probs: Tensor, candidates: Tensor) -> Tensor:
    """Probabilities (B, K) of the candidates alone, rows summing to 1.

    Args:
        probs: probabilities (B, K), not of unlike candidates alone: they may all be tiny.
        candidates: (B, K) bool, at least one in each row.
    """
    # In logs, since a network may give all candidates less than float32 can hold together.
    logs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    return logs.masked_fill(~candidates, -torch.inf).softmax(1)


def trusted(probs: Tensor, votes: Tensor, power: float) -> Tensor:
    """Probabilities (B, K) of the voted classes alone, p^(1 - power) * votes^power, summing to 1.

    Args:
        probs: the network's (B, K).
        votes: shares (B, K); a class without any is no candidate.
        power: [0, 1]; 0: the votes say only what the candidates are; 1: they say everything.
    """
    tiny = torch.finfo(probs.dtype).tiny
    logs = (1 - power) * probs.clamp(min=tiny).log() + power * votes.clamp(min=tiny).log()
    return logs.masked_fill(votes <= 0, -torch.inf).softmax(1)


def move_targets(
    targets: Tensor, index: Tensor, toward: Tensor, momentum: float, gather: Gather = ALONE
) -> None:
    """Targets of a batch's faces, in place: q <- m * q + (1 - m) * toward.

    A face that the batch has several times moves once, toward their mean.

    Args:
        targets: of all faces (N, K).
        index: the batch's positions among them (B,) int64.
        toward: (B, K), rows summing to 1.
        momentum: m, [0, 1]; 1 leaves them as they are.
        gather: joins what all workers have seen.
    """
    index, toward = gather(index), gather(toward)
    faces, place, times = torch.unique(index, return_inverse=True, return_counts=True)
    mean = toward.new_zeros(len(faces), toward.shape[1]).index_add_(0, place, toward)
    mean = mean / times[:, None]
    targets[faces] = momentum * targets[faces] + (1 - momentum) * mean


def move_prototypes(
    prototypes: Tensor, features: Tensor, classes: Tensor, momentum: float, gather: Gather = ALONE
) -> None:
    """Prototypes, in place: mu_c <- unit(m^n * mu_c + (1 - m^n) * mean of the n faces of c).

    Args:
        prototypes: of unit length or zero (K, D).
        features: of unit length (B, D).
        classes: the class that each face is given to (B,) int64.
        momentum: m, [0, 1).
        gather: joins what all workers have seen.
    """
    given = F.one_hot(gather(classes), len(prototypes)).to(prototypes.dtype)
    count = given.sum(0)[:, None]
    mean = given.T @ gather(features).to(prototypes.dtype) / count.clamp(min=1)
    keep = momentum**count
    prototypes.copy_(F.normalize(keep * prototypes + (1 - keep) * mean, dim=1))


def nearest_candidate(features: Tensor, prototypes: Tensor, candidates: Tensor) -> Tensor:
    """One-hot (B, K) of the candidate with the most similar prototype.

    Args:
        features: of unit length (B, D).
        prototypes: (K, D).
        candidates: (B, K) bool.
    """
    cosines = (features @ prototypes.T).masked_fill(~candidates, -torch.inf)
    return F.one_hot(cosines.argmax(1), len(prototypes)).to(features.dtype)


def class_contrast(
    features: Tensor, classes: Tensor, temperature: float = 0.07, gather: Gather = ALONE
) -> Tensor:
    """Each face tells the faces of its class from all others of the batch, nats.

    Mean over positives of minus the log softmax of their cosines (arXiv 2201.08984, eq. 4).

    Args:
        features: of unit length (B, D).
        classes: the class that each face is given to (B,) int64.
        temperature: cosines are divided by it, above 0.
        gather: looks at the faces of all workers.

    Returns:
        (B,) float32, at least 0; 0 for a face that is alone in its class.
    """
    joined, given = gather(features.float()), gather(classes)
    rows = torch.arange(len(features), device=features.device)
    itself = torch.zeros(len(rows), len(joined), dtype=torch.bool, device=features.device)
    itself[rows, rows + gather.rank * len(rows)] = True
    with torch.autocast(features.device.type, enabled=False):  # it would multiply in bfloat16
        cosines = features.float() @ joined.T / temperature
    # A finite filling: minus infinity times "no positive" would be no number.
    logs = F.log_softmax(cosines.masked_fill(itself, -1e9), 1)
    positive = (classes[:, None] == given) & ~itself
    return -(positive * logs).sum(1) / positive.sum(1).clamp(min=1)


def uniformity(embeddings: Tensor) -> Tensor:
    """Log mean over pairs of exp(-2 * squared distance) of unit embeddings (K, D).

    Scalar in [-8, 0], smallest where embeddings are as far apart as they can be: no class
    is drawn toward another because it has few faces.
    """
    # The distance of unit vectors is 2 - 2 * cosine, and pdist has no gradient at distance 0.
    unit = F.normalize(embeddings.float(), dim=1)
    pairs = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    apart = 2 - 2 * (unit[pairs[0]] * unit[pairs[1]]).sum(1)
    return (-2 * apart).logsumexp(0) - math.log(len(apart))


class LabelDecoder(nn.Module):
    """Learned label embeddings look at the tokens of a face; each becomes its class's logit."""

    def __init__(self, token_dim: int, classes: int, *, width: int, depth: int, heads: int) -> None:
        """A decoder of its own.

        Args:
            token_dim: of the network's tokens.
            classes: K.
            width: of label embeddings; a multiple of `heads`.
            depth: layers.
            heads: of each layer.

        Raises:
            ConfigError: the width cannot be divided, or there is one class only.
        """
        super().__init__()
        if width % heads:
            raise ConfigError(f"partial.decoder: width {width} is no multiple of {heads} heads")
        if classes < 2:
            raise ConfigError(f"partial.decoder: {classes} class, expected at least 2")
        self.embeddings = nn.Parameter(torch.randn(classes, width))
        self.tokens = nn.Sequential(nn.Linear(token_dim, width), nn.LayerNorm(width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, N, D)."""
        seen = self.tokens(tokens)
        queries = self.embeddings.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(queries, seen)
        return (self.norm(queries) * self.weight).sum(2) + self.bias


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        looked, _ = self.attention(self.before(queries), tokens, tokens, need_weights=False)
        queries = queries + looked
        out: Tensor = queries + self.mlp(self.between(queries))
        return out
