"""Faces as they may stand on the page.

Unless faces are to be shown, a face is averaged down to `BLUR` x `BLUR` gray blocks *before* it is
encoded; the browser smooths them. The page then holds 64 numbers per face and no way back to it. A
CSS blur would leave the face in the file. Encoding anew also drops whatever metadata the file had.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

BLUR = 8
SIDE = 72  # longest side of a face that is shown, pixels


def face_uri(pixels: np.ndarray, show: bool) -> str:
    """`data:` URI of one face; uint8 (H, W) or (H, W, 3).

    Costs about 0.2 KB blurred and 2 KB shown.
    """
    image = Image.fromarray(pixels)
    if not show:
        return _png(image.convert("L").resize((BLUR, BLUR), Image.Resampling.BOX))
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _png(image) if max(image.size) <= 16 else _jpeg(image)


def grid_uri(pixels: np.ndarray, cell: int, show: bool) -> str:
    """`data:` URI of a grid of images with sides of `cell` pixels; blurred cell by cell.

    Distilled images are learned from faces and may resemble one, so they are treated like faces.
    """
    image = Image.fromarray(pixels)
    if show:
        return _png(image)
    blocks = [max(1, round(side * BLUR / cell)) for side in image.size]
    return _png(image.convert("L").resize((blocks[0], blocks[1]), Image.Resampling.BOX))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
