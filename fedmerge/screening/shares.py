"""Shares of a whole that nobody may exceed: weights in proportion to counts, capped per node and per organisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Caps are written by people: 1 / 3 should hold for three as .3333.
SLACK = 1e-3


def capped_shares(
    counts: Mapping[str, float], organisations: Mapping[str, str], *, max_node: float = 1.0, max_org: float = 1.0
) -> dict[str, float] | None:
    """Return shares that sum to 1, in proportion to `counts` but where a cap holds; None when the caps forbid it.

    Water-filling: shares rise together, count by count, until a node has `max_node` or the nodes of an organisation
    have `max_org` in all, and the others take what is left. Who is capped has exactly its cap. `counts` (above 0) and
    `organisations` are by node. The order of the mappings changes no bit.
    """
    members: dict[str, dict[str, float]] = {}
    for node in sorted(counts):
        members.setdefault(organisations[node], {})[node] = counts[node]
    full: set[str] = set()
    while True:
        free = {node: count for org in sorted(members.keys() - full) for node, count in members[org].items()}
        shares = _fill(free, max_node, 1.0 - max_org * len(full))
        totals = {org: math.fsum(shares[node] for node in members[org]) for org in members.keys() - full}
        over = {org for org, total in totals.items() if total > max_org}
        if not over:
            break
        full |= over  # the others rise for it, so who is over now would be so again
    for org in sorted(full):
        shares |= _fill(members[org], max_node, max_org)
    total = math.fsum(shares[node] for node in sorted(shares))
    if total < 1.0 - SLACK:
        return None
    return {node: shares[node] / total for node in sorted(shares)} if total < 1.0 - 1e-12 else shares


def _fill(counts: Mapping[str, float], cap: float, room: float) -> dict[str, float]:
    """Share `room` in proportion to `counts`, at most `cap` each; what then finds no taker is left."""
    shares: dict[str, float] = {}
    left = dict(counts)
    while left:
        rate = (room - cap * len(shares)) / math.fsum(left.values())
        over = [node for node, count in left.items() if count * rate > cap]
        if not over:
            shares |= {node: count * rate for node, count in left.items()}
            break
        for node in over:
            shares[node] = cap
            del left[node]
    return shares
