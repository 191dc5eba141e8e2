"""The page as a person meets it, in a headless Chromium; skipped where none is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.browser import Browser, chromium

from pipeline.report.page import render
from report.invented import explorer, facts

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on PATH to open the page with")

WIDTHS = (1280, 390)
SAID = "document.querySelector('output').textContent"
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
SHOWN = "getComputedStyle(document.getElementById('{}')).display"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    try:
        opened = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    except (OSError, RuntimeError) as err:  # some systems have a stub that only asks to install it
        pytest.skip(f"{PROGRAM} does not start: {err}")
    with opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("page") / "report.html"
    at.write_text(render(facts()), encoding="utf-8")
    return at


@pytest.mark.parametrize("width", WIDTHS)
def test_page__opens_without_error_and_without_sideways_scroll(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width)
    assert browser.errors == []
    assert browser.value("innerWidth") == width
    assert browser.value(FITS)
    assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_page__its_results_need_no_scroll_on_a_desk(browser: Browser, page: Path) -> None:
    browser.open(page, 1100)
    wide = (
        "[...document.querySelectorAll('#results .scroll')].map(e => e.scrollWidth > e.clientWidth)"
    )
    assert browser.value(wide) == [False]


@pytest.mark.parametrize("width", WIDTHS)
def test_explorer__keys_on_the_slider_move_numbers_and_faces(
    browser: Browser, page: Path, width: int
) -> None:
    levels = explorer(1).levels
    browser.open(page, width)
    assert browser.value(SHOWN.format("explorer")) == "block"
    assert browser.value(SHOWN.format("levels")) == "none"
    browser.value("document.getElementById('cut').focus()")
    for key, code, step in (("ArrowRight", 39, 63), ("Home", 36, 0), ("End", 35, 100)):
        browser.press(key, code)
        level = levels[step]
        said = browser.value(SAID)
        assert said.startswith(f"At {step / 100:.2f}: {level.kept:,} faces kept")
        rows = (
            "[...document.querySelectorAll('#explorer tbody tr')].map(r => r.cells[1].textContent)"
        )
        assert browser.value(rows) == [f"{n:,}" for n, _ in level.by_class]
        above = browser.value("document.getElementById('just-kept').children.length")
        below = browser.value("document.getElementById('just-not').children.length")
        assert (above, below) == {63: (8, 8), 0: (8, 0), 100: (0, 8)}[step]
        assert ("estimated purity" in said) == (level.estimated is not None)
    assert browser.errors == []


def test_policy__another_script_does_not_run_and_the_table_stands_in(
    browser: Browser, tmp_path: Path
) -> None:
    text = render(facts())
    added = tmp_path / "added.html"
    added.write_text(text.replace("</body>", "<script>window.owned = 1</script></body>"))
    browser.open(added, 1280)
    assert browser.value("window.owned") is None
    assert any("Content Security Policy" in error for error in browser.errors)
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("const shown = 8;", "const shown = 9;"))
    browser.open(changed, 1280)
    assert browser.value(SHOWN.format("explorer")) == "none"
    assert browser.value(SHOWN.format("levels")) == "block"


def test_page__hostile_names_are_read_as_text(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror='window.owned=1'><script>window.owned=1</script>"
    given = explorer(150)
    odd = tuple(replace(face, id=evil, note=evil) for face in given.faces)
    at = tmp_path / "report.html"
    hostile = facts(recipe=evil, explorer=replace(given, classes=(evil,) * 7, faces=odd))
    at.write_text(render(hostile), encoding="utf-8")
    browser.open(at, 390)
    assert browser.errors == []
    assert browser.value("window.owned") is None
    assert browser.value("document.querySelector('h1').textContent") == evil
    assert evil in browser.value("document.querySelector('#just-kept .caption').textContent")
    assert browser.value(FITS)
