"""Sheets of a round of annotation: CSV to fill in, a page of faces to look at. Text in, text out.

What a person sends back is checked as a whole: every fault is reported, with its line. Excel saves
with a byte order mark, CRLF and, in half of Europe, semicolons: all are understood. A cell that a
spreadsheet would run as a formula is written behind an apostrophe, which is taken off again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.errors import LabelError, SourceError
from pipeline.schema import emotion

SKIP = "skip"
COLUMNS = ("rank", "id", "label")
NEEDED = ("id", "label")
SUGGESTED = "suggested"
_DELIMITERS = ",;\t"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

_PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1d1d1b; background: #fff; }}
ol {{ list-style: none; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }}
img {{ width: 8.5rem; height: 8.5rem; border-radius: 4px; display: block; }}
b {{ font-size: 1.2rem; }}
.id {{ color: #5a5a55; font-size: .75rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Write one of {names} into the column <code>label</code> of the CSV sheet, in the row of the
face: the expression that you perceive, which need not be what the person felt. Write
<code>{skip}</code> where you cannot tell; leave the cell empty to decide later.</p>
<p>The faces on this page are recognizable: keep it as you keep the images themselves.</p>
<ol>
{faces}
</ol>
</body>
</html>
""")
_FACE = Markup(
    '<li><img src="{uri}" alt="Face of rank {rank}"><b>{rank}</b>{said}'
    '<div class="id">{id}</div></li>'
)


@dataclass(frozen=True)
class Filled:
    """What a sheet says."""

    labels: Mapping[str, str]
    """Emotion by id."""
    skipped: frozenset[str]
    empty: int
    """Asked faces without an answer, those that the sheet lacks included."""


def write_sheet(ids: Sequence[str], suggested: Sequence[str] | None) -> bytes:
    """CSV with rank, id and an empty label per face, in the order of the ranks.

    Args:
        ids: of the faces, rank 1 first.
        suggested: the model's label of each; None leaves it out, so that it persuades nobody.
    """
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow([*COLUMNS, *([SUGGESTED] if suggested is not None else [])])
    for i, face in enumerate(ids):
        more = [suggested[i]] if suggested is not None else []
        writer.writerow([i + 1, _inert(face), "", *more])
    return sink.getvalue().encode("utf-8-sig")


def read_sheet(data: bytes, asked: Sequence[str], names: Sequence[str], where: str) -> Filled:
    """A filled sheet.

    Args:
        data: the file; UTF-8, separated by commas, semicolons or tabs.
        asked: ids of the round's faces, rank 1 first.
        names: classes of the run.
        where: the file's name, for messages.

    Raises:
        SourceError: not the filled sheet of this round; every fault on a line of its own, with the
            line of the file: bytes that are not UTF-8, a missing column, an unknown or repeated id,
            a rank that belongs to another face, an unknown emotion, one that is no class of the
            run; or no answer at all.
    """
    rows, faults = _rows(data, where)
    place = {face: rank for rank, face in enumerate(asked, 1)}
    seen: dict[str, int] = {}
    labels: dict[str, str] = {}
    skipped: set[str] = set()
    for line, row in rows:
        at, face = f"{where} line {line}", row["id"]
        if face not in place:
            said = f"no face of this round has the id {face!r}" if face else "no id"
            faults.append((line, f"{at}: {said}"))
            continue
        if face in seen:
            faults.append((line, f"{at}: id {face!r} is in line {seen[face]} already"))
            continue
        seen[face] = line
        if row["rank"] and row["rank"] != str(place[face]):
            said = f"rank {row['rank']} with the face of rank {place[face]}; were cells moved?"
            faults.append((line, f"{at}: {said}"))
        if row["label"].lower() == SKIP:
            skipped.add(face)
        elif row["label"]:
            try:
                labels[face] = _of_the_run(row["label"], names, at)
            except LabelError as err:
                faults.append((line, str(err)))
    if not faults and not labels and not skipped:
        faults.append((1, f"{where}: no label in it; fill in the column label"))
    if faults:
        raise SourceError("\n".join(text for _, text in sorted(faults)))
    return Filled(labels, frozenset(skipped), len(asked) - len(labels) - len(skipped))


def known_ids(data: bytes, where: str) -> set[str]:
    """Every id in a sheet, right or wrong; none where it has no such column."""
    return {row["id"] for _, row in _rows(data, where)[0]}


def page(
    title: str,
    ids: Sequence[str],
    uris: Sequence[str],
    names: Sequence[str],
    suggested: Sequence[str] | None,
) -> str:
    """A page of faces that loads nothing; every text is escaped.

    Args:
        title: of the page.
        ids: of the faces, rank 1 first.
        uris: `data:` URI of each face, recognizable.
        names: classes of the run.
        suggested: the model's label of each, or None.
    """
    faces = Markup("\n").join(
        _FACE.format(
            uri=uri,
            rank=i + 1,
            id=face,
            said="" if suggested is None else f" {suggested[i]}?",
        )
        for i, (face, uri) in enumerate(zip(ids, uris, strict=True))
    )
    return str(_PAGE.format(title=title, names=", ".join(names), skip=SKIP, faces=faces))


def _of_the_run(text: str, names: Sequence[str], at: str) -> str:
    name = emotion(text, at)
    if name not in names:
        raise LabelError(f"{at}: {name} is no class of this run; classes: {', '.join(names)}")
    return name


def _rows(
    data: bytes, where: str
) -> tuple[list[tuple[int, dict[str, str]]], list[tuple[int, str]]]:
    """Line and cells (rank, id, label) of every row that is not blank; faults by line."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    faults = [
        (line, f"{where} line {line}: not UTF-8; save the sheet as CSV UTF-8")
        for line, content in enumerate(io.StringIO(text, newline=""), 1)
        if _broken(content)
    ]
    header = next(iter(io.StringIO(text, newline="")), "")
    if "\0" in text or len(header) > csv.field_size_limit():
        said = "not text separated by commas; save the sheet as CSV UTF-8"
        return [], [(1, f"{where} line 1: {said}")]
    delimiter = max(_DELIMITERS, key=lambda mark: _fields(header, mark))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    found: list[tuple[int, dict[str, str]]] = []
    try:
        head = [name.strip().lower() for name in next(lines, [])]
        lacking = [name for name in NEEDED if name not in head]
        twice = [name for name in COLUMNS if head.count(name) > 1]
        if lacking or twice:
            said = f"no column {' and no column '.join(lacking)}" if lacking else ""
            said = said or f"two columns are named {twice[0]}"
            listed = ", ".join(name for name in head if not _broken(name)) or "none"
            return [], [*faults, (1, f"{where} line 1: {said}; found: {listed}")]
        end = lines.line_num
        for cells in lines:
            start, end = end + 1, lines.line_num
            own = dict(zip(head, cells, strict=False))
            row = {name: own.get(name, "").strip() for name in COLUMNS}
            if any(row.values()) and not any(map(_broken, row.values())):
                found.append((start, {**row, "id": _alive(own.get("id", ""))}))
    except csv.Error as err:
        faults.append((lines.line_num, f"{where} line {lines.line_num}: not CSV: {err}"))
    return found, faults


def _fields(header: str, delimiter: str) -> int:
    """How many of our columns a header line has if cells are parted so."""
    cells = next(csv.reader([header], delimiter=delimiter), [])
    return len({cell.strip().lower() for cell in cells} & set(COLUMNS))


def _broken(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)


def _inert(text: str) -> str:
    """The text as no spreadsheet runs it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _alive(text: str) -> str:
    """Inverse of :func:`_inert`."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text
