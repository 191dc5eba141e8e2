"""How well the classes of labeled faces lie together in an embedding: leave-one-out neighbors.

Cost: one forward of each face that is looked at, and a product of all pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.augment import plain
from pipeline.models import FaceModel
from pipeline.training.data import LabeledFaces
from pipeline.training.worker import Worker


@torch.no_grad()
def nearest_accuracy(
    model: FaceModel, labeled: LabeledFaces, worker: Worker, neighbors: int, most: int
) -> float:
    """Share of labeled faces whose nearest other faces, by cosine, mostly have their class.

    Leave one out; every neighbor has one vote, ties go to the lower code. Not counted as training.

    Args:
        model: on the worker's device; comes back in the mode it was in.
        labeled: the faces.
        worker: where; every worker computes all of it.
        neighbors: voters.
        most: faces that are looked at, evenly over the set.
    """
    rows = np.unique(np.linspace(0, len(labeled) - 1, min(most, len(labeled))).astype(np.int64))
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(rows), 256):
        pixels = torch.from_numpy(labeled.faces.take(rows[start : start + 256])).to(worker.device)
        x = plain(pixels, model.config.size, torch.Generator())
        with worker.autocast():
            embedding, _ = model.features(x.contiguous(memory_format=torch.channels_last))
        parts.append(F.normalize(embedding.float(), dim=1))
    model.train(was_training)
    vectors = torch.cat(parts)
    labels = torch.from_numpy(labeled.labels[rows]).to(vectors.device)
    votes = F.one_hot(labels, len(model.label_names)).float()
    right = 0
    for first in range(0, len(rows), 1024):
        cosines = vectors[first : first + 1024] @ vectors.T
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + first] = -torch.inf
        near = cosines.topk(min(neighbors, len(rows) - 1), 1).indices
        said = votes[near].sum(1).argmax(1)
        right += int((said == labels[first : first + 1024]).sum())
    return right / len(rows)
