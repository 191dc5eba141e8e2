"""Tables of the benches about streaming: faces in, rows out, at what speed, whoever dies."""

from __future__ import annotations

import numpy as np

from tests.bench import (
    chaos,
    formats,
    memory,
    odd_files,
    omni,
    resume,
    scoring_speed,
    selection,
)
from tests.bench.harness import Record, Records
from tests.bench.markdown import seconds, section, table


def lines() -> list[str]:
    """All of them."""
    return [
        *section(resume.BENCH, "kill -9 of the driver in the middle of scoring", _resume),
        *section(chaos.BENCH, "who dies by SIGKILL in the middle of a pass", _chaos),
        *section(odd_files.BENCH, "broken and unusual pictures, surveyed and embedded", _odd_files),
        *section(formats.BENCH, "every format, from real faces, whole and damaged", _formats),
        *section(scoring_speed.BENCH, "the pass against a bare loop", _scoring_speed),
        *section(memory.BENCH, "ten times the faces, ten times the slices", _memory),
        *section(selection.BENCH, "ten million faces, a million embeddings", _selection),
    ]


def _resume(records: Records) -> list[str]:
    lines: list[str] = []
    rows = [
        [
            name,
            str(record["metrics"]["slices"]),
            str(record["metrics"]["committed_at_kill"]),
            str(record["metrics"]["read_again"]),
            "yes" if record["metrics"]["manifest_equal"] else "NO",
        ]
        for name, record in records.items()
    ]
    if rows:
        head = ("kill", "slices", "committed at the kill", "of them read again", "manifest equal")
        lines += [*table(head, rows), ""]
    return lines


def _chaos(records: Records) -> list[str]:
    lines: list[str] = []
    groups: dict[str, list[Record]] = {}
    for record in records.values():
        groups.setdefault(record["method"], []).append(record)
    rows = [
        [
            who,
            str(len(found)),
            ", ".join(str(r["metrics"]["scored_at_death"]) for r in found),
            str(sum(r["metrics"]["runs"] - 1 for r in found)),
            f"{sum(r['metrics']['manifest_equal'] for r in found)} of {len(found)}",
        ]
        for who, found in groups.items()
    ]
    if rows:
        head = ("who", "deaths", "slices scored then (of 10)", "started again", "manifests equal")
        lines += [*table(head, rows), ""]
    return lines


def _odd_files(records: Records) -> list[str]:
    lines: list[str] = []
    for record in records.values():
        found = record["metrics"]
        lines += [
            f"{found['files']} files, {found['pictures']} of them pictures by their names; largest "
            f"process {found['largest_mb']:,} MB.",
            "",
        ]
        lines += table(("outcome", "files"), [[k, str(n)] for k, n in found["reasons"].items()])
        lines.append("")
    return lines


def _formats(records: Records) -> list[str]:
    lines: list[str] = []
    rows, runs = [], []
    for name, record in records.items():
        if "cases" not in record["metrics"]:
            runs.append((name, record["metrics"]))
            continue
        sums = formats.totals(record)
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sums["reasons"].items())
        counts = [f"{sums[key]:,}" for key in ("cases", "written", "read", "equal")]
        rows.append([name, *counts, reasons or "-", str(sums["refused"])])
    if rows:
        head = ("format", "cases", "written", "read", "as expected", "bad rows", "refused cases")
        lines += [*table(head, rows), ""]
    for name, found in runs:
        lines += [*_omni(name, found), ""]
    return lines


def _omni(name: str, found: Record) -> list[str]:
    requests = ", ".join(f"{method} {n:,}" for method, n in found["requests"].items())
    lines = [
        f"{name}: {found['faces']:,} faces ({found['pool_mb']:,} MB) on S3, "
        f"{found['selected']:,} selected and {found['rows']['mine']:,} mined, "
        f"{found['run_seconds']:,.0f} s with Ray's start; requests {requests}; planted secret in "
        f"{len(found['leaks'])} places.",
        "",
    ]
    rows = [
        [stage, f"{seconds:,.1f}", f"{found['requests_per_stage'].get(stage, 0):,}"]
        for stage, seconds in found["seconds_per_stage"].items()
    ]
    lines += table(("stage", "seconds", "requests until it was done"), rows)
    return [*lines, "", "Set: " + "; ".join(f"`{item}` ({why})" for item, why in omni.SETS.items())]


def _selection(records: Records) -> list[str]:
    lines: list[str] = []
    if "select" in records:
        lines += _selected(records["select"])
    if "near" in records:
        lines += _near(records["near"])
    return lines


