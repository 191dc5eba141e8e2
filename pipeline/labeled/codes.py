"""What the emotion codes of each data set mean; no two of these sets agree.

One table serves the readers, and recipes of folders or tables whose classes are numbers: a recipe
names the scheme (`names: rafdb`), nothing is guessed from the numbers that occur.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import LabelError
from pipeline.schema import EMOTIONS, OTHER

FER2013 = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
CKPLUS = ("neutral", "anger", "contempt", "disgust", "fear", "happiness", "sadness", "surprise")
AFFWILD2 = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise", OTHER)
NOT_EMOTIONS = 3  # AffectNet's 8 none, 9 uncertain, 10 no face

SCHEMES: Mapping[str, Mapping[str, str | None]] = {
    "affectnet": {
        **{str(code): name for code, name in enumerate(EMOTIONS)},
        **{str(len(EMOTIONS) + i): None for i in range(NOT_EMOTIONS)},
    },
    "affwild2": {str(code): name for code, name in enumerate(AFFWILD2)},
    "ckplus": {str(code): name for code, name in enumerate(CKPLUS)},
    "expw": {str(code): name for code, name in enumerate(FER2013)},
    "fer2013": {str(code): name for code, name in enumerate(FER2013)},
    "rafdb": {str(code): name for code, name in enumerate(RAFDB, start=1)},
}
"""Scheme -> code as written -> emotion; null: a code of faces without an emotion."""


def emotion_of(code: str, scheme: str, where: str) -> str | None:
    """Emotion of a code; None where the code says that there is none.

    Raises:
        LabelError: the scheme has no such code.
    """
    codes = SCHEMES[scheme]
    if code not in codes:
        first, *_, last = codes
        raise LabelError(f"{where}: emotion code {code}; expected {first}-{last} ({scheme})")
    return codes[code]


def label_names(scheme: str) -> tuple[str, ...]:
    """The emotions that a scheme has codes for, in canonical order; without `other`."""
    return tuple(name for name in EMOTIONS if name in SCHEMES[scheme].values())
