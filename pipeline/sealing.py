"""Seal and sweep the groups of a stage: side by side on the cluster, one by one without Ray.

A group is read, checked, packed and cleared by whoever has a free CPU, for on S3 one process waits
a tenth of a second per slice: hours for a billion faces. The protocol is the ledger's, so a task
that dies or runs twice does no harm, and the packs are the same whoever writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.errors import RunError, told
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.storage import Location

Work = Callable[[Ledger, list[Slice]], None]
PATIENCE = 1800.0
"""Seconds without a group done until a pass gives up; one takes minutes on a slow store."""


def seal(ledger: Ledger, plan: Plan) -> None:
    """Pack and seal every complete group of the plan; safe to repeat and to race.

    Raises:
        LedgerError: a part differs from its commit, or another seal disagrees.
        RunError: a task died, and again after Ray's retries, or nothing was done for `PATIENCE`.
    """
    _each("seal", Ledger.close, ledger, ledger.complete(plan))


def sweep(ledger: Ledger, plan: Plan) -> None:
    """Remove parts and noted attempts of a stage all of whose groups are sealed.

    Raises:
        LedgerError: a group is not sealed; nothing was removed.
    """
    _each("sweep", Ledger.clear, ledger, ledger.closed(plan))


def _each(what: str, work: Work, ledger: Ledger, groups: Iterable[list[Slice]]) -> None:
    import ray

    rest = iter(groups)
    few = list(itertools.islice(rest, 2))
    if len(few) < 2 or not ray.is_initialized():
        for slices in itertools.chain(few, rest):
            work(ledger, slices)
        return
    task = ray.remote(_apply).options(num_cpus=1, name=what)
    most = 2 * max(2, int(ray.cluster_resources().get("CPU", 1)))
    running: list[ray.ObjectRef[None]] = []
    try:
        for slices in itertools.chain(few, rest):
            running.append(task.remote(work, ledger.at, slices))
            if len(running) >= most:
                running = _fewer(what, running)
        while running:
            running = _fewer(what, running)
    except ray.exceptions.RayError as error:  # a task's own, or a node that died time and again
        # The others end first: whoever is told of the fault finds nobody at work.
        if running:
            ray.wait(running, num_returns=len(running))
        raise told(getattr(error, "cause", error), what) from error


def _fewer(what: str, running: list[Any]) -> list[Any]:
    """Those that still run after the next one has ended."""
    import ray

    ready, rest = ray.wait(running, timeout=PATIENCE)
    if not ready:
        for task in rest:
            ray.cancel(task)
        raise RunError(f"{what}: no group was done in {PATIENCE:g} s; is a CPU free?")
    ray.get(ready)
    return rest


def _apply(work: Work, at: Location, slices: list[Slice]) -> None:
    work(Ledger(at), slices)