def _selected(record: Record) -> list[str]:
    found = record["metrics"]
    layout, storing = found["layout"], found["storing"]
    head = ("step", "seconds", "largest process")
    rows = [
        [
            "packing scores, guard and faces with the ledger",
            f"{layout['packing_seconds']:.0f} (n=1)",
            "",
        ],
        [
            "selecting from the packs, both passes",
            seconds(found["seconds"]),
            f"{max(found['largest_mb']):,} MB",
        ],
        ["of it learning, the first pass", seconds(found["learning_seconds"]), ""],
        ["CPU of both passes, all threads", seconds(found["cpu_seconds"]), ""],
        ["CPU of other work on the machine meanwhile", seconds(found["others_cpu_seconds"]), ""],
        [
            "selecting and packing the selection",
            f"{storing['seconds']:.1f} (n=1)",
            f"{storing['megabytes']:,} MB",
        ],
    ]
    reasons = ", ".join(f"{name} {count:,}" for name, count in found["reasons"].items())
    return [
        f"{found['rows']:,} faces in {layout['slices']:,} slices and {layout['groups']} groups, "
        f"{layout['megabytes']:,} MB of packs that are not in the page cache; {record['n']} rounds "
        f"on {found['cores']} cores that other work shares ({record['host']}). One by one a "
        f"slice would take {layout['one_by_one_ms']:.0f} ms to commit, pack and sweep.",
        "",
        *table(head, rows),
        "",
        f"Reasons: {reasons}.",
        "",
    ]


def _near(record: Record) -> list[str]:
    found = record["metrics"]
    return [
        f"Near copies at a cosine of 0.95 among {found['rows']:,} float16 embeddings of 512 "
        f"numbers: {found['pairs']:,} pairs in {found['seconds']:.0f} s "
        f"({found['cpu_seconds']:.0f} CPU-seconds, n=1) with {found['probes']} probes, "
        f"read from packs in {found['reading_seconds']:.0f} s; largest process "
        f"{found['largest_mb']:,} MB, {found['before_mb']:,} of them before the search. Against "
        f"brute force for {found['queries']:,} of the rows: {100 * found['recall']:.2f} % of "
        f"{found['true_pairs']:,} pairs found, {found['wrong']} wrong ({record['host']}).",
        "",
    ]


def _scoring_speed(records: Records) -> list[str]:
    rows = []
    for name in (*scoring_speed.BARE, *scoring_speed.PASSES, *scoring_speed.PEERS):
        if own := scoring_speed.rates(records, name):
            over = scoring_speed.ratios(records, name, scoring_speed.CEILING)
            busy = [
                sum(value for who, value in row["cores_busy"].items() if who != "workers")
                for record in records.values()
                if "cores_busy" in (row := record["metrics"]["rows"].get(name, {}))
            ]
            said = [seconds(own), f"{np.median(over):.2f} ({min(over):.2f} to {max(over):.2f})"]
            rows.append([name, *said, f"{np.median(busy):.2f}" if busy else "-"])
    lines: list[str] = []
    ours, bare = scoring_speed.OURS, scoring_speed.CEILING
    if long := scoring_speed.ratios(records, ours, bare, "long"):
        lines += [
            f"{scoring_speed.LONG_FACES:,} faces, "
            f"{f'{len(long)} alternating rounds' if len(long) > 1 else 'n=1'}: {ours} runs at "
            f"{seconds(scoring_speed.rates(records, ours, 'long'))} img/s, {bare} at "
            f"{seconds(scoring_speed.rates(records, bare, 'long'))}, {np.median(long):.2f} of it "
            f"({min(long):.2f} to {max(long):.2f}).",
            "",
        ]
    if rows:
        first = next(r for r in records.values() if r["method"] == "rows")
        found = first["metrics"]
        worst = ", ".join(f"{kind} {value:.5f}" for kind, value in found["cosine"].items())
        row = found["rows"][ours]
        lines += [
            f"{found['model']}, {first['n']:,} faces of 112 px a row, {found['dtype']}, medians of "
            f"{len(scoring_speed.rates(records, scoring_speed.CEILING))} alternating rounds "
            f"(smallest to largest); {first['host']}, {found['amx']}. Smallest cosine with "
            f"float32: {worst}. Alone, scoring a slice of 128 faces takes "
            f"{row['score_per_slice']:.3f} s and both commits "
            f"{row['commit_per_slice']:.3f} s.",
            "",
            *table(
                ("row", "img/s", f"over {scoring_speed.CEILING}", "cores of driver and Ray"), rows
            ),
            "",
        ]
    return lines


def _memory(records: Records) -> list[str]:
    rows = []
    for name, record in records.items():
        found = record["metrics"]
        megabytes = ("driver_mb", "driver_late_mb", "total_mb", "total_late_mb", "largest_mb")
        rows.append(
            [
                name,
                f"{found['faces']:,}",
                f"{found['slices']:,}",
                f"{found['seconds']:,.0f}",
                f"{found['first_commit']:.1f}",
                *(f"{found[key]:,.0f}" for key in megabytes),
                f"{found['spilled_mb']:.0f}",
            ]
        )
    if not rows:
        return []
    head = (
        "pass",
        "faces",
        "slices",
        "seconds",
        "first commit, s",
        "driver MB",
        "late",
        "all MB",
        "late",
        "largest",
        "spilled",
    )
    lines = [*table(head, rows), ""]
    for kind, key in (("faces", "total"), ("slices", "driver")):
        if (more := memory.growth(records, memory.PAIRS[kind], key)) is not None:
            lines += [f"Ten times the {kind}: {key} memory {more:.3f} times as much.", ""]
    return lines
