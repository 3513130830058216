"""When a round opens, for whom, and when it closes: what is due, as a pure function of state, policy and time.

Times are in seconds and come from outside, as in `fedmerge.rounds.state`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import median
from typing import Literal

from fedmerge.rounds.state import FederationState, Phase
from fedmerge.seeds import derive_seed


class Action(StrEnum):
    """What a coordinator should do next."""

    OPEN = "open"
    WAIT = "wait"
    SEAL = "seal"
    FAIL = "fail"
    MERGE = "merge"
    SCORE = "score"
    PUBLISH = "publish"
    FINISH = "finish"


@dataclass(frozen=True)
class RoundPolicy:
    """When a round closes.

    Its quorum is `min_nodes`, or a `fraction` of the nodes that are expected if that is more. It seals as soon as every
    expected node has delivered; or `grace_s` after the delta that made the quorum; or `deadline_s` after opening, if
    the quorum is there, and fails then if it is not. With `grace_s` "auto" it seals once nothing has come for as long
    as `measured_grace_s` says, counted from the newest delta.

    With an `async_buffer` it does not wait for anybody in particular: it seals once it has so many deltas, late ones of
    earlier rounds included, of `min_nodes` different nodes; or at the deadline, if it has that many different nodes.

    Expected are the trusted nodes, or those of a `sample`: so many of them, or a share of them below 1. Deltas that
    come after their round was sealed count in a later one, up to `max_staleness` rounds on. There are `num_rounds`
    rounds. A model is published once as many members as `cosignatures` witnessed its merge. Where merges are searched
    for, nodes have `scoring_s` for each generation of candidates.
    """

    num_rounds: int
    min_nodes: int
    deadline_s: float
    grace_s: float | Literal["auto"]
    fraction: float = 0.0
    sample: int | float | None = None
    max_staleness: int = 0
    async_buffer: int | None = None
    scoring_s: float = 3600.0
    cosignatures: int = 0

    def quorum(self, num_expected: int) -> int:
        """Return how many deltas a round needs, of so many expected nodes."""
        # A share of .3 of 10 nodes is 3 of them, although .3 * 10 is a little more than 3.
        return max(self.min_nodes, math.ceil(round(self.fraction * num_expected, 9)))

    def sampled(self, trusted: Collection[str], seed: int) -> list[str]:
        """Return the nodes that a round asks, sorted: all, or as many as `sample` says, but `min_nodes` at least.

        Who is asked depends on the seed and the set of trusted nodes; one node more or less changes one place at most.
        """
        if self.sample is None:
            return sorted(trusted)
        num_asked = self.sample if isinstance(self.sample, int) else math.ceil(round(self.sample * len(trusted), 9))
        drawn = sorted(trusted, key=lambda node_id: (derive_seed("sample", seed, node_id), node_id))
        return sorted(drawn[: max(num_asked, self.min_nodes)])


@dataclass(frozen=True)
class Standing:
    """Where an open round stands: its quorum, how many nodes count towards it, and why it is closed, if it is.

    The grace is 0 before the quorum is there. If nothing happens until then, it closes at `closes_s`.
    """

    quorum: int
    num_nodes: int
    grace_s: float
    closes_s: float
    closed_by: Literal["everyone", "grace", "deadline", "buffer", "operator"] | None

    @property
    def action(self) -> Action:
        """What is due of the round."""
        if self.closed_by is None:
            return Action.WAIT
        return Action.SEAL if self.num_nodes >= self.quorum else Action.FAIL


def next_action(state: FederationState, policy: RoundPolicy, trusted: Collection[str], now_s: float) -> Action:
    """Return what is due at `now_s`, given the key ids of the nodes that are trusted at present."""
    due = _due(state, policy, trusted, now_s)
    is_paused = state.paused_at_s is not None
    return Action.WAIT if is_paused and due in {Action.OPEN, Action.SEAL, Action.FAIL} else due


def _due(state: FederationState, policy: RoundPolicy, trusted: Collection[str], now_s: float) -> Action:
    match state.phase:
        case Phase.PLANNED:
            return Action.OPEN
        case Phase.PUBLISHED:
            return Action.OPEN if state.round < policy.num_rounds else Action.FINISH
        case Phase.SEALED | Phase.MERGING:
            return Action.MERGE
        case Phase.SEARCHING:
            return _while_searching(state, policy, now_s)
        case Phase.PUBLISHING:
            return Action.PUBLISH if state.num_witnesses() >= policy.cosignatures else Action.WAIT
        case Phase.FAILED:
            return Action.OPEN if state.is_retried else Action.FINISH
        case Phase.OPEN:
            return standing(state, policy, trusted, now_s).action


def standing(state: FederationState, policy: RoundPolicy, trusted: Collection[str], now_s: float) -> Standing:
    """Return where the open round stands at `now_s`."""
    assert state.opened is not None
    deadline_s = state.opened_at_s + policy.deadline_s + state.extra_s
    is_over = now_s >= deadline_s
    num_nodes = len(nodes_there(state, policy))
    if state.is_cut_short:
        return Standing(policy.min_nodes, num_nodes, 0.0, now_s, "operator")
    if policy.async_buffer is not None:
        num_deltas = len(state.deltas) + len(state.carried)
        is_full = num_deltas >= policy.async_buffer and num_nodes >= policy.min_nodes
        if is_full:
            return Standing(policy.min_nodes, num_nodes, 0.0, now_s, "buffer")
        return Standing(policy.min_nodes, num_nodes, 0.0, deadline_s, "deadline" if is_over else None)
    sample = state.opened.sample
    expected = [node_id for node_id in sample if node_id in trusted] if sample else trusted
    quorum = policy.quorum(len(expected))
    grace_s, closes_s = 0.0, deadline_s
    if len(state.deltas) >= quorum:
        arrivals_s = sorted(entry.at_s for entry in state.deltas.values())
        if policy.grace_s == "auto":
            grace_s = measured_grace_s(arrivals_s, state.opened_at_s)
            until_s = arrivals_s[-1] + grace_s
        else:
            grace_s = policy.grace_s
            until_s = arrivals_s[quorum - 1] + grace_s
        closes_s = min(until_s, deadline_s)
        if all(state.accepted(node_id) is not None for node_id in expected):
            return Standing(quorum, num_nodes, grace_s, closes_s, "everyone")
        if now_s >= until_s:
            return Standing(quorum, num_nodes, grace_s, closes_s, "grace")
    return Standing(quorum, num_nodes, grace_s, closes_s, "deadline" if is_over else None)


def next_due_s(state: FederationState, policy: RoundPolicy, trusted: Collection[str], now_s: float) -> float | None:
    """Return when something will be due if nothing is now, and nothing happens until then; None if nothing will be."""
    if state.phase == Phase.SEARCHING:
        return state.proposals[-1].at_s + policy.scoring_s
    if state.phase == Phase.OPEN and state.paused_at_s is None:
        return standing(state, policy, trusted, now_s).closes_s
    return None


def nodes_there(state: FederationState, policy: RoundPolicy) -> Set[str]:
    """Return the nodes whose deltas count towards the open round's quorum: in a buffer, late ones as well."""
    if policy.async_buffer is None:
        return state.deltas.keys()
    late = [event.node_id for digest in state.carried if (event := state.late(digest)) is not None]
    return {*state.deltas, *late}


def measured_grace_s(arrivals_s: Sequence[float], opened_at_s: float) -> float:
    """Return how long to wait for a further delta, from when the others arrived (sorted, at least one).

    It is the median gap between arrivals and three times the median absolute deviation of the arrivals: the usual
    bound for outliers. After a single one, it is the time that this one took.
    """
    if len(arrivals_s) == 1:
        return max(0.0, arrivals_s[0] - opened_at_s)
    middle = median(arrivals_s)
    deviation_s = median(abs(at_s - middle) for at_s in arrivals_s)
    return 3 * deviation_s + median(later - earlier for earlier, later in pairwise(arrivals_s))


def _while_searching(state: FederationState, policy: RoundPolicy, now_s: float) -> Action:
    generation = state.generations()[-1]
    asked = [(digest, node_id) for digest in generation.digests for node_id in generation.judges]
    everyone = all(pair in state.answers for pair in asked)
    return Action.SCORE if everyone or now_s >= state.proposals[-1].at_s + policy.scoring_s else Action.WAIT
