"""A pass on many nodes, event by event: a driver that hands out slices, nodes that die, a store.

Pure: costs in, seconds out. Nodes take slices from one driver, which needs `dispatch` seconds for
each, one after the other; a node works `seconds` on it, longer by chance, and commits it, which the
store answers at a limited rate. A node that dies loses the slices it holds; they go back to the
driver, and another node comes `away` seconds later. What surrounds the stream (listing what is
there, packing and sealing at the end) is the driver's and is added.

All chance is drawn before: by slice how much longer, by node when it dies. So replays that differ
in one cost meet the same stragglers and the same deaths, and the difference is that cost's.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache


@dataclass(frozen=True)
class Costs:
    """What the ledger, the driver and the store take; 0 leaves a cost out."""

    listing: float = 0.0
    """Seconds per slice in which the driver finds out what is there, before the stream."""
    dispatch: float = 0.0
    """Seconds of the driver per slice, one after the other, while it streams."""
    commit: float = 0.0
    """Seconds of the node per slice."""
    sealing: float = 0.0
    """Seconds per slice in which the driver packs, seals and sweeps, after the stream."""
    writes: float = 0.0
    """Requests per slice that the store counts as writes."""
    write_rate: float = math.inf
    """Writes per second that the store takes."""
    reads: float = 0.0
    read_rate: float = math.inf

    @property
    def store(self) -> float:
        """Seconds of the store per slice, at its limit."""
        return max(self.writes / self.write_rate, self.reads / self.read_rate)


@dataclass(frozen=True)
class Chance:
    """What goes wrong, seeded."""

    seed: int = 0
    straggler_share: float = 0.0
    """Of the slices."""
    straggler_factor: float = 1.0
    """Times that one takes."""
    lifetime: float = math.inf
    """Mean seconds until a node is taken away, exponential."""
    away: float = 0.0
    """Seconds until another node stands in its place."""


@dataclass(frozen=True)
class Replayed:
    """How a pass went."""

    seconds: float
    """From the first listing to the last seal."""
    streamed: float
    """Of it, from the first slice handed out to the last one committed."""
    deaths: int
    lost: int
    """Slices that nodes held when they died."""


@dataclass
class _Node:
    """Where a node stands."""

    number: int
    life: int = 0
    """How many nodes stood here before."""
    dies: float = math.inf
    held: set[int] = field(default_factory=set)


def replay(
    slices: int,
    seconds: float,
    nodes: int,
    per_node: int,
    costs: Costs,
    chance: Chance,
    deaths: Sequence[float] = (),
) -> Replayed:
    """Run a pass.

    Args:
        slices: to do.
        seconds: of one slice on a node.
        nodes: at any time, but for those that are away.
        per_node: slices that a node works on at a time, each as fast as one alone.
        costs: see there.
        chance: see there.
        deaths: when the first nodes die for the first time, in seconds of the stream; others and
            later lives are drawn.
    """
    rng = random.Random(chance.seed)
    factors = [
        chance.straggler_factor if rng.random() < chance.straggler_share else 1.0
        for _ in range(slices if chance.straggler_share else 0)
    ]
    places = [_Node(number) for number in range(nodes)]
    waiting = deque(range(slices))
    events: list[tuple[float, int, int, int, int]] = []  # when, what, node, its life, slice
    for node in places:
        node.dies = (
            deaths[node.number] if node.number < len(deaths) else _lifetime(chance, node.number, 0)
        )
        if node.dies < math.inf:
            heapq.heappush(events, (node.dies, _DIES, node.number, 0, -1))
    idle = deque((node.number, 0) for _ in range(per_node) for node in places)
    now = driver = store = last = 0.0
    left, died, lost = slices, 0, 0
    while left:
        while waiting and idle:
            number, life = idle.popleft()
            node = places[number]
            if life != node.life or node.dies <= now:
                continue
            slice = waiting.popleft()
            node.held.add(slice)
            driver = max(driver, now) + costs.dispatch
            work = seconds * (factors[slice] if factors else 1.0) + costs.commit
            heapq.heappush(events, (driver + work, _WORKED, number, life, slice))
        now, what, number, life, slice = heapq.heappop(events)
        node = places[number]
        if what == _BACK:
            idle.extend((number, life) for _ in range(per_node))
        elif life != node.life:
            continue  # of a node that is no more
        elif what == _DIES:
            died, lost = died + 1, lost + len(node.held)
            waiting.extendleft(sorted(node.held, reverse=True))
            node.held.clear()
            node.life += 1
            back = now + chance.away
            if back < math.inf:
                node.dies = back + _lifetime(chance, number, node.life)
                heapq.heappush(events, (back, _BACK, number, node.life, -1))
                if node.dies < math.inf:
                    heapq.heappush(events, (node.dies, _DIES, number, node.life, -1))
        elif what == _WORKED and costs.store:
            store = max(store, now) + costs.store
            heapq.heappush(events, (store, _STORED, number, life, slice))
        else:
            node.held.discard(slice)
            left, last = left - 1, now
            idle.append((number, life))
    around = slices * (costs.listing + costs.sealing)
    return Replayed(last + around, last, died, lost)


_STORED, _WORKED, _BACK, _DIES = range(4)
"""At one time in this order: who ends a slice in the moment of its death has ended it."""


def _lifetime(chance: Chance, number: int, life: int) -> float:
    if chance.lifetime == math.inf:
        return math.inf
    return random.Random(f"{chance.seed}/{number}/{life}").expovariate(1 / chance.lifetime)


WITHOUT = {
    "listing": {"listing": 0.0},
    "dispatch": {"dispatch": 0.0},
    "commits": {"commit": 0.0},
    "sealing": {"sealing": 0.0},
    "store rates": {"writes": 0.0, "reads": 0.0},
}
"""What is left out of the costs to see what it takes."""


def shares(
    slices: int, seconds: float, nodes: int, per_node: int, costs: Costs, chance: Chance
) -> tuple[Replayed, dict[str, float]]:
    """A pass, and the share of its time that would not be there without each of the costs."""

    def run(now: Costs) -> Replayed:
        bare = replace(now, listing=0.0, sealing=0.0)
        found = _replayed(slices, seconds, nodes, per_node, bare, chance)
        return replace(found, seconds=found.streamed + slices * (now.listing + now.sealing))

    whole = run(costs)
    less = {name: run(replace(costs, **none)) for name, none in WITHOUT.items()}
    return whole, {name: 1 - found.seconds / whole.seconds for name, found in less.items()}


_replayed = cache(replay)
"""Passes that differ in what surrounds the stream are replayed once."""
