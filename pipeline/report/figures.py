"""Figures as inline SVG: text stays text, colors follow the page, nothing is loaded or run.

Every function returns markup whose inputs are escaped. Lengths are SVG user units; the style sheet
gives the classes their colors in light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from pipeline.report.facts import Bin, Course, Level, ModelRow, Yield

WIDTH = 640.0
LABELS = 120.0  # room left of the plot for names
VALUES = 130.0  # room right of it for numbers
ROW = 30.0
MARKS = 12  # thresholds that may all have their number below the axis
TOLD = (0.5, 0.7, 0.9)  # thresholds whose share the words of a figure give


def accuracy_dots(models: Sequence[ModelRow], names: Mapping[str, str]) -> Markup:
    """Accuracy with its 95 % interval, one row per model, on a common scale."""
    ends = [end for m in models for end in (m.interval or (m.accuracy, m.accuracy))]
    low, high = _padded(min(ends), max(ends))
    left, right = LABELS + 60, WIDTH - 76
    x = _scale(low, high, left, right)
    height = ROW * len(models) + 34
    parts = [_line(x(t), 4, x(t), height - 26, "grid") for t in _ticks(low, high)]
    parts += [_text(x(t), height - 8, f"{t:.0%}", "tick", "middle") for t in _ticks(low, high)]
    for i, model in enumerate(models):
        y = ROW * i + 20
        kind = "student" if model.key == "student" else "other"
        parts.append(_text(left - 14, y + 4, names.get(model.key, model.key), "label", "end"))
        if model.interval:
            parts.append(_line(x(model.interval[0]), y, x(model.interval[1]), y, f"whisker {kind}"))
        parts.append(
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{}" r="6"/>').format(
                kind, x(model.accuracy), y
            )
        )
        parts.append(_text(WIDTH, y + 4, f"{model.accuracy:.1%}", "value", "end"))
    said = "; ".join(f"{names.get(m.key, m.key)} {m.accuracy:.1%}" for m in models)
    return _svg(height, f"Accuracy on the test faces. {said}", parts)


def class_bars(yields: Sequence[Yield]) -> Markup:
    """Pool faces per pseudo-label (outline) and how many of them were kept (solid).

    Square-root scale: classes differ by orders of magnitude, and a log scale has no zero.
    """
    most = max([max(y.pool, y.kept) for y in yields] + [1])
    x = _scale(0.0, most**0.5, LABELS, WIDTH - VALUES)
    parts: list[Markup] = []
    for i, row in enumerate(yields):
        y = ROW * i + 6
        parts.append(_text(LABELS - 12, y + 14, row.label, "label", "end"))
        parts.append(_rect(LABELS, y, x(row.pool**0.5) - LABELS, 18, "pool"))
        parts.append(_rect(LABELS, y, x(row.kept**0.5) - LABELS, 18, "kept"))
        parts.append(_text(WIDTH, y + 14, f"{row.kept:,} of {row.pool:,}", "value", "end"))
    said = "; ".join(f"{y.label} {y.kept:,} of {y.pool:,}" for y in yields)
    return _svg(ROW * len(yields) + 4, f"Faces kept per class. {said}", parts)


def recall_change(student: ModelRow, control: ModelRow, label_names: Sequence[str]) -> Markup:
    """Recall per class, student minus control, in points, around a zero line."""
    rows = [
        (name, student.recall[name] - control.recall[name])
        for name in label_names
        if name in student.recall and name in control.recall
    ]
    reach = max([abs(change) for _, change in rows] + [0.01])
    x = _scale(-reach, reach, LABELS + 40, WIDTH - 110)
    zero = x(0.0)
    height = ROW * len(rows) + 4
    parts = [_line(zero, 0, zero, height, "axis")]
    for i, (name, change) in enumerate(rows):
        y = ROW * i + 6
        kind = "gained" if change >= 0 else "lost"
        parts.append(_text(LABELS - 12, y + 14, name, "label", "end"))
        parts.append(_rect(min(zero, x(change)), y, abs(x(change) - zero), 18, kind))
        parts.append(_text(WIDTH, y + 14, f"{change * 100:+.1f} points", "value", "end"))
    said = "; ".join(f"{name} {change * 100:+.1f}" for name, change in rows)
    return _svg(height, f"Change of recall per class in points. {said}", parts)


def reliability(bins: Sequence[Bin], name: str) -> Markup:
    """Accuracy against mean confidence; dots on the diagonal are calibrated, areas show counts."""
    side, left, top = 260.0, 44.0, 8.0
    x, y = _scale(0, 1, left, left + side), _scale(0, 1, top + side, top)
    parts = [_line(x(0), y(0), x(1), y(1), "diagonal")]
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [_line(x(0), y(t), x(1), y(t), "grid"), _line(x(t), y(0), x(t), y(1), "grid")]
        parts.append(_text(x(t), y(0) + 18, f"{t:.0%}", "tick", "middle"))
        parts.append(_text(left - 8, y(t) + 4, f"{t:.0%}", "tick", "end"))
    parts.append(_text(x(0.5), y(0) + 38, "confidence", "axis-name", "middle"))
    used = [b for b in bins if b.n]
    most = max([b.n for b in used] + [1])
    for b in used:
        radius = 3.0 + 9.0 * (b.n / most) ** 0.5
        parts.append(_line(x(b.confidence), y(b.confidence), x(b.confidence), y(b.accuracy), "gap"))
        parts.append(
            Markup(
                '<circle class="dot student" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">'
                "<title>{}</title></circle>"
            ).format(
                x(b.confidence),
                y(b.accuracy),
                radius,
                f"{b.n:,} faces: confidence {b.confidence:.1%}, right {b.accuracy:.1%}",
            )
        )
    said = "; ".join(f"{b.confidence:.0%} sure, {b.accuracy:.0%} right" for b in used)
    return _svg(top + side + 46, f"Reliability of {name}. {said}", parts, left + side + 20)


def level_curves(levels: Sequence[Level], start: float | None = None) -> Markup:
    """Share kept and purity, estimated and known, against a plain confidence threshold.

    With `start` a line stands at that threshold, which the threshold explorer moves.
    """
    left, right, top, bottom = 52.0, WIDTH - 20, 10.0, 230.0
    low, high = levels[0].threshold, levels[-1].threshold
    x, y = _scale(low, high, left, right), _scale(0, 1, bottom, top)
    parts: list[Markup] = []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(left, y(t), right, y(t), "grid"))
        parts.append(_text(left - 8, y(t) + 4, f"{t:.0%}", "tick", "end"))
    marks = [v.threshold for v in levels]
    for t in marks if len(marks) <= MARKS else [m / 10 for m in range(11) if low <= m / 10 <= high]:
        parts.append(_text(x(t), bottom + 18, f"{t:g}", "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 38, "confidence", "axis-name", "middle"))
    curves: dict[str, list[tuple[float, float | None]]] = {
        "share": [(v.threshold, v.share) for v in levels],
        "estimated": [(v.threshold, v.estimated) for v in levels],
        "purity": [(v.threshold, v.purity) for v in levels],
    }
    for kind, points in curves.items():
        known = [(x(t), y(value)) for t, value in points if value is not None]
        if known:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in known)
            parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(kind, path))
    if start is not None:
        parts.append(
            Markup(
                '<line id="cut-line" class="cut" data-left="{}" data-right="{}" '
                'x1="{:.1f}" y1="{}" x2="{:.1f}" y2="{}"/>'
            ).format(left, right, x(start), top, x(start), bottom)
        )
    told = [v for v in levels if v.threshold in TOLD] or levels
    said = "; ".join(f"at {v.threshold:g} {v.share:.0%} kept" for v in told)
    return _svg(bottom + 46, f"Share kept by confidence threshold. {said}", parts)


def trial_dots(trials: Sequence[Mapping[str, Any]]) -> Markup:
    """Purity against utilization of the search's trials; those on the Pareto front stand out."""
    left, right, top, bottom = 60.0, WIDTH - 20, 26.0, 266.0
    xs = [float(trial["utilization"]) for trial in trials]
    ys = [float(trial["purity"]) for trial in trials]
    (low_x, high_x), (low_y, high_y) = _padded(min(xs), max(xs)), _padded(min(ys), max(ys))
    x, y = _scale(low_x, high_x, left, right), _scale(low_y, high_y, bottom, top)
    parts: list[Markup] = []
    for t in _ticks(low_y, high_y):
        parts.append(_line(left, y(t), right, y(t), "grid"))
        parts.append(_text(left - 8, y(t) + 4, f"{t:.0%}", "tick", "end"))
    for t in _ticks(low_x, high_x):
        parts.append(_line(x(t), top, x(t), bottom, "grid"))
        parts.append(_text(x(t), bottom + 18, f"{t:.0%}", "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 38, "utilization", "axis-name", "middle"))
    parts.append(_text(left - 8, top - 14, "purity", "axis-name", "end"))
    best = sorted(range(len(trials)), key=lambda i: bool(trials[i].get("pareto")))
    for i in best:  # the front last, on top
        kind = "student" if trials[i].get("pareto") else "other"
        parts.append(
            Markup(
                '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="6"><title>{}</title></circle>'
            ).format(
                kind,
                x(xs[i]),
                y(ys[i]),
                f"trial {trials[i].get('trial', i)}: utilization {xs[i]:.1%}, purity {ys[i]:.1%}",
            )
        )
    front = sum(bool(trial.get("pareto")) for trial in trials)
    said = f"{len(trials)} trials" + (f", {front} on the Pareto front" if front else "")
    return _svg(
        bottom + 46,
        f"Estimated purity and utilization of the search's trials. {said}: purity {min(ys):.0%} "
        f"to {max(ys):.0%}, utilization {min(xs):.0%} to {max(xs):.0%}",
        parts,
    )


def course_strips(course: Course) -> Markup:
    """A strip per class: the darker, the surer a face had to be; below, what counted, was right."""
    left, right, tall, columns = LABELS, WIDTH - VALUES / 2, 18.0, 60
    count = min(columns, len(course.steps))
    chosen = [round(i * (len(course.steps) - 1) / max(count - 1, 1)) for i in range(count)]
    wide = (right - left) / count
    parts: list[Markup] = []
    rows: dict[str, Sequence[float | None]] = {**course.cuts, "counted": course.used}
    if course.known:
        rows["right"] = course.purity
    for i, (name, values) in enumerate(rows.items()):
        kind = "kept" if name in course.cuts else "strip-used"
        y = (tall + 6) * i + (10 if name not in course.cuts else 0)
        parts.append(_text(left - 12, y + 14, name, "label", "end"))
        for at, column in enumerate(chosen):
            value = min(max(values[column] or 0.0, 0.0), 1.0)
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
                    'fill-opacity="{:.3f}" shape-rendering="crispEdges"/>'
                ).format(kind, left + at * wide, y, wide, tall, value)
            )
        last = "" if values[-1] is None else f"{values[-1]:.0%}"
        parts.append(_text(WIDTH, y + 14, last, "value", "end"))
    bottom = (tall + 6) * len(rows) + 10
    for step, place, anchor in (
        (course.steps[0], left, "start"),
        (course.steps[-1], right, "end"),
    ):
        parts.append(_text(place, bottom + 14, f"step {step:,}", "tick", anchor))
    said = "; ".join(f"{n} from {v[0]:.0%} to {v[-1]:.0%}" for n, v in course.cuts.items())
    return _svg(bottom + 20, f"Thresholds over the training. {said}", parts)


