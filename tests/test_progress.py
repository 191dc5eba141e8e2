"""The meter counts, rates and prints plain lines where there is no terminal."""

import io

from rich.console import Console

from pipeline import progress


def test_meter__line_holds_count_unit_and_note(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.meter("score", 20, "slices") as meter:
        meter.advance(5, note="loss 0.5")
        assert "score: 5/20 slices" in meter.line()
        assert "s left" in meter.line()
        meter.advance(15)
    out = capsys.readouterr().out
    assert "20/20 slices" in out
    assert "loss 0.5" in out
    assert "\x1b" not in out


def test_meter__rate_is_units_per_second(monkeypatch):
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    meter = progress.Meter("x", 10, "faces")
    meter.done = 8
    assert meter.rate == 2.0


def test_meter__total_that_nobody_knows(capsys):
    with progress.meter("survey", None) as meter:
        meter.advance(1_500)
    assert capsys.readouterr().out.startswith("survey: 1,500 faces, ")


def test_meter__is_a_bar_with_rate_on_a_terminal_and_ends_with_a_line(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.meter("score", 20, "slices") as meter:
        meter.advance(5, note="loss [0.5]")
        assert isinstance(meter, progress._Bar)
        meter._bars.refresh()
        assert "5/20" in screen.getvalue()
        assert "slices/s  loss [0.5]" in screen.getvalue()
        meter.advance(15)
    assert "\x1b[" in screen.getvalue()
    assert "score: 20/20 slices" in screen.getvalue().splitlines()[-1]
