"""Tables of the benches about clusters: nodes that die, and what grows with their number."""

from __future__ import annotations

from tests.bench import cluster, scale_model
from tests.bench.harness import Record, Records
from tests.bench.markdown import section, table


def lines() -> list[str]:
    """All of them."""
    return [
        *section(cluster.BENCH, "real Ray nodes on one machine", _cluster),
        *section(scale_model.BENCH, "what a slice costs, and what a thousand nodes make", _model),
    ]


def _cluster(records: Records) -> list[str]:
    rows = [
        [name, outcome(name, record["metrics"]), f"{record['metrics']['scene_seconds']:,.0f} (n=1)"]
        for name, record in records.items()
    ]
    if not rows:
        return []
    hosts = ", ".join(sorted({record["host"] for record in records.values()}))
    head = ("scene", "outcome", f"seconds with the nodes' start ({hosts}, shared with other work)")
    return [*table(head, rows), ""]


def outcome(name: str, found: Record) -> str:
    """What came of a scene, in a few words."""
    equal = "manifest that of one node" if found.get("manifest_equal") else "manifest DIFFERS"
    if name == "submission":
        runs = ", ".join(f"{count} {status}" for status, count in found["tracked"].items())
        return (
            f"exit code {found['exit_code']}, {found['without_token']} without a token, "
            f"{len(found['stages'])} stages on S3; runs in PostgreSQL: {runs}"
        )
    if name == "train-node-loss":
        return (
            f"died after {found['steps_at_death']} of {found['steps']} steps, exit code "
            f"{found['exit_code']}, largest difference of a weight {found['largest_difference']}"
        )
    if name == "autoscaling":
        counts = " -> ".join(str(found[f"nodes_{when}"]) for when in ("before", "most", "after"))
        return f"{counts} nodes, gone {found['gone_seconds']:.0f} s after the pass; {equal}"
    deaths = found["scored_at_death"]
    when = ", ".join(map(str, deaths)) if isinstance(deaths, list) else str(deaths)
    again = "; run again" if name == "head-restart" else ""
    return f"died with {when} of {found['slices']} slices scored{again}; {equal}"


def _model(records: Records) -> list[str]:
    lines: list[str] = []
    measured = [records[name] for name in scale_model.FULL if name in records]
    if measured:
        lines += _measured(measured)
    if "dispatch" in records:
        found = records["dispatch"]["metrics"]
        lines += [
            f"The driver of a pass takes {found['driver_ms']:.1f} ms of a core per slice "
            f"({found['slices']:,} slices through one read task and one actor that do nothing).",
            "",
        ]
    if "replay" in records:
        lines += _replay(records["replay"]["metrics"])
    return lines


def _measured(records: list[Record]) -> list[str]:
    disks = [record["metrics"]["disk"] for record in records]
    asked = [record["metrics"]["s3"]["requests"] for record in records]
    head = ["per slice of 1,024 faces", *(f"{disk['slices']:,} slices" for disk in disks)]
    rows = [
        [f"{name}: core-ms (ms with the disk)"]
        + [
            f"{disk['cpu_microseconds'][name] / 1000:,.3f} "
            f"({disk['microseconds'][name] / 1000:,.3f})"
            for disk in disks
        ]
        for name in disks[0]["microseconds"]
    ]
    rows += [
        [f"{name}: S3 requests"]
        + [", ".join(f"{kind} {count:g}" for kind, count in each[name].items()) for each in asked]
        for name in asked[0]
    ]
    largest = [
        f"{name} {', '.join(format(disk['memory_mb'][name], 'g') for disk in disks)}"
        for name in disks[0]["memory_mb"]
    ]
    group = records[0]["metrics"]
    return [
        f"Commits, seals and sweeps: of one group of {group['disk']['group']:,} slices on disk, of "
        f"{group['s3']['slices']} on S3 (moto); `slice` is all that embed and score ask for.",
        "",
        *table(head, rows),
        "",
        "Largest memory beyond what was there before, MB: " + "; ".join(largest) + ".",
        "",
    ]


def _replay(found: Record) -> list[str]:
    chance = scale_model.CHANCE
    memory = found["memory_bytes_per_slice"]
    pools = sorted({row["faces"] for row in found["grid"]})
    lines = [
        f"Replayed with slices of {scale_model.SLICE_FACES:,} faces, {found['work_seconds']} s "
        f"each on a GPU node (assumed), {1000 * scale_model.LATENCY:.0f} ms until S3 answers "
        f"(assumed), "
        f"{100 * chance.straggler_share:.0f} % of the slices {chance.straggler_factor:g} times as "
        f"slow, a node taken away every {chance.lifetime / 3600:g} h and back after "
        f"{chance.away:.0f} s. A commit takes a node {found['commit_unhidden']:.2f} s, behind the "
        f"forward of its other slice.",
        "",
        "Fewest nodes at which a cost takes more than a tenth of the run time; after the slash, if "
        "the driver sealed the groups alone:",
        "",
        *table(
            ("cost", *(f"{faces:,} faces" for faces in pools)),
            [
                [
                    name,
                    *(
                        f"{at.get(str(n)) or '-'} / "
                        f"{found['first_if_the_driver_seals'][name].get(str(n)) or '-'}"
                        for n in pools
                    ),
                ]
                for name, at in found["first"].items()
            ],
        ),
        "",
        f"Between the two sizes the driver's largest memory grows by at most "
        f"{max(memory.values()):.0f} B per slice ({max(memory, key=lambda name: memory[name])}): a "
        f"tenth of the head's {scale_model.HEAD_MEMORY >> 30} GiB at "
        f"{found['faces_at_much_memory']:.2g} faces.",
        "",
        "One billion faces on 1,000 nodes:",
        "",
    ]
    head = ("", "hours", "ideal", "nodes lost", "slices lost", *found["first"], "PUTs/s")
    rows = [
        [
            name,
            f"{row['seconds'] / 3600:.2f}",
            f"{row['ideal'] / 3600:.2f}",
            str(row["deaths"]),
            str(row["lost"]),
            *(f"{100 * share:.1f} %" for share in row["shares"].values()),
            f"{row['writes_per_second']:,.0f}",
        ]
        for name, row in found["changed"].items()
    ]
    return [*lines, *table(head, rows), ""]
