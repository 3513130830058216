"""The round as a pure state machine: `after(state, entry)` says what an event changes; `fedmerge.policy` what is due.

    planned -> open -> sealed -> merging -> publishing -> published -> open (the next round) ...
                 |     |    ^
                 |     v    |
                 |   searching (nodes score candidate merges; once for each generation, if the plan has a search)
                 |
                 \\-> failed -> open (the same round again, when the operator restarts it)

Nothing here reads a clock or touches a disk: times come in with the ledger's entries, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fedmerge.errors import DigestMismatch
from fedmerge.events import (
    CandidatesProposed,
    CandidatesScored,
    DeltaAccepted,
    DeltaRejected,
    FederationCreated,
    KeyRotated,
    MemberAdmitted,
    MemberRevoked,
    MergeFinished,
    MergeStarted,
    MetricsReported,
    RoundFailed,
    RoundOpened,
    RoundPublished,
    RoundSealed,
)
from fedmerge.store.ledger import LedgerEntry


class Phase(StrEnum):
    """Where the current round stands."""

    PLANNED = "planned"
    OPEN = "open"
    SEALED = "sealed"
    SEARCHING = "searching"
    MERGING = "merging"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True)
class FederationState:
    """All that the ledger says, in the form that the coordinator uses it.

    `attempt` counts how often the current round was opened. `proposals` are its generations of candidates, `answers`
    the metrics statements about them that count, by candidate and node: a judge's first one before the generation was
    closed. `members` are the keys that are trusted, by id, and `predecessors` has the key that a key replaced.
    """

    created: FederationCreated | None = None
    round: int = 0
    attempt: int = 0
    phase: Phase = Phase.PLANNED
    opened: RoundOpened | None = None
    opened_at_s: float = 0.0
    deltas: Mapping[str, LedgerEntry] = field(default_factory=dict)
    sealed_hash: str = ""
    node_ids: tuple[str, ...] = ()
    proposals: tuple[LedgerEntry, ...] = ()
    answers: Mapping[tuple[str, str], str] = field(default_factory=dict)
    merges: tuple[MergeFinished, ...] = ()
    failure: str = ""
    members: Mapping[str, MemberAdmitted] = field(default_factory=dict)
    predecessors: Mapping[str, str] = field(default_factory=dict)

    def accepted(self, node_id: str) -> DeltaAccepted | None:
        """Return what the node delivered in the current round, be it under a key that this one has replaced since."""
        for key_id in self.keys_of(node_id):
            entry = self.deltas.get(key_id)
            if entry is not None and isinstance(entry.event, DeltaAccepted):
                return entry.event
        return None

    def keys_of(self, node_id: str) -> set[str]:
        """Return a key and those that it replaced, one after the other, by id."""
        found = {node_id}
        while node_id in self.predecessors:
            node_id = self.predecessors[node_id]
            found.add(node_id)
        return found

    def generations(self) -> list[CandidatesProposed]:
        """Return the round's generations of candidates so far."""
        return [entry.event for entry in self.proposals if isinstance(entry.event, CandidatesProposed)]


_LEGAL: dict[type, set[Phase]] = {
    FederationCreated: {Phase.PLANNED},
    RoundOpened: {Phase.PLANNED, Phase.PUBLISHED, Phase.FAILED},
    DeltaAccepted: {Phase.OPEN},
    DeltaRejected: {Phase.OPEN},
    RoundSealed: {Phase.OPEN},
    CandidatesProposed: {Phase.SEALED},
    CandidatesScored: {Phase.SEARCHING},
    MergeStarted: {Phase.SEALED},
    MergeFinished: {Phase.MERGING},
    RoundPublished: {Phase.PUBLISHING},
    RoundFailed: {Phase.OPEN, Phase.SEALED, Phase.MERGING},
    MetricsReported: set(Phase),
    MemberAdmitted: set(Phase),
    MemberRevoked: set(Phase),
    KeyRotated: set(Phase),
}


def after(state: FederationState, entry: LedgerEntry) -> FederationState:
    """Return the state once `entry` has happened.

    Raises `DigestMismatch` when the event can't happen in this state: then no coordinator wrote this ledger.
    """
    event = entry.event
    if state.phase not in _LEGAL[type(event)]:
        raise DigestMismatch(f"ledger event {entry.number}: {event.kind} can't happen while the round is {state.phase}")
    match event:
        case FederationCreated():
            return replace(state, created=event)
        case RoundOpened():
            return replace(
                state,
                round=event.round,
                attempt=state.attempt + 1 if event.round == state.round else 1,
                phase=Phase.OPEN,
                opened=event,
                opened_at_s=entry.at_s,
                deltas={},
                node_ids=(),
                sealed_hash="",
                proposals=(),
                answers={},
                failure="",
            )
        case DeltaAccepted():
            return replace(state, deltas={**state.deltas, event.node_id: entry})
        case RoundSealed():
            return replace(state, phase=Phase.SEALED, node_ids=tuple(event.node_ids), sealed_hash=entry.hash)
        case CandidatesProposed():
            return replace(state, phase=Phase.SEARCHING, proposals=(*state.proposals, entry))
        case CandidatesScored():
            return replace(state, phase=Phase.SEALED)
        case MetricsReported():
            return _with_answer(state, event)
        case MemberAdmitted():
            return replace(state, members={**state.members, event.node_id: event})
        case MemberRevoked():
            return _without_member(state, event.node_id)
        case KeyRotated():
            members = {key_id: member for key_id, member in state.members.items() if key_id != event.node_id}
            predecessors = {**state.predecessors, event.new_node_id: event.node_id}
            return replace(state, members=members, predecessors=predecessors)
        case MergeStarted():
            return replace(state, phase=Phase.MERGING)
        case MergeFinished():
            return replace(state, phase=Phase.PUBLISHING, merges=(*state.merges, event))
        case RoundPublished():
            return replace(state, phase=Phase.PUBLISHED)
        case RoundFailed():
            return replace(state, phase=Phase.FAILED, failure=event.reason)
        case DeltaRejected():
            return state


def _without_member(state: FederationState, node_id: str) -> FederationState:
    """Forget a revoked key, with what it delivered under this key or an earlier one to a round that can do without."""
    revoked = state.keys_of(node_id)
    state = replace(state, members={key_id: each for key_id, each in state.members.items() if key_id not in revoked})
    if state.phase == Phase.OPEN:
        kept = {key_id: entry for key_id, entry in state.deltas.items() if key_id not in revoked}
        return replace(state, deltas=kept)
    if state.phase == Phase.SEALED and not state.proposals:
        return replace(state, node_ids=tuple(key_id for key_id in state.node_ids if key_id not in revoked))
    return state


def _with_answer(state: FederationState, event: MetricsReported) -> FederationState:
    generation = state.generations()[-1] if state.phase == Phase.SEARCHING else None
    if (
        generation is None
        or event.candidate not in generation.digests
        or event.node_id not in generation.judges
        or (event.candidate, event.node_id) in state.answers
    ):
        return state
    return replace(state, answers={**state.answers, (event.candidate, event.node_id): event.envelope})


def replay(entries: Iterable[LedgerEntry]) -> FederationState:
    """Return the state that a ledger adds up to."""
    state = FederationState()
    for entry in entries:
        state = after(state, entry)
    return state
