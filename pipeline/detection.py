"""Faces in photos: a detector behind an interface, and what is kept of a face it finds.

A detector turns a photo into boxes, five landmarks and scores. The one at hand is YuNet, run by
OpenCV from an ONNX file that the person names; nothing is downloaded. OpenCV is an extra:
`pip install omnifer[detect]`.

Of each face its surroundings are kept, as PNG: every pixel that a crop by box or landmarks looks
at, without another loss. Whole photos would be decoded once per face and pass, 0.2 s each at 12
megapixels where a cut-out of 400 x 400 takes 10 ms, and one of ten people be stored ten times.

Cost: per photo its decoding and the network; per face its PNG, 45 ms at 400 x 400 pixels.

Source: Wu, Peng, Yu, YuNet: A Tiny Millisecond-level Face Detector, Machine Intelligence Research
    2023.
Departs: photos are reduced to `longest` pixels before the detector looks, since it is trained on
    faces of 10 to 300 pixels; a face of a few pixels in a large photo is not found.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, ModelError, RecordError
from pipeline.images import decode
from pipeline.schema import BOX, LANDMARKS
from pipeline.storage import location

DETECTED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # photo#0, photo#1, ...; photo where no face
        pa.field("photo", pa.string(), nullable=False),
        pa.field(
            "group", pa.string()
        ),  # the photo's own, or the photo: no split may part its faces
        pa.field("image", pa.large_binary()),  # PNG of the face and its surroundings
        pa.field("box", BOX),  # in the cut-out
        pa.field("landmarks", LANDMARKS),  # in the cut-out
        pa.field("score", pa.float32()),  # the detector's, [0, 1]
        pa.field("photo_box", BOX),  # in the photo, after its EXIF turn
        pa.field("reason", pa.string()),  # why there is no face: no_face, or the photo's fault
    ]
)
"""Faces of photos; the faces of one photo stand together, from left to right."""

FOUND = 15
"""Numbers of a found face: box, ten of landmarks, score."""


class DetectConfig(Config):
    """Which faces are found, and how much of the photo around them is kept."""

    model: str  # ONNX file of a YuNet, local or s3://...
    score: float = Field(default=0.6, ge=0, le=1)  # least score of a face
    nms: float = Field(default=0.3, ge=0, le=1)  # two boxes that overlap more are one face
    longest: int = Field(default=1024, ge=32)  # longer side that the detector sees, pixels
    margin: float = Field(default=0.5, ge=0, le=4)  # of the box's longer side, kept on each side
    largest: int = Field(default=1024, ge=64)  # longer side of a cut-out; beyond it is reduced


class Detector(Protocol):
    """Finds the faces of a photo; may be called by several threads."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able; what decides over the faces that it finds."""
        ...

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Faces (N, 15) of a photo, uint8 (H, W) or (H, W, 3) RGB, in its pixels.

        Columns: x0 y0 x1 y1, ten numbers as schema.LANDMARKS, score in [0, 1].
        """
        ...


class YuNet:
    """OpenCV's runner of YuNet, one per thread."""

    def __init__(self, config: DetectConfig) -> None:
        """Read the model and try it on an empty picture.

        Raises:
            ConfigError: OpenCV is not installed.
            SourceError: no such file.
            ModelError: it is no YuNet.
        """
        try:
            import cv2
        except ImportError as err:
            raise ConfigError(
                f"detecting faces needs OpenCV: pip install omnifer[detect] ({err})"
            ) from err
        cv2.setNumThreads(1)  # photos are the parallel part
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self._cv2 = cv2
        self._config = config
        data = location(config.model).read_bytes()
        self._model = np.frombuffer(data, np.uint8)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._own = threading.local()
        try:
            self(np.zeros((64, 64), np.uint8))
        except (RecordError, cv2.error) as err:
            said = " ".join(str(err).split())[:200]
            raise ModelError(f"{config.model}: expected an ONNX file of YuNet: {said}") from err

    @property
    def identity(self) -> dict[str, Any]:
        """The model's sha256, OpenCV's version and the settings, less the model's path."""
        settings = self._config.model_dump(mode="json", exclude={"model"})
        return {"model": self.sha256, "opencv": self._cv2.__version__, **settings}

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Faces (N, 15) of a photo, see :class:`Detector`.

        Raises:
            RecordError: unreadable, where OpenCV does not take the picture.
        """
        height, width = pixels.shape[:2]
        share = min(1.0, self._config.longest / max(height, width))
        size = max(1, round(width * share)), max(1, round(height * share))
        picture = Image.fromarray(pixels).convert("RGB")
        seen = picture if share == 1 else picture.resize(size, Image.Resampling.BOX)
        runner = self._runner()
        runner.setInputSize(size)
        try:
            _, rows = runner.detect(np.ascontiguousarray(np.asarray(seen)[..., ::-1]))
        except self._cv2.error as err:
            raise RecordError("unreadable", f"detector: {' '.join(str(err).split())}") from err
        if rows is None:
            return np.zeros((0, FOUND), np.float32)
        # x y width height, then the person's right eye, which the picture shows on the left
        found = np.asarray(rows, np.float64)
        found[:, 2:4] += found[:, :2]
        found[:, :14] *= np.tile([width / size[0], height / size[1]], 7)
        return found[np.isfinite(found).all(1)].astype(np.float32)

    def _runner(self) -> Any:
        if not hasattr(self._own, "runner"):
            config, nothing = self._config, np.zeros(0, np.uint8)
            self._own.runner = self._cv2.FaceDetectorYN.create(
                "onnx", self._model, nothing, (64, 64), config.score, config.nms
            )
        return self._own.runner


class _Row(NamedTuple):
    """A row of DETECTED behind the photo and its group."""

    id: str
    image: bytes | None = None
    box: np.ndarray | None = None
    landmarks: np.ndarray | None = None
    score: float | None = None
    photo_box: np.ndarray | None = None
    reason: str | None = None


def find_faces(
    photos: pa.Table, detector: Detector, config: DetectConfig, *, threads: int
) -> pa.Table:
    """All faces of the photos of a READ table, as DETECTED, photos in the table's order.

    A photo that cannot be read, or shows no face, is one row with the reason.
    """
    names = photos["id"].to_pylist()
    groups = [own or name for own, name in zip(photos["group"].to_pylist(), names, strict=True)]
    reasons, encoded = photos["reason"].to_pylist(), photos["image"]

    def look(row: int) -> list[_Row]:
        data = encoded[row].as_py()
        if reasons[row] is not None or data is None:
            return [_Row(names[row], reason=reasons[row] or "unreadable")]
        try:
            pixels = decode(data)
            found = in_order(detector(pixels))
            faces = [_kept(pixels, face, config) for face in found]
        except RecordError as err:
            return [_Row(names[row], reason=err.reason)]
        if not faces:
            return [_Row(names[row], reason="no_face")]
        return [_Row(f"{names[row]}#{number}", *face) for number, face in enumerate(faces)]

    with ThreadPoolExecutor(threads, thread_name_prefix="detect") as pool:
        looked = list(pool.map(look, range(photos.num_rows)))
    return _table(names, groups, looked)


def in_order(found: np.ndarray) -> np.ndarray:
    """Faces (N, 15) from left to right by their boxes' whole pixels, then from the top.

    Not by score or size, which differ a little among machines, and the ids with them.
    """
    x, y = np.floor(found[:, 0]), np.floor(found[:, 1])
    return found[np.lexsort((-found[:, 14], y, x))]


def cut_out(
    pixels: np.ndarray, box: Sequence[float], margin: float, largest: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The surroundings of a box, as far as the picture reaches.

    Returns:
        pixels, reduced by a whole factor (area average) if they are larger than `largest`; the
        place (2,) of their upper left corner in the picture; the factor.
    """
    height, width = pixels.shape[:2]
    corners = np.asarray(box, np.float64).reshape(2, 2)
    half = (corners[1] - corners[0]).max() * (0.5 + margin)
    start = np.clip(np.floor(corners.mean(0) - half), 0, [width - 1, height - 1]).astype(int)
    stop = np.clip(np.ceil(corners.mean(0) + half), start + 1, [width, height]).astype(int)
    part = pixels[start[1] : stop[1], start[0] : stop[0]]
    factor = -(-max(part.shape[:2]) // largest)
    if factor > 1:
        part = np.asarray(Image.fromarray(np.ascontiguousarray(part)).reduce(factor))
    return part, start, factor


def _kept(pixels: np.ndarray, face: np.ndarray, config: DetectConfig) -> tuple[Any, ...]:
    """Image, box, landmarks, score and photo_box of a found face."""
    part, start, factor = cut_out(pixels, face[:4].tolist(), config.margin, config.largest)
    inside = (face[:14].reshape(7, 2) - start) / factor
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(part)).save(file, "PNG", compress_level=1)
    where = inside.astype(np.float32).ravel()
    return file.getvalue(), where[:4], where[4:], float(face[14]), face[:4]


def _table(names: Sequence[str], groups: Sequence[str], looked: Sequence[list[_Row]]) -> pa.Table:
    def lines() -> Iterator[tuple[Any, ...]]:
        for name, group, rows in zip(names, groups, looked, strict=True):
            for row in rows:
                yield row.id, name, group, *row[1:]

    columns = list(zip(*lines(), strict=True)) or [()] * len(DETECTED)
    arrays = [pa.array(c, field.type) for c, field in zip(columns, DETECTED, strict=True)]
    return pa.table(arrays, schema=DETECTED)
