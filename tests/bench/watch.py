"""Samples the resident memory of a process and of everything below it, once a second.

    python -m tests.bench.watch PID FILE

A process of its own, since a sampler inside the watched one would be part of what it measures.
Lines: seconds since the start, MB of the process, MB of all together (its own not counted).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


def children() -> dict[int, list[int]]:
    """Pids by their parent's pid."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(entry.name))
    return found


def resident(pid: int) -> float:
    """MB of a process; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0.0


def main(root: int, out: Path) -> None:
    """Sample until killed or the watched process is gone."""
    began = time.monotonic()
    with out.open("w", buffering=1) as file:
        while own := resident(root):
            known, todo, total = children(), [root], 0.0
            while todo:
                pid = todo.pop()
                if pid != os.getpid():
                    total += resident(pid)
                    todo += known.get(pid, [])
            file.write(f"{time.monotonic() - began:.1f} {own:.1f} {total:.1f}\n")
            time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