@dataclass(frozen=True)
class Curve:
    """A line of :func:`learning_curves`."""

    name: str
    points: tuple[tuple[float, float], ...]  # (labels, accuracy), ascending


def learning_curves(curves: Sequence[Curve]) -> Markup:
    """Accuracy by the number of labels, a line for each; names stand where the lines end."""
    lines = [curve for curve in curves if curve.points]
    xs = [x for curve in lines for x, _ in curve.points] or [0.0, 1.0]
    ys = [y for curve in lines for _, y in curve.points] or [0.0, 1.0]
    left, right, top, pitch = 52.0, WIDTH - 170, 10.0, 15.0
    bottom = max(300.0, top + pitch * len(lines))
    low, high = _padded(min(ys), max(ys))
    x, y = _scale(min(xs), max(xs), left, right), _scale(low, high, bottom, top)
    parts: list[Markup] = []
    for t in _ticks(low, high):
        parts.append(_line(left, y(t), right, y(t), "grid"))
        parts.append(_text(left - 8, y(t) + 4, f"{t:.0%}", "tick", "end"))
    for t in sorted(set(xs)):
        parts.append(_text(x(t), bottom + 18, f"{t:,.0f}", "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 38, "labels", "axis-name", "middle"))
    # Names from the bottom up, none nearer to the next than a line of text.
    ends = sorted(range(len(lines)), key=lambda i: lines[i].points[-1][1])
    place, below = {}, bottom + pitch
    for rank, i in enumerate(ends):
        room = top + pitch * (len(ends) - 1 - rank)
        place[i] = below = max(min(y(lines[i].points[-1][1]), below - pitch), room)
    for i, curve in enumerate(lines):
        color = f"hsl({360 * i / len(lines):.0f}, 65%, 45%)"
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve.points)
        parts.append(
            Markup('<polyline fill="none" stroke="{}" stroke-width="2" points="{}"/>').format(
                color, path
            )
        )
        dot = Markup('<circle fill="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
        parts += [dot.format(color, x(a), y(b)) for a, b in curve.points]
        parts.append(
            Markup('<text fill="{}" font-size="12" x="{:.1f}" y="{:.1f}">{}</text>').format(
                color, right + 10, place[i] + 4, curve.name
            )
        )
    said = "; ".join(f"{c.name} {c.points[-1][1]:.1%}" for c in lines)
    return _svg(bottom + 46, f"Accuracy by number of labels; at the end: {said}", parts)


def standalone(figure: Markup) -> str:
    """A figure as a file of its own, on white."""
    style = (
        "svg{background:#fff;font-family:sans-serif}"
        ".grid{stroke:#ddd}.tick,.axis-name{fill:#555;font-size:12px}"
    )
    head, _, rest = figure.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def _svg(height: float, said: str, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    return Markup(
        '<svg class="{}" role="img" viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" '
        'aria-label="{}">{}</svg>'
    ).format("wide" if width >= WIDTH else "", width, height, width, said, Markup("").join(parts))


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(text)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"/>'
    ).format(kind, x, y, width, height)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _padded(low: float, high: float) -> tuple[float, float]:
    """An axis a little wider than the data, inside [0, 1]."""
    pad = max(0.02, 0.15 * (high - low))
    return max(0.0, low - pad), min(1.0, high + pad)


def _ticks(low: float, high: float) -> list[float]:
    """Whole percents, at most six of them."""
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (high - low) * 100 / s <= 6)
    first = -(-round(low * 100) // step) * step
    return [t / 100 for t in range(first, int(high * 100) + 1, step)]
