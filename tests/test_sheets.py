"""Proves what sheets say, that every fault is named with its line, and that text stays text."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.schema import EMOTIONS
from pipeline.sheets import Filled, known_ids, page, read_sheet, write_sheet

HOSTILE = (
    'pool/"><script>alert(1)</script>.png',
    '=HYPERLINK("http://example.org";"x")',
    "pool/a,b;c\td.png",
    "pool/two\nlines.png",
    "'pool/quoted'",
    " pool/blank at both ends ",
    "pool/größe 顔.png",
    "@x",
)
ASKED = ("pool/1", "pool/2", "pool/3", "pool/4")


def read(text: str | bytes, asked: tuple[str, ...] = ASKED) -> Filled:
    data = text if isinstance(text, bytes) else text.encode()
    return read_sheet(data, asked, EMOTIONS, "own.csv")


def faults(text: str | bytes, asked: tuple[str, ...] = ASKED) -> list[str]:
    with pytest.raises(SourceError) as caught:
        read(text, asked)
    return str(caught.value).splitlines()


def test_write_sheet__hides_the_models_label_unless_asked() -> None:
    plain = write_sheet(ASKED[:2], None)
    assert plain == b"\xef\xbb\xbfrank,id,label\r\n1,pool/1,\r\n2,pool/2,\r\n"
    shown = write_sheet(ASKED[:2], ["fear", "anger"]).decode("utf-8-sig")
    assert shown.splitlines() == ["rank,id,label,suggested", "1,pool/1,,fear", "2,pool/2,,anger"]


def test_read_sheet__labels_skips_and_what_is_left() -> None:
    found = read("rank,id,label\n1,pool/1, Happy \n2,pool/2,SKIP\n3,pool/3,\n")
    assert found == Filled({"pool/1": "happiness"}, frozenset({"pool/2"}), empty=2)


@pytest.mark.parametrize("mark", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("order", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_read_sheet__as_spreadsheets_save_it(mark: str, end: str, order: bytes) -> None:
    rows = [["label", "Rank", "ID", "note"], ["fear", "2", "pool/2", "hm"], ["", "", "", ""], []]
    text = end.join(mark.join(row) for row in rows) + end
    assert read(order + text.encode()) == Filled({"pool/2": "fear"}, frozenset(), empty=3)


def test_read_sheet__hostile_ids_come_back_as_they_were() -> None:
    sheet = io.StringIO(write_sheet(HOSTILE, None).decode("utf-8-sig"), newline="")
    rows = list(csv.reader(sheet))
    assert not any(row[1].startswith(("=", "@", "+", "-")) for row in rows)
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=";")
    writer.writerows([rows[0], *([rank, face, "anger"] for rank, face, _ in rows[1:])])
    found = read_sheet(sink.getvalue().encode(), HOSTILE, EMOTIONS, "own.csv")
    assert found == Filled(dict.fromkeys(HOSTILE, "anger"), frozenset(), empty=0)


def test_read_sheet__every_fault_with_its_line() -> None:
    found = faults(
        b"rank,id,label\n"
        b"1,pool/1,happyness\n"
        b"2,pool/2,fear\n"
        b'4,"pool/3",anger\n'
        b"2,pool/2,anger\n"
        b'9,"pool/two\nlines",anger\n'
        b"4,pool/4,tr\xe4nen\n"
        b"4,,fear\n"
        b"3,pool/3,other\n"
    )
    assert found == [
        "own.csv line 2: unknown class name 'happyness'; did you mean 'happiness'?",
        "own.csv line 4: rank 4 with the face of rank 3; were cells moved?",
        "own.csv line 5: id 'pool/2' is in line 3 already",
        "own.csv line 6: no face of this round has the id 'pool/two\\nlines'",
        "own.csv line 8: not UTF-8; save the sheet as CSV UTF-8",
        "own.csv line 9: no id",
        "own.csv line 10: id 'pool/3' is in line 4 already",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank,label\n1,fear\n", "line 1: no column id; found: rank, label"),
        ("rank;id\n1;pool/1\n", "line 1: no column label; found: rank, id"),
        ("a b\n", "line 1: no column id and no column label; found: a b"),
        ("", "line 1: no column id and no column label; found: none"),
        ("id,label,label\n", "line 1: two columns are named label; found: id, label, label"),
        ("id,label\npool/1,\n", "no label in it; fill in the column label"),
        ("id,label\npool/1,other\n", "line 2: other is no class of this run"),
    ],
)
def test_read_sheet__one_fault(text: str, said: str) -> None:
    (found,) = faults(text)
    assert said in found


@pytest.mark.parametrize(
    "data",
    [
        b"id,label," + b"x" * 140_000 + b"\n",
        np.random.default_rng(0).bytes(30_000),
        b"PK\x03\x04\0",
    ],
    ids=["one long line", "random bytes", "spreadsheet"],
)
def test_read_sheet__what_is_no_sheet_is_one_line(data: bytes) -> None:
    text = "own.csv line 1: not text separated by commas; save the sheet as CSV UTF-8"
    assert faults(data) == [text]
    assert known_ids(data, "own.csv") == set()


def test_known_ids__of_any_sheet() -> None:
    assert known_ids(b"label;id\nx;pool/9\n;pool/1\n", "own.csv") == {"pool/9", "pool/1"}
    assert known_ids(b"\xff\xfe", "own.csv") == set()


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page__is_one_file_and_keeps_text_as_text() -> None:
    uris = [f"data:image/jpeg;base64,{i}" for i in range(len(HOSTILE))]
    seen = Seen(page("<b>run</b>, round-001", HOSTILE, uris, EMOTIONS, None))
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "form"}
    assert [own["src"] for tag, own in seen.tags if tag == "img"] == uris
    assert [own["alt"] for tag, own in seen.tags if tag == "img"] == [
        f"Face of rank {i + 1}" for i in range(len(HOSTILE))
    ]
    assert all(face in seen.text for face in (*HOSTILE, "<b>run</b>", "skip", *EMOTIONS))
    assert "recognizable" in seen.text
    assert "?" not in seen.text
    shown = Seen(page("x", HOSTILE[:1], uris[:1], EMOTIONS, ["fear"]))
    assert "fear?" in shown.text
