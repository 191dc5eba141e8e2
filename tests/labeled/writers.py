"""Small data sets of drawn faces, laid out as the real ones are distributed.

A writer gets the folder to fill and what its faces are; it returns the bytes of each picture by its
path, so that a test can say which picture it expects behind which id.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.synthetic import draw

FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF"}


def pictures(root: Path, paths: Iterable[str], size: int = 16) -> dict[str, bytes]:
    """One face per path, each another one, in the format of its suffix (JPEG by default)."""
    names = list(paths)
    written = {}
    for path, face in zip(names, draw(5, np.arange(len(names)), size), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(face).save(buffer, FORMATS.get(Path(path).suffix.lower(), "JPEG"))
        written[path] = buffer.getvalue()
        text(root / path, buffer.getvalue())
    return written


def text(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def rafdb(
    root: Path, codes: Mapping[str, int], listed: str = "list_patition_label.txt"
) -> dict[str, bytes]:
    """`codes`: original name -> 1 to 7; aligned and original pictures."""
    lines = [f"{name} {code}\n" for name, code in codes.items()]
    text(root / "EmoLabel" / listed, "".join(lines))
    stems = [name.removesuffix(".jpg") for name in codes]
    aligned = [f"Image/aligned/{stem}_aligned.jpg" for stem in stems]
    return pictures(root, [*aligned, *(f"Image/original/{stem}.jpg" for stem in stems)])


AFFECTNET_HEADER = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,"
    "expression,valence,arousal\n"
)


def rafdb_attributes(root: Path, annotated: Mapping[str, str]) -> None:
    """`annotated`: original name -> content of its file."""
    for name, content in annotated.items():
        stem = name.removesuffix(".jpg")
        text(root / "Annotation/manual" / f"{stem}_manu_attri.txt", content)


POINTS_68 = ";".join(f"{x};{100 + x}" for x in range(68))


def affectnet_2017(
    root: Path,
    split: str,
    rows: Sequence[tuple[str, tuple[int, int, int, int], int]],
    *,
    header: bool = True,
    lists: str = "Manually_Annotated_file_lists",
    images: str = "Manually_Annotated_Images",
    landmarks: str = POINTS_68,
) -> dict[str, bytes]:
    """`rows`: path of a picture, face x y width height, code; all have the same landmarks."""
    lines = [
        f"{path},{','.join(map(str, box))},{landmarks},{code},-2,0.25\n" for path, box, code in rows
    ]
    file = root / lists / f"{split}.csv"
    text(file, (AFFECTNET_HEADER if header else "") + "".join(lines))
    return pictures(root, [f"{images}/{path}" for path, _, _ in rows])


def affectnet_2021(root: Path, folder: str, codes: Mapping[str, object]) -> dict[str, bytes]:
    """`codes`: id -> what the array holds; the release holds text."""
    for face, code in codes.items():
        buffer = io.BytesIO()
        np.save(buffer, np.array(code))
        text(root / folder / "annotations" / f"{face}_exp.npy", buffer.getvalue())
    return pictures(root, [f"{folder}/images/{face}.jpg" for face in codes])


def fer2013_csv(
    file: Path, codes: Sequence[int], usage: Sequence[str] | None, header: str
) -> np.ndarray:
    """Columns in the order of `header`; the faces (N, 48, 48)."""
    faces = draw(6, np.arange(len(codes)), 48)
    lines = [header]
    for i, face in enumerate(faces):
        fields = {"emotion": str(codes[i]), "pixels": " ".join(map(str, face.ravel()))}
        fields["Usage"] = usage[i] if usage else ""
        lines.append(",".join(fields[name.strip()] for name in header.split(",")))
    text(file, "\n".join(lines) + "\n")
    return faces


def ferplus_pictures(
    root: Path, folder: str, votes: Mapping[int, Sequence[int]]
) -> dict[str, bytes]:
    """`votes`: row -> ten counts in the order of the file."""
    lines = [
        f'fer{row:07d}.png,"(0, 0, 48, 48)",{",".join(map(str, counts))}\n'
        for row, counts in votes.items()
    ]
    text(root / folder / "label.csv", "".join(lines))
    return pictures(root, [f"{folder}/fer{row:07d}.png" for row in votes], 48)


def kdef(root: Path, names: Sequence[str]) -> dict[str, bytes]:
    """`names`: AF01ANS and the like; each lies in the folder of its session and person."""
    return pictures(root, [f"{name[:4]}/{name}.JPG" for name in names])


def ckplus(root: Path, sequences: Mapping[str, tuple[int, int | None]]) -> dict[str, bytes]:
    """`sequences`: S005/001 -> number of frames, and the code or None."""
    paths = []
    for sequence, (frames, code) in sequences.items():
        stem = sequence.replace("/", "_")
        paths += [f"cohn-kanade-images/{sequence}/{stem}_{k:08d}.png" for k in range(1, frames + 1)]
        (root / "Emotion" / sequence).mkdir(parents=True)
        if code is not None:
            file = root / "Emotion" / sequence / f"{stem}_{frames:08d}_emotion.txt"
            text(file, f"   {code:.7e}\n")
    return pictures(root, paths)


def expw(root: Path, lines: Sequence[str]) -> dict[str, bytes]:
    """`lines`: as they stand in label.lst."""
    text(root / "label" / "label.lst", "\n".join(lines) + "\n")
    return pictures(root, dict.fromkeys(f"origin/{line.split()[0]}" for line in lines))


AFFWILD2_HEADER = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"


def affwild2(
    root: Path,
    folder: str,
    video: str,
    codes: Sequence[int],
    frames: Sequence[int],
    header: str = AFFWILD2_HEADER,
) -> dict[str, bytes]:
    """`codes`: of frames 1, 2, ...; `frames`: those that have a picture."""
    file = root / "EXPR_Recognition_Challenge" / folder / f"{video}.txt"
    text(file, "\n".join([header, *map(str, codes)]) + "\n")
    return pictures(root, [f"cropped_aligned/{video}/{k:05d}.jpg" for k in frames])
