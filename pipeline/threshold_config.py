"""Settings of the rules in adaptive.py, and which of them a rule reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Config, unread

READ = {
    "fixed": ("tau",),
    "ada_cm": ("beta", "floor"),
    "dtm": ("beta", "floor"),
    "flexmatch": ("tau",),
    "freematch": ("momentum",),
    "softmatch": ("momentum", "width", "align", "align_power"),
    "adamatch": ("tau", "momentum", "align", "align_power"),
    "remixmatch": ("momentum", "align", "align_power", "temperature"),
}
"""What a rule reads of its settings."""


class ThresholdConfig(Config):
    """Which unlabeled faces count in semi-supervised training, and how much."""

    rule: Literal[
        "fixed", "ada_cm", "dtm", "flexmatch", "freematch", "softmatch", "adamatch", "remixmatch"
    ] = "softmatch"
    """Class-wise lowering (flexmatch, freematch) suffers where the pool's classes are uneven."""
    tau: float = Field(default=0.95, gt=0, le=1)
    """fixed: the cut (SSFER: 0.7); flexmatch: the highest cut; adamatch: share of the confidence on
    labeled faces."""
    momentum: float = Field(default=0.999, ge=0, lt=1)
    """Of running means (freematch, softmatch, adamatch, remixmatch): they look back some
    1 / (1 - momentum) steps; take less than 0.999 for runs of few thousand."""
    beta: float = Field(default=0.97, gt=0, le=1)
    """ada_cm, dtm: largest share of the labeled faces' confidence that is asked for."""
    floor: float | None = Field(default=0.8, ge=0, le=1)
    """ada_cm, dtm: lowest cut."""
    width: float = Field(default=2.0, gt=0)
    """softmatch: the Gaussian's standard deviation is divided by it."""
    align: Literal["prior", "labeled", "uniform"] | None = "prior"
    """softmatch, adamatch, remixmatch: class shares that the pool's probabilities are brought to:
    the estimate handed over, the model's mean answer on labeled faces, or all alike."""
    align_power: float = Field(default=1.0, ge=0, le=1)
    """1 aligns fully."""
    temperature: float = Field(default=0.5, gt=0, le=1)
    """remixmatch: targets are raised to 1 / temperature; 1 leaves them as they are."""

    @property
    def stray(self) -> str | None:
        """A setting that is not its default and that the rule does not read."""
        read = ("rule", *READ[self.rule])
        return unread(self, [name for name in type(self).model_fields if name not in read])
