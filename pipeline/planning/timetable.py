"""What `omnifer plan` prints of an outlook, and plan.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pipeline.planning.forecast import GB
from pipeline.planning.foresight import Row
from pipeline.planning.outlook import Outlook
from pipeline.storage import location


def facts(outlook: Outlook) -> dict[str, object]:
    """What plan.json holds."""
    measured = asdict(outlook.measured)
    return {
        "recipe": outlook.recipe,
        "machine": outlook.machine,
        "stages": [_row(row, outlook) for row in outlook.rows],
        "stages_fewest_nodes": [_row(row, outlook) for row in outlook.fewest],
        "stages_quiet_machine": [_row(row, outlook) for row in outlook.quiet],
        "measured": measured,
        "probes": [asdict(probe) for probe in outlook.probes],
        "sources": {name: asdict(one) for name, one in outlook.pool.sampled.items()},
        "prices": outlook.prices.model_dump(mode="json"),
        "honest": list(outlook.honest),
    }


def request_dollars(row: Row, outlook: Outlook) -> float:
    """Of a stage's S3 requests."""
    return outlook.prices.s3.requests(row.requests.puts, row.requests.gets)


def _row(row: Row, outlook: Outlook) -> dict[str, object]:
    asked = request_dollars(row, outlook)
    dollars = {"request_dollars": asked, "dollars": row.compute_dollars + asked}
    return {**asdict(row), "rate": row.rate, **dollars}


def table(outlook: Outlook) -> Table:
    """Stages, and a total; columns that would be empty are left out.

    An image is a face of the pool, or an image pass where something trains.
    """
    shown = Table(
        title=f"{outlook.recipe} on {outlook.machine}: predicted, nothing was run", box=None
    )
    lines = [_cells(row, outlook) for row in outlook.rows]
    lines.append(_total(outlook))
    for name in lines[0]:
        if name in ALWAYS or any(line[name] for line in lines):
            left = name in ("stage", "waits for")
            shown.add_column(name, justify="left" if left else "right", no_wrap=name != "waits for")
    names = [str(column.header) for column in shown.columns]
    for line in lines:
        shown.add_row(*(line[name] for name in names))
    return shown


ALWAYS = ("stage", "images", "img/s", "waits for", "time")


def _cells(row: Row, outlook: Outlook) -> dict[str, str]:
    asked = row.requests.puts + row.requests.gets
    low, high = duration(row.low), duration(row.high)
    return {
        "stage": row.stage,
        "images": f"{row.amount:,.0f}",
        "img/s": f"{row.rate:,.0f}",
        "waits for": row.bottleneck,
        "time": duration(row.seconds),
        "range": f"{low} - {high}" if low != high else "",
        "GB": f"{row.stored / GB:,.2f}" if row.stored else "",
        "S3 requests": f"{asked:,.0f}" if asked else "",
        "per s": f"{asked / row.seconds:,.0f}" if asked and row.seconds else "",
        "$ S3": dollars(request_dollars(row, outlook)),
        "$": dollars(row.compute_dollars + request_dollars(row, outlook)),
    }


def _total(outlook: Outlook) -> dict[str, str]:
    rows = outlook.rows
    asked = sum(row.requests.puts + row.requests.gets for row in rows)
    low, high = (duration(sum(getattr(row, end) for row in rows)) for end in ("low", "high"))
    return {
        "stage": "total",
        "images": "",
        "img/s": "",
        "waits for": "",
        "time": duration(sum(row.seconds for row in rows)),
        "range": f"{low} - {high}" if low != high else "",
        "GB": f"{sum(row.stored for row in rows) / GB:,.2f}",
        "S3 requests": f"{asked:,.0f}" if asked else "",
        "per s": "",
        "$ S3": dollars(sum(request_dollars(row, outlook) for row in rows)),
        "$": dollars(total_dollars(rows, outlook)),
    }


def said(outlook: Outlook) -> list[str]:
    """Lines below the table."""
    lines = []
    if outlook.fewest:
        seconds = sum(row.seconds for row in outlook.fewest)
        cost = dollars(total_dollars(outlook.fewest, outlook))
        lines.append(f"With the fewest nodes: {duration(seconds)}, ${cost or 0}.")
    if outlook.quiet:
        passes = [row for row in outlook.quiet if row.stage in ("survey", "embed")]
        times = ", ".join(f"{row.stage} {duration(row.seconds)}" for row in passes)
        lines.append(f"With every core of this machine free: {times}.")
    prices = outlook.prices
    if outlook.on_s3:
        stored = sum(row.stored for row in outlook.rows) / GB
        month = stored * prices.s3.gb_month
        lines.append(
            f"Storage: {stored:,.2f} GB of results, ${month:,.2f} a month. S3 prices as of "
            f"{prices.s3.as_of}, {prices.region}: {prices.note}."
        )
    elif outlook.fewest:
        lines.append(f"Prices of {prices.region}: {prices.note}.")
    return [*lines, *outlook.honest]


def total_dollars(rows: Sequence[Row], outlook: Outlook) -> float:
    """Machines and requests."""
    return sum(row.compute_dollars + request_dollars(row, outlook) for row in rows)


def dollars(value: float) -> str:
    """Dollars; nothing where nothing is paid."""
    if not value:
        return ""
    return f"{value:,.2f}" if value >= 0.01 else "<0.01"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def write_plan(outlook: Outlook, at: Path) -> None:
    """Write plan.json."""
    location(at).write_json(facts(outlook))
