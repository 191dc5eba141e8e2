"""What the report page is made of: plain values, filled from a run folder or by hand in tests.

A field that is empty or None leaves its section out; nothing is guessed. Percentages are fractions
in [0, 1] here and become percent on the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.metrics import Interval


@dataclass(frozen=True)
class ModelRow:
    """One model on the test faces."""

    key: str  # teacher | control_a | control_b | student; any other name is shown as it is
    accuracy: float
    interval: tuple[float, float] | None = None  # 95 %, of the accuracy
    mean_class: float | None = None
    macro_f1: float | None = None
    ece: float | None = None
    passes: float | None = None  # image passes: forward and backward 1, forward only 1/3
    recall: dict[str, float] = field(default_factory=dict)  # by class
    seconds: float | None = None  # of its own training, what it starts from apart
    kl: float | None = None  # to the raters' votes, nats; None: nobody counted any
    brier: float | None = None  # against them, 0 to 2


@dataclass(frozen=True)
class Gain:
    """Student minus the better control, accuracy, as a fraction."""

    value: float
    low: float
    high: float
    against: str
    n: int | None = None  # test faces
    seeds: int = 1
    real: bool = False  # three seeds of one sign, a point or more, and the interval above zero


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram."""

    confidence: float  # mean confidence of its faces
    accuracy: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """How sure teachers are of labeled faces they have not seen, and how often they are right."""

    temperature: float  # what logits are divided by; one for all members
    faces: int
    before: tuple[Bin, ...]  # at temperature 1
    after: tuple[Bin, ...]
    ece_before: float
    ece_after: float


@dataclass(frozen=True)
class Yield:
    """What one class got from the pool."""

    label: str
    pool: int  # faces whose pseudo-label is this class
    kept: int
    threshold: float | None = None
    purity: float | None = None  # share of kept labels that are right, where truth is known
    known: int = 0  # kept faces whose truth is known


@dataclass(frozen=True)
class Level:
    """What a plain confidence threshold would keep."""

    threshold: float
    kept: int
    share: float
    purity: float | None = None  # right among the kept whose truth is known
    known: int = 0  # kept faces whose truth is known
    estimated: float | None = None  # purity by labeled faces out of fold, in the pool's proportions
    labeled: int = 0  # labeled faces that it was estimated on
    by_class: tuple[tuple[int, float | None], ...] = ()  # kept and estimated purity of each class


@dataclass(frozen=True)
class Explorer:
    """What any plain confidence threshold would keep, and faces around it."""

    classes: tuple[str, ...]
    levels: tuple[Level, ...]  # evenly spaced thresholds from 0 to 1, with `by_class`
    start: float  # threshold that is shown first, one of the levels'
    faces: tuple[Face, ...] = ()  # sampled evenly over the thresholds, least sure first


@dataclass(frozen=True)
class Noise:
    """Labeled faces whose out-of-fold prediction speaks against their label."""

    label_names: tuple[str, ...]
    faces: int
    agreement: float  # share of faces whose label is the predicted one
    counts: np.ndarray  # (K, K) of given label (row) and label that is confidently suggested
    suspects: tuple[Face, ...]  # least belief in the given label first; that is `confidence`


@dataclass(frozen=True)
class Subgroup:
    """Accuracy on a part of the test faces."""

    trait: str  # brightness, perceived_gender, ...
    group: str
    n: int
    control: Interval
    student: Interval
    change: Interval  # student minus control, paired
    p: float  # of the change, Holm-corrected over all subgroups


@dataclass(frozen=True)
class Course:
    """How the thresholds of an online student moved, and how much of the pool counted."""

    steps: tuple[int, ...]  # training steps, ascending
    used: tuple[float, ...]  # mean weight of the unlabeled faces since the step before
    cuts: dict[str, tuple[float, ...]]  # by class: confidence from which a face counts
    purity: tuple[float | None, ...] = ()  # right among what counts, where truth is known
    known: int = 0  # watched faces with a truth


@dataclass(frozen=True)
class Face:
    """One face of a gallery; `pixels` is uint8 (H, W) or (H, W, 3)."""

    id: str
    confidence: float | None
    pixels: np.ndarray
    note: str = ""  # what else to say of it


@dataclass(frozen=True)
class Copies:
    """Labeled faces that show the same picture."""

    faces: int  # labeled faces that were compared
    pictures: int  # that stand among them more than once
    copies: int  # faces beside the first of each picture
    conflicting: int  # pictures whose faces carry several labels
    across: int = 0  # pictures whose faces lie in several of the teachers' folds
    shown: tuple[Face, ...] = ()  # of conflicting pictures, picture by picture
    twins: dict[str, dict[str, int]] = field(default_factory=dict)
    """Labeled faces that guard took out: kind: {role: faces}."""


@dataclass(frozen=True)
class Gallery:
    """Faces of one class, kept or rejected for one reason."""

    label: str
    reason: str  # `selected`, or why not
    total: int
    faces: tuple[Face, ...]


@dataclass(frozen=True)
class ReportFacts:
    """Everything the page shows."""

    recipe: str
    command: str
    made: str  # date and time, ISO 8601
    version: str
    run: str = ""
    show_faces: bool = False
    label_names: tuple[str, ...] = ()
    models: tuple[ModelRow, ...] = ()
    gain: Gain | None = None
    purity: float | None = None
    purity_known: int = 0
    utilization: float | None = None
    pool: dict[str, int] = field(default_factory=dict)  # faces, quarantined, kept, ...
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    protocol: dict[str, Any] = field(default_factory=dict)
    yields: tuple[Yield, ...] = ()
    levels: tuple[Level, ...] = ()
    explorer: Explorer | None = None
    operating_point: dict[str, Any] = field(default_factory=dict)
    course: Course | None = None
    trials: tuple[dict[str, Any], ...] = ()
    confusion: dict[str, np.ndarray] = field(default_factory=dict)  # (K, K), rows are the truth
    reliability: dict[str, tuple[Bin, ...]] = field(default_factory=dict)
    calibration: Calibration | None = None
    galleries: tuple[Gallery, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)  # selection: faces by reason
    guard: dict[str, dict[str, int]] = field(default_factory=dict)  # kind: {role: faces}
    duplicates: int | None = None
    quarantine: dict[str, int] = field(default_factory=dict)
    noise: Noise | None = None
    copies: Copies | None = None
    subgroups: tuple[Subgroup, ...] = ()
    distilled_grid: np.ndarray | None = None  # uint8 (H, W) or (H, W, 3)
    distilled_size: int = 48  # pixels of one image's side in the grid
    distilled: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)  # stage: digest
