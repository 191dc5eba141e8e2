"""All acquisition functions by name: the eight of ActiveFER, its baseline, and four for few labels.

| name | reads | for |
|---|---|---|
| random | | the baseline |
| entropy, margin, least_confidence | probs | many labels |
| bald | passes | many labels |
| deepfool | boundary | many labels |
| coreset | embeddings | many labels |
| badge | embeddings, probs | some labels |
| glister | embeddings, probs, labels | some labels |
| typiclust, max_herding | embeddings | few or none |
| probcover | embeddings, and probs for their number of classes | few or none |
| uncertainty_herding | embeddings, probs | any number |

Settings of a function (candidates, sigma, ...) are keyword arguments: functools.partial binds them.
"""

from __future__ import annotations

from pipeline.acquisition.adversarial import deepfool
from pipeline.acquisition.clusters import probcover, typiclust
from pipeline.acquisition.diversity import coreset
from pipeline.acquisition.gradient import badge, glister
from pipeline.acquisition.herding import max_herding, uncertainty_herding
from pipeline.acquisition.interface import Acquisition
from pipeline.acquisition.uncertainty import bald, entropy, least_confidence, margin, random

ACQUISITIONS: dict[str, Acquisition] = {
    "random": random,
    "entropy": entropy,
    "margin": margin,
    "least_confidence": least_confidence,
    "badge": badge,
    "glister": glister,
    "coreset": coreset,
    "bald": bald,
    "deepfool": deepfool,
    "typiclust": typiclust,
    "probcover": probcover,
    "max_herding": max_herding,
    "uncertainty_herding": uncertainty_herding,
}

READS: dict[str, tuple[str, ...]] = {
    "random": (),
    "entropy": ("probs",),
    "margin": ("probs",),
    "least_confidence": ("probs",),
    "badge": ("embeddings", "probs"),
    "glister": ("embeddings", "probs"),
    "coreset": ("embeddings",),
    "bald": ("passes",),
    "deepfool": ("boundary",),
    "typiclust": ("embeddings",),
    "probcover": ("embeddings", "probs"),
    "max_herding": ("embeddings",),
    "uncertainty_herding": ("embeddings", "probs"),
}
"""Columns of a pool that a model has to make for a function; labels are the annotator's."""
