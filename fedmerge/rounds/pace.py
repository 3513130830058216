"""Dynamic local updates: how many training steps each node is asked for, by how fast it has been.

Where rounds wait for nobody, a node of half the speed would send deltas that are as long as the others' and twice as
stale. DyLU (arXiv 2401.09135) has it take half the steps instead: H_w = floor(H * v_w / v_max). Speeds are what the
ledger shows, in the coordinator's own time: the steps of a delta, over the seconds from when its node could begin, as
the round had opened and its delta before was in, to when it arrived. What a node says of itself has no part in it, and
the way there and back counts as well, so steps settle where deltas come equally often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from statistics import median

from fedmerge.events import DeltaAccepted, RoundOpened
from fedmerge.statements import RoundSpec
from fedmerge.store.entries import LedgerEntry

# Of so many newest deltas of a node the median speed counts: one that took long once is not slow.
NUM_MEASURED = 3


def dynamic_steps(
    entries: Iterable[LedgerEntry],
    spec_of: Callable[[RoundOpened], RoundSpec],
    node_ids: Collection[str],
    num_steps: int,
    least_share: float,
) -> dict[str, int]:
    """Return the steps of a new round for those of `node_ids` that are to take fewer than `num_steps`.

    `entries` are the ledger's, and `spec_of` opens a round's spec. Nobody is asked for less than `least_share` of the
    steps, rounded up; nodes that have not delivered yet are asked for all.
    """
    speeds = {key: speed for key, speed in _speeds(entries, spec_of).items() if key in node_ids and speed > 0}
    fastest = max(speeds.values(), default=0.0)
    least = max(1, math.ceil(round(least_share * num_steps, 9)))
    # A quarter of the speed is a quarter of the steps, although times may differ in their last bits.
    dynamic = {key: math.floor(round(num_steps * speed / fastest, 6)) for key, speed in sorted(speeds.items())}
    return {node_id: max(least, steps) for node_id, steps in dynamic.items() if max(least, steps) < num_steps}


def _speeds(entries: Iterable[LedgerEntry], spec_of: Callable[[RoundOpened], RoundSpec]) -> dict[str, float]:
    """Return steps per second by node, of those that could be measured."""
    opened: dict[int, tuple[RoundOpened, float]] = {}
    arrived_s: dict[str, float] = {}
    took: dict[str, list[tuple[RoundOpened, float]]] = {}
    for entry in entries:
        if isinstance(entry.event, RoundOpened):
            opened[entry.event.round] = entry.event, entry.at_s
        elif isinstance(entry.event, DeltaAccepted):
            node_id = entry.event.node_id
            plan, opened_s = opened[entry.event.round]
            began_s = max(opened_s, arrived_s.get(node_id, opened_s))
            arrived_s[node_id] = entry.at_s
            if entry.at_s > began_s:  # a clock may have been set back
                took[node_id] = [*took.get(node_id, ()), (plan, entry.at_s - began_s)][-NUM_MEASURED:]
    return {
        node_id: median((spec_of(plan).num_steps(node_id) or 0) / duration_s for plan, duration_s in measured)
        for node_id, measured in took.items()
    }
