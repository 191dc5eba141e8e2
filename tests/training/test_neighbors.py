"""Proves the leave-one-out vote against a loop over faces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toy import CONVNET, NAMES, labeled

from pipeline.augment import plain
from pipeline.training.loop import local
from pipeline.training.neighbors import nearest_accuracy
from pipeline.training.supervised import new_model

WORKER = local(dtype=torch.float32)


def test_nearest_accuracy__leaves_every_face_out() -> None:
    model, data = new_model(CONVNET, NAMES, 0), labeled(24)
    found = nearest_accuracy(model, data, WORKER, 3, 1000)
    pixels = torch.from_numpy(data.faces.take(np.arange(24)))
    vectors = model.eval().features(plain(pixels, 16, torch.Generator()))[0].detach()
    right = 0
    for face in range(24):
        cosines = torch.cosine_similarity(vectors[face][None], vectors)
        cosines[face] = -2
        votes = np.bincount(data.labels[cosines.topk(3).indices.numpy()], minlength=4)
        right += votes.argmax() == data.labels[face]
    assert found == pytest.approx(right / 24)
    # Labels that say nothing: a share of one in four, not one.
    wild = replace(data, labels=np.random.default_rng(0).permutation(data.labels))
    assert nearest_accuracy(model, wild, WORKER, 3, 1000) < found
