"""Small pools for the tests of acquisition functions."""

import numpy as np

from pipeline.acquisition.interface import Pool


def blobs(
    faces: int = 60, labeled: int = 8, *, dims: int = 8, classes: int = 4, seed: int = 0
) -> Pool:
    """Faces around `classes` centers, every column filled, `labeled` of them labeled at random."""
    rng = np.random.default_rng(seed)
    centers = 2 * rng.normal(size=(classes, dims))
    labels = rng.integers(0, classes, faces)
    embeddings = centers[labels] + rng.normal(size=(faces, dims))
    mask = np.zeros(faces, bool)
    mask[rng.choice(faces, labeled, replace=False)] = True
    logits = embeddings @ centers.T / 4
    return Pool(
        labeled=mask,
        embeddings=embeddings.astype(np.float32),
        probs=softmax(logits),
        passes=softmax(logits + rng.normal(size=(5, faces, classes))),
        labels=labels,
        boundary=rng.random(faces),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
