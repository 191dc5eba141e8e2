"""Verbs about models, files and finished runs: they need no recipe. Thin, as cli.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline.progress import console


def predict(
    model: Annotated[str, typer.Argument(help="model or teacher folder; a run is its student")],
    path: Annotated[str, typer.Argument(help="image, folder, container or {000..146} pattern")],
    out: Annotated[Path, typer.Option("--out", help="preds.parquet or preds.csv")],
    abstain: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="mark faces below this confidence; none by default"),
    ] = None,
    detect: Annotated[
        str | None,
        typer.Option(metavar="YUNET.ONNX", help="find all faces of each photo first"),
    ] = None,
    align: Annotated[
        str | None, typer.Option(help="with --detect: arcface112 or centered; else the box")
    ] = None,
) -> None:
    """Write probabilities by class name for every image; bad files are rows."""
    from pipeline.config import parse
    from pipeline.detection import DetectConfig
    from pipeline.images import Crop
    from pipeline.made import named_model
    from pipeline.predicting import predict as predict_faces
    from pipeline.storage import location

    found = None if detect is None else DetectConfig(model=detect)
    crop = None if align is None else parse(Crop, {"align": {"template": align}}, "--align")
    at, pictures = named_model(location(model)), location(path)
    counts = predict_faces(at, pictures, out, abstain=abstain, detect=found, crop=crop)
    console.print(f"{out}: {counts}", markup=False)


def detect(
    path: Annotated[str, typer.Argument(help="photo, folder of photos, or Parquet")],
    model: Annotated[str, typer.Option(help="ONNX file of YuNet; nothing is downloaded")],
    out: Annotated[str, typer.Option("--out", help="folder of Parquet parts; continued")],
    score: Annotated[float, typer.Option(help="least score of a face, 0 to 1")] = 0.6,
    nms: Annotated[float, typer.Option(help="boxes that overlap more are one face")] = 0.3,
    longest: Annotated[int, typer.Option(help="longer side the detector sees, pixels")] = 1024,
) -> None:
    """Find all faces of photos, once; what is written is a pool with boxes and landmarks."""
    from pipeline.config import parse
    from pipeline.detecting import detect as find
    from pipeline.detection import DetectConfig
    from pipeline.storage import location

    values = {"model": model, "score": score, "nms": nms, "longest": longest}
    counts = find(location(path), location(out), parse(DetectConfig, values, "omnifer detect"))
    console.print(f"{out}: {counts}", markup=False)


def inspect(
    path: Annotated[str, typer.Argument(help="file or folder, local or s3://...")],
    model: Annotated[
        str | None,
        typer.Option(help="model or teacher folder that audits the label order, or a run"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG of captioned sample faces; recognizable")
    ] = None,
) -> None:
    """Say what is at a path: format, counts, bad files, label order; and draw samples."""
    import tempfile

    from pipeline import inspecting
    from pipeline.artifacts import load_any, on_node
    from pipeline.made import named_model
    from pipeline.storage import location

    judge = None if model is None else load_any(on_node(named_model(location(model))))
    with tempfile.TemporaryDirectory(prefix="omnifer-") as work:
        seen = inspecting.inspect(path, location(work), judge)
    for line in inspecting.said(seen):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None and seen.sheet is not None:
        inspecting.save_sheet(seen.sheet, out)
        console.print(f"samples: {out}", markup=False, soft_wrap=True)


def export(
    what: Annotated[
        str, typer.Argument(metavar="MODEL", help="model or teacher folder; a run is its student")
    ],
    kind: Annotated[
        str, typer.Option("--format", help="timm, onnx or hf; --mined: parquet, webdataset or hf")
    ],
    out: Annotated[str, typer.Option("--out", help="folder that is not there or empty")],
    mined: Annotated[
        bool, typer.Option("--mined", help="the mined set of a run in place of a model")
    ] = False,
) -> None:
    """Write a model, or a run's mined set, so that it opens without OmniFER."""
    from pipeline.storage import location

    if mined:
        from pipeline.mined_sets import export_mined

        said: object = export_mined(location(what), kind, location(out))
    else:
        from pipeline.exporting import export as export_model

        said = export_model(location(what), kind, location(out))
    console.print(f"{out}: {said}", markup=False, soft_wrap=True)


def lineage(
    what: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="model, distilled set, the stage of one, or a run"),
    ],
    faces: Annotated[
        str | None, typer.Option(metavar="OUT.PARQUET", help="every face that it learned from")
    ] = None,
) -> None:
    """Say what a model was made from: run, code, teacher, thresholds, faces."""
    from pipeline.lineage import lineage as trace
    from pipeline.lineage import said, write_faces
    from pipeline.storage import location

    found = trace(location(what))
    for line in said(found):
        console.print(line, markup=False, soft_wrap=True)
    if faces is not None:
        count = write_faces(found, location(faces))
        console.print(f"faces: {faces}, {count:,} rows", markup=False, soft_wrap=True)


def explain(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="run folder")],
    sample_id: Annotated[
        str, typer.Argument(help="face id, as in the mined set, or its beginning")
    ],
) -> None:
    """Say why a face was kept or rejected."""
    from pipeline import explaining

    table = Table(show_header=False, box=None)
    for key, value in explaining.explain(run_dir, sample_id).items():
        table.add_row(key, str(value))
    console.print(table, markup=False)


def forget(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="run folder")],
    ids: Annotated[
        str, typer.Option("--ids", metavar="FILE", help="ids, sha256 or groups; as `removals`")
    ],
) -> None:
    """Take faces out of all that a run has stored, and keep them out from then on."""
    from pipeline.forgetting import forget as take_out
    from pipeline.storage import location

    for line in take_out(location(run_dir), location(ids)).lines():
        console.print(line, markup=False, soft_wrap=True)


VERBS = (predict, detect, inspect, export, lineage, explain, forget)
"""In the order of the help page."""
